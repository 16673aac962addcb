"""Methods that are replaced on one object, and can be given back in any order.

A replacement is an attribute of the module, so class, hooks and ``state_dict`` stay as they are,
and a deep copy or a pickle of the module carries a replacement of its own. A shallow copy
(``copy.copy``) shares it, so calls go to the original module. Unlike a hook, a replaced ``forward``
sees how every call ends, also with an error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TypeVar

from torch import nn

from batchnorm.tools.patching.handle import Handle

_Method = TypeVar("_Method", bound="ReplacedMethod")


class ReplacedMethod(ABC):
    """Replaces one method of a module, in front of an earlier replacement if there is one.

    Args:
        module: Its owner; it is not changed before `install`.

    Attributes:
        method: Name of the method.
        mark: Name of an attribute that tells of the replacement, also where foreign code covers it.
        remedy: What to do before ``torch.jit.script``.
    """

    method: ClassVar[str] = "forward"
    mark: ClassVar[str | None] = None
    remedy: ClassVar[str] = "end the tool first, with remove() or by leaving its with block"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._previous: Any = None
        self._is_active = False

    @abstractmethod
    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Runs in place of the method, which it reaches by `original`."""

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The earlier replacement, or the method of the class."""
        if self._previous is None:
            return getattr(type(self.module), self.method)(self.module, *args, **kwargs)
        return self._previous(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forwards a call of the method to `call`."""
        if self._is_active:
            return self.call(*args, **kwargs)
        return self.original(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Shows ``inspect.signature`` and ``torch.export`` the method of the class."""
        if name in ("__wrapped__", "__code__", "__name__"):
            method = getattr(type(self.module), self.method).__get__(self.module)
            return method if name == "__wrapped__" else getattr(method, name)
        if name == "__globals__":  # What TorchScript asks first of a method.
            raise AttributeError(
                f"torch.jit.script cannot compile {type(self.module).__name__}.{self.method} while "
                f"a tool of batchnorm has replaced it; {self.remedy}."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def find(cls: type[_Method], module: nn.Module) -> _Method | None:
        """The replacement of this class on ``module``; None also if foreign code covers it."""
        return next((m for m in replacements(module, cls.method) if isinstance(m, cls)), None)

    def install(self) -> None:
        """Replaces the method from now on, in front of earlier replacements."""
        self._begin(vars(self.module).get(self.method))
        vars(self.module)[self.method] = self

    def install_behind(self) -> None:
        """Replaces the method from now on, behind earlier replacements, which then call this."""
        earlier = list(replacements(self.module, self.method))
        if not earlier:
            self.install()
            return
        self._begin(earlier[-1]._previous)
        earlier[-1]._previous = self

    def _begin(self, previous: Any) -> None:
        self._previous, self._is_active = previous, True
        if self.mark is not None:
            vars(self.module)[self.mark] = True

    def uninstall(self, module: nn.Module | None = None) -> None:
        """Uninstalls this replacement wherever it stands in the chain.

        If foreign code has wrapped it, it stays but only forwards calls.

        Args:
            module: A shallow copy of the module, to uninstall it there only; None for the module.
        """
        if module is None or module is self.module:
            module, self._is_active = self.module, False
        attributes = vars(module)
        if self.mark is not None:
            attributes.pop(self.mark, None)
        found = attributes.get(self.method)
        if found is self:
            if self._previous is None:
                del attributes[self.method]
            else:
                attributes[self.method] = self._previous
            return
        while isinstance(found, ReplacedMethod) and found._previous is not self:
            found = found._previous
        if isinstance(found, ReplacedMethod):
            found._previous = self._previous


def replacements(module: nn.Module, method: str = "forward") -> Iterator[ReplacedMethod]:
    """Yields the replacements of a method, the outermost first, down to foreign code."""
    found = vars(module).get(method)
    while isinstance(found, ReplacedMethod):
        yield found
        found = found._previous


def is_replaced_by_others(module: nn.Module, method: str = "forward") -> bool:
    """Tells if foreign code replaced a method on the object, before or after our replacements."""
    found = vars(module).get(method)
    while isinstance(found, ReplacedMethod):
        found = found._previous
    return found is not None


def install(methods: Iterable[ReplacedMethod]) -> Handle:
    """Installs replacements; the handle uninstalls them."""
    methods = list(methods)
    for method in methods:
        method.install()
    return Handle(*(method.uninstall for method in methods))
