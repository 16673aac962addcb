"""Attributes that have another value for a while, restored whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.tools.patching.handle import Handle


class _FalseUntilCopied(int):
    """False in place of True for a while; a copy or a pickle of it is True."""

    def __reduce__(self) -> tuple[type[bool], tuple[bool]]:
        return bool, (True,)

    def __repr__(self) -> str:
        return "False"


FALSE_UNTIL_COPIED = _FalseUntilCopied(0)


_Overrides = dict[object | None, Any]
"""Values of one attribute: under None the one from before, then the overrides by their owner."""
_overridden: WeakKeyDictionary[nn.Module, dict[str, _Overrides]] = WeakKeyDictionary()
_lock = threading.RLock()


def temporary_attributes(modules: Iterable[nn.Module], **values: Any) -> Handle:
    """Sets attributes of modules for a while; the one place where tools do so.

    Several of these may overlap, nested or from several threads, and end in any order: the newest
    one decides, and the value from before the first returns with the end of the last.

    Args:
        modules: The modules.
        **values: New values by the name of the attribute.
    """
    modules, owner = list(modules), object()

    def restore() -> None:
        with _lock:
            for module in modules:
                for name in values:
                    _restore(module, name, owner)

    handle = Handle(restore)
    try:
        with _lock:
            for module in modules:
                for name, value in values.items():
                    _override(module, name, value, owner)
    except BaseException:
        handle.remove()
        raise
    return handle


def is_temporary(module: nn.Module, *names: str) -> bool:
    """Tells if `temporary_attributes` has set one of the attributes."""
    attributes = _overridden.get(module)
    return bool(attributes) and any(name in attributes for name in names)


def change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Changes the class of an object, whatever its ``__setattr__`` does."""
    object.__setattr__(module, "__class__", kind)


def without_buffer_broadcast(model: nn.Module) -> Handle:
    """Stops ``DistributedDataParallel`` from sending buffers to other ranks for a while.

    It sets ``require_forward_param_sync`` itself after every forward, so ``broadcast_buffers``
    has to change too. What it still had to send before, it sends afterwards.
    """
    wrappers = [part for part in model.modules() if isinstance(part, DistributedDataParallel)]
    sending = [wrapper for wrapper in wrappers if wrapper.broadcast_buffers]
    with ExitStack() as stack:
        stack.enter_context(temporary_attributes(wrappers, require_forward_param_sync=False))
        stack.enter_context(temporary_attributes(sending, broadcast_buffers=FALSE_UNTIL_COPIED))
        return Handle(stack.pop_all().close)


def _override(module: nn.Module, name: str, value: Any, owner: object) -> None:
    attributes = _overridden.setdefault(module, {})
    if name not in attributes:
        attributes[name] = {None: getattr(module, name)}
    attributes[name][owner] = value
    setattr(module, name, value)


def _restore(module: nn.Module, name: str, owner: object) -> None:
    attributes = _overridden.get(module, {})
    overrides = attributes.get(name, {})
    if owner not in overrides:
        return
    del overrides[owner]
    setattr(module, name, next(reversed(overrides.values())))
    if len(overrides) == 1:
        del attributes[name]
