"""Tries a layer that is no class of torch: which rules of batch norm it keeps.

A copy of the layer computes known numbers. Code of a user is judged by what it does, because a
module that has a running mean may do anything with it.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.tools.patching.statistics import put_state, statistics_of
from batchnorm.torch_internals import clear_hooks

_SAMPLES = 6
_LAYOUTS = ((4, 1), (3, 1), (5, 1), (3, -1), (4, -1), (2, 1))
"""Number of dimensions and the one of the channels, in the order in which they are tried. With two
dimensions last, because a layer that takes more of them shows where it expects the channels."""
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
        channel_dim: Dimension of the channels: 1, or -1 for the last one.
    """

    evaluates: str | None
    evaluates_without_grad: str | None
    trains: str | None
    keeps_dtype: str | None
    stores_unbiased: bool
    channel_dim: int


def probe(layer: nn.Module) -> Behavior:
    """Tries a copy of the layer in float32 on the CPU; the layer and random numbers stay.

    Args:
        layer: A layer that looks like batch norm (`statistics.is_batch_norm`).
    """
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.enable_grad(),
            warnings.catch_warnings(action="ignore"),  # They are about shapes of the trial.
        ):
            return _tried(_twin(layer))
    except Exception as error:
        failed = f"it could not be tried on the CPU ({type(error).__name__}: {error})"
        return Behavior(failed, failed, failed, failed, False, 1)


def _tried(twin: nn.Module) -> Behavior:
    x, channel_dim = _input(twin)
    trains, stores_unbiased = _training(twin, x, channel_dim)
    with torch.no_grad():
        without_grad = _obstacle_in_evaluation(twin, x, channel_dim)
    return Behavior(
        _obstacle_in_evaluation(twin, x, channel_dim),
        without_grad,
        trains,
        _obstacle_in_bfloat16(twin, x),
        stores_unbiased,
        channel_dim,
    )


@torch.no_grad()
def _twin(layer: nn.Module) -> nn.Module:
    """A copy without hooks, whose channels all have another weight and bias, none of them 0."""
    memo = {
        id(value): _in_float32(value)
        for module in layer.modules()
        for value in (*module._buffers.values(), *vars(module).values())
        if isinstance(value, Tensor)
    }  # Those with a graph could not be copied.
    twin = copy.deepcopy(layer, memo).to("cpu", torch.float32)
    for module in twin.modules():
        clear_hooks(module)
        vars(module).pop("forward", None)
    weights = [b for name, b in twin.named_buffers() if name.rpartition(".")[2] == "weight"]
    for tensor in (*twin.parameters(), *weights):
        tensor.requires_grad_(False)
        tensor.copy_(torch.linspace(0.5, 1.5, tensor.numel()).view_as(tensor))
    if not all(tensor.is_floating_point() for tensor in statistics_of(twin).values()):
        raise TypeError("its statistics are integers")
    return twin


def _in_float32(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True)


def _input(twin: nn.Module) -> tuple[Tensor, int]:
    """Returns numbers that the layer takes, and the dimension of their channels.

    It takes them in training and in evaluation, or at least in evaluation.

    Raises:
        Exception: That of the layer, if it takes nothing.
    """
    channels = next(iter(statistics_of(twin).values())).numel()
    side = 2 if channels != 2 else 3  # So that no other dimension passes for the channels.
    refusals = []
    for modes in ((True, False), (False,)):
        for rank, channel_dim in _LAYOUTS:
            shape = [_SAMPLES, *(side,) * (rank - 1)]
            shape[channel_dim] = channels
            x = _numbers(shape)
            found = [_refusal(twin.train(mode), x) for mode in modes]
            if not any(found):
                return x, channel_dim
            refusals += filter(None, found)
    raise refusals[0]


def _numbers(shape: list[int]) -> Tensor:
    """Samples of an asymmetric distribution, of both signs, with a mean of 1."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float32).square() * 3 - 2


def _refusal(twin: nn.Module, x: Tensor) -> Exception | None:
    """Calls a copy; the error if it fails, or changes the shape of ``x`` or of the statistics."""
    trial = copy.deepcopy(twin)
    _set(trial, 0.0, 1.0)
    try:
        y = trial(x.clone())  # Some layers compute in place.
    except Exception as error:
        return error
    before, after = statistics_of(twin).values(), statistics_of(trial).values()
    if getattr(y, "shape", None) != x.shape or [t.shape for t in before] != [
        t.shape for t in after
    ]:
        return ValueError(f"it changes shapes where its input has the shape {tuple(x.shape)}")
    return None


def _obstacle_in_evaluation(twin: nn.Module, x: Tensor, channel_dim: int) -> str | None:
    twin.eval()
    _set(twin, 0.0, 1.0)
    raw, expected = twin(x.clone()), twin((x - 0.5) / 2)
    _set(twin, 0.5, 4.0)
    computed = twin(x.clone())
    moved = [
        (t - v).abs().max() for t, v in zip(statistics_of(twin).values(), (0.5, 4.0), strict=True)
    ]
    if any(moved):
        return "its forward moves the running statistics in evaluation, too"
    values = x.movedim(channel_dim, -1)
    stays = torch.arange(values[..., 0].numel()).view(values.shape[:-1]) % 2 == 0
    others = torch.where(stays[..., None], values, 3 * values).movedim(-1, channel_dim)
    alone = (y.movedim(channel_dim, -1)[stays] for y in (twin(others), computed))
    if _is_close(computed, raw) or not (_is_close(computed, expected) and _is_close(*alone)):
        return "its forward does not normalize by the running statistics in evaluation"
    return None


def _training(twin: nn.Module, x: Tensor, channel_dim: int) -> tuple[str | None, bool]:
    """Returns the obstacle, and if the variance is stored unbiased."""
    values = x.movedim(channel_dim, -1)
    axes, count = tuple(range(x.dim() - 1)), values[..., 0].numel()
    mean, var = values.mean(axes), values.var(axes, unbiased=False)
    twin.eval()
    _set(twin, 0.0, 1.0)
    with torch.no_grad():
        expected = twin(((values - mean) / var.sqrt()).movedim(-1, channel_dim))
    twin.train()
    _set(twin, 0.0, 1.0)
    try:
        computed = twin(x.clone())
    except Exception as error:
        return f"it fails in training ({type(error).__name__}: {error})", False
    new_mean, new_var = (t.detach().flatten() for t in statistics_of(twin).values())
    weight = new_mean @ mean / (mean @ mean)
    if not weight > 0:
        return "it never moves its running statistics", False
    if not _is_close(computed, expected):
        return "its forward does not normalize by the batch in training", False
    ratio = (new_var - (1 - weight)) / weight / var
    of_unbiased = count / (count - 1)
    unbiased = abs(float(ratio.mean()) - of_unbiased) < abs(float(ratio.mean()) - 1)
    stored = torch.full_like(ratio, of_unbiased if unbiased else 1.0)
    if torch.allclose(ratio, stored, rtol=_TOLERANCE):
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
