"""Running statistics of any layer: torch's batch norm, ours, and layers that look like it.

A layer looks like batch norm if it keeps a running mean and a running variance, one number a
channel, under torch's names or d2l's, and has a forward of its own: `batchnorm.scratch.BatchNorm`,
the class of the d2l book (whose statistics are no buffers), ``FrozenBatchNorm2d``,
``InstanceNorm2d(track_running_stats=True)``, and layers that people write.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.torch_internals import is_real

STATISTICS = (("running_mean", "running_var"), ("moving_mean", "moving_var"))
"""Names of a mean and a variance: torch's, and those of the d2l book."""
COUNTER = "num_batches_tracked"
_Default = TypeVar("_Default", float, None)


def is_batch_norm(module: nn.Module) -> bool:
    """Tells if a module is a batch norm layer of torch or ours, or looks like one."""
    if isinstance(module, _BatchNorm):
        return True
    return (
        names_of_statistics(module) is not None
        and _computes(module)
        and obstacle_to_likeness(module) is None
    )


def names_of_statistics(layer: nn.Module) -> tuple[str, str] | None:
    """Names of the running mean and the running variance; None if the layer does not have both."""
    if isinstance(layer, _BatchNorm):  # Without a look into dictionaries, for compiled code.
        has_both = layer.running_mean is not None and layer.running_var is not None
        return STATISTICS[0] if has_both else None
    for names in STATISTICS:
        if all(isinstance(_own(layer, name), Tensor) for name in names):
            return names
    return None


def has_running_statistics(layer: nn.Module) -> bool:
    """Tells if the layer has running statistics at all."""
    return names_of_statistics(layer) is not None


def statistics_of(layer: nn.Module) -> dict[str, Tensor]:
    """Running mean and variance by their names in the layer; empty if it has none."""
    if isinstance(layer, _BatchNorm):
        mean, var = layer.running_mean, layer.running_var
        return {} if mean is None or var is None else {"running_mean": mean, "running_var": var}
    names = names_of_statistics(layer)
    return {} if names is None else {name: getattr(layer, name) for name in names}


def moves_statistics(layer: nn.Module) -> bool:
    """Tells if a call of the layer may move its running statistics now."""
    if not isinstance(layer, _BatchNorm):
        return has_running_statistics(layer)
    return bool(layer.training and layer.track_running_stats) and has_running_statistics(layer)


def obstacle_to_likeness(module: nn.Module) -> str | None:
    """Says why a module with a running mean or variance is not taken for batch norm.

    Returns:
        The reason; None also for a module that has nothing of the kind.
    """
    if isinstance(module, _BatchNorm) or not _computes(module):
        return None  # A module without a forward of its own only holds tensors.
    for names in STATISTICS:
        present = [name for name in names if isinstance(_own(module, name), Tensor)]
        if not present:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            return "it is compiled by TorchScript"
        if type(module).forward is nn.Module.forward:
            return "it computes in __call__, past its hooks, and has no forward"
        if len(present) == 1:
            (missing,) = set(names) - set(present)
            return f"it keeps {present[0]} but no {missing}"
        if any(name in module._parameters for name in names):
            return f"its {names[0]} is a parameter, not a buffer"
        mean, var = (getattr(module, name) for name in names)
        if is_lazy(mean) or is_lazy(var):
            return None
        if mean.shape != var.shape or not mean.dim() or max(mean.shape) != mean.numel():
            return (
                f"its {names[0]} has the shape {tuple(mean.shape)} and its {names[1]} "
                f"{tuple(var.shape)}, not one number a channel"
            )
        return None
    return None


def is_counter(name: str) -> bool:
    """Tells by its dotted name if a tensor in a ``state_dict`` is a batch counter."""
    return name.rpartition(".")[2] == COUNTER


def count_in(counter: Any) -> int:
    """Reads a batch counter from a file, where it may have a dtype or a shape that torch's has not.

    Args:
        counter: One integer in a tensor of shape () or (1,), of any dtype.

    Raises:
        ValueError: It is no such number. The message is the rest of a sentence about the counter.
    """
    if not isinstance(counter, Tensor):
        raise ValueError(f"is a {type(counter).__name__}, and a counter is a tensor of one number")
    if tuple(counter.shape) not in ((), (1,)):
        raise ValueError(f"has the shape {tuple(counter.shape)}, and a counter is one number")
    if counter.is_complex():
        raise ValueError(f"is {counter.dtype}, and a counter is a whole number")
    if not is_real(counter):
        where = "on the meta device" if counter.is_meta else "fake"
        raise ValueError(f"is {where} and has no value")
    value = counter.item()
    if not (math.isfinite(value) and value == int(value) and value >= 0):
        raise ValueError(f"is {value}, and a counter is a whole number from 0")
    return int(value)


def eps_of(layer: nn.Module) -> float:
    """The layer's ``eps``, or torch's default if it does not tell its own."""
    return number_in(getattr(layer, "eps", None), 1e-5)


def number_in(value: Any, default: _Default) -> float | _Default:
    """Reads a setting of a layer that may be a number or a tensor of one number.

    Args:
        value: What the layer has.
        default: Returned for anything else.
    """
    if isinstance(value, Tensor):
        return float(value) if is_real(value) and value.numel() == 1 else default
    return float(value) if isinstance(value, Real) else default


def state_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields a module's own buffers; of a look-alike also tensors that are ordinary attributes.

    Those that are computed with gradients are results and no state, unless they are statistics.
    """
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield name, buffer
    statistics = None if isinstance(module, _BatchNorm) else names_of_statistics(module)
    if statistics is None:
        return
    for name, value in list(vars(module).items()):
        if isinstance(value, Tensor) and (name in statistics or not value.requires_grad):
            yield name, value


def put_state(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Gives a module another tensor for one that `state_of` yields."""
    if name in module._buffers:
        module._buffers[name] = tensor
    else:
        vars(module)[name] = tensor


def get_state(module: nn.Module, name: str) -> Tensor | None:
    """The tensor that a module has under a name of `state_of` now; None if it has none."""
    value = module._buffers[name] if name in module._buffers else vars(module).get(name)
    return value if isinstance(value, Tensor) else None


def _own(module: nn.Module, name: str) -> Any:
    """A tensor of the module itself; a property may show that of another module."""
    for place in (module._buffers, vars(module), module._parameters):
        if name in place:
            return place[name]
    return None


def _computes(module: nn.Module) -> bool:
    """Tells if a module has code of its own, and does not only hold tensors."""
    if isinstance(module, torch.jit.ScriptModule):  # Its class has no attribute ``forward``.
        return True
    kind = type(module)
    return kind.forward is not nn.Module.forward or kind.__call__ is not nn.Module.__call__
