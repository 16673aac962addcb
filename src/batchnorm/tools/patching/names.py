"""Names of layers and tensors with wrappers in them: compiled, distributed, averaged models.

``torch.compile``, ``DistributedDataParallel`` and their kin put the model into a child, so all
names get one more part, in front (``module.0.weight``) or in the middle (``body._orig_mod.0``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_PRIVATE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPERS = {"module", *_PRIVATE}


def without_wrappers(name: str) -> str:
    """Removes the parts that wrappers add: ``module._orig_mod.bn`` becomes ``bn``."""
    return _without(_WRAPPERS, name)


def without_private_parts(name: str) -> str:
    """Removes the parts that only wrappers have: ``module._orig_mod.bn`` becomes ``module.bn``."""
    return _without(_PRIVATE, name)


def by_unwrapped_name(
    names: Iterable[str], shorten: Callable[[str], str] = without_wrappers
) -> dict[str, str]:
    """Maps names without wrappers to the names.

    Where two names would become one, because a child has such a name itself, all map to themselves.
    """
    names = list(names)
    found = {shorten(name): name for name in names}
    return found if len(found) == len(names) else {name: name for name in names}


def _without(parts: Collection[str], name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)


def inside_wrappers(model: nn.Module) -> nn.Module:
    """The model in wrappers that add nothing to what it computes."""
    while True:
        inner = next((model._modules[n] for n in _PRIVATE if n in model._modules), None)
        if inner is None and _is_wrapper(model):
            inner = model._modules["module"]
        if inner is None:
            return model
        model = inner


def _is_wrapper(model: nn.Module) -> bool:
    from torch.optim.swa_utils import AveragedModel

    return isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel))
