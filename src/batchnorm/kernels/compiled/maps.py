"""Operations on one vector at ``[r, k]``, which may belong to one channel or to many.

Coefficients are vectors. Sums leave out the first ``skip`` places, which belong to the vector
before. Like everything in `batchnorm.kernels.compiled.vectors`, all of this works on single numbers
as well. Where a residual or a mask is None, nothing is compiled for it: Numba sees that an argument
is None, but not that a field is; so the functions that test for it take the array itself.

`normalize` and `_grad_before_relu` must compute the same ``y`` to the last bit, or the gradient
would pass a ReLU where the output was cut.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from batchnorm.kernels.compiled.gates import store_passes, where_passed, where_positive, zero_first
from batchnorm.kernels.compiled.numba_internals import inlined
from batchnorm.kernels.compiled.vectors import load, multiply_add, rounded, store


class Tensors(NamedTuple):
    """The tensors of a call as matrices. Those that a pass does not have are never touched."""

    x: Any
    residual: Any
    y: Any
    mask: Any
    grad: Any
    grad_x: Any
    grad_before_relu: Any


class ForwardOptions(NamedTuple):
    """Options of `normalize`.

    Attributes:
        relu: Apply a ReLU.
        writes_mask: Write its mask.
        streamed: Write ``y`` past the caches.
    """

    relu: bool
    writes_mask: bool
    streamed: bool


class BackwardOptions(NamedTuple):
    """Options of `add_grads` and `grad_input`.

    Attributes:
        gated: A ReLU is fused and has no mask: find its sign again from ``x``.
        fixed: Mean and variance are constants.
        streamed: Write the result past the caches.
    """

    gated: bool
    fixed: bool
    streamed: bool


@inlined
def add_deviation(x, r, k, skip, center, sums, zero):
    """Adds ``x - center`` and its square to two sums."""
    linear, squares = sums
    d = zero_first(skip, load(x, r, k, zero) - center, zero)
    return linear + d, multiply_add(d, d, squares)


@inlined
def _affine(element, c):
    return multiply_add(element - c.center, c.scale, c.offset)


@inlined
def normalize(tensors, options, r, k, skip, c, zero):
    """Writes ``y = (x - center) * scale + offset + residual``, then ReLU, which passes NaN."""
    value = _affine(load(tensors.x, r, k, zero), c)
    value = _add_residual(value, tensors.residual, r, k, zero)
    if options.relu:
        value = where_positive(value, value, zero)
    store(tensors.y, r, k, value, options.streamed)
    if options.writes_mask:
        _store_passes(tensors.mask, r, k, skip, rounded(value, tensors.y), zero)


@inlined
def _add_residual(value, residual, r, k, zero):
    if residual is not None:
        return value + load(residual, r, k, zero)
    return value


@inlined
def _store_passes(mask, r, k, skip, y, zero):
    if mask is not None:
        store_passes(mask, r, k, skip, y, zero)


@inlined
def _grad_before_relu(tensors, options, r, k, element, c, zero):
    """The gradient before the ReLU: passed by the mask, or by the sign of ``y``, or as it is."""
    grad = _where_passed(tensors.mask, r, k, load(tensors.grad, r, k, zero), zero)
    if options.gated:
        y = rounded(_affine(element, c), tensors.x)
        return where_positive(y, grad, zero)
    return grad


@inlined
def _where_passed(mask, r, k, grad, zero):
    if mask is not None:
        return where_passed(mask, r, k, grad, zero)
    return grad


@inlined
def add_grads(tensors, options, r, k, skip, c, sums, zero):
    """Adds the gradient before the ReLU, and its product with ``x_hat``, to two sums.

    With a mask, it also writes that gradient, which is the residual's, to ``grad_before_relu``.
    """
    sum_grad, sum_grad_x_hat = sums
    element = load(tensors.x, r, k, zero)
    grad = _grad_before_relu(tensors, options, r, k, element, c, zero)
    _store_masked(tensors.mask, tensors.grad_before_relu, r, k, grad, options)
    grad = zero_first(skip, grad, zero)
    x_hat = (element - c.center) * c.inv_std
    return sum_grad + grad, multiply_add(grad, x_hat, sum_grad_x_hat)


@inlined
def _store_masked(mask, grad_before_relu, r, k, grad, options):
    if mask is not None:
        store(grad_before_relu, r, k, grad, options.streamed)


@inlined
def grad_input(tensors, options, r, k, c, zero):
    """Writes ``grad_x = scale * grad + x_hat_factor * x_hat + constant``.

    If the statistics are fixed, it is the first term alone.
    """
    element = load(tensors.x, r, k, zero)
    grad = _grad_before_relu(tensors, options, r, k, element, c, zero)
    if options.fixed:
        value = c.scale * grad
    else:
        x_hat = (element - c.center) * c.inv_std
        value = multiply_add(c.scale, grad, multiply_add(x_hat, c.x_hat_factor, c.constant))
    store(tensors.grad_x, r, k, value, options.streamed)
