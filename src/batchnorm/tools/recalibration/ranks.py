"""Several processes that have one fate: what each computed reaches all, and so does a failure."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from torch import distributed

Value = TypeVar("Value")


@dataclass(frozen=True)
class _Failure:
    error: str


class Fate:
    """What all ranks go through together, each in a ``with`` block of its own.

    A rank that leaves its block by any exception before `agree` tells the others in place of what
    they would get from it next, so that none waits for ever. Between two of these calls no rank
    waits for another: they may have more or less to do, or nothing.
    """

    def __init__(self) -> None:
        self._open = True

    def __enter__(self) -> Fate:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and self._open:
            message = str(error)
            with uninterrupted():
                _exchange(_Failure(type(error).__name__ + (f": {message}" if message else "")))

    def share(self, own: Value) -> list[Value]:
        """Hands ``own`` to all ranks.

        Returns:
            Those of all ranks in their order; without processes just the own one.

        Raises:
            RuntimeError: Another rank failed instead.
        """
        with uninterrupted():
            results = _exchange(own)
            for rank, result in enumerate(results):
                if isinstance(result, _Failure):
                    self._open = False
                    raise RuntimeError(
                        f"recalibrate: rank {rank} failed, so nothing is changed on any: "
                        f"{result.error}"
                    )
        return results

    def agree(self) -> None:
        """Waits until all ranks have come here; afterwards each goes its own way.

        Raises:
            RuntimeError: Another rank failed instead.
        """
        self.share(None)
        self._open = False


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A Ctrl-C meanwhile is answered when the block has ended; a second one is answered at once."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    came = False

    def note(*_: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _exchange(own: Any) -> list[Any]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, own)
    return gathered
