"""All ranks succeed together or fail together, and none waits for one that has failed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import distributed

from batchnorm.tools.patching import Handle

Value = TypeVar("Value")


@dataclass(frozen=True)
class _Failure:
    error: str


class AllRanks(Handle):
    """Makes a ``with`` block all-or-nothing over ranks.

    If one raises before `agree`, the others receive the error in place of its next value, so none
    waits forever. Between two exchanges no rank waits for another: each may have more or less to
    do, or nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_open = True

    def share(self, own: Value) -> list[Value]:
        """Sends ``own`` to all ranks.

        Returns:
            The values of all ranks in their order; without processes just the own one.

        Raises:
            RuntimeError: Another rank failed instead.
        """
        with uninterrupted():
            results = _exchange(own)
            for rank, result in enumerate(results):
                if isinstance(result, _Failure):
                    self._is_open = False
                    raise RuntimeError(
                        f"recalibrate: rank {rank} failed, so nothing is changed on any: "
                        f"{result.error}"
                    )
        return results

    def agree(self) -> None:
        """Waits until all ranks have come here; a failure after this is one of a single rank.

        Raises:
            RuntimeError: Another rank failed instead.
        """
        self.share(None)
        self._is_open = False

    def _fail(self, error: BaseException) -> None:
        if self._is_open:
            message = str(error)
            with uninterrupted():
                _exchange(_Failure(type(error).__name__ + (f": {message}" if message else "")))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays a Ctrl-C until the block has ended; a second one is answered at once."""
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
