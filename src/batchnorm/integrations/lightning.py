"""``BatchNormCallback`` for Lightning's ``Trainer``, of ``lightning`` or ``pytorch_lightning``."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import nn

from batchnorm.integrations.training import TrainingTools

if TYPE_CHECKING or find_spec("lightning"):
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
elif find_spec("pytorch_lightning"):
    from pytorch_lightning import Callback
    from pytorch_lightning.utilities import CombinedLoader, rank_zero_info
else:
    raise ModuleNotFoundError(
        "batchnorm.integrations.lightning needs Lightning, which is not installed; "
        "pip install lightning.",
        name="lightning",
    )


class BatchNormCallback(TrainingTools, Callback):
    """Guards and watches the batch norm layers in ``Trainer.fit``, and recalibrates them after it.

    The guard begins with the training and ends with it, also with an exception. Skipped batches
    and the table of `recalibrate` are in Lightning's log. Of the latest step that the watch
    recorded, the worst values of all layers and the number of skipped batches go to the loggers
    every ``log_every_n_steps``, as ``batchnorm/mean_shift``, ``batchnorm/var_ratio_low``,
    ``batchnorm/var_ratio_high``, ``batchnorm/dead`` and ``batchnorm/skipped``. A step is one of the
    optimizers; batches whose gradients accumulate make one step.

    At the end, `recalibrate` gives the training data of one epoch, as ``fit`` prepares it, to the
    module's ``forward``, in evaluation and in the trainer's precision. That takes as long as an
    epoch without gradients; a number of samples makes it shorter. Layers that stay in evaluation
    in the training keep their statistics. The trainer's ranks take part together.

    **Checkpoints** that ``ModelCheckpoint`` writes in the training have the statistics of the
    training, so that it can be resumed from them. Recalibrated statistics are in the module, and
    in what ``trainer.save_checkpoint`` saves after ``fit``. ``trainer.test(ckpt_path="best")``
    tests without them.

    Args:
        guard: Keeps batches out of the statistics that would make them inf or NaN
            (`batchnorm.guard`).
        watch: Records every ``watch``-th step (`batchnorm.watch`); None records none.
        recalibrate: Number of samples to take for `batchnorm.recalibrate`; ``"all"`` takes an
            epoch, None leaves the statistics.
        forward: ``forward(module, batch)`` for `recalibrate`; None calls the module with the batch,
            with the first element of a tuple or list, or with the keywords of a dict.

    Attributes:
        guarded: What `guard` returned in the latest ``fit``, or None.
        watched: What `watch` returned in the latest ``fit``, or None.
        recalibrated: What `recalibrate` returned after the latest ``fit``, or None.

    Raises:
        ValueError: A number makes no sense; or in ``fit``: a layer is poisoned already or lazy, or
            the module has no ``forward``.
        TypeError: In ``fit``: the first batch does not fit the module's ``forward``.

    Warns:
        RuntimeWarning: There is no batch norm layer; or `recalibrate` failed after the training,
            whose statistics then stay.

    Example:
        >>> from batchnorm.integrations.lightning import BatchNormCallback
        >>> callback = BatchNormCallback(watch=50, recalibrate=10_000)
        >>> trainer = Trainer(callbacks=[callback])  # doctest: +SKIP
        >>> trainer.fit(module)  # doctest: +SKIP
        >>> print(callback.recalibrated)  # doctest: +SKIP
        Recalibrated 20 layers on 10,112 samples in 79 batches and 9.7 s.
    """

    _stepped = 0

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Begins to guard and to watch."""
        self.begin(pl_module)
        self._stepped = trainer.global_step
        forward = getattr(type(pl_module).forward, "__qualname__", "")
        if self.calls_model and forward == "LightningModule.forward":
            raise ValueError(
                f"BatchNormCallback: recalibrate calls the module, and {type(pl_module).__name__} "
                "has no forward; give forward=lambda module, batch: ..., or recalibrate=None."
            )

    def on_train_batch_start(
        self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int
    ) -> None:
        """Checks in the first batch that `recalibrate` will be able to use such batches."""
        self.check_batch(pl_module, batch)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends a step of the watch and logs it, if an optimizer stepped."""
        self.end_batch()
        if trainer.global_step != self._stepped:
            self._stepped = trainer.global_step
            pl_module.log_dict(self.end_step())

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Ends the guard and the watch, and recalibrates."""
        with trainer.precision_plugin.forward_context():
            for result in self.finish(pl_module, self._prepared(trainer)):
                rank_zero_info(result)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Ends the guard and the watch."""
        self.remove()

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Ends the guard and the watch, if something else has ended the training."""
        self.remove()

    def _prepared(self, trainer: Any) -> Iterator[Any]:
        """Yields batches as Lightning's own loop prepares them, which no public name does."""
        loader = CombinedLoader(trainer.train_dataloader, "max_size_cycle")
        for batch, _, _ in self.one_epoch(loader, trainer.num_training_batches):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)
