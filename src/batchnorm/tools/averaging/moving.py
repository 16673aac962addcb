"""``ema_update``: a second model that follows the first one slowly; it changes values, for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from batchnorm.moments import Moments, merge_moments
from batchnorm.tools.patching import (
    batch_norms,
    by_unwrapped_name,
    inside_wrappers,
    statistics_of,
)
from batchnorm.torch_internals import is_real

Policy = Literal["copy", "average", "merge"]


@torch.no_grad()
def ema_update(
    target: nn.Module, model: nn.Module, decay: float, statistics: Policy = "copy"
) -> None:
    r"""Moves a target towards a model: :math:`t' = d\,t + (1 - d)\,m` for every parameter.

    For mean teachers, BYOL, target networks, and averaged weights for evaluation. Integer counters
    and all buffers that are no running statistics are copied. Arithmetic is float32 at least, and
    the result is rounded once, to the target's dtype. Either model may be compiled, distributed or
    an ``AveragedModel``, as a whole or in parts: their names are compared without those of
    the wrappers. Rounding drops a step smaller than half a
    unit in the last place: with a decay of 0.999 the target should be float32.

    Args:
        target: Changed in place; any mode, any dtype and device.
        model: Not changed; same names and shapes.
        decay: Weight of the target's old value, in [0, 1]; 0 copies.
        statistics: The policy for running statistics. ``"copy"`` takes the model's: they already
            are an average over many batches, of activations under weights close to the target's.
            ``"average"`` treats them like parameters: smoother, but the variance lacks the spread
            between the two means. ``"merge"`` takes them as moments of a share of :math:`d` and
            of :math:`1 - d` of the data:
            :math:`d\,v_t + (1 - d)\,v_m + d (1 - d) (\mu_m - \mu_t)^2`. Where none of them is exact
            enough, recalibrate the target.

    Raises:
        ValueError: ``decay`` is not in [0, 1], the policy is unknown, names or shapes differ, or a
            tensor is on the meta device or fake, without values. Nothing has been changed then.

    Warns:
        RuntimeWarning: A policy for running statistics is given, and there is no batch norm layer.

    Example:
        >>> import copy
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import ema_update
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> teacher = copy.deepcopy(model)
        >>> y = model(torch.randn(8, 4))
        >>> ema_update(teacher, model, decay=0.99)
        >>> torch.equal(teacher[1].running_mean, model[1].running_mean)
        True

    Source:
        Tarvainen and Valpola (2017), "Mean teachers are better role models"; ``"copy"`` is what
        ``torch.optim.swa_utils.AveragedModel`` does by default.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"ema_update: decay must be between 0 and 1, got {decay}.")
    if statistics not in get_args(Policy):
        raise ValueError(
            f"ema_update: statistics must be one of {', '.join(get_args(Policy))}, "
            f"got {statistics!r}."
        )
    target, model = inside_wrappers(target), inside_wrappers(model)
    targets, sources = _tensors(target), _tensors(model)
    _check_alike(targets, sources)
    parameters = {id(parameter) for parameter in target.parameters()}
    pairs = [] if statistics == "copy" else list(_statistics(target, targets, sources))
    for mean, var in pairs:
        _move_statistics(mean, var, decay, between=statistics == "merge")
    moved = {id(tensor) for pair in pairs for tensor, _ in pair}
    for name, tensor in targets.items():
        if id(tensor) in parameters:
            _move(tensor, sources[name], decay)
        elif id(tensor) not in moved:
            tensor.copy_(sources[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers, and statistics that are ordinary attributes, without wrappers' names."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    attributes = {
        (f"{prefix}.{name}" if prefix else name): tensor
        for prefix, module in model.named_modules()
        for name, tensor in statistics_of(module).items()
        if name not in module._buffers
    }
    found |= attributes
    return {short: found[name] for short, name in by_unwrapped_name(found).items()}


def _check_alike(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    for name in [*targets, *sources]:
        if name not in targets or name not in sources:
            who = "target" if name not in targets else "model"
            raise ValueError(f"ema_update: {name} is missing in the {who}; give two equal models.")
        ours, theirs = tuple(targets[name].shape), tuple(sources[name].shape)
        if ours != theirs:
            raise ValueError(
                f"ema_update: {name} has the shape {ours} in the target and {theirs} in the model; "
                "give two equal models."
            )
        for who, tensor in (("target", targets[name]), ("model", sources[name])):
            if not is_real(tensor):
                where = "on the meta device" if tensor.is_meta else "fake"
                raise ValueError(
                    f"ema_update: {name} is {where} in the {who} and has no values; "
                    "load them first."
                )


_Pair = tuple[Tensor, Tensor]


def _statistics(
    target: nn.Module, targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]
) -> Iterator[tuple[_Pair, _Pair]]:
    """Pairs the target's and the model's running mean, and running variance, of every layer."""
    places = {id(tensor): name for name, tensor in targets.items()}
    for layer in batch_norms(target, caller="ema_update").values():
        tensors = statistics_of(layer).values()
        if tensors:
            mean, var = ((tensor, sources[places[id(tensor)]]) for tensor in tensors)
            yield mean, var


def _move(tensor: Tensor, source: Tensor, decay: float) -> None:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    old, new = tensor.to(dtype), source.to(tensor.device, dtype)
    tensor.copy_(decay * old + (1 - decay) * new)


def _move_statistics(mean: _Pair, var: _Pair, decay: float, *, between: bool) -> None:
    """Merges two statistics; ``between`` adds the variance between the two means."""
    if not between:
        _move(*mean, decay)
        _move(*var, decay)
        return
    device = mean[0].device
    # Filled on the device: to copy a number there would wait for the device.
    share = torch.full((), decay, dtype=torch.float64, device=device)
    parts = [
        Moments(weight, m.flatten().to(device), v.flatten().to(device))
        for weight, m, v in zip((share, 1 - share), mean, var, strict=True)
    ]
    merged = merge_moments(*parts)
    mean[0].copy_(merged.mean.view_as(mean[0]))
    var[0].copy_(merged.var.view_as(var[0]))
