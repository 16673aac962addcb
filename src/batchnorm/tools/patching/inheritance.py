"""Layers that are rebuilt inherit what tools have attached to the layer before.

Converters (``convert_sync_batchnorm`` of torch, timm and apex, Lightning's ``sync_batchnorm``) make
a new layer and give it the tensors of the old one, but nothing else that is on it. torch calls
hooks when a module gets a buffer or a child. They tell when a layer gets the running statistics of
another one, or takes its place with equal ones; it then inherits. Initial statistics are equal in
all layers, so they only tell something where somebody assigned them to the new layer. The hooks are
installed when a tool first attaches something, and cost a fraction of a microsecond for each buffer
and each child of modules that are built later.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
)

from batchnorm.tools.patching.handle import Handle
from batchnorm.tools.patching.methods import ReplacedMethod
from batchnorm.tools.patching.selection import warn
from batchnorm.tools.patching.statistics import STATISTICS, is_batch_norm, statistics_of
from batchnorm.torch_internals import is_real

_Method = TypeVar("_Method", bound="InheritedMethod")


class InheritedMethod(ReplacedMethod):
    """A replaced method that a layer rebuilt from this one gets, too.

    Attributes:
        tool: Name of the tool, for a warning.
    """

    tool: ClassVar[str]

    def install(self) -> None:
        """Replaces the method from now on, here and on layers that are rebuilt from this one."""
        super().install()
        _attach(self.module)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the state of a copy or a pickle, whose layer may be rebuilt as well."""
        vars(self).update(state)
        _attach(self.module)

    def give_to(self, layer: nn.Module) -> None:
        """Installs a method of the same kind on a layer, and uninstalls it together with this."""
        heir = type(self)(layer)
        heir.install()
        _heirs.setdefault(self, []).append(heir)

    def complete(self, heir: Any) -> None:
        """Called when a rebuilt layer, which has inherited, takes its place in the model."""

    def with_heirs(self: _Method) -> Iterator[_Method]:
        """Yields this method and those that were given to rebuilt layers."""
        yield self
        for heir in _heirs.get(self, ()):
            if isinstance(heir, type(self)):
                yield from heir.with_heirs()

    def end(self) -> None:
        """Uninstalls this method, and those that were given to rebuilt layers."""
        for method in list(self.with_heirs()):
            method.uninstall()


@runtime_checkable
class Follower(Protocol):
    """A change that is no replaced method, and follows a layer that is rebuilt."""

    tool: str

    def follow(self, old: nn.Module, new: nn.Module) -> None:
        """Does for the new layer what it did for the old one; may be called again."""


def install_inherited(methods: Iterable[InheritedMethod]) -> Handle:
    """Installs methods; the handle uninstalls them and those that rebuilt layers inherited."""
    methods = list(methods)
    for method in methods:
        method.install()
    return Handle(*(method.end for method in methods))


def add_follower(layers: Iterable[nn.Module], follower: Follower) -> None:
    """Lets ``follower`` follow the layers, as long as somebody holds it or `remove_follower`."""
    for layer in layers:
        _followers.setdefault(layer, WeakSet()).add(follower)
        _attach(layer)


def remove_follower(follower: Follower) -> None:
    """Ends `add_follower` for all layers."""
    for followers in list(_followers.values()):
        followers.discard(follower)


_SHARED = {name for names in STATISTICS for name in names}
"""Buffers that a converter shares between the old and the new layer."""
_attached: WeakSet[nn.Module] = WeakSet()
"""Layers that have, or had, something that can be inherited."""
_assigned: WeakSet[nn.Module] = WeakSet()
"""Modules that got other statistics than they were built with."""
_heirs: WeakKeyDictionary[InheritedMethod, list[InheritedMethod]] = WeakKeyDictionary()
_followers: WeakKeyDictionary[nn.Module, WeakSet[Follower]] = WeakKeyDictionary()
_hooks: list[Any] = []
_lock = threading.RLock()


def _attach(layer: nn.Module) -> None:
    with _lock:
        _attached.add(layer)
        if _hooks:
            return
        _hooks.append(register_module_buffer_registration_hook(_on_buffer))
        _hooks.append(register_module_module_registration_hook(_on_child))


def _on_buffer(module: nn.Module, name: str, buffer: Tensor | None) -> None:
    """Lets a module inherit whose new buffer is the one of an attached layer."""
    if buffer is None or name not in _SHARED or module in _attached:
        return
    if module._buffers.get(name) is not None:
        _assigned.add(module)
    with _lock:
        layers = list(_attached)
    for layer in layers:
        if layer is module or vars(layer).get("_buffers", {}).get(name) is not buffer:
            continue
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or is_batch_norm(module):
            _inherit(layer, module)


def _on_child(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Lets a child inherit that takes the place of an attached layer, with its statistics."""
    old = parent._modules.get(name)
    if child is None or old is None or old is child or old not in _attached:
        return
    inside = list(child.modules())
    if old in inside:
        return
    if is_batch_norm(child) and _has_statistics_of(old, child):
        _inherit(old, child)
    elif any(map(is_batch_norm, inside)) and (tools := sorted(_tools(old) - _tools(child))):
        warn(
            f"{', '.join(tools)}: layer {name!r} ({type(old).__name__}) was replaced by a "
            f"{type(child).__name__} with other statistics, to which this does not apply; "
            "call the tool again for the new layer."
        )


def _inherit(old: nn.Module, new: nn.Module) -> None:
    for method in _methods(old):
        heir = method.find(new)
        if heir is None:
            method.give_to(new)
        else:
            method.complete(heir)
    for follower in list(_followers.get(old, ())):
        follower.follow(old, new)
        add_follower([new], follower)


def _methods(layer: nn.Module) -> list[InheritedMethod]:
    """The methods to inherit, in the order in which they were installed."""
    found = []
    for method in list(vars(layer).values()):
        while isinstance(method, ReplacedMethod):
            if isinstance(method, InheritedMethod) and method._is_active:
                found.append(method)
            method = method._previous
    return found[::-1]


def _tools(layer: nn.Module) -> set[str]:
    attached = (*_methods(layer), *_followers.get(layer, ()))
    return {each.tool for each in attached}


def _has_statistics_of(old: nn.Module, new: nn.Module) -> bool:
    """Tells if a layer has the memory or the values of another one's; their names may differ."""
    pairs = list(zip(statistics_of(old).values(), statistics_of(new).values(), strict=False))
    real = [pair for pair in pairs if all(map(is_real, pair))]
    if any(ours.data_ptr() == theirs.data_ptr() for ours, theirs in real):
        return True
    if new not in _assigned and _are_initial(old):
        return False
    return len(pairs) > 0 and all(_is_equal(*pair) for pair in pairs)


def _are_initial(layer: nn.Module) -> bool:
    """Tells if a layer has the statistics of a new one; False if they have no values."""
    return all(
        is_real(tensor) and bool((tensor == initial).all())
        for initial, tensor in enumerate(statistics_of(layer).values())
    )


def _is_equal(ours: Tensor, theirs: Tensor) -> bool:
    if ours.numel() != theirs.numel():
        return False
    if not (is_real(ours) and is_real(theirs)):
        return True
    return torch.equal(ours.detach().flatten(), theirs.detach().flatten().to(ours))
