"""``BatchNormCallback`` for the ``Trainer`` of Hugging Face's Transformers."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import nn

from batchnorm.integrations.training import TrainingTools

if TYPE_CHECKING or find_spec("transformers"):
    from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
    from transformers.training_args import TrainingArguments
    from transformers.utils.logging import get_logger
else:
    raise ModuleNotFoundError(
        "batchnorm.integrations.transformers needs Transformers, which is not installed; "
        "pip install 'transformers[torch]'.",
        name="transformers",
    )

_logger = get_logger(f"transformers.{__name__}")
"""Below Transformers' own logger, which has its verbosity and its handler."""


class BatchNormCallback(TrainingTools, TrainerCallback):
    """Guards and watches the batch norm layers in ``Trainer.train``, then recalibrates them.

    The guard begins with the training and ends with it. **After an exception** the ``Trainer``
    calls nobody, so the guard stays until the next ``train``, until ``remove()``, or until the end
    of a block, ``with BatchNormCallback() as callback: ...``. Skipped batches and the table of
    `recalibrate` are in Transformers' log, at the level of ``set_verbosity_info``. Of the latest
    step that the watch recorded, the worst values of all layers and the number of skipped batches
    are in the entries of ``state.log_history`` with a loss, as ``batchnorm/mean_shift``,
    ``batchnorm/var_ratio_low``, ``batchnorm/var_ratio_high``, ``batchnorm/dead`` and
    ``batchnorm/skipped``; reporters such as TensorBoard's are called before and do not see them. A
    step is one of the optimizer; batches whose gradients accumulate make one step.

    At the end, `recalibrate` gives the training data of one epoch to the model, in evaluation and
    in the trainer's precision. That takes as long as an epoch without gradients; a number of
    samples makes it shorter. Layers that stay in evaluation in the training keep their statistics.
    With ``load_best_model_at_end`` it is the best model that is recalibrated. The trainer's ranks
    take part together.

    **Checkpoints** of the training have the statistics of the training, so that it can be resumed
    from them. Recalibrated statistics are in the model, and in what ``trainer.save_model`` saves
    after ``train``.

    Args:
        guard: Keeps batches out of the statistics that would make them inf or NaN
            (`batchnorm.guard`).
        watch: Records every ``watch``-th step (`batchnorm.watch`); None records none.
        recalibrate: Number of samples to take for `batchnorm.recalibrate`; ``"all"`` takes an
            epoch, None leaves the statistics.
        forward: ``forward(model, batch)`` for `recalibrate`; None calls the model with the batch as
            keywords, as the ``Trainer`` does.

    Attributes:
        guarded: What `guard` returned in the latest ``train``, or None.
        watched: What `watch` returned in the latest ``train``, or None.
        recalibrated: What `recalibrate` returned after the latest ``train``, or None.

    Raises:
        ValueError: A number makes no sense; or in ``train``: a layer is poisoned already or lazy,
            or the ``Trainer`` uses ``DataParallel``.

    Warns:
        RuntimeWarning: There is no batch norm layer; or `recalibrate` failed after the training,
            whose statistics then stay.

    Example:
        >>> from batchnorm.integrations.transformers import BatchNormCallback
        >>> callback = BatchNormCallback(watch=50, recalibrate=10_000)
        >>> trainer = Trainer(model, arguments, callbacks=[callback])  # doctest: +SKIP
        >>> result = trainer.train()  # doctest: +SKIP
        >>> print(callback.recalibrated)  # doctest: +SKIP
        Recalibrated 20 layers on 10,112 samples in 79 batches and 9.7 s.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins to guard and to watch."""
        if args.n_gpu > 1:
            raise ValueError(
                "BatchNormCallback: the Trainer would use DataParallel, which copies the layers at "
                f"each call, on {args.n_gpu} GPUs; start one process for each GPU by torchrun."
            )
        self.begin(kwargs["model"])
        self._numbers_to_log: dict[str, float] = {}

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts a batch whose gradients accumulate."""
        self.end_batch()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends a step of the watch."""
        self.end_batch()
        self._numbers_to_log = self.end_step() or self._numbers_to_log

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the numbers of the latest recorded step to an entry of the training."""
        if logs is not None and "loss" in logs and self.watched is not None:
            logs.update(self._numbers_to_log)
            state.log_history[-1].update(self._numbers_to_log)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the guard and the watch, and recalibrates."""
        model: nn.Module = kwargs["model"]
        loader: Iterable[Any] = kwargs["train_dataloader"]
        modes = {module: module.training for module in model.modules()}
        model.train()  # As before each step: an evaluation may have been the last.
        try:
            for result in self.finish(model, self.one_epoch(loader)):
                if state.is_world_process_zero:
                    _logger.info(result)
        finally:
            for module, mode in modes.items():
                module.training = mode
