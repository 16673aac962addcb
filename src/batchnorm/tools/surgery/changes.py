"""Changes for a while: attributes of layers, and their statistics, put back whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class _Held:
    """One attribute that somebody holds at a value: what it was, and who wants what."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.wishes: dict[object, Any] = {}


_held: WeakKeyDictionary[nn.Module, dict[str, _Held]] = WeakKeyDictionary()
_lock = threading.RLock()


@contextmanager
def changed(modules: Iterable[nn.Module], **values: Any) -> Iterator[None]:
    """Sets attributes of modules for a while; the one place where tools do so.

    Several of these may overlap, nested or from several threads, and end in any order: the newest
    one decides, and the value from before the first comes back with the last.

    Args:
        modules: Whose attributes.
        **values: Attributes by name, and the values that they have meanwhile.
    """
    modules, holder = list(modules), object()
    try:
        with _lock:
            for module in modules:
                for name, value in values.items():
                    _hold(module, name, value, holder)
        yield
    finally:
        with _lock:
            for module in modules:
                for name in values:
                    _let_go(module, name, holder)


def _hold(module: nn.Module, name: str, value: Any, holder: object) -> None:
    attributes = _held.setdefault(module, {})
    if name not in attributes:
        attributes[name] = _Held(getattr(module, name))
    attributes[name].wishes[holder] = value
    setattr(module, name, value)


def _let_go(module: nn.Module, name: str, holder: object) -> None:
    attributes = _held.get(module, {})
    held = attributes.get(name)
    if held is None or holder not in held.wishes:
        return
    del held.wishes[holder]
    if held.wishes:
        setattr(module, name, next(reversed(held.wishes.values())))
    else:
        setattr(module, name, held.before)
        del attributes[name]


class Statistics:
    """The running statistics and counters of layers, as they were when this was made.

    Args:
        layers: Whose; layers without running statistics have none to remember. Of other modules,
            their own buffers.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        buffers = [tensor for layer in layers for tensor in layer.buffers(recurse=False)]
        self._kept: list[tuple[Tensor, Tensor]] = [(t, t.detach().clone()) for t in buffers]

    @torch.no_grad()
    def put_back(self) -> None:
        """Writes them into the very tensors that they were read from, bit for bit."""
        for tensor, kept in self._kept:
            tensor.copy_(kept)
