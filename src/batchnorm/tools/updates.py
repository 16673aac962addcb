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

from batchnorm.tools.surgery.changes import Statistics, changed
from batchnorm.tools.surgery.selection import Choice, batch_norms

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


@contextmanager
def no_stats_update(model: nn.Module, layers: Choice = None) -> Iterator[None]:
    """Batch norm normalizes by the batch as always in training, and writes nothing.

    Running statistics and counters stay, bit for bit; outputs and gradients are those of training.
    ``torch.no_grad()`` does not do that: it stops gradients, not statistics. In evaluation nothing
    changes. May be nested and entered by several threads: the layers are shared, so they update
    again when the last one leaves. Costs nothing a call.

    It sets ``track_running_stats`` for a while, which all of torch's layers and ours ask for; a
    subclass with a forward of its own has to ask too. Where a part of the model is checkpointed,
    the backward belongs inside: torch wants the recomputation to be like the forward.

    Args:
        model: Any module, also one wrapped in ``DistributedDataParallel`` or compiled.
        layers: Which of its batch norm layers; None for all.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A name fits no layer, or a layer is lazy.
    """
    chosen = batch_norms(model, layers, caller="no_stats_update")
    with changed(chosen.values(), track_running_stats=False):
        yield


class Transaction:
    """Decides about the statistics that have moved since the last `commit`, or the beginning."""

    def __init__(self, layers: Iterable[_BatchNorm]) -> None:
        self._layers = list(layers)
        self._before = Statistics(self._layers)
        self._is_rolled_back = False
        self._is_over = False

    def commit(self) -> None:
        """Keeps what has moved so far, whatever comes.

        Raises:
            RuntimeError: The transaction is over.
        """
        self._check("commit")
        self._before = Statistics(self._layers)
        self._is_rolled_back = False

    def rollback(self) -> None:
        """Puts back what has moved, now, and what moves after this, when the transaction ends.

        Raises:
            RuntimeError: The transaction is over.
        """
        self._check("rollback")
        self._before.put_back()
        self._is_rolled_back = True

    def _end(self, *, failed: bool) -> None:
        if failed or self._is_rolled_back:
            self._before.put_back()
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
    come back bit for bit, and a backward after that still works. It costs a copy of the
    statistics. May be nested: an outer one also takes back what an inner one kept.

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
