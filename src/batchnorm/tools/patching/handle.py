"""A change that can be ended: what the kit returns for every change that is for a while."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TypeVar

_Handle = TypeVar("_Handle", bound="Handle")


class Handle:
    """A change that lasts until `remove` is called, or until its ``with`` block ends.

    Args:
        *undo: Functions that undo the change. Each is called once, the last one first, also if
            another one fails.
    """

    def __init__(self, *undo: Callable[[], object]) -> None:
        self._undo = undo

    def remove(self) -> None:
        """Undoes the change; a second call does nothing."""
        undo, self._undo = self._undo, ()
        with ExitStack() as stack:
            for function in undo:
                stack.callback(function)

    def _fail(self, error: BaseException) -> None:
        """Called before `remove` if an exception leaves the block; does nothing by default."""

    def __enter__(self: _Handle) -> _Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                self._fail(error)
        finally:
            self.remove()
