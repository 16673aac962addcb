"""Batch normalization in eager torch: the oracle that every other kernel is held against.

Any device, any rank of at least two, any floating dtype, differentiable to any order. It computes
in float64 (float32 on devices without it) and rounds once, at the end. It is written to be read and
to be right, not to be fast. The formulas are derived in ``docs/derivation.md``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from batchnorm.kernels.contract import Gradients, statistics_dtype
from batchnorm.moments import Moments

# torch adds up fewer values than this on one thread.
BLOCK = 16384


def refusal(x: Tensor) -> str | None:
    """Nothing is refused."""
    return None


def moments(x: Float[Tensor, "n c *spatial"]) -> Moments:
    r"""Mean and biased variance of each channel, in two passes.

    :math:`\mu = \frac1n \sum x`, then with :math:`d = x - \mu`:
    :math:`\sigma^2 = \frac1n \left(\sum d^2 - \frac1n (\sum d)^2\right)`. The second term is what
    the rounding of :math:`\mu` left over. The values are added up in one order, whatever the memory
    layout and the number of threads.

    Returns:
        Moments in float64 (float32 on a device without it).

    Source:
        Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance", eq. 1.7.
    """
    rows = x.movedim(1, 0).reshape(x.shape[1], -1)
    rows = rows.to(statistics_dtype(x), memory_format=torch.contiguous_format)
    count = rows.shape[1]
    mean = _row_sums(rows) / count
    deviation = rows - mean[:, None]
    rest = _row_sums(deviation) / count
    var = _row_sums(deviation.square()) / count - rest.square()
    return Moments(count, mean + rest, var.clamp_min(0))


def normalize(
    x: Float[Tensor, "n c *spatial"],
    mean: Float[Tensor, " c"],
    inv_std: Float[Tensor, " c"],
    weight: Float[Tensor, " c"] | None,
    bias: Float[Tensor, " c"] | None,
    residual: Float[Tensor, "n c *spatial"] | None = None,
    *,
    relu: bool = False,
) -> Float[Tensor, "n c *spatial"]:
    r""":math:`y = (x - \mu)\,\sigma^{-1} \gamma + \beta + r`, then ReLU; in x's dtype."""
    y = _x_hat(x, mean, inv_std)
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
    inv_std: Float[Tensor, " c"],
    output: Float[Tensor, "n c *spatial"] | None = None,
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    r""":math:`\sum g` and :math:`\sum g\,\hat x` of each channel, summed in float64."""
    grad = _behind_relu(grad_output, output).to(statistics_dtype(x))
    x_hat = _x_hat(x, mean, inv_std)
    return _channel_sums(grad), _channel_sums(grad * x_hat)


def grad_input(
    grad_output: Float[Tensor, "n c *spatial"],
    x: Float[Tensor, "n c *spatial"],
    mean: Float[Tensor, " c"],
    inv_std: Float[Tensor, " c"],
    weight: Float[Tensor, " c"] | None,
    sum_grad: Float[Tensor, " c"],
    sum_grad_x_hat: Float[Tensor, " c"],
    output: Float[Tensor, "n c *spatial"] | None = None,
) -> tuple[Float[Tensor, "n c *spatial"], Float[Tensor, "n c *spatial"] | None]:
    r"""The chain rule through the batch's own mean and variance.

    :math:`\frac{\partial L}{\partial x} = \gamma\,\sigma^{-1}
    \left(g - \frac1n \sum g - \hat x\,\frac1n \sum g\,\hat x\right)`

    Returns:
        The gradient of ``x``, and with a fused ReLU the gradient of ``residual`` (else None: it is
        ``grad_output``).
    """
    count = x.numel() // x.shape[1]
    grad = _behind_relu(grad_output, output)
    x_hat = _x_hat(x, mean, inv_std)
    centred = grad.to(x_hat.dtype) - _along_channels(sum_grad / count, x)
    centred = centred - x_hat * _along_channels(sum_grad_x_hat / count, x)
    scale = inv_std if weight is None else inv_std * weight
    return (centred * _along_channels(scale, x)).to(x.dtype), None if output is None else grad


def forward(
    x: Float[Tensor, "n c *spatial"],
    weight: Float[Tensor, " c"] | None,
    bias: Float[Tensor, " c"] | None,
    eps: float,
    residual: Float[Tensor, "n c *spatial"] | None = None,
    *,
    relu: bool = False,
) -> tuple[Float[Tensor, "n c *spatial"], Moments]:
    """`moments`, then `normalize` by them."""
    batch = moments(x)
    inv_std = (batch.var + eps).rsqrt()
    return normalize(x, batch.mean, inv_std, weight, bias, residual, relu=relu), batch


def backward(
    grad_output: Float[Tensor, "n c *spatial"],
    x: Float[Tensor, "n c *spatial"],
    mean: Float[Tensor, " c"],
    inv_std: Float[Tensor, " c"],
    weight: Float[Tensor, " c"] | None,
    output: Float[Tensor, "n c *spatial"] | None = None,
) -> Gradients:
    """`grad_sums`, then `grad_input` by them."""
    sum_grad, sum_grad_x_hat = grad_sums(grad_output, x, mean, inv_std, output)
    grad_x, grad_residual = grad_input(
        grad_output, x, mean, inv_std, weight, sum_grad, sum_grad_x_hat, output
    )
    return Gradients(grad_x, sum_grad_x_hat, sum_grad, grad_residual)


def _x_hat(x: Tensor, mean: Tensor, inv_std: Tensor) -> Tensor:
    return (x.to(mean.dtype) - _along_channels(mean, x)) * _along_channels(inv_std, x)


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def _behind_relu(grad_output: Tensor, output: Tensor | None) -> Tensor:
    return grad_output if output is None else grad_output.masked_fill(output <= 0, 0)


def _channel_sums(values: Tensor) -> Tensor:
    return _row_sums(values.movedim(1, 0).reshape(values.shape[1], -1).contiguous())


def _row_sums(rows: Float[Tensor, "c values"]) -> Float[Tensor, " c"]:
    """Sums of rows, the same to the last bit for any number of threads.

    torch splits a sum over its threads only where there is one result, that is one channel. That
    one is added up in blocks, each on one thread.
    """
    if rows.shape[0] != 1 or rows.shape[1] <= BLOCK:
        return rows.sum(1)
    padding = -rows.shape[1] % BLOCK
    return F.pad(rows, (0, padding)).reshape(-1, BLOCK).sum(1).sum(0, keepdim=True)
