"""`recalibrate`: what collects, what stands still meanwhile, and what is written at the end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.tools.patching import Choice, Statistics, batch_norms, is_held, keeps_statistics
from batchnorm.tools.recalibration.feeding import Feeder, Forward, Progress
from batchnorm.tools.recalibration.intake import Intake
from batchnorm.tools.recalibration.passes import Outcome, in_one_pass, in_turn
from batchnorm.tools.recalibration.ranks import Fate, uninterrupted
from batchnorm.tools.recalibration.result import LayerChange, Recalibration
from batchnorm.tools.recalibration.standstill import standstill


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    max_samples: int | None = None,
    tolerance: float | None = None,
    layers: Choice = None,
    sequential: bool = False,
    progress: Progress | None = None,
) -> Recalibration:
    """Gives each layer the mean and variance that its input has in ``batches``, and nothing else.

    The moments of all batches are merged exactly in float64: batches weigh as much as they have
    values, and the spread between batches counts. Means go to ``running_mean``, unbiased variances
    to ``running_var``, each rounded once; ``num_batches_tracked`` becomes the number of calls that
    the layer saw, so that ``momentum=None`` goes on as an average over all of them. One forward
    pass over the data without gradients, in which statistics are summed once and not twice.

    What a layer gets depends on how the layers before it normalize:

    - By default each normalizes by the moments of the batch at hand, as in training. Then nothing
      depends on the old statistics, and one pass serves all layers. The first layer gets exactly
      the moments of the data; deeper ones get those of what training feeds them, with the noise
      of batches of this size, so use batches as large as in training, or larger. Where a batch has
      one value a channel, which training refuses, the layer normalizes by all that it has
      collected so far, that value included.
    - With ``sequential=True`` the layers are taken one by one, in the order in which they run, and
      all before them already normalize by their new statistics, as in evaluation. The result is
      that of the whole data at once, however it is split into batches: what evaluation feeds each
      layer. It takes a further pass for each layer; a pass ends at its layer, unless that is called
      a different number of times from batch to batch. A layer that runs again after others gets its
      later inputs under the statistics of the first pass of those.

    Frozen layers (in evaluation mode inside a model in training mode, or held by ``freeze``) are
    left alone. They, and layers that ``layers`` leaves out, normalize by their own statistics.
    Everything else keeps its mode: call ``model.eval()`` before, or dropout will be in the
    statistics. A model in evaluation mode has no frozen layers. A subclass must take its channels
    in dimension 1, as torch's layers do. ``torch.compile`` is set aside meanwhile. A layer of
    bfloat16 normalizes by moments rounded to bfloat16, as in evaluation.

    Where ``torch.distributed`` is initialized, all ranks call this, and get the moments of the data
    of all; a rank may have fewer batches, or none. No rank waits for another inside of a pass, so
    synchronized layers normalize by the batch of their rank. ``max_samples`` and ``tolerance`` are
    then for each rank. When one fails or is interrupted, all raise.

    Calls from other threads than the one that calls this are not counted as data. They still get
    in the meantime what the layers normalize by just then, so their results are worth nothing.

    Args:
        model: Any module; not used by others meanwhile.
        batches: Tensors; tuples or lists whose first element is the input; dicts of keyword
            arguments; or anything that ``forward`` takes. In random order, if not all are used.
        forward: ``forward(model, batch)``; None calls the model as said under ``batches``.
        max_samples: Stop with the batch that reaches this number, counted by dimension 0 of the
            first tensor of each batch.
        tolerance: Stop when the standard error of every channel's mean and variance, relative to
            the standard deviation and the variance, is below this, judged by the spread between
            the batches (see `precision.Chunks`); after 8 batches at least.
        layers: Which (see `patching.Choice`); None is all.
        sequential: One layer after the other; ``batches`` is then gone through several times.
        progress: Called after each batch with the number of samples so far, over all passes.

    Returns:
        What changed.

    Raises:
        TypeError: ``model`` or ``batches`` is of a wrong type, or a batch is.
        ValueError: There is no data, values are not finite, a layer got one value in all, a name in
            ``layers`` fits nothing, a number makes no sense, or ranks do not ask for the same.
        RuntimeError: Another rank failed. After this and every other exception, also of the loader
            and the model, and after an interruption, the model is what it was, bit for bit.

    Source:
        Wu and Johnson (2021), "Rethinking 'Batch' in BatchNorm", section 3, precise BN; here with
        the exact variance of the population and not the average of the batches'.
    """
    started = time.perf_counter()
    with Fate() as fate:
        _check_numbers(max_samples, tolerance)
        _check_batches(batches, sequential=sequential)
        intakes, left = _intakes(model, layers)
        _check_alike(fate.share((tuple(intakes), sequential)))
        feeder = Feeder(model, batches, forward, max_samples, progress)
        outcome = Outcome()
        if intakes:
            with standstill(model, intakes):
                outcome = in_one_pass(feeder, intakes, tolerance, fate)
                if sequential:
                    outcome = in_turn(feeder, intakes, outcome, fate)
        changes = tuple(_change(intakes[name], outcome) for name in intakes if name in outcome.new)
        with uninterrupted():
            _write({name: intakes[name].layer for name in outcome.new}, outcome, fate)
    return Recalibration(
        layers=changes,
        left=left,
        unreached=tuple(name for name in intakes if name not in outcome.new),
        samples=outcome.samples,
        batches=outcome.batches,
        seconds=time.perf_counter() - started,
        stopped=outcome.stopped,
        sequential=sequential,
    )


def _check_numbers(max_samples: int | None, tolerance: float | None) -> None:
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"recalibrate: max_samples must be at least 1, got {max_samples}.")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"recalibrate: tolerance must be between 0 and 1, got {tolerance}.")


def _check_batches(batches: object, *, sequential: bool) -> None:
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"recalibrate: batches must be several batches, got one {type(batches).__name__}; "
            "give a DataLoader or a list of batches."
        )
    if sequential and isinstance(batches, Iterator):
        raise ValueError(
            "recalibrate: sequential=True goes through the batches once a layer, and a "
            f"{type(batches).__name__} gives them only once; give a DataLoader or a list."
        )


def _check_alike(of_ranks: list[tuple[tuple[str, ...], bool]]) -> None:
    for rank, other in enumerate(of_ranks):
        if other != of_ranks[0]:
            raise ValueError(
                "recalibrate: all ranks must give the same layers and the same sequential, and "
                f"rank {rank} differs from rank 0 with {_described(*other)} against "
                f"{_described(*of_ranks[0])}."
            )


def _described(names: tuple[str, ...], sequential: bool) -> str:
    return f"{len(names)} layers" + (", sequential" if sequential else "")


def _intakes(model: nn.Module, layers: Choice) -> tuple[dict[str, Intake], dict[str, str]]:
    """The layers that collect, and the others of those that were asked for, with the reason."""
    intakes, left = {}, {}
    for name, layer in batch_norms(model, layers, caller="recalibrate").items():
        reason = _obstacle(model, layer)
        if reason is None:
            intakes[name] = Intake(name, layer)
        else:
            left[name] = reason
    if intakes:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if is_lazy(tensor):
                raise ValueError(
                    f"recalibrate: {name} is lazy and has no shape yet; call the model once before."
                )
    return intakes, left


def _obstacle(model: nn.Module, layer: _BatchNorm) -> str | None:
    if not keeps_statistics(layer):
        return "it keeps no running statistics"
    if is_held(layer):
        return "it is frozen"
    if model.training and not layer.training:
        return "it is frozen: in evaluation mode inside a model in training mode"
    return None


def _change(intake: Intake, outcome: Outcome) -> LayerChange:
    layer, (mean, var) = intake.layer, outcome.new[intake.name]
    assert layer.running_mean is not None
    assert layer.running_var is not None
    old = layer.running_var.double().cpu() + layer.eps
    shift = (mean.double() - layer.running_mean.double().cpu()).abs() / old.sqrt()
    ratio = (var.double() + layer.eps) / old
    collected = outcome.collected[intake.name]
    return LayerChange(
        name=intake.name,
        mean_shift=float(shift.mean()),
        mean_shift_max=float(shift.max()),
        var_ratio_min=float(ratio.min()),
        var_ratio_max=float(ratio.max()),
        values=int(collected.moments.count),
        calls=collected.calls,
        standard_error=intake.standard_error(),
    )


def _write(layers: Mapping[str, _BatchNorm], outcome: Outcome, fate: Fate) -> None:
    """Writes all on all ranks, or nothing."""
    before = Statistics(layers.values())
    try:
        for name, layer in layers.items():
            assert layer.running_mean is not None
            assert layer.running_var is not None
            mean, var = outcome.new[name]
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(outcome.collected[name].calls)
        fate.agree()
    except BaseException:
        before.put_back()
        raise
