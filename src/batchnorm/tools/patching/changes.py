"""Changes for a while: attributes of layers, and their statistics, put back whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class _Off(int):
    """False for a while, in place of True: whatever copies or pickles it gets the True."""

    def __reduce__(self) -> tuple[type[bool], tuple[bool]]:
        return bool, (True,)

    def __repr__(self) -> str:
        return "False"


OFF = _Off(0)


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


def is_changed(module: nn.Module, name: str) -> bool:
    """Whether somebody has the attribute `changed` now."""
    return name in _held.get(module, {})


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
def no_broadcast(model: nn.Module) -> Iterator[None]:
    """``DistributedDataParallel`` sends no buffers around meanwhile.

    It sets ``require_forward_param_sync`` itself after every forward, so the option has to change
    too; what is still to be sent then waits as it waited before.
    """
    wrappers = [part for part in model.modules() if isinstance(part, DistributedDataParallel)]
    sending = [wrapper for wrapper in wrappers if wrapper.broadcast_buffers]
    with (
        changed(wrappers, require_forward_param_sync=False),
        changed(sending, broadcast_buffers=OFF),
    ):
        yield


@contextmanager
def on_copies(layers: Iterable[nn.Module]) -> Iterator[None]:
    """The layers work on copies of their running statistics for a while, which are thrown away.

    Unlike ``track_running_stats=False`` this changes nothing of what autograd saves. What another
    thread trains on these layers meanwhile is thrown away with them.
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


class StandIns:
    """Copies of running statistics and counters, which layers work on in place of their own.

    Torch's layers let autograd save the buffers themselves. Because nobody writes into one that
    is taken back, graphs from before and graphs from meanwhile both keep the values that they were
    computed with. A buffer that several layers share has one stand-in.

    Args:
        layers: Whose; layers without running statistics have none.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._own: dict[tuple[nn.Module, str], Tensor | None] = {
            (layer, name): buffer
            for layer in layers
            for name, buffer in layer.named_buffers(recurse=False, remove_duplicate=False)
        }
        self._put()

    def keep(self) -> None:
        """What the layers have now is theirs, whatever comes."""
        for (layer, name), own in self._own.items():
            now = layer._buffers.get(name)
            if own is not None and now is not None and _is_alike(own, now):
                own.data.copy_(now)
            else:
                self._own[layer, name] = None if now is None else _copied(now)

    def take_back(self) -> None:
        """The layers go on with what they had, on new copies."""
        self._give_back()
        self._put()

    def leave(self, *, keep: bool) -> None:
        """The layers get their own buffers again.

        Args:
            keep: Whether with what has moved. A buffer that somebody put in the place of a stand-in
                then stays, as it would have without one.
        """
        if not keep:
            self._give_back()
            return
        for (layer, name), own in self._own.items():
            stand_in = self._stand_ins[layer, name]
            if own is None or stand_in is None:
                continue
            if layer._buffers.get(name) is stand_in:
                own.data.copy_(stand_in)
                layer._buffers[name] = own

    def _put(self) -> None:
        copies = {own: _copied(own) for own in self._own.values() if own is not None}
        self._stand_ins = {p: own if own is None else copies[own] for p, own in self._own.items()}
        for (layer, name), stand_in in self._stand_ins.items():
            layer._buffers[name] = stand_in

    def _give_back(self) -> None:
        """If the layer was moved or cast meanwhile, what it gets back is so too."""
        for (layer, name), own in self._own.items():
            now = layer._buffers.get(name)
            if own is not None and now is not None:
                own = own.to(now.device, now.dtype)
            self._own[layer, name] = layer._buffers[name] = own


def _copied(buffer: Tensor) -> Tensor:
    """A copy that autograd may save, whatever mode the caller is in."""
    with torch.inference_mode(False):
        return buffer.detach().clone()


def _is_alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
