"""Running statistics of any layer: torch's batch norm, ours, and layers that look like it.

A layer looks like batch norm if it keeps a running mean and a running variance, one number a
channel, under torch's names or d2l's, and has a forward of its own: `batchnorm.scratch.BatchNorm`,
the class of the d2l book (whose statistics are no buffers), ``FrozenBatchNorm2d``,
``InstanceNorm2d(track_running_stats=True)``, and layers that people write.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.torch_internals import is_real

STATISTICS = (("running_mean", "running_var"), ("moving_mean", "moving_var"))
"""Names of a mean and a variance: torch's, and those of the d2l book."""
COUNTER = "num_batches_tracked"


def is_batch_norm(module: nn.Module) -> bool:
    """Tells if a module is a batch norm layer of torch or ours, or looks like one."""
    if isinstance(module, _BatchNorm):
        return True
    return (
        names_of_statistics(module) is not None
        and type(module).forward is not nn.Module.forward
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
    if isinstance(module, _BatchNorm) or type(module).forward is nn.Module.forward:
        return None  # A module without a forward of its own only holds tensors.
    for names in STATISTICS:
        present = [name for name in names if isinstance(_own(module, name), Tensor)]
        if not present:
            continue
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
        raise ValueError("is on the meta device and has no value")
    value = counter.item()
    if not (math.isfinite(value) and value == int(value) and value >= 0):
        raise ValueError(f"is {value}, and a counter is a whole number from 0")
    return int(value)


def state_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields a module's own buffers, and statistics that it keeps as ordinary attributes."""
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield name, buffer
    if isinstance(module, _BatchNorm):
        return
    for name in names_of_statistics(module) or ():
        if name not in module._buffers:
            yield name, getattr(module, name)


def put_state(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Gives a module another tensor for one that `state_of` yields."""
    if name in module._buffers:
        module._buffers[name] = tensor
    else:
        vars(module)[name] = tensor


def get_state(module: nn.Module, name: str) -> Any:
    """The tensor that a module has under a name of `state_of` now; None if it has none."""
    return module._buffers[name] if name in module._buffers else vars(module).get(name)


def _own(module: nn.Module, name: str) -> Any:
    """A tensor of the module itself; a property may show that of another module."""
    for place in (module._buffers, vars(module), module._parameters):
        if name in place:
            return place[name]
    return None
