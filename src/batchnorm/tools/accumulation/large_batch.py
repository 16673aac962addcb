"""``accumulate``: the gradient of a large batch with the memory of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import functional
from batchnorm.moments import Moments, merge
from batchnorm.tools.accumulation.calls import Call, Reached, Replay, normalizes_by_batch
from batchnorm.tools.accumulation.commit import commit
from batchnorm.tools.accumulation.micro_batches import Count, MicroBatch, micro_batches
from batchnorm.tools.surgery import Choice, Statistics, batch_norms, changed, keeps_statistics

Loss = Callable[[Any, Any], Tensor]
_SAME = 1e-3  # of a standard deviation: how far a recomputed mean may be from the first one


@dataclass(frozen=True)
class Accumulation:
    """What `accumulate` did; ``str()`` of it is a sentence.

    Attributes:
        loss: Mean loss of the large batch.
        micro_batches: How many there were.
        calls: Names of the layers that were called in training, in that order.
        forwards: Forward passes of micro-batches, whole ones and parts.
        backwards: Backward passes of micro-batches, whole ones and parts.
        kept_out: Names of the layers whose running statistics the large batch would have made inf
            or NaN, so that they and their counters are as before.
    """

    loss: float
    micro_batches: int
    calls: tuple[str, ...]
    forwards: int
    backwards: int
    kept_out: tuple[str, ...]

    def __str__(self) -> str:
        done = (
            f"Loss {self.loss:.6g} of {self.micro_batches} micro-batches as one batch: "
            f"{len(self.calls)} calls of batch norm,\n{self.forwards} forward and "
            f"{self.backwards} backward passes, most of them in part."
        )
        if not self.kept_out:
            return done
        layers = ", ".join(name or "the model itself" for name in self.kept_out)
        return f"{done}\nNot finite, so these layers' statistics are as before: {layers}."

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def accumulate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    count: Count | None = None,
    layers: Choice = None,
) -> Accumulation:
    r"""One backward pass of a large batch that is given in parts.

    Plain accumulation normalizes every micro-batch by itself. Here all of them are normalized by
    the moments of their union, and the gradients go through these moments, as if the parts had been
    concatenated: ``.grad`` gets what the large batch gives, the running statistics move once, the
    counters by one a call. Exact up to rounding. Gradients are summed in float32 at least.

    How: first the statistics, layer by layer: each pass stops at the first call whose statistics
    are not known. Then the loss, with all statistics :math:`s_l` as independent variables. Then,
    from the last call to the first, the derivative :math:`\lambda_l` of the loss by :math:`s_l`
    goes back through the forward pass up to call :math:`l`, to the parameters and to the
    statistics before.

    Cost: with :math:`f_l` the share of the forward pass that comes before call :math:`l`,
    :math:`(1 + \sum_l f_l)` forward and backward passes of the large batch, and
    :math:`\sum_l f_l` forward passes without gradients. As backward costs about two forwards, that
    is :math:`3 + 4 \sum_l f_l` forwards instead of 3: about :math:`3 + 2 L` for L calls that are
    spread evenly. Measured on a CPU (``benchmarks/accumulation_cost.py``): 7 times as long as plain
    accumulation for LeNet with its 4 calls, 14 times for ResNet-18 with its 20. Memory: the graph
    of one micro-batch, the inputs of all, a second set of gradients and, at the end, a third.

    Layers that are frozen (``eval()``) or not chosen stay what they are; the latter then normalize
    each micro-batch by itself. Random numbers of torch (CPU and CUDA) are the same in every pass
    over a micro-batch. Other buffers that a forward pass changes are as after the last micro-batch
    alone. Hooks run in every pass. Only parameters of ``model`` get gradients.

    A large batch that is not finite still gives its gradients, which ``GradScaler`` then refuses;
    but it does not move running statistics that it would make inf or NaN, nor their counters,
    whether a guard stands there or not, and the result names those layers. A guard does not count
    it.

    Meanwhile the model is this thread's alone: a call of a chosen layer from another thread raises
    a RuntimeError there, changes nothing, and does no harm here.

    Args:
        model: Called only by ``loss``.
        batches: The micro-batches, of any sizes; one sample is enough. All are kept while this
            runs.
        loss: ``loss(model, batch)`` runs the model on a micro-batch and returns its *mean* loss, a
            scalar.
        count: Weight of a micro-batch in the mean over all: how many of what its loss is a mean
            over. None takes the length of its first tensor, the number of samples.
        layers: Which layers see the large batch.

    Returns:
        The mean loss and what it took.

    Raises:
        TypeError: A micro-batch has no tensor and there is no ``count``, the loss is no tensor, or
            a layer is called without one.
        ValueError: There is no micro-batch, one counts for nothing, a channel has one value, or a
            layer has neither a momentum nor a counter.
        RuntimeError: The calls are not the same in every pass, what they get is not, the loss has
            no gradient, a layer is synchronized over processes, or the model is compiled or
            wrapped for parallel training. After any error, gradients and buffers are as before.

    Source:
        The adjoint method, with the statistics as the states. PyTorch has no such thing
        (https://github.com/pytorch/pytorch/issues/46516).
    """
    found = batch_norms(model, layers, caller="accumulate")
    chosen = {name: layer for name, layer in found.items() if normalizes_by_batch(layer)}
    _check_supported(model, chosen)
    parts = micro_batches(batches, count)
    return _LargeBatch(model, chosen, parts, loss).differentiated()


def _check_supported(model: nn.Module, layers: dict[str, _BatchNorm]) -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    for name, layer in layers.items():
        tracked = layer.training and layer.track_running_stats and keeps_statistics(layer)
        if tracked and layer.momentum is None and layer.num_batches_tracked is None:
            raise ValueError(
                f"accumulate: layer {name!r} has momentum=None (the cumulative average) and no "
                "num_batches_tracked to divide by; give it a momentum between 0 and 1, or a "
                "counter."
            )
        if isinstance(layer, nn.SyncBatchNorm) and distributed:
            raise RuntimeError(
                f"accumulate: layer {name!r} is a SyncBatchNorm in a process group, and its large "
                "batch would be that of one process; convert it to a BatchNorm first."
            )
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    for module in model.modules():
        if isinstance(module, wrappers):
            raise RuntimeError(
                f"accumulate: cannot see into {type(module).__name__}; give its .module, and "
                "average the gradients over the processes afterwards."
            )
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise RuntimeError(
                f"accumulate: cannot stop inside a compiled {type(module).__name__}; give the "
                "model as it was before torch.compile."
            )


class _LargeBatch:
    """The passes over the micro-batches, and what they add up to."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, _BatchNorm],
        parts: list[MicroBatch],
        loss: Loss,
    ) -> None:
        self._model, self._parts, self._loss = model, parts, loss
        self._replay = Replay(layers)
        chosen = set(layers.values())
        modules = list(model.modules())
        others = [module for module in modules if not isinstance(module, _BatchNorm)]
        self._plain = [m for m in modules if isinstance(m, _BatchNorm) and m not in chosen]
        self._before = Statistics(modules)
        self._others, self._others_before = others, Statistics(others)
        self._versions = {name: _versions(layer) for name, layer in layers.items()}
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients: list[Tensor | None] = [None] * len(self._parameters)
        self._forwards = self._backwards = 0

    def differentiated(self) -> Accumulation:
        """All passes; then, and only then, gradients and statistics are written."""
        try:
            with self._replay.listening():
                with changed(self._plain, track_running_stats=False):
                    while self._find_next_statistics():
                        pass
                loss = self._differentiate_loss()
                after = Statistics(self._others)
                with changed(self._plain, track_running_stats=False):
                    for place in reversed(range(len(self._replay.calls))):
                        self._differentiate_statistics(place)
            after.put_back()
            self._check_only_called()
            value = float(loss)
            kept_out = commit(self._parameters, self._gradients, self._replay.calls)
        except BaseException:
            self._before.put_back()
            raise
        calls = tuple(call.name for call in self._replay.calls)
        return Accumulation(
            value, len(self._parts), calls, self._forwards, self._backwards, kept_out
        )

    @contextmanager
    def _run(self, part: MicroBatch, stop_at: int | None) -> Iterator[Any]:
        """One forward pass and what comes after it, with everything random as it was before."""
        self._others_before.put_back()
        self._forwards += 1
        with part.repeated():
            yield self._replay.run(lambda: self._loss(self._model, part.batch), stop_at)

    @torch.no_grad()
    def _find_next_statistics(self) -> bool:
        found: list[Call] = []
        for part in self._parts:
            with self._run(part, len(self._replay.calls)) as reached:
                if not isinstance(reached, Reached):
                    if not found:
                        return False
                    raise _not_alike(found[0].name, part, "has no such call")
                if found and reached.layer is not found[0].layer:
                    raise _not_alike(found[0].name, part, f"calls {reached.name!r} instead")
                found.append(Call(reached.name, reached.layer, functional.moments(reached.x)))
                del reached
        self._replay.calls.append(_together(found))
        return True

    def _differentiate_loss(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for part in self._parts:
            with self._run(part, None) as value:
                _check_loss(value)
                total += part.share * value.detach().double().cpu().squeeze()
                share = torch.full_like(value, part.share)
                self._add_gradients(value, share, self._replay.calls)
        return total

    def _differentiate_statistics(self, place: int) -> None:
        call, earlier = self._replay.calls[place], self._replay.calls[:place]
        if call.grad_mean is None or call.grad_var is None:
            return
        count, mean = call.moments.count, call.moments.mean
        slope, level = 2 * call.grad_var / count, call.grad_mean / count
        ones, again = torch.ones_like(mean), []
        for part in self._parts:
            with self._run(part, place) as reached:
                if not reached.x.requires_grad:
                    return
                x = reached.x.detach()
                again.append(functional.moments(x))
                # slope * (x - mean) + level
                grad_x = functional.batch_norm(x, mean, ones, slope, level, eps=0.0)
                self._add_gradients(reached.x, grad_x, earlier)
                del reached, x, grad_x
        _check_same(call, merge(*again))

    def _add_gradients(self, output: Tensor, grad_output: Tensor, calls: list[Call]) -> None:
        leaves = [leaf for call in calls for leaf in (call.mean, call.var)]
        wanted = [*self._parameters, *leaves]
        found = torch.autograd.grad(output, wanted, grad_output, allow_unused=True)
        self._backwards += 1
        size = len(self._parameters)
        self._gradients = [*map(_sum, self._gradients, found[:size])]
        pairs = zip(found[size::2], found[size + 1 :: 2], strict=True)
        for call, (grad_mean, grad_var) in zip(calls, pairs, strict=True):
            call.grad_mean = _sum(call.grad_mean, grad_mean)
            call.grad_var = _sum(call.grad_var, grad_var)

    def _check_only_called(self) -> None:
        for name, versions in self._versions.items():
            if _versions(self._replay.layers[name]) != versions:
                raise RuntimeError(
                    f"accumulate: something moved the statistics of layer {name!r} without calling "
                    "the layer; call it as a module, not its forward."
                )


def _versions(layer: _BatchNorm) -> list[int]:
    return [buffer._version for buffer in layer.buffers(recurse=False)]


def _sum(total: Tensor | None, new: Tensor | None) -> Tensor | None:
    """The sum in float32 at least; None is zero."""
    if new is None:
        return total
    if total is None:
        return new.to(torch.promote_types(new.dtype, torch.float32), copy=True)
    return total.add_(new)


def _together(parts: list[Call]) -> Call:
    """One call of the large batch from the same call in every micro-batch."""
    name, moments = parts[0].name, merge(*(part.moments for part in parts))
    if moments.count < 2:
        raise ValueError(
            f"accumulate: layer {name!r} needs more than one value per channel, all micro-batches "
            f"together have {moments.count}."
        )
    return Call(name, parts[0].layer, moments)


def _check_loss(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"accumulate: loss must return a tensor with one number, the mean loss, got {shape}."
        )
    if not value.requires_grad:
        raise RuntimeError(
            "accumulate: the loss has no gradient; call accumulate with gradients enabled, and let "
            "the loss depend on parameters that require them."
        )


def _check_same(call: Call, again: Moments) -> None:
    """Every pass must see what the first one saw, or the gradient is of something else."""
    mean, var = call.moments.mean, call.moments.var
    allowed = _SAME * (var + call.layer.eps).sqrt() + 1e-6 * mean.abs()
    if bool(((again.mean - mean).abs() > allowed).any()):
        raise RuntimeError(
            f"accumulate: the input of layer {call.name!r} is not the same when it is recomputed; "
            "the model uses random numbers that are not torch's, or a state that is no buffer."
        )


def _not_alike(name: str, part: MicroBatch, what: str) -> RuntimeError:
    return RuntimeError(
        f"accumulate: micro-batch 0 calls layer {name!r}, micro-batch {part.number} {what}; every "
        "micro-batch must call the same layers in the same order."
    )
