"""Forwards whose statistics do not count: not at all, or only if the step turns out well.

`no_stats_update` is for passes that are known to be extra: SAM's second one, a probe, a GAN's
generator step through the discriminator. `transaction` is for steps that are judged afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.tools.patching.attributes import (
    FALSE_UNTIL_COPIED,
    temporary_attributes,
    without_buffer_broadcast,
)
from batchnorm.tools.patching.buffers import StandInBuffers
from batchnorm.tools.patching.selection import Choice, batch_norms

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


@contextmanager
def no_stats_update(model: nn.Module, layers: Choice = None) -> Iterator[None]:
    """Batch norm normalizes by the batch as always in training, and writes nothing.

    Running statistics and counters stay, bit for bit; outputs and gradients are those of training.
    ``torch.no_grad()`` does not do that: it stops gradients, not statistics. In evaluation nothing
    changes. Costs nothing a call. May be nested and entered by several threads. The layers are
    shared: they update again when the last one leaves, and a training step that another thread
    takes on the same model meanwhile moves no statistics either.

    It sets ``track_running_stats`` for a while, which all of torch's layers and ours ask for; a
    subclass with a forward of its own has to ask too. ``copy.deepcopy`` and pickle give a copy that
    updates as always; ``copy.copy`` of a layer shares its attributes, so set the flag of such a
    copy yourself. Where a part of the model is checkpointed, the backward belongs inside: torch
    wants the recomputation to be like the forward. ``DistributedDataParallel`` sends no buffers
    around meanwhile; give the wrapped model, and on all ranks.

    Args:
        model: Any module, also one wrapped in ``DistributedDataParallel`` or compiled.
        layers: Which of its batch norm layers; None for all.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A name fits no layer, or a layer is lazy.
    """
    chosen = batch_norms(model, layers, caller="no_stats_update").values()
    on = [layer for layer in chosen if layer.track_running_stats is not False]
    off = [layer for layer in chosen if layer.track_running_stats is False]
    with (
        temporary_attributes(on, track_running_stats=FALSE_UNTIL_COPIED),
        temporary_attributes(off, track_running_stats=False),
        without_buffer_broadcast(model),
    ):
        yield


class Transaction:
    """Decides about the statistics that have moved since the last `commit`, or the beginning."""

    def __init__(self, layers: Iterable[_BatchNorm]) -> None:
        self._stand_ins = StandInBuffers(layers)
        self._is_rolled_back = False
        self._is_over = False

    def commit(self) -> None:
        """Keeps what has moved so far, whatever comes.

        Raises:
            RuntimeError: The transaction is over.
        """
        self._check("commit")
        self._stand_ins.commit()
        self._is_rolled_back = False

    def rollback(self) -> None:
        """Puts back what has moved, now, and what moves after this, when the transaction ends.

        Raises:
            RuntimeError: The transaction is over.
        """
        self._check("rollback")
        self._stand_ins.rollback()
        self._is_rolled_back = True

    def _end(self, *, failed: bool) -> None:
        self._stand_ins.end(commit=not (failed or self._is_rolled_back))
        self._is_over = True

    def _check(self, what: str) -> None:
        if self._is_over:
            raise RuntimeError(
                f"transaction: {what}() came after the end; call it inside the with statement."
            )


@contextmanager
def transaction(model: nn.Module, layers: Choice = None) -> Iterator[Transaction]:
    """Keeps or puts back the running statistics and counters that a step moves.

    Leaving keeps them, unless `Transaction.rollback` was called; an exception puts them back. They
    come back bit for bit. May be nested: an outer one also takes back what an inner one kept.

    It costs a copy of the statistics, which the layers work on meanwhile. Their own buffers, and
    whatever refers to them from outside, see nothing before a commit or the end, when the values
    are written into them. So nothing that autograd saved changes at a rollback: gradients are right
    afterwards, be it in training or in evaluation, of forwards before and inside. What is kept is
    like any training step: torch's backward of an *evaluation* before it reads the statistics of
    after it; ours does not. A captured CUDA graph writes past the copies.

    A step that ``GradScaler`` skips, because it overflowed::

        with transaction(model) as step:
            scaler.scale(loss(model(x), y)).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() < before:
                step.rollback()

    SAM: a second pass at other weights does not count (`no_stats_update` does the same without a
    copy)::

        loss(model(x), y).backward()
        ascend()
        with transaction(model) as second:
            loss(model(x), y).backward()
            second.rollback()

    Meta-learning: an episode leaves nothing behind::

        for task in tasks:
            with transaction(learner) as episode:
                adapt_and_evaluate(learner, task)
                episode.rollback()

    A GAN's discriminator in the generator's step::

        with transaction(discriminator) as second:
            loss(discriminator(generator(noise))).backward()
            second.rollback()

    Args:
        model: Any module.
        layers: Which of its batch norm layers; None for all.

    Yields:
        The transaction, to call ``rollback()`` or ``commit()`` on.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A name fits no layer, or a layer is lazy.
        RuntimeError: A layer is in a transaction of another thread, whose statistics could not be
            told from this one's.
    """
    chosen = batch_norms(model, layers, caller="transaction")
    with _alone(chosen):
        step = Transaction(chosen.values())
        try:
            yield step
        except BaseException:
            step._end(failed=True)
            raise
        step._end(failed=False)


@contextmanager
def _alone(layers: dict[str, _BatchNorm]) -> Iterator[None]:
    """Holds each layer's lock, which a thread may take several times."""
    with ExitStack() as held:
        for name, layer in layers.items():
            lock = _locks.setdefault(layer, threading.RLock())
            if not lock.acquire(blocking=False):
                raise RuntimeError(
                    f"transaction: layer {name!r} ({type(layer).__name__}) is in a transaction of "
                    "another thread, and a rollback would mix up the statistics of both; let that "
                    "one end first."
                )
            held.callback(lock.release)
        yield
