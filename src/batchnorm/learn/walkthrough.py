"""Batch norm one step at a time: every intermediate result of d2l's ``batch_norm``, as plain data.

The names and conventions are d2l's: ``momentum`` is the weight of the *old* moving value, and
``moving_var`` averages the biased variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.learn import execution, recipes
from batchnorm.learn.comparison import compare_with_scratch
from batchnorm.learn.step import Step


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
    """Goes through batch norm step by step: training on X, then inference in both ways.

    Training: the mean one axis at a time, the variance, x̂ = (x - μ) / √(σ² + ε), y = γ·x̂ + β, and
    the update of the moving statistics. Inference: by the moving statistics, by the statistics of
    the data to predict, and, if these are several examples, by those of the first one alone.

    The value of a step is what its line of code gives when it is run. At the end the results are
    compared with `batchnorm.scratch.batch_norm`.

    Args:
        X: A mini-batch, float32 or float64, of 2 to 5 axes: (N, C), (N, C, L), (N, C, H, W) or
            (N, C, D, H, W), with more than one value per channel.
        gamma: Scale, one number per channel, shape (C,) or (1, C, 1, ...). Ones by default.
        beta: Shift, shaped like ``gamma``. Zeros by default.
        moving_mean: The moving mean so far, shaped like ``gamma``. Zeros by default.
        moving_var: The moving (biased) variance so far, shaped like ``gamma``. Ones by default.
        eps: Added to the variance, above 0.
        momentum: Weight of the old moving value, 0 to 1. `torch.nn.BatchNorm2d` takes the weight
            of the new one instead, 1 - momentum.
        prediction: The data to predict, with the axes and channels of X. By default X itself, so
            that the outputs can be compared.

    Returns:
        The steps in order, computed in the dtype of X, without gradients. The arguments are not
        changed.

    Raises:
        TypeError: X or another argument that should be a tensor is not one.
        ValueError: A shape, a dtype or a value does not fit.
        RuntimeError: The result differs from `batchnorm.scratch.batch_norm` by more than rounding.

    Example:
        >>> import torch, batchnorm
        >>> for step in batchnorm.walkthrough(torch.tensor([[1.0], [3.0]]))[:5]:
        ...     print(step)
        # X: (N, C) = (2, 1)
        mean = X.mean(dim=0, keepdim=True)  # (1 + 3) / 2 ≈ 2.0000
        var = ((X - mean) ** 2).mean(dim=0, keepdim=True)  # ((1 - 2)² + (3 - 2)²) / 2 ≈ 1.0000
        X_hat = (X - mean) / torch.sqrt(var + eps)  # (1 - 2) / √(1 + 1e-05) ≈ -1.0000
        Y = gamma * X_hat + beta  # 1 × (-1) + 0 ≈ -1.0000
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
    given = {
        "X": X.detach().clone(),
        "P": prediction.detach().to(X).clone(),
        "gamma": _per_channel("gamma", gamma, 1.0, X),
        "beta": _per_channel("beta", beta, 0.0, X),
        "moving_mean": _per_channel("moving_mean", moving_mean, 0.0, X),
        "moving_var": _per_channel("moving_var", moving_var, 1.0, X),
    }
    if (given["moving_var"] < 0).any():
        raise ValueError(
            "walkthrough: moving_var must not be negative, got "
            f"{given['moving_var'].min().item():g}; pass variances, not means."
        )
    steps = _walk(given, eps, momentum)
    compare_with_scratch(steps, given, eps, momentum)
    return steps


def _walk(given: dict[str, Tensor], eps: float, momentum: float) -> list[Step]:
    variables = {**given, "eps": eps, "momentum": momentum}
    X, P = given["X"], given["P"]
    steps = [
        *execution.run(recipes.training(X.dim()), variables, X, "training"),
        *execution.run(recipes.inference(X.dim()), variables, P, "inference"),
    ]
    if P.shape[0] > 1:
        alone = recipes.alone(P.dim(), is_own_mean=P[0].numel() == P.shape[1])
        steps += execution.run([alone], variables, P[:1], "inference")
    return steps


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
            f"walkthrough: {name} contains nan or infinity, which spreads to every result; "
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
    """Returns the numbers per channel in the shape (1, C, 1, ...) and the dtype of X."""
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
            f"walkthrough: {name} contains nan or infinity, which spreads to every result; "
            "pass finite numbers."
        )
    return given.detach().to(X).reshape(shape).clone()
