"""Passes over the data: one for all layers, or one more for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from batchnorm.moments import unbiased_var
from batchnorm.tools.recalibration.feeding import Feeder
from batchnorm.tools.recalibration.intake import Collected, Intake, listening, merged
from batchnorm.tools.recalibration.ranks import Fate


@dataclass(frozen=True)
class Outcome:
    """What the layers are to have, in the order in which they run.

    Attributes:
        collected: What came in, on all ranks together.
        new: Mean and unbiased variance, in the dtypes of the buffers, on the CPU.
        samples: Of one pass, on all ranks together.
        batches: As many batches.
        own_batches: Those of this rank.
        stopped: What ended the pass on this rank before the data did.
    """

    collected: Mapping[str, Collected] = field(default_factory=dict)
    new: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    samples: int = 0
    batches: int = 0
    own_batches: int = 0
    stopped: str | None = None


def in_one_pass(
    feeder: Feeder, intakes: Mapping[str, Intake], tolerance: float | None, fate: Fate
) -> Outcome:
    """All layers collect, each normalizing by the batch at hand.

    Args:
        feeder: Gives the batches.
        intakes: By name.
        tolerance: Relative standard error at which the pass may end; None goes on to the end.
        fate: That of all ranks.

    Raises:
        ValueError: There is no data, or it makes no statistics.
    """

    def end_batch() -> bool:
        for intake in intakes.values():
            intake.end_batch()
        return tolerance is not None and _precise(intakes, tolerance)

    with listening(intakes.values()):
        own = feeder.run(end_batch)
    reached = [intake for intake in intakes.values() if intake.first_call >= 0]
    reached.sort(key=lambda intake: intake.first_call)
    results = fate.share((own, {intake.name: intake.collected() for intake in reached}))
    samples = sum(passed.samples for passed, _ in results)
    if samples == 0:
        raise ValueError("recalibrate: batches gave no samples; the model is as it was.")
    collected = merged(part for _, part in results)
    return Outcome(
        collected,
        {name: _statistics(intakes[name], part) for name, part in collected.items()},
        samples,
        sum(passed.batches for passed, _ in results),
        own.batches,
        own.stopped,
    )


def in_turn(feeder: Feeder, intakes: Mapping[str, Intake], first: Outcome, fate: Fate) -> Outcome:
    """One layer after the other collects, all normalizing as in evaluation.

    Args:
        feeder: Gives the batches, again for each layer.
        intakes: By name.
        first: What came out of `in_one_pass`: the order, the number of batches, and statistics for
            layers that run before their turn.
        fate: That of all ranks.

    Raises:
        ValueError: The batches are not as many as in the first pass, or make no statistics.
    """
    for name, (mean, var) in first.new.items():
        intakes[name].normalizes_by_batch = False
        intakes[name].normalize_by(mean, var)
    collected, new = {}, {}
    for name in first.new:
        intake = intakes[name]
        results = fate.share(_collect_one(feeder, intake, first))
        parts = merged({name: part} for part in results)
        if name not in parts:
            raise ValueError(f"recalibrate: layer {name!r} was reached in the first pass only.")
        collected[name] = parts[name]
        new[name] = _statistics(intake, parts[name])
        intake.normalize_by(*new[name])
    return replace(first, collected=collected, new=new)


def _collect_one(feeder: Feeder, intake: Intake, first: Outcome) -> Collected:
    intake.enough = intake.calls_of_every_batch()
    intake.clear()

    def end_batch() -> bool:
        intake.end_batch()
        return False

    with listening([intake]):
        passed = feeder.run(end_batch, first.own_batches)
    if passed.batches != first.own_batches:
        raise ValueError(
            f"recalibrate: batches gave {first.own_batches} batches in the first pass and "
            f"{passed.batches} in another; with sequential=True they must stay as many."
        )
    return intake.collected()


def _precise(intakes: Mapping[str, Intake], tolerance: float) -> bool:
    reached = [intake for intake in intakes.values() if intake.first_call >= 0]
    errors = [intake.standard_error() for intake in reached]
    return bool(errors) and all(error is not None and error < tolerance for error in errors)


def _statistics(intake: Intake, collected: Collected) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance, rounded once.

    Raises:
        ValueError: They are not finite.
    """
    layer, moments = intake.layer, collected.moments
    who = f"recalibrate: layer {intake.name!r} ({type(layer).__name__})"
    if moments.count == 1:
        raise ValueError(
            f"{who} got one value a channel in all, and one value has no variance; give more data."
        )
    if not (moments.mean.isfinite().all() and moments.var.isfinite().all()):
        raise ValueError(
            f"{who} got values that are not finite; the model is as it was. Look for NaN or "
            "infinity in the data, or in the weights before this layer."
        )
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean = moments.mean.to(layer.running_mean.dtype)
    var = unbiased_var(moments).to(layer.running_var.dtype)
    if not (mean.isfinite().all() and var.isfinite().all()):
        raise ValueError(
            f"{who} has statistics that are too large for {layer.running_var.dtype}; the model is "
            "as it was. Keep its buffers in float32."
        )
    return mean, var
