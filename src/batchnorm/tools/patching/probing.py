"""Tries a layer that is no class of torch: which rules of batch norm it keeps.

A copy of the layer computes known numbers. Code of a user is judged by what it does, because a
module that has a running mean may do anything with it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.tools.patching.statistics import put_state, statistics_of
from batchnorm.torch_internals import clear_hooks

_SAMPLES = 6
_RANKS = (4, 2, 3, 5)
_TOLERANCE = 1e-2
"""Relative; an eps of up to 1e-3 in a variance of one is no difference, another formula is."""


@dataclass(frozen=True)
class Behavior:
    """Rules that a layer keeps; each is None, or the reason why it does not.

    Attributes:
        evaluates: ``eval()`` normalizes by the running statistics, and leaves them.
        evaluates_without_grad: The same under ``torch.no_grad()``.
        trains: ``train()`` normalizes by the batch, and moves the statistics.
        keeps_dtype: bfloat16 input with float32 statistics gives bfloat16.
        stores_unbiased: True if the running variance is the unbiased one.
    """

    evaluates: str | None
    evaluates_without_grad: str | None
    trains: str | None
    keeps_dtype: str | None
    stores_unbiased: bool


def probe(layer: nn.Module) -> Behavior:
    """Tries a copy of the layer in float32 on the CPU; the layer and random numbers stay.

    Args:
        layer: A layer that looks like batch norm (`statistics.is_batch_norm`).
    """
    try:
        twin = _twin(layer)
        x = _input(twin)
    except Exception as error:
        failed = f"it could not be tried on the CPU ({type(error).__name__}: {error})"
        return Behavior(failed, failed, failed, failed, False)
    with torch.enable_grad():
        evaluates = _obstacle_in_evaluation(twin, x)
        trains, stores_unbiased = _training(twin, x)
    with torch.no_grad():
        without_grad = _obstacle_in_evaluation(twin, x)
    return Behavior(
        evaluates, without_grad, trains, _obstacle_in_bfloat16(twin, x), stores_unbiased
    )


def _twin(layer: nn.Module) -> nn.Module:
    twin = copy.deepcopy(layer).to("cpu", torch.float32)
    for module in twin.modules():
        clear_hooks(module)
        vars(module).pop("forward", None)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    _set(twin, 0.0, 1.0)
    return twin


def _input(twin: nn.Module) -> Tensor:
    """Numbers that the layer takes, of an asymmetric distribution."""
    mean = next(iter(statistics_of(twin).values()))
    channels, last = mean.numel(), None
    for rank in (mean.dim(),) if mean.dim() > 1 else _RANKS:
        generator = torch.Generator().manual_seed(0)
        shape = (_SAMPLES, channels, *(3,) * (rank - 2))
        x = torch.randn(shape, generator=generator).square() + 1
        try:
            twin.eval()(x)
        except Exception as error:
            last = last or error
        else:
            _set(twin, 0.0, 1.0)
            return x
    assert last is not None
    raise last


def _obstacle_in_evaluation(twin: nn.Module, x: Tensor) -> str | None:
    twin.eval()
    _set(twin, 0.0, 1.0)
    expected = twin((x - 0.5) / 2)
    _set(twin, 0.5, 4.0)
    computed = twin(x)
    moved = [
        (t - v).abs().max() for t, v in zip(statistics_of(twin).values(), (0.5, 4.0), strict=True)
    ]
    if any(moved):
        return "its forward moves the running statistics in evaluation, too"
    if not _is_close(computed, expected):
        return "its forward does not normalize by the running statistics in evaluation"
    return None


def _training(twin: nn.Module, x: Tensor) -> tuple[str | None, bool]:
    """Returns the obstacle, and if the variance is stored unbiased."""
    axes, count = (0, *range(2, x.dim())), x.numel() // x.shape[1]
    mean, var = x.mean(axes), x.var(axes, unbiased=False)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    twin.eval()
    _set(twin, 0.0, 1.0)
    with torch.no_grad():
        expected = twin((x - mean.view(shape)) / var.sqrt().view(shape))
    twin.train()
    _set(twin, 0.0, 1.0)
    computed = twin(x)
    new_mean, new_var = (t.detach().flatten() for t in statistics_of(twin).values())
    weight = (new_mean / mean).mean()
    if not weight > 0:
        return "it never moves its running statistics", False
    if not _is_close(computed, expected):
        return "its forward does not normalize by the batch in training", False
    stored = (new_var - (1 - weight)) / weight
    for unbiased in (False, True):
        if torch.allclose(stored, var * (count / (count - 1) if unbiased else 1), rtol=_TOLERANCE):
            return None, unbiased
    return "its running variance is no average of variances", False


def _obstacle_in_bfloat16(twin: nn.Module, x: Tensor) -> str | None:
    twin.eval()
    _set(twin, 0.0, 1.0)
    try:
        with torch.no_grad():
            dtype = twin(x.bfloat16()).dtype
    except Exception as error:
        return f"it takes no bfloat16 input beside float32 statistics ({type(error).__name__})"
    return None if dtype == torch.bfloat16 else f"it returns {dtype} for bfloat16 input"


def _set(twin: nn.Module, mean: float, var: float) -> None:
    for (name, old), value in zip(statistics_of(twin).items(), (mean, var), strict=True):
        put_state(twin, name, torch.full_like(old, value).detach())


def _is_close(a: object, b: object) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape):
        return False
    scale = float(b.abs().max()) + 1e-12
    return float((a - b).abs().max()) <= _TOLERANCE * scale
