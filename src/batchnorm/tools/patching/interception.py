"""What stands between a layer and its forward for a while.

An interceptor is an attribute ``forward`` of one layer, so class, hooks and ``state_dict`` of the
layer stay what they are, and a copy or pickle of the layer carries a copy of it. Unlike a hook it
sees every call through to its end, however that ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import TracebackType
from typing import Any, TypeVar

from torch.nn.modules.batchnorm import _BatchNorm


class Interceptor(ABC):
    """Stands for the forward of a layer, in front of what stood there before.

    Args:
        layer: Whose forward; it is not changed before `put`.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self._behind: Any = None
        self._active = False

    @abstractmethod
    def around(self, *args: Any, **kwargs: Any) -> Any:
        """What a call of the layer does now; it reaches the layer by `forward`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the layer's forward."""
        if self._active:
            return self.around(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, or that of the interceptor behind."""
        if self._behind is None:
            return type(self.layer).forward(self.layer, *args, **kwargs)
        return self._behind(*args, **kwargs)

    def put(self) -> None:
        """Stands in front from now on."""
        attributes = vars(self.layer)
        self._behind, self._active = attributes.get("forward"), True
        attributes["forward"] = self

    def take_away(self) -> None:
        """Goes, also from behind others; one that a stranger wrapped stays and does nothing."""
        self._active = False
        attributes = vars(self.layer)
        front = attributes.get("forward")
        if front is not self:
            while isinstance(front, Interceptor) and front._behind is not self:
                front = front._behind
            if isinstance(front, Interceptor):
                front._behind = self._behind
        elif self._behind is None:
            del attributes["forward"]
        else:
            attributes["forward"] = self._behind


_Handle = TypeVar("_Handle", bound="Handle")


class Handle:
    """Interceptors of several layers, which stand until `remove`, or until ``with`` ends."""

    def __init__(self, interceptors: Iterable[Interceptor]) -> None:
        self._standing = list(interceptors)
        for interceptor in self._standing:
            interceptor.put()

    def remove(self) -> None:
        """Gives the layers their own forward again; a second time does nothing."""
        while self._standing:
            self._standing.pop().take_away()

    def __enter__(self: _Handle) -> _Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()
