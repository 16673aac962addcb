"""Batch norm one step at a time: every intermediate result of d2l's `batch_norm`, as plain data.

The names and conventions are d2l's: `momentum` is the weight of the *old* moving value, and
`moving_var` averages the biased variance.
"""

from dataclasses import replace

import torch
from torch import Tensor

from batchnorm.learn.inference import infer
from batchnorm.learn.step import Layer, Step
from batchnorm.learn.training import train

__all__ = ["Step", "walkthrough"]


def walkthrough(
    X: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    moving_mean: Tensor | None = None,
    moving_var: Tensor | None = None,
    eps: float = 1e-5,
    momentum: float = 0.9,
    prediction: Tensor | None = None,
) -> list[Step]:
    """Go through batch norm step by step: training on X, then inference in both ways.

    Training: the mean one axis at a time, the variance, x̂ = (x - μ) / √(σ² + ε), y = γ·x̂ + β, and
    the update of the moving statistics. Inference: with the moving statistics, with the statistics
    of the data to predict, and, if these are several examples, with the first one's alone.

    Args:
        X: A mini-batch, float32 or float64, of 2 to 5 axes: (N, C), (N, C, L), (N, C, H, W) or
            (N, C, D, H, W), with more than one value per channel.
        gamma: Scale, one number per channel, shape (C,) or (1, C, 1, ...). Ones if left out.
        beta: Shift, shaped like `gamma`. Zeros if left out.
        moving_mean: The moving mean so far, shaped like `gamma`. Zeros if left out.
        moving_var: The moving (biased) variance so far, shaped like `gamma`. Ones if left out.
        eps: What is added to the variance, above 0.
        momentum: Weight of the old moving value, 0 to 1. `torch.nn.BatchNorm2d` takes the weight
            of the new one instead, 1 - momentum.
        prediction: The data to predict, with the axes and channels of X; X itself if left out, so
            that the outputs can be compared.

    Returns:
        The steps in order, computed in the dtype of X, without gradients. Nothing that came in is
        changed.

    Raises:
        TypeError: If X or another argument that should be a tensor is not one.
        ValueError: If a shape, a dtype or a value does not fit; the sentence says which.
    """
    _check_data("X", X)
    if X.numel() == X.shape[1]:
        raise ValueError(
            "walkthrough: training needs more than one value per channel, got X of shape "
            f"{tuple(X.shape)}; add examples."
        )
    _check_numbers(eps, momentum)
    if prediction is None:
        prediction = X
    _check_data("prediction", prediction)
    if prediction.dim() != X.dim() or prediction.shape[1] != X.shape[1]:
        raise ValueError(
            f"walkthrough: prediction needs the axes and channels of X, shape {tuple(X.shape)}, "
            f"got shape {tuple(prediction.shape)}."
        )
    layer = Layer(
        gamma=_per_channel("gamma", gamma, 1.0, X),
        beta=_per_channel("beta", beta, 0.0, X),
        moving_mean=_per_channel("moving_mean", moving_mean, 0.0, X),
        moving_var=_per_channel("moving_var", moving_var, 1.0, X),
        eps=eps,
        momentum=momentum,
    )
    if (layer.moving_var < 0).any():
        raise ValueError(
            "walkthrough: moving_var must not be negative, got "
            f"{layer.moving_var.min().item():g}; pass variances, not means."
        )
    training = train(X.detach().clone(), layer)
    results = {step.name: step.value for step in training}
    trained = replace(layer, moving_mean=results["moving_mean"], moving_var=results["moving_var"])
    return [*training, *infer(prediction.detach().to(X).clone(), trained)]


def _check_data(name: str, data: Tensor) -> None:
    if not isinstance(data, Tensor):
        raise TypeError(
            f"walkthrough: {name} must be a torch.Tensor, got {type(data).__name__}; "
            "wrap it in torch.tensor(...)."
        )
    if data.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"walkthrough: {name} must be float32 or float64, got {data.dtype}; use .float()."
        )
    if not 2 <= data.dim() <= 5 or data.numel() == 0:
        raise ValueError(
            f"walkthrough: {name} needs 2 to 5 axes, (N, C) to (N, C, D, H, W), none of them "
            f"empty, got shape {tuple(data.shape)}."
        )
    if not data.isfinite().all():
        raise ValueError(
            f"walkthrough: {name} holds nan or infinity, which spreads to every result; "
            "take those values out."
        )


def _check_numbers(eps: float, momentum: float) -> None:
    if not eps > 0:
        raise ValueError(f"walkthrough: eps must be above 0, got {eps:g}; the usual value is 1e-5.")
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"walkthrough: momentum is the weight of the old moving value, from 0 to 1, got "
            f"{momentum:g}; the usual value is 0.9."
        )


def _per_channel(name: str, given: Tensor | None, default: float, X: Tensor) -> Tensor:
    """What is given for each channel, in the shape (1, C, 1, ...) and the dtype of X."""
    channels = X.shape[1]
    shape = (1, channels, *[1] * (X.dim() - 2))
    if given is None:
        return X.new_full(shape, default)
    if not isinstance(given, Tensor):
        raise TypeError(
            f"walkthrough: {name} must be a torch.Tensor, got {type(given).__name__}; "
            "wrap it in torch.tensor(...)."
        )
    if tuple(given.shape) not in ((channels,), shape):
        raise ValueError(
            f"walkthrough: {name} needs one number for each of the {channels} channels of X, "
            f"shape {(channels,)} or {shape}, got shape {tuple(given.shape)}."
        )
    if not given.isfinite().all():
        raise ValueError(
            f"walkthrough: {name} holds nan or infinity, which spreads to every result; "
            "pass finite numbers."
        )
    return given.detach().to(X).reshape(shape).clone()
