"""How large the terms of a result are: what its rounding is measured against."""

import torch


def along(values, x):
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def channel_max(values):
    return values.abs().amax([d for d in range(values.dim()) if d != 1])


def scales(arguments, training, eps=1e-5):
    """By name of a result, the size of its terms in each channel."""
    wide = arguments.widened()
    x = wide.x.detach()
    dims = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(dims) if training else wide.running_mean
    var = x.var(dims, correction=0) if training else wide.running_var
    inv_std = (var.detach() + eps).rsqrt()
    x_hat = (x - along(mean.detach(), x)) * along(inv_std, x)
    one = torch.ones_like(inv_std)
    weight = one if wide.weight is None else wide.weight.detach().abs()
    bias = 0 * one if wide.bias is None else wide.bias.detach().abs()
    residual = 0 * one if wide.residual is None else channel_max(wide.residual.detach())
    grad = wide.grad_output.abs()
    plain, product = grad.sum(dims), (grad * x_hat.abs()).sum(dims)
    far = 1 + mean.detach().abs() * inv_std if arguments.x.dtype == torch.float64 else one
    return {
        "y": far * (channel_max(x_hat) * weight + bias + residual),
        "x": far * weight * inv_std * channel_max(grad) * (1 + channel_max(x_hat).square()),
        "weight": far * product,
        "bias": plain,
        "residual": channel_max(grad),
        "mean": 1 + mean.detach().abs(),
        "var": 1 + var.detach().abs(),
    }


def assert_close_for(scale, got, exact, name, steps=8):
    """``got`` is the exact result, but for ``steps`` roundings of its terms and one of itself."""
    eps = torch.finfo(got.dtype).eps
    work = max(eps, 2**-53) if got.dtype == torch.float64 else 2**-23
    size = scale if got.dim() == 1 else along(scale, got)
    allowed = steps * work * size + eps * exact.abs()
    error = (got.double() - exact).abs()
    assert (error <= allowed).all(), f"{name}: {(error / allowed).max().item():.1f} times too far"
