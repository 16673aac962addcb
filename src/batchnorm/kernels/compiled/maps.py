"""What is done to one vector at ``[r, k]``, whether it belongs to one channel or to many.

``numbers`` are the coefficients that `batchnorm.kernels.compiled.statistics` prepares, as vectors.
Sums leave out the first ``skip`` places, which belong to the vector before. Like everything in
`batchnorm.kernels.compiled.vectors`, all of this works on single numbers as well.

A mask and a residual may be None, and what is done with them is then not compiled.

`normalize` and `_gradient` compute the same ``y`` to the last bit, or the gradient of ReLU would
pass where the output was cut.
"""

from __future__ import annotations

from numba import njit

from batchnorm.kernels.compiled.gates import beyond, store_passes, where_passed, where_positive
from batchnorm.kernels.compiled.vectors import fused, load, rounded, store


@njit(forceinline=True)
def add_deviation(x, r, k, skip, centre, sums, zero):
    """Adds ``x - centre`` and its square to two sums."""
    linear, squares = sums
    d = beyond(skip, load(x, r, k, zero) - centre, zero)
    return linear + d, fused(d, d, squares)


@njit(forceinline=True)
def _affine(element, centre, scale, offset):
    return fused(element - centre, scale, offset)


@njit(forceinline=True)
def normalize(x, residual, y, mask, options, r, k, skip, numbers, zero):
    """``y = (x - centre) * scale + offset + residual``, then ReLU, which lets NaN through.

    ``options`` are whether there is a ReLU, whether its mask is wanted, and whether ``y`` is
    streamed.
    """
    relu, masked, streamed = options
    centre, scale, offset = numbers
    value = _affine(load(x, r, k, zero), centre, scale, offset)
    if residual is not None:
        value = value + load(residual, r, k, zero)
    if relu:
        value = where_positive(value, value, zero)
    store(y, r, k, value, streamed)
    if mask is not None and masked:
        store_passes(mask, r, k, skip, rounded(value, y), zero)


@njit(forceinline=True)
def _gradient(gated, g, element, like, centre, scale, offset, zero):
    """The gradient behind the ReLU, whose decision is found again from ``element`` if ``gated``."""
    if gated:
        y = rounded(_affine(element, centre, scale, offset), like)
        return where_positive(y, g, zero)
    return g


@njit(forceinline=True)
def add_grads(grad, x, mask, behind_relu, options, r, k, skip, numbers, sums, zero):
    """Adds the gradient, and its product with ``x_hat``, to two sums.

    With a mask, the gradient behind the ReLU is written to ``behind_relu``. ``options`` are whether
    the gradient is gated by ``x`` and whether ``behind_relu`` is streamed.
    """
    gated, streamed = options
    centre, inv_std, scale, offset = numbers
    plain, product = sums
    g, element = load(grad, r, k, zero), load(x, r, k, zero)
    if mask is not None:
        g = where_passed(mask, r, k, g, zero)
        store(behind_relu, r, k, g, streamed)
    g = beyond(skip, _gradient(gated, g, element, x, centre, scale, offset, zero), zero)
    return plain + g, fused(g, (element - centre) * inv_std, product)


@njit(forceinline=True)
def grad_input(grad, x, mask, result, options, r, k, numbers, zero):
    """``result = scale * grad + tilt * x_hat + level``, or just ``scale * grad`` if ``fixed``.

    ``options`` are whether statistics are fixed, the gradient is gated by ``x``, the result
    streamed.
    """
    fixed, gated, streamed = options
    centre, inv_std, scale, offset, tilt, level = numbers
    element = load(x, r, k, zero)
    g = load(grad, r, k, zero)
    if mask is not None:
        g = where_passed(mask, r, k, g, zero)
    g = _gradient(gated, g, element, x, centre, scale, offset, zero)
    if fixed:
        value = scale * g
    else:
        value = fused(scale, g, fused((element - centre) * inv_std, tilt, level))
    store(result, r, k, value, streamed)
