"""Forwards whose statistics do not count: never, or only if the step turns out well.

`no_stats_update` is for passes that are known to be extra: SAM's second one, a probe, a GAN's
generator step through the discriminator. `transaction` is for steps that are judged afterwards.
Both return a handle: they end with its ``with`` block, or with ``remove()``.
"""

from __future__ import annotations

import copy
import threading
from contextlib import ExitStack
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.tools.patching import (
    FALSE_UNTIL_COPIED,
    Handle,
    LayerSelection,
    StandInBuffers,
    add_follower,
    batch_norms,
    is_temporary,
    remove_follower,
    temporary_attributes,
    without_buffer_broadcast,
    work_on_copies,
)


def no_stats_update(model: nn.Module, layers: LayerSelection = None) -> Handle:
    """Lets batch norm normalize by the batch, as in training, without writing anything.

    Running statistics and counters stay, bit for bit; outputs and gradients are those of training.
    ``torch.no_grad()`` does not do that: it stops gradients, not statistics. In evaluation nothing
    changes. A call costs nothing extra. Several of these may overlap, nested or in several threads.
    The layers are shared: they update again when the last handle is removed, and until then a
    training step of another thread on the same model moves no statistics either.

    It sets ``track_running_stats``, which torch's layers and ours read; a subclass with a forward
    of its own must read it, too. Layers that only look like batch norm work on copies of their
    buffers and tensor attributes, which are dropped; a Python number that they count in stays
    moved. A layer that is rebuilt in between does not update either, and does so again at the end.
    ``copy.deepcopy`` and pickle give a copy that updates as always; ``copy.copy`` of a layer shares
    its attributes, so set the flag of such a copy yourself.
    Where a part of the model is checkpointed, run the backward inside too: torch requires that the
    recomputation be like the forward. ``DistributedDataParallel`` sends no buffers to other ranks;
    pass the wrapped model, on all ranks.

    Args:
        model: Any module, also one wrapped in ``DistributedDataParallel`` or compiled.
        layers: The layers that stop updating; None for all.

    Returns:
        A handle; the layers update again after its ``with`` block, or its ``remove()``.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A name fits no layer, or a layer is lazy.

    Warns:
        RuntimeWarning: There is no batch norm layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import no_stats_update
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> with no_stats_update(model):
        ...     y = model(torch.randn(8, 4))
        >>> int(model[1].num_batches_tracked)
        0
    """
    chosen = batch_norms(model, layers, caller="no_stats_update").values()
    with ExitStack() as stack:
        paused = _Paused()
        stack.callback(paused.end)
        for layer in chosen:
            paused.pause(layer)
        stack.enter_context(without_buffer_broadcast(model))
        return Handle(stack.pop_all().close)


class _Paused:
    """Layers that do not update, and those that are rebuilt from them."""

    tool = "no_stats_update"

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._layers: WeakSet[nn.Module] = WeakSet()

    def pause(self, layer: nn.Module) -> None:
        """Stops the updates of a layer until `end`."""
        self._layers.add(layer)
        if not isinstance(layer, _BatchNorm):
            self._stack.enter_context(work_on_copies([layer]))
            return
        off = False if layer.track_running_stats is False else FALSE_UNTIL_COPIED
        self._stack.enter_context(temporary_attributes([layer], track_running_stats=off))
        add_follower([layer], self)

    def follow(self, old: nn.Module, new: nn.Module) -> None:
        """Stops a layer that was built with a flag that is off only for now."""
        if new in self._layers:
            return
        if isinstance(new, _BatchNorm) and not is_temporary(new, "track_running_stats"):
            new.track_running_stats = bool(copy.copy(old.track_running_stats))
        self.pause(new)

    def end(self) -> None:
        """Lets the layers update again."""
        remove_follower(self)
        self._stack.close()


def transaction(model: nn.Module, layers: LayerSelection = None) -> Transaction:
    """Keeps the running statistics and counters that a step moves, or rolls them back.

    The end of the ``with`` block, or ``remove()``, keeps them, unless `Transaction.rollback` was
    called; an exception rolls them back, bit for bit. Transactions may be nested: an outer one also
    rolls back what an inner one kept.

    The layers work on copies of their statistics inside; `Transaction.commit` and the end write the
    values into their own buffers. A rollback changes nothing that autograd has saved, so gradients
    of forward passes before and inside stay right. What is kept acts like any training step: with
    torch's layers, which save the buffers themselves, the backward pass of an *evaluation* that ran
    before the transaction then reads the new statistics; our layers save copies. A CUDA graph
    captured before writes into the layers' own buffers and cannot be rolled back, nor can a Python
    number in which a layer that only looks like batch norm counts.

    A step that ``GradScaler`` skips, because it overflowed::

        with transaction(model) as step:
            scaler.scale(loss(model(x), y)).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() < before:
                step.rollback()

    For a pass that never counts, such as the second one of SAM, `no_stats_update` does without a
    copy. In meta-learning, an episode leaves nothing behind::

        for task in tasks:
            with transaction(learner) as episode:
                adapt_and_evaluate(learner, task)
                episode.rollback()

    Args:
        model: Any module.
        layers: The layers whose statistics are decided about; None for all.

    Returns:
        A handle with ``rollback()`` and ``commit()``.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A name fits no layer, or a layer is lazy.
        RuntimeError: A layer is in a transaction of another thread, whose statistics could not be
            told from this one's.

    Warns:
        RuntimeWarning: There is no batch norm layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import transaction
        >>> layer = nn.BatchNorm1d(4)
        >>> with transaction(layer) as step:
        ...     loss = layer(torch.full((8, 4), torch.inf)).sum()
        ...     if not loss.isfinite():
        ...         step.rollback()
        >>> layer.running_mean
        tensor([0., 0., 0., 0.])
    """
    return Transaction(batch_norms(model, layers, caller="transaction"))


class Transaction(Handle):
    """Decides about the statistics that have moved since the last `commit`, or the beginning.

    Args:
        layers: The layers by name.

    Raises:
        RuntimeError: A layer is in a transaction of another thread.
    """

    tool = "transaction"

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        _claim(layers, self)
        try:
            self._stand_ins = StandInBuffers(layers.values())
            add_follower(layers.values(), self)
        except BaseException:
            _release(layers)
            raise
        super().__init__(lambda: _release(layers), self._end)
        self._layers = layers
        self._is_rolled_back = False
        self._is_over = False

    def commit(self) -> None:
        """Keeps what has moved so far, also if the step fails later.

        Raises:
            RuntimeError: The transaction is over.
        """
        self._check("commit")
        self._stand_ins.commit()
        self._is_rolled_back = False

    def rollback(self) -> None:
        """Restores the statistics now, and again at the end.

        Later forward passes in the transaction do not count either, unless `commit` is called.

        Raises:
            RuntimeError: The transaction is over.
        """
        self._check("rollback")
        self._stand_ins.rollback()
        self._is_rolled_back = True

    def remove(self) -> None:
        """Ends the transaction; a second call does nothing.

        Raises:
            RuntimeError: One that began later on the same layers is still open.
        """
        if not self._is_over:
            for name, layer in self._layers.items():
                if _claims[layer][-1][1] is not self:
                    raise RuntimeError(
                        f"transaction: layer {name!r} ({type(layer).__name__}) is in a later "
                        "transaction that is still open; end that one first."
                    )
        super().remove()

    def follow(self, old: nn.Module, new: nn.Module) -> None:
        """Decides about a layer, too, that was rebuilt from one of these."""
        self._stand_ins.follow(old, new)

    def _fail(self, error: BaseException) -> None:
        self._is_rolled_back = True

    def _end(self) -> None:
        self._is_over = True
        remove_follower(self)
        self._stand_ins.end(commit=not self._is_rolled_back)

    def _check(self, action: str) -> None:
        if self._is_over:
            raise RuntimeError(
                f"transaction: {action}() came after the end; call it inside the with statement."
            )


_claims: WeakKeyDictionary[nn.Module, list[tuple[int, Transaction]]] = WeakKeyDictionary()
"""The open transactions of a layer with their threads, the newest last."""
_lock = threading.Lock()


def _claim(layers: dict[str, nn.Module], owner: Transaction) -> None:
    """Claims all layers for this thread, or none."""
    thread = threading.get_ident()
    with _lock:
        for name, layer in layers.items():
            if layer in _claims and _claims[layer][-1][0] != thread:
                raise RuntimeError(
                    f"transaction: layer {name!r} ({type(layer).__name__}) is in a transaction of "
                    "another thread, and a rollback would mix up the statistics of both; let that "
                    "one end first."
                )
        for layer in layers.values():
            _claims.setdefault(layer, []).append((thread, owner))


def _release(layers: dict[str, nn.Module]) -> None:
    with _lock:
        for layer in layers.values():
            claims = _claims[layer]
            claims.pop()
            if not claims:
                del _claims[layer]
