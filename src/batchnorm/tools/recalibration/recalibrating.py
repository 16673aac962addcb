"""`recalibrate`: selects the layers, isolates the model, and writes the new statistics."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.tools.patching import (
    COUNTER,
    Handle,
    LayerSelection,
    SavedBuffers,
    batch_norms,
    has_frozen_mark,
    has_running_statistics,
    is_batch_norm,
    pass_over,
    probe,
    statistics_of,
    temporary_attributes,
    unlike,
    warn,
    without_buffer_broadcast,
)
from batchnorm.tools.recalibration.collector import MomentCollector
from batchnorm.tools.recalibration.distributed import AllRanks, uninterrupted
from batchnorm.tools.recalibration.passes import (
    Feeder,
    Forward,
    Outcome,
    Progress,
    call,
    in_one_pass,
    layer_by_layer,
)
from batchnorm.tools.recalibration.result import LayerChange, Recalibration
from batchnorm.tools.wording import counted
from batchnorm.torch_internals import is_real


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    max_samples: int | None = None,
    tolerance: float | None = None,
    layers: LayerSelection = None,
    sequential: bool = False,
    progress: Progress | None = None,
) -> Recalibration:
    """Gives each layer the mean and variance that its input has in ``batches``, and nothing else.

    The moments of all batches are merged exactly in float64: batches weigh as much as they have
    values, and the spread between batches counts. Means go to ``running_mean``, unbiased variances
    to ``running_var``, each rounded once; ``num_batches_tracked`` becomes the number of calls that
    the layer saw, so that ``momentum=None`` goes on as an average over all of them. It takes one
    forward pass over the data without gradients.

    The result depends on how the layers *before* a layer normalize:

    - By default each normalizes by the moments of its current batch, as in training. Then nothing
      depends on the old statistics, and one pass serves all layers. The first layer gets exactly
      the moments of the data. Deeper ones get those of what training feeds them, with the noise of
      batches of this size, so use batches as large as in training, or larger. Where a batch has
      one value a channel, which training refuses, the layer normalizes by all that it has
      collected so far, that value included.
    - With ``sequential=True`` the layers are taken one by one, in the order in which they run, and
      all before them already normalize by their new statistics, as in evaluation. The result is
      that of the whole data at once, however it is split into batches. It takes a further pass for
      each layer. A pass ends at its layer, unless that is called a different number of times from
      batch to batch. A layer that runs again after others gets its later inputs under the
      statistics of the first pass of those.

    Frozen layers (in evaluation mode inside a model in training mode, or frozen by ``freeze``) are
    left alone. They, and layers that ``layers`` leaves out, normalize by their own statistics.
    Everything else keeps its mode: call ``model.eval()`` before, or dropout will be in the
    statistics. A model in evaluation mode has no frozen layers. A subclass must take its channels
    in dimension 1, as torch's layers do. Layers that only look like batch norm are recalibrated if
    they normalize by the batch in training and by their statistics in evaluation, which a copy of
    the layer is tried for; their channels may be in the last dimension, and their variance stays
    biased if they store that one. Code that ``torch.compile`` made is not used. A layer of bfloat16
    normalizes by moments rounded to bfloat16, as in evaluation.

    Where ``torch.distributed`` is initialized, all ranks call this, and get the moments of the data
    of all; a rank may have fewer batches, or none. No rank waits for another inside of a pass, so
    synchronized layers normalize by the batch of their rank. ``max_samples`` and ``tolerance`` are
    then for each rank. When one fails or is interrupted, all raise.

    Not thread-safe for the model: calls of it from other threads are not counted as data, but their
    results are meaningless, because the layers normalize by other statistics.

    Args:
        model: Any module.
        batches: Tensors; tuples or lists whose first element is the input; dicts of keyword
            arguments; or anything that ``forward`` takes. In random order, if not all are used.
        forward: ``forward(model, batch)``; None calls the model as said under ``batches``.
        max_samples: Stop with the batch that reaches this number, counted by dimension 0 of the
            first tensor of each batch.
        tolerance: Stop when the standard error of every channel's mean and variance, relative to
            the standard deviation and the variance, is below this, judged by the spread between
            the batches (see `collector.ChunkedMoments`); after 8 batches at least.
        layers: The layers (see `patching.LayerSelection`); None is all.
        sequential: Takes one layer after the other, with a pass over ``batches`` for each.
        progress: Called after each batch with the number of samples so far, over all passes.

    Returns:
        What changed; ``print`` shows it as a table.

    Raises:
        TypeError: ``model`` or ``batches`` is of a wrong type, or a batch is.
        ValueError: There is no data, values are not finite, a layer got one value in all, a name in
            ``layers`` fits nothing, a number makes no sense, or ranks do not ask for the same.
        RuntimeError: Another rank failed. After this and every other exception, also of the loader
            and the model, and after an interruption, the model is what it was, bit for bit.

    Warns:
        RuntimeWarning: Nothing was recalibrated, or a layer that looks like batch norm is passed
            over.

    Example:
        >>> import batchnorm
        >>> x = torch.arange(12.0).reshape(6, 2)
        >>> layer = nn.BatchNorm1d(2)
        >>> result = batchnorm.recalibrate(layer, x.split(4))
        >>> layer.running_mean
        tensor([5., 6.])
        >>> layer.running_var  # exactly x.var(0), though the batches have 4 and 2 samples
        tensor([14., 14.])
        >>> result.samples, result.batches
        (6, 2)

    Source:
        Wu and Johnson (2021), "Rethinking 'Batch' in BatchNorm", section 3, precise BN; here with
        the exact variance of the population and not the average of the batches'.
    """
    started = time.perf_counter()
    with AllRanks() as ranks:
        _check_numbers(max_samples, tolerance)
        _check_batches(batches, sequential=sequential)
        collectors, left, passed = _collectors(model, layers)
        _check_alike(ranks.share((tuple(collectors), sequential)))
        feeder = Feeder(model, batches, forward or call, max_samples, progress)
        outcome = Outcome()
        if collectors:
            with _isolated(model, collectors.values()):
                outcome = in_one_pass(feeder, collectors, tolerance, ranks)
                if sequential:
                    outcome = layer_by_layer(feeder, collectors, outcome, ranks)
        reached = [collector for name, collector in collectors.items() if name in outcome.new]
        changes = tuple(_change(collector, outcome) for collector in reached)
        with uninterrupted():
            _write(reached, outcome, ranks)
    if not reached and (collectors or left):  # Of those that are passed over a warning spoke.
        reasons = {**left, **dict.fromkeys(collectors, "no batch reached it")}
        name, reason = next(iter(reasons.items()))
        more = f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        warn(f"recalibrate: nothing was recalibrated; layer {name!r}: {reason}{more}.")
    return Recalibration(
        layers=changes,
        left={**left, **passed},
        unreached=tuple(name for name in collectors if name not in outcome.new),
        samples=outcome.samples,
        batches=outcome.batches,
        seconds=time.perf_counter() - started,
        stopped=outcome.own.stopped,
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
                f"rank {rank} has {_described(*other)}, but rank 0 has {_described(*of_ranks[0])}."
            )


def _described(names: tuple[str, ...], sequential: bool) -> str:
    return counted(len(names), "layer") + (" in sequence" if sequential else "")


def _collectors(
    model: nn.Module, layers: LayerSelection
) -> tuple[dict[str, MomentCollector], dict[str, str], dict[str, str]]:
    """Returns a collector for each layer to recalibrate, and the reason for each other one.

    The reasons of layers that it passes over with a warning come last.
    """
    collectors, left, passed = {}, {}, {}
    for name, layer in batch_norms(model, layers, caller="recalibrate").items():
        reason, behavior = _obstacle(model, layer), None
        if reason is None and not isinstance(layer, _BatchNorm):
            behavior = probe(layer)
            reason = behavior.evaluates_without_grad or behavior.trains
        if reason is None:
            _check_values(name, layer)
            collectors[name] = MomentCollector(
                name,
                layer,
                unbiased=behavior is None or behavior.stores_unbiased,
                channel_dim=1 if behavior is None else behavior.channel_dim,
            )
        else:
            (left if behavior is None else passed)[name] = reason
    pass_over(model, passed, layers, caller="recalibrate")
    if collectors:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if is_lazy(tensor):
                raise ValueError(
                    f"recalibrate: {name} is lazy and has no shape yet; call the model once before."
                )
    return collectors, left, {**passed, **unlike(model, layers)}


def _check_values(name: str, layer: nn.Module) -> None:
    if not all(map(is_real, statistics_of(layer).values())):
        raise ValueError(
            f"recalibrate: layer {name!r} ({type(layer).__name__}) is on the meta device or fake "
            "and has no values; load them first."
        )


def _obstacle(model: nn.Module, layer: nn.Module) -> str | None:
    if not has_running_statistics(layer):
        return "it keeps no running statistics"
    if has_frozen_mark(layer):
        return "it is frozen"
    if model.training and not layer.training:
        return "it is frozen: in evaluation mode inside a model in training mode"
    return None


def _isolated(model: nn.Module, collectors: Iterable[MomentCollector]) -> Handle:
    """Gives the collectors control of their layers, and protects all buffers of the model.

    The other batch norm layers that have running statistics normalize by them. Buffers of other
    modules may change (spectral norms, queues) and are restored. ``DistributedDataParallel`` sends
    no buffers around, for which every rank would have to run as many batches.
    """
    collectors = list(collectors)
    collecting = {id(collector.layer) for collector in collectors}
    others = [module for module in model.modules() if id(module) not in collecting]
    frozen = [m for m in others if is_batch_norm(m) and has_running_statistics(m)]
    with ExitStack() as stack:
        stack.callback(SavedBuffers(others).restore)
        stack.enter_context(temporary_attributes(frozen, training=False))
        stack.enter_context(without_buffer_broadcast(model))
        for collector in collectors:
            stack.enter_context(collector.using_own_buffers())
        if "torch._dynamo" in sys.modules:  # Compiled code does not see hooks that came later.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        return Handle(stack.pop_all().close)


def _change(collector: MomentCollector, outcome: Outcome) -> LayerChange:
    mean, var = outcome.new[collector.name]
    old_mean, old_var = (buffer.double().flatten().cpu() for buffer in collector.buffers)
    old = old_var + collector.eps
    shift = (mean.double() - old_mean).abs() / old.sqrt()
    ratio = (var.double() + collector.eps) / old
    collected = outcome.collected[collector.name]
    return LayerChange(
        name=collector.name,
        mean_shift=float(shift.mean()),
        mean_shift_max=float(shift.max()),
        var_ratio_min=float(ratio.min()),
        var_ratio_max=float(ratio.max()),
        values=int(collected.moments.count),
        calls=collected.calls,
        standard_error=collector.standard_error(),
    )


def _write(reached: list[MomentCollector], outcome: Outcome, ranks: AllRanks) -> None:
    """Writes all statistics on all ranks, or none."""
    before = SavedBuffers(collector.layer for collector in reached)
    try:
        for collector in reached:
            for buffer, value in zip(collector.buffers, outcome.new[collector.name], strict=True):
                buffer.detach().copy_(value.view_as(buffer))
            counter = getattr(collector.layer, COUNTER, None)
            if isinstance(counter, Tensor):
                counter.fill_(outcome.collected[collector.name].calls)
        ranks.agree()
    except BaseException:
        before.restore()
        raise
