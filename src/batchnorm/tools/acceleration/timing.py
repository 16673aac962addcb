"""Times batch norm by our kernels and by torch's, and lets the faster ones compute each layer.

Each kind of layer and input is timed once, on a layer made for it and on random numbers. The caches
are emptied in part before each call, as the rest of a model does: code in Python takes up to three
times as long out of a cache as in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.tools.acceleration.replacement import EVERYWHERE, NOWHERE, LayerForward, Smallest
from batchnorm.tools.acceleration.verification import Input
from batchnorm.tools.wording import counted

_KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_ROUNDS = range(5, 16)
_SECONDS = 0.05
_OTHER_WORK = 2**19  # numbers, which are 2 MiB


@dataclass(frozen=True)
class Timing:
    """Seconds of a model's batch norm in one call, with everything that is fused into the layers.

    Attributes:
        training: True for forward and backward in training, False for forward in evaluation.
        calls: Number of calls of layers.
        ours: Number of those that our kernels compute, because they are faster.
        before: Seconds by torch's kernels.
        after: Seconds by those that compute them now.
    """

    training: bool
    calls: int
    ours: int
    before: float
    after: float

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        if not self.ours:
            return f"In {mode} torch's kernels are faster, and compute all layers."
        return (
            f"In {mode} our kernels are faster for {self.ours:,} of {counted(self.calls, 'layer')}:"
            f" batch norm takes {1e3 * self.after:.3g} ms, and took {1e3 * self.before:.3g} ms."
        )


class Fused(NamedTuple):
    """Names of the layers that also compute a ReLU, and of those that also compute an addition."""

    relus: Collection[str]
    additions: Collection[str]


def choose(
    forwards: Mapping[str, LayerForward], inputs: Mapping[str, Collection[Input]], fused: Fused
) -> tuple[tuple[Timing, ...], set[str]]:
    """Times what each layer got, and sets which inputs our kernels compute from now on.

    Args:
        forwards: The layers' forwards by name.
        inputs: What each layer got.
        fused: What else they compute.

    Returns:
        A report for each mode, and the names of the layers for which torch's kernels are faster in
        each mode that was tried.
    """
    races: dict[_Race, tuple[float, float]] = {}
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    slower = set()
    for name, forward in forwards.items():
        wins = []
        for input in sorted(inputs.get(name, ()), key=lambda found: found.shape.numel()):
            race = _Race.of(forward.module, input, name in fused.relus, name in fused.additions)
            if input.shape.numel() == 0 or len(input.shape) not in _KINDS:
                continue
            if race not in races:
                races[race] = race.run()
            torchs, ours = races[race]
            wins.append(ours < torchs)
            times[input.training].append((torchs, ours))
            forward.smallest = race.learn(forward.smallest, wins=wins[-1])
        if wins and not any(wins):
            slower.add(name)
    return tuple(_reports(times)), slower


class _Race(NamedTuple):
    """One kind of layer and input: what the time depends on."""

    input: Input
    affine: bool
    tracks: bool
    learns: bool
    averages: bool
    dtype: torch.dtype
    relu: bool
    addition: bool

    @classmethod
    def of(cls, layer: _BatchNorm, input: Input, relu: bool, addition: bool) -> _Race:
        own = (*layer.parameters(), *layer.buffers())
        dtypes = (tensor.dtype for tensor in own if tensor.is_floating_point())
        learns = any(parameter.requires_grad for parameter in layer.parameters())
        dtype = next(dtypes, torch.float32)
        average = layer.momentum is None
        tracks = layer.track_running_stats
        return cls(input, layer.affine, tracks, learns, average, dtype, relu, addition)

    def run(self) -> tuple[float, float]:
        """Returns the median seconds by torch's kernels and by ours, which are called in turn."""
        _, shape, stride, dtype = self.input
        layer = _KINDS[len(shape)](
            shape[1],
            momentum=None if self.averages else 0.1,
            affine=self.affine,
            track_running_stats=self.tracks,
            dtype=self.dtype,
        )
        layer.requires_grad_(self.learns).train(self.input.training)
        layout = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        x, residual, grad = (torch.randn_like(layout, device="cpu") for _ in range(3))
        forward = LayerForward(layer)

        def call() -> None:
            if self.relu or self.addition:
                y = forward.compute(x, residual if self.addition else None, "relu")
            else:
                y = forward.call(x)
            if y.requires_grad:
                torch.autograd.grad(y, wanted, grad)

        x.requires_grad_(self.input.training)
        wanted = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
        times: tuple[list[float], list[float]] = ([], [])
        with torch.set_grad_enabled(self.input.training):
            for number in range(_ROUNDS.stop):
                for smallest, taken in zip((NOWHERE, EVERYWHERE), times, strict=True):
                    forward.smallest = smallest
                    taken.append(_seconds(call))
                if number >= _ROUNDS.start and sum(map(sum, times)) > _SECONDS:
                    break
        torchs, ours = (statistics.median(taken[1:]) for taken in times)  # The first compiles.
        return torchs, ours

    def learn(self, smallest: Smallest, *, wins: bool) -> Smallest:
        """Moves the smallest input that our kernels compute, so that it agrees with the race."""
        alone = not (self.relu or self.addition)
        field = "training" if self.input.training else "alone" if alone else "fused"
        size, before = float(self.input.shape.numel()), getattr(smallest, field)
        return smallest._replace(**{field: min(before, size) if wins else max(before, size + 1)})


def _reports(times: Mapping[bool, list[tuple[float, float]]]) -> Iterator[Timing]:
    for training, found in times.items():
        if found:
            ours = sum(ours < torchs for torchs, ours in found)
            before, after = sum(torchs for torchs, _ in found), sum(map(min, found))
            yield Timing(training, len(found), ours, before, after)


def _seconds(call: Callable[[], None]) -> float:
    torch.ones(_OTHER_WORK)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
