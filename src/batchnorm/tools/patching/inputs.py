"""Listening to what layers get as their input, the one way in which tools do so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from batchnorm.tools.patching.handle import Handle
from batchnorm.torch_internals import is_real

Listener = Callable[[str, Tensor], Tensor | None]
"""Takes the name of a layer and its input. If it returns a tensor, the layer gets that instead."""


def listen(layers: Mapping[str, nn.Module], listener: Listener, *, caller: str) -> Handle:
    """Calls ``listener`` before each call of the layers, until the handle is removed.

    The input is the first tensor among the arguments, ``input`` first among those by name, because
    a subclass may call it otherwise. The hook runs after those that were registered before, so the
    listener sees what the layer sees. An exception of the listener ends the call. A call with
    tensors that have no values (in ``torch.export``, fake, on meta) is not listened to.

    Args:
        layers: Modules by name.
        listener: Called with the name and the input.
        caller: Name of the tool, for the message. A call without any tensor raises a TypeError.
    """
    hooks = [
        layer.register_forward_pre_hook(_InputHook(name, listener, caller), with_kwargs=True)
        for name, layer in layers.items()
    ]
    return Handle(*(hook.remove for hook in hooks))


def are_real(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tells if all tensors of a call have values; those of an export or on meta have none."""
    return all([is_real(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)])


class _InputHook:
    """The hook on one layer; an object, so that a copy or a pickle of the layer can carry it."""

    def __init__(self, name: str, listener: Listener, caller: str) -> None:
        self._name, self._listener, self._caller = name, listener, caller

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        key = self._key_of_input(layer, args, kwargs)
        x = args[key] if isinstance(key, int) else kwargs[key]
        if not is_real(x):
            return None
        replaced = self._listener(self._name, x)
        if replaced is None:
            return None
        if isinstance(key, int):
            return (*args[:key], replaced, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: replaced}

    def _key_of_input(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> int | str:
        for key, value in (*enumerate(args), ("input", kwargs.get("input")), *kwargs.items()):
            if isinstance(value, Tensor):
                return key
        raise TypeError(
            f"{self._caller}: layer {self._name!r} ({type(layer).__name__}) is called without a "
            "tensor; give it its input."
        )
