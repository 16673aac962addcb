"""The loops of the Numba kernels: plain Python on NumPy arrays, compiled when first used."""
