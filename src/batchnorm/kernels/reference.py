"""Batch normalization in eager torch: the oracle that tests compare every other backend with.

It takes any device, any rank of at least two and any floating dtype, and is differentiable to any
order. It computes in float64 (float32 on devices without it) and rounds once, at the end. It is
written to be read and to be right, not to be fast. ``docs/derivation.md`` derives the formulas.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from batchnorm.kernels import geometry
from batchnorm.kernels.contract import Gradients, ReluGate, Running, statistics_dtype
from batchnorm.moments import Moments

# torch adds up to this many values on one thread; it splits a longer sum over its threads.
BLOCK = 16384


def refusal(x: Tensor) -> str | None:
    """Returns None: the reference takes every input."""
    return None


def moments(x: Float[Tensor, "n c *spatial"]) -> Moments:
    r"""Computes mean and biased variance of each channel, in two passes.

    :math:`\mu = \frac1n \sum x`, then with :math:`d = x - \mu`:
    :math:`\sigma^2 = \frac1n \left(\sum d^2 - \frac1n (\sum d)^2\right)`. The second term corrects
    the rounding of :math:`\mu`. The order of the additions does not depend on the memory layout or
    the number of threads.

    Returns:
        Moments in float64 (float32 on a device without it).

    Source:
        Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance", eq. 1.7.
    """
    rows = x.movedim(1, 0).reshape(x.shape[1], -1)
    rows = rows.to(statistics_dtype(x.device), memory_format=torch.contiguous_format)
    count = rows.shape[1]
    mean = _row_sums(rows) / count
    deviation = rows - mean[:, None]
    rest = _row_sums(deviation) / count
    var = _row_sums(deviation.square()) / count - rest.square()
    return Moments(count, mean + rest, var.clamp_min(0))


def normalize(
    x: Float[Tensor, "n c *spatial"],
    mean: Float[Tensor, " c"],
    var: Float[Tensor, " c"],
    eps: float,
    weight: Float[Tensor, " c"] | None,
    bias: Float[Tensor, " c"] | None,
    residual: Float[Tensor, "n c *spatial"] | None = None,
    *,
    relu: bool = False,
) -> tuple[Float[Tensor, "n c *spatial"], UInt8[Tensor, " bytes"] | None]:
    """Computes `formula`, and with a residual and a ReLU also the mask."""
    mean, var = mean.to(statistics_dtype(x.device)), var.to(statistics_dtype(x.device))
    y = formula(x, mean, var, eps, weight, bias, residual, relu=relu)
    return y, geometry.pack(_passes(y), x) if relu and residual is not None else None


def formula(
    x: Float[Tensor, "n c *spatial"],
    mean: Float[Tensor, " c"],
    var: Float[Tensor, " c"],
    eps: float,
    weight: Float[Tensor, " c"] | None,
    bias: Float[Tensor, " c"] | None,
    residual: Float[Tensor, "n c *spatial"] | None = None,
    *,
    relu: bool = False,
) -> Float[Tensor, "n c *spatial"]:
    r"""Computes :math:`y = (x - \mu) / \sqrt{\sigma^2 + \epsilon}\,\gamma + \beta + r`, then ReLU.

    The result has x's dtype. It is differentiable, so it needs no mask.
    """
    y = _x_hat(x, mean, var, eps)
    if weight is not None:
        y = y * _along_channels(weight, x)
    if bias is not None:
        y = y + _along_channels(bias, x)
    if residual is not None:
        y = y + residual
    return (y.relu() if relu else y).to(x.dtype)


def grad_sums(
    grad_output: Float[Tensor, "n c *spatial"],
    x: Float[Tensor, "n c *spatial"],
    mean: Float[Tensor, " c"],
    var: Float[Tensor, " c"],
    eps: float,
    weight: Float[Tensor, " c"] | None,
    gate: ReluGate | None = None,
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    r"""Computes :math:`\sum g` and :math:`\sum g\,\hat x` of each channel, in float64."""
    grad = _grad_before_relu(grad_output, x, mean, var, eps, weight, gate)
    return _grad_sums(grad, _x_hat(x, mean, var, eps))


def grad_input(
    grad_output: Float[Tensor, "n c *spatial"],
    x: Float[Tensor, "n c *spatial"],
    mean: Float[Tensor, " c"],
    var: Float[Tensor, " c"],
    eps: float,
    weight: Float[Tensor, " c"] | None,
    mean_grad: Float[Tensor, " c"],
    mean_grad_x_hat: Float[Tensor, " c"],
    gate: ReluGate | None = None,
) -> tuple[Float[Tensor, "n c *spatial"], Float[Tensor, "n c *spatial"] | None]:
    r"""Applies the chain rule through the mean and variance of the pool.

    With the means :math:`\overline{g}` and :math:`\overline{g \hat x}` over the pool,
    :math:`\frac{\partial L}{\partial x} = \gamma\,\sigma^{-1}
    \left(g - \overline{g} - \hat x\,\overline{g \hat x}\right)`.

    Returns:
        The gradient of ``x``, and with a mask the gradient of ``residual`` (else None).
    """
    grad = _grad_before_relu(grad_output, x, mean, var, eps, weight, gate)
    x_hat, scale = _x_hat(x, mean, var, eps), _scale(var, eps, weight)
    grad_x = _grad_input(grad, x, x_hat, scale, mean_grad, mean_grad_x_hat)
    return grad_x, None if gate is None or gate.mask is None else grad


def forward(
    x: Float[Tensor, "n c *spatial"],
    weight: Float[Tensor, " c"] | None,
    bias: Float[Tensor, " c"] | None,
    eps: float,
    residual: Float[Tensor, "n c *spatial"] | None = None,
    *,
    relu: bool = False,
    running: Running | None = None,
) -> tuple[Float[Tensor, "n c *spatial"], Moments, UInt8[Tensor, " bytes"] | None]:
    """Composes `moments` and `normalize`; it leaves ``running`` to the caller."""
    batch = moments(x)
    y, mask = normalize(x, batch.mean, batch.var, eps, weight, bias, residual, relu=relu)
    return y, batch, mask


def backward(
    grad_output: Float[Tensor, "n c *spatial"],
    x: Float[Tensor, "n c *spatial"],
    mean: Float[Tensor, " c"],
    var: Float[Tensor, " c"],
    eps: float,
    weight: Float[Tensor, " c"] | None,
    gate: ReluGate | None = None,
    *,
    fixed: bool = False,
) -> Gradients:
    """Composes `grad_sums` and `grad_input`; if ``fixed``, the gradient of x is only scaled."""
    grad = _grad_before_relu(grad_output, x, mean, var, eps, weight, gate)
    x_hat, scale = _x_hat(x, mean, var, eps), _scale(var, eps, weight)
    sum_grad, sum_grad_x_hat = _grad_sums(grad, x_hat)
    if fixed:
        grad_x = (grad * _along_channels(scale, x)).to(x.dtype)
    else:
        count = x.numel() // x.shape[1]
        grad_x = _grad_input(grad, x, x_hat, scale, sum_grad / count, sum_grad_x_hat / count)
    masked = gate is not None and gate.mask is not None
    return Gradients(grad_x, sum_grad_x_hat, sum_grad, grad if masked else None)


def _x_hat(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    inv_std = (var + eps).rsqrt()
    return (x.to(mean.dtype) - _along_channels(mean, x)) * _along_channels(inv_std, x)


def _scale(var: Tensor, eps: float, weight: Tensor | None) -> Tensor:
    inv_std = (var + eps).rsqrt()
    return inv_std if weight is None else inv_std * weight


def _passes(y: Tensor) -> Tensor:
    """Marks the elements that ReLU passes, NaN among them. The marks are not differentiable."""
    return (y.detach() <= 0).logical_not()


def _grad_before_relu(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    gate: ReluGate | None,
) -> Tensor:
    if gate is None:
        return grad_output
    if gate.mask is not None:
        passes = geometry.unpack(gate.mask, x)
    else:
        with torch.no_grad():
            passes = _passes(formula(x, mean, var, eps, weight, gate.bias))
    return grad_output.masked_fill(passes.logical_not(), 0)


def _grad_sums(grad: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.to(x_hat.dtype)
    return _channel_sums(grad), _channel_sums(grad * x_hat)


def _grad_input(
    grad: Tensor,
    x: Tensor,
    x_hat: Tensor,
    scale: Tensor,
    mean_grad: Tensor,
    mean_grad_x_hat: Tensor,
) -> Tensor:
    mean_grad, mean_grad_x_hat, scale = (
        _along_channels(vector, x) for vector in (mean_grad, mean_grad_x_hat, scale)
    )
    centered = grad.to(x_hat.dtype) - mean_grad - x_hat * mean_grad_x_hat
    return (centered * scale).to(x.dtype)


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def _channel_sums(values: Tensor) -> Tensor:
    return _row_sums(values.movedim(1, 0).reshape(values.shape[1], -1).contiguous())


def _row_sums(rows: Float[Tensor, "c values"]) -> Float[Tensor, " c"]:
    """Sums rows, to the same bits for any number of threads.

    torch splits a sum over its threads only where there is one result, that is one channel. So the
    sum of a single channel is taken in blocks, each on one thread.
    """
    if rows.shape[0] != 1 or rows.shape[1] <= BLOCK:
        return rows.sum(1)
    padding = -rows.shape[1] % BLOCK
    return F.pad(rows, (0, padding)).reshape(-1, BLOCK).sum(1).sum(0, keepdim=True)
