"""The loops of the Numba kernels: Python on NumPy arrays, compiled when first used.

Read upwards: `elements`, `vectors`, `gates`, `maps` (one vector); `rows` and `stripes` (one row);
`planes` and `columns` (a whole tensor); `passes` (the kernels). Beside them, `channel_sums` and
`coefficients` compute per channel, between the loops; `task` describes a call, `plans` spreads it
over threads, `compiling` and `storage` turn a kernel into machine code. Tensors come
in as addresses.
"""
