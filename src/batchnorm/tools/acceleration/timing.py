"""Times batch norm by our kernels and by torch's, and lets the faster ones compute each layer.

Each kind of layer and input is timed once, on a layer made for it and on random numbers. The caches
are emptied in part before each call, as the rest of a model does: code in Python takes up to three
times as long out of a cache as in it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.tools.acceleration.replacement import EVERYWHERE, NOWHERE, LayerForward
from batchnorm.tools.acceleration.verification import Input
from batchnorm.tools.wording import counted

_KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_ROUNDS = range(5, 16)
_SECONDS = 0.05
_OTHER_WORK = 2**19  # numbers, which are 2 MiB
_MARGIN = 1.05
_IN_A_NETWORK = {True: 200e-6, False: 100e-6}  # seconds, forward and backward or forward alone


@dataclass(frozen=True)
class Timing:
    """Seconds of a model's batch norm in one call, with everything that is fused into the layers.

    Attributes:
        training: True for training, forward and backward; False for evaluation, forward.
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
        text = (
            f"In {mode} our kernels are faster for {self.ours:,} of {counted(self.calls, 'call')}"
        )
        if not self.ours:
            return f"{text}; torch's go on computing."
        after, before = 1e3 * self.after, 1e3 * self.before
        return f"{text}: batch norm takes {after:.3g} ms, and took {before:.3g} ms."


class Fused(NamedTuple):
    """Names of the layers that also compute a ReLU, and of those that also compute an addition."""

    relus: Collection[str]
    additions: Collection[str]


class Raced(NamedTuple):
    """One input of a layer, and what both kernels take for it.

    Attributes:
        race: What was timed.
        calls: Number of calls with this input.
        torchs: Seconds of torch's kernels.
        ours: Seconds of ours.
    """

    race: Race
    calls: int
    torchs: float
    ours: float

    def seconds(self, least: float) -> float:
        """Seconds of the calls if our kernels compute inputs of at least ``least`` values."""
        return self.calls * (self.ours if self.race.size >= least else self.torchs)


def choose(
    forwards: Mapping[str, LayerForward], inputs: Mapping[str, Counter[Input]], fused: Fused
) -> tuple[tuple[Timing, ...], set[str]]:
    """Times what each layer got, and sets which inputs our kernels compute from now on.

    Args:
        forwards: The layers' forwards by name.
        inputs: What each layer got, and how often.
        fused: What else they compute.

    Returns:
        A report for each mode, and the names of the layers of which torch's kernels compute all
        that was tried.
    """
    times: dict[Race, tuple[float, float]] = {}
    done: list[tuple[Raced, float]] = []
    slower = set()
    for name, forward in forwards.items():
        by_bound: dict[str, list[Raced]] = {}
        for input, count in inputs.get(name, Counter()).items():
            race = Race.of(forward.module, input, name in fused.relus, name in fused.additions)
            if race.size == 0 or len(input.shape) not in _KINDS:
                continue
            if race not in times:
                times[race] = race.run()
            torchs, ours = times[race]
            if race.bound == "alone":  # A win would be one of the clock.
                ours = math.inf
            by_bound.setdefault(race.bound, []).append(Raced(race, count, torchs, ours))
        wins = False
        for bound, raced in by_bound.items():
            least = _best(getattr(forward.smallest, bound), raced)
            forward.smallest = forward.smallest._replace(**{bound: least})
            done += [(one, least) for one in raced]
            wins |= any(one.race.size >= least for one in raced)
        if by_bound and not wins:
            slower.add(name)
    return tuple(_reports(done)), slower


def _best(usual: float, raced: list[Raced]) -> float:
    """Returns the bound by which all calls take the least time; the usual one if it is as good.

    Ours must win by `_MARGIN`, and by what a call through Python takes longer in a network.
    """
    trusted = [
        one._replace(ours=one.ours * _MARGIN + _IN_A_NETWORK[one.race.input.backward])
        for one in raced
    ]
    sizes = [float(one.race.size) for one in raced]
    choices = [usual, *sorted(sizes), max(sizes) + 1]
    return min(choices, key=lambda least: sum(one.seconds(least) for one in trusted))


class Race(NamedTuple):
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
    def of(cls, layer: _BatchNorm, input: Input, relu: bool, addition: bool) -> Race:
        """Describes a layer and an input."""
        own = (*layer.parameters(), *layer.buffers())
        dtypes = (tensor.dtype for tensor in own if tensor.is_floating_point())
        learns = any(parameter.requires_grad for parameter in layer.parameters())
        dtype, average = next(dtypes, torch.float32), layer.momentum is None
        tracks = layer.running_mean is not None
        return cls(input, layer.affine, tracks, learns, average, dtype, relu, addition)

    @property
    def size(self) -> int:
        """Number of values of the input."""
        return self.input.shape.numel()

    @property
    def bound(self) -> str:
        """The field of `Smallest` that this race is about."""
        if self.input.training:
            return "training"
        return "fused" if self.relu or self.addition else "alone"

    def run(self) -> tuple[float, float]:
        """Returns the least seconds of torch's kernels and of ours, which are called in turn."""
        training, backward, shape, stride, dtype = self.input
        with torch.inference_mode(False), torch.set_grad_enabled(backward):
            layer = _KINDS[len(shape)](
                shape[1],
                momentum=None if self.averages else 0.1,
                affine=self.affine,
                track_running_stats=self.tracks,
                device="cpu",
                dtype=self.dtype,
            )
            layer.requires_grad_(self.learns).train(training)
            layout = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            x = torch.randn_like(layout, device="cpu")
            grad = torch.randn_like(x) if backward else None
            residual = torch.randn_like(x) if self.addition else None
            x.requires_grad_(backward)
            wanted = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
            forward = LayerForward(layer)

            def call() -> None:
                fuses = self.relu or self.addition
                y = forward.compute(x, residual, "relu") if fuses else forward.call(x)
                if y.requires_grad:
                    torch.autograd.grad(y, wanted, grad)

            return _least_seconds(forward, call)


def _least_seconds(forward: LayerForward, call: Callable[[], None]) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    other_work = torch.empty(_OTHER_WORK, device="cpu")
    for number in range(_ROUNDS.stop):
        for smallest, taken in zip((NOWHERE, EVERYWHERE), times, strict=True):
            forward.smallest = smallest
            other_work.fill_(number)
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        enough = _SECONDS if number >= _ROUNDS.start else 20 * _SECONDS
        if number > 0 and sum(map(sum, times)) > enough:
            break
    torchs, ours = (min(taken[1:]) for taken in times)  # The first compiles.
    return torchs, ours


def _reports(done: list[tuple[Raced, float]]) -> Iterator[Timing]:
    for training in (True, False):
        found = [(one, least) for one, least in done if one.race.input.backward is training]
        if found:
            ours = sum(one.calls for one, least in found if one.race.size >= least)
            before = sum(one.seconds(math.inf) for one, _ in found)
            after = sum(one.seconds(least) for one, least in found)
            yield Timing(training, sum(one.calls for one, _ in found), ours, before, after)
