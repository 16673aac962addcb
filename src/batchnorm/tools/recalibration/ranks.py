"""Several processes that have one fate: what each computed reaches all, and so does a failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import distributed

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Failure:
    error: str


def together(work: Callable[[], Result]) -> tuple[Result, list[Result]]:
    """Works, and hands the result to all ranks.

    No rank waits for another while it works, so they may have more or less to do, or nothing.

    Returns:
        The own result, and those of all ranks in their order; without processes just the own one.

    Raises:
        RuntimeError: It failed on another rank. What fails on this rank is raised as it is.
    """
    try:
        own = work()
    except Exception as error:
        _exchange(_Failure(f"{type(error).__name__}: {error}"))
        raise
    results = _exchange(own)
    for rank, result in enumerate(results):
        if isinstance(result, _Failure):
            raise RuntimeError(
                f"recalibrate: rank {rank} failed, so nothing is changed on any: {result.error}"
            )
    return own, results


def _exchange(own: Any) -> list[Any]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, own)
    return gathered
