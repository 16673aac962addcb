"""Trains d2l's LeNet with each norm in turn, so that a crash loses at most one epoch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from batchnorm.experiment import population
from batchnorm.experiment.data import DIGITS, Dataset
from batchnorm.experiment.defaults import defaults_for
from batchnorm.experiment.evaluation import Evaluation
from batchnorm.experiment.images import Images
from batchnorm.experiment.results import Data, Epoch, Inputs, Results, Run, Settings
from batchnorm.experiment.run_directory import RunDirectory, RunError
from batchnorm.nets import Norm
from batchnorm.nets.lenet import lenet
from batchnorm.version import __version__


@runtime_checkable  # The tests check annotations at run time.
class Listener(Protocol):
    """Receives the progress of training."""

    def start(self, norm: Norm, done: int) -> None:
        """Called when training of ``norm`` begins, or resumes after ``done`` epochs."""
        ...

    def step(self, examples: int) -> None:
        """Called when ``examples`` more images have been trained on."""
        ...

    def epoch(self, norm: Norm, record: Epoch) -> None:
        """An epoch is finished, measured and saved."""
        ...


class Comparison:
    """Several norms, trained on the same images in the same order.

    Args:
        settings: Settings of training.
        data: The data set.
        directory: Folder for results and checkpoints.

    Attributes:
        results: Everything measured so far.

    Raises:
        ValueError: torch knows no such device, or the last batch of an epoch would hold one image,
            whose variance is zero.
    """

    def __init__(self, settings: Settings, data: Dataset, directory: RunDirectory) -> None:
        self.directory = directory
        try:
            device = torch.device(settings.device)
        except RuntimeError as error:
            raise ValueError(
                f"device must be one that torch knows, such as 'cpu', got {settings.device!r}."
            ) from error
        kept = slice(settings.train_examples)
        self._train_set = Images(data.train_images[kept], data.train_labels[kept]).to(device)
        test_set = Images(data.test_images, data.test_labels).to(device)
        if len(self._train_set) % settings.batch_size == 1:
            raise ValueError(
                f"the last batch of an epoch would hold one image ({len(self._train_set)} images "
                f"in batches of {settings.batch_size}), and one image has no variance; "
                f"choose another --batch-size."
            )
        self._evaluation = Evaluation(self._train_set, test_set, settings)
        self.results = Results(
            version=1,
            data=Data(
                name=data.name,
                source=data.source,
                train_examples=len(self._train_set),
                test_examples=len(test_set),
                stand_in=data.name == DIGITS,
            ),
            settings=settings.model_copy(
                update={"torch": torch.__version__, "batchnorm": __version__}
            ),
            runs=[
                Run(
                    norm=norm,
                    learning_rate=settings.learning_rate or defaults_for(data.name).rate_of(norm),
                    epochs=[],
                    pre_activations=[],
                    norm_layers=[],
                )
                for norm in settings.norms
            ],
        )

    def train(self, listener: Listener) -> None:
        """Trains every norm to the end, from its last checkpoint if there is one.

        Raises:
            RunError: A checkpoint cannot be read.
        """
        torch.set_num_threads(self.results.settings.threads)
        for at in range(len(self.results.runs)):
            self._train_one(at, listener)
        self.directory.write_results(self.results)

    def _train_one(self, at: int, listener: Listener) -> None:
        run, settings = self.results.runs[at], self.results.settings
        torch.manual_seed(settings.seed)
        model = lenet(run.norm).to(settings.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=run.learning_rate)
        checkpoint = self.directory.last_checkpoint(run.norm)
        if checkpoint is None:
            for name, point in self._evaluation.pre_activations(model, 0).items():
                run.pre_activations.append(Inputs(layer=name, points=[point]))
        else:
            run = self.results.runs[at] = _restore(checkpoint, run.norm, model, optimizer)
        listener.start(run.norm, len(run.epochs))
        if not run.complete:
            warm_up(model)
        for epoch in range(len(run.epochs) + 1, settings.epochs + 1):
            trained = self._train_epoch(model, optimizer, epoch, listener.step)
            running, accuracy, run.norm_layers = self._evaluation.measure(model)
            record = Epoch(
                epoch=epoch,
                test_accuracy_running=running,
                test_accuracy_population=accuracy,
                **trained,
            )
            run.epochs.append(record)
            points = self._evaluation.pre_activations(model, epoch)
            for layer in run.pre_activations:
                layer.points.append(points[layer.layer])
            run.complete = epoch == settings.epochs
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            self.directory.save_checkpoint(run, state)
            self.directory.write_results(self.results)
            listener.epoch(run.norm, record)

    def _train_epoch(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        on_step: Callable[[int], None],
    ) -> dict[str, float]:
        """Makes one pass, in an order that depends on the seed and the epoch only."""
        settings, examples = self.results.settings, len(self._train_set)
        generator = torch.Generator().manual_seed(settings.seed * 100_003 + epoch)
        order = torch.randperm(examples, generator=generator)
        total_loss = torch.zeros((), dtype=torch.float64)
        correct = 0
        started = time.perf_counter()
        model.train()
        for images, labels in self._train_set.batches(order.split(settings.batch_size)):
            scores = model(images)
            loss = nn.functional.cross_entropy(scores, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.item() * len(labels)
            correct += int((scores.argmax(1) == labels).sum())
            on_step(len(labels))
        seconds = time.perf_counter() - started
        return {
            "loss": total_loss.item() / examples,
            "train_accuracy": correct / examples,
            "examples_per_second": examples / seconds,
        }


def warm_up(model: nn.Module) -> None:
    """Uses every kernel once, on a copy, so that no epoch's time includes their compilation."""
    copied = copy.deepcopy(model)
    first = next(copied.parameters())
    images = first.new_zeros(2, 1, 28, 28)
    copied.train()(images).sum().backward()
    population.use_population(copied, [images])
    with torch.no_grad():
        copied.eval()(images)


def _restore(
    checkpoint: Mapping[str, Any], norm: Norm, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Run:
    """Loads the state after an epoch and returns what was measured until then."""
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        return Run.model_validate(checkpoint["run"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise RunError(
            f"the last checkpoint of {norm} does not fit this network; delete it, and --resume "
            "goes on from the epoch before."
        ) from error
