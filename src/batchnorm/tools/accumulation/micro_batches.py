"""Micro-batches that can be run again and again, each time with the same random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Count = Callable[[Any], float]


@dataclass(frozen=True)
class MicroBatch:
    """One part of the large batch.

    Attributes:
        number: Its place among the others, from 0.
        batch: What the loss function takes.
        share: Weight of its loss in the mean over the large batch; all shares add up to one.
        seed: Where its random numbers start.
    """

    number: int
    batch: Any
    share: float
    seed: int

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Gives torch's generators the same start every time, and puts them back.

        Raises:
            RuntimeError: The micro-batch was changed meanwhile, and can be run only once.
        """
        before = _versions(self.batch)
        with torch.random.fork_rng(devices=_cuda_devices()):
            torch.manual_seed(self.seed)
            # A weight that autocast has cast without gradients must not serve a pass with them.
            torch.clear_autocast_cache()
            yield
        if _versions(self.batch) != before:
            raise RuntimeError(
                f"accumulate: the loss changed a tensor of micro-batch {self.number} in place, but "
                "every micro-batch is run several times; let it work on a copy."
            )


def micro_batches(batches: Iterable[Any], count: Count | None) -> list[MicroBatch]:
    """Keeps the micro-batches, weighs them, and draws a seed for each.

    Args:
        batches: What the loss function takes, one by one.
        count: How many of what the loss is a mean over a micro-batch has; None for the length of
            the first tensor in it.

    Raises:
        ValueError: There are none, or one counts for nothing.
        TypeError: There is no tensor in one, whose length could be taken.
    """
    kept = list(batches)
    if not kept:
        raise ValueError("accumulate: batches must hold at least one micro-batch, got none.")
    counts = [float((count or _length)(batch)) for batch in kept]
    for number, size in enumerate(counts):
        if not 0 < size < math.inf:
            raise ValueError(
                f"accumulate: every micro-batch must count for something, number {number} counts "
                f"for {size:g}; leave it out."
            )
    total = sum(counts)
    seeds = torch.randint(2**62, (len(kept),)).tolist()
    return [
        MicroBatch(number, batch, size / total, seed)
        for number, (batch, size, seed) in enumerate(zip(kept, counts, seeds, strict=True))
    ]


def _length(batch: Any) -> int:
    for tensor in _tensors(batch):
        if tensor.dim() > 0:
            return len(tensor)
    raise TypeError(
        f"accumulate: cannot see how large a micro-batch is, a {type(batch).__name__} without a "
        "tensor in it; give count, a function of a micro-batch."
    )


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)


def _versions(batch: Any) -> list[int]:
    return [tensor._version for tensor in _tensors(batch) if not tensor.is_inference()]


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
