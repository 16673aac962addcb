"""Changes for a while: attributes of layers, and their statistics, put back whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

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


@contextmanager
def on_copies(layers: Iterable[nn.Module]) -> Iterator[None]:
    """The layers work on copies of their running statistics for a while, which are thrown away.

    Unlike ``track_running_stats=False`` this changes nothing of what autograd saves.
    """
    with ExitStack() as copies:
        for layer in layers:
            buffers = {name: b.clone() for name, b in layer.named_buffers(recurse=False)}
            copies.enter_context(changed([layer], **buffers))
        yield


class Statistics:
    """The running statistics and counters of layers, as they were when this was made.

    Args:
        layers: Whose; layers without running statistics have none to remember. Of other modules,
            their own buffers.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = [
            (layer, name, tensor, tensor.detach().clone())
            for layer in layers
            for name, tensor in layer.named_buffers(recurse=False)
        ]

    def put_back(self) -> None:
        """Writes them into the buffers that the layers have now, bit for bit.

        Autograd does not notice: torch saves the buffers for backward without need in training,
        and would refuse the backward of a step whose statistics are put back.
        """
        for layer, name, tensor, kept in self._kept:
            if layer._buffers.get(name) is None:
                layer._buffers[name] = tensor
            getattr(layer, name).data.copy_(kept)
