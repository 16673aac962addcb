"""One run of contiguous elements: what the kernels do with a row that lies in the L1 cache.

``centre``, ``scale`` and the other coefficients are numbers where the whole row belongs to one
channel, and arrays of one number an element where it runs across channels.

No product is fused with a sum in `normalize` and in `_behind_relu`: both must compute the same
``y`` to the last bit, or the gradient of ReLU would pass where the output was cut.
"""

from __future__ import annotations

from numba import njit

from batchnorm.kernels.compiled.elements import at, minus, narrow, number_like, widen

REORDERED = {"reassoc", "nsz", "contract"}


@njit(fastmath=REORDERED)
def total(x):
    """Sum of a row."""
    result = number_like(x, 0)
    for j in range(x.size):
        result += widen(x[j])
    return result


@njit(fastmath=REORDERED)
def deviations(x, centre):
    """Sums of ``x - centre`` and of its square."""
    linear, squares = number_like(x, 0), number_like(x, 0)
    for j in range(x.size):
        d = minus(widen(x[j]), centre)
        linear += d
        squares += d * d
    return linear, squares


@njit
def normalize(x, y, centre, scale, shift, residual, relu):
    """``y = (x - centre) * scale + shift + residual``, then ReLU, which lets NaN through."""
    zero = number_like(x, 0)
    for j in range(x.size):
        value = minus(widen(x[j]), at(centre, j)) * at(scale, j) + at(shift, j)
        if residual is not None:
            value += widen(residual[j])
        if relu and value <= zero:
            value = zero
        y[j] = narrow(value, y)


@njit
def _behind_relu(grad, element, row, centre, scale, offset, j):
    """The gradient where ReLU let the output through, zero elsewhere."""
    g = widen(grad)
    if offset is not None:
        y = narrow(minus(widen(element), centre) * scale + at(offset, j), row)
        if widen(y) <= number_like(row, 0):
            return number_like(row, 0)
    return g


@njit
def pack(y, bits):
    """One bit an element: whether ReLU let it through."""
    zero = number_like(y, 0)
    whole = y.size // 8
    for k in range(whole):
        byte = 0
        for j in range(8):
            byte |= int(not widen(y[8 * k + j]) <= zero) << j
        bits[k] = byte
    if 8 * whole < y.size:
        byte = 0
        for j in range(y.size - 8 * whole):
            byte |= int(not widen(y[8 * whole + j]) <= zero) << j
        bits[whole] = byte


@njit
def unpack(grad, bits, behind):
    """``behind = grad`` where the bit is set, else zero."""
    zero = behind.dtype.type(0)
    whole = grad.size // 8
    for k in range(whole):
        byte = bits[k]
        for j in range(8):
            behind[8 * k + j] = grad[8 * k + j] if (byte >> j) & 1 else zero
    for j in range(8 * whole, grad.size):
        behind[j] = grad[j] if (bits[whole] >> (j - 8 * whole)) & 1 else zero


@njit(fastmath=REORDERED)
def grad_sums(grad, x, centre, inv_std, scale, offset):
    """Sums of the gradient and of its product with ``x_hat``; ``offset`` as in `grad_input`."""
    plain, product = number_like(x, 0), number_like(x, 0)
    for j in range(x.size):
        g = _behind_relu(grad[j], x[j], x, centre, scale, offset, j)
        plain += g
        product += g * (minus(widen(x[j]), centre) * inv_std)
    return plain, product


@njit
def grad_input(fixed, grad, x, result, centre, inv_std, scale, tilt, level, offset):
    """``result = scale * grad + tilt * x_hat + level``, or ``scale * grad`` if ``fixed``.

    ``offset`` is None unless ReLU's decision has to be found again from ``x``.
    """
    if fixed:
        for j in range(x.size):
            g = _behind_relu(grad[j], x[j], x, at(centre, j), at(scale, j), offset, j)
            result[j] = narrow(at(scale, j) * g, result)
    else:
        for j in range(x.size):
            g = _behind_relu(grad[j], x[j], x, at(centre, j), at(scale, j), offset, j)
            x_hat = minus(widen(x[j]), at(centre, j)) * at(inv_std, j)
            result[j] = narrow(at(scale, j) * g + at(tilt, j) * x_hat + at(level, j), result)
