"""Trains d2l's LeNet with each norm in turn, so that a crash loses at most one epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from batchnorm.experiment import observation, population
from batchnorm.experiment.data import Dataset
from batchnorm.experiment.norm_layers import preserved_buffers
from batchnorm.experiment.run_directory import RunDirectory, RunError
from batchnorm.nets.lenet import NORMS, Norm, lenet
from batchnorm.version import __version__

EVALUATION_BATCH = 1000
OBSERVED_IMAGES = 256


@dataclass(frozen=True)
class Settings:
    """How every norm of a comparison is trained.

    Args:
        norms: Which to train, in turn.
        epochs: Passes over the training images.
        batch_size: Images a step.
        learning_rate: Of plain SGD; None is d2l's: 1.0 with a norm, 0.9 without.
        seed: Of the weights and of the order of the images.
        threads: CPU threads; the same number gives the same bits.
        device: As torch spells it.
        population_examples: Training images behind the population statistics.
        train_examples: Use only the first so many training images; None uses all.
    """

    norms: tuple[Norm, ...] = ("batchnorm", "none")
    epochs: int = 10
    batch_size: int = 256
    learning_rate: float | None = None
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    population_examples: int = 2560
    train_examples: int | None = None

    @classmethod
    def from_plain(cls, stored: Mapping[str, Any]) -> Settings:
        """Settings that were written to ``config.json``; what else stands there is left out.

        Raises:
            RunError: A setting is missing, or a norm is unknown.
        """
        missing = [field.name for field in fields(cls) if field.name not in stored]
        if missing:
            raise RunError(
                f"config.json lacks the settings {', '.join(missing)}; start a new run with --out."
            )
        known: dict[str, Any] = {field.name: stored[field.name] for field in fields(cls)}
        known["norms"] = tuple(known["norms"])
        unknown = [norm for norm in known["norms"] if norm not in NORMS]
        if unknown:
            raise RunError(
                f"config.json names the norm {unknown[0]!r}, but only {', '.join(NORMS)} are "
                "known; start a new run with --out."
            )
        return cls(**known)

    def rate_of(self, norm: Norm) -> float:
        """The learning rate of one norm."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 0.9 if norm == "none" else 1.0


@runtime_checkable
class Listener(Protocol):
    """Who wants to know how far training is."""

    def start(self, norm: Norm, done: int) -> None:
        """Training of ``norm`` begins, or goes on after ``done`` epochs."""
        ...

    def step(self, examples: int) -> None:
        """So many more examples were trained on."""
        ...

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is finished, measured and saved."""
        ...


@dataclass(frozen=True)
class Images:
    """Images as bytes, and labels, on the training device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Floats in [0, 1] of shape (N, 1, 28, 28) with their labels, by rows of indices."""
        for indices in order:
            yield self.images[indices].unsqueeze(1).float() / 255, self.labels[indices]


class Comparison:
    """One run directory's worth of training: several norms, same data, same settings.

    Args:
        settings: How to train.
        data: What to train on.
        directory: Where results and checkpoints go; already created.

    Raises:
        ValueError: The last batch of an epoch would hold one image, whose variance is zero.
    """

    def __init__(self, settings: Settings, data: Dataset, directory: RunDirectory) -> None:
        self.settings = settings
        self.directory = directory
        device = torch.device(settings.device)
        kept = slice(settings.train_examples)
        self.train_set = Images(
            data.train_images[kept].to(device), data.train_labels[kept].to(device)
        )
        self.test_set = Images(data.test_images.to(device), data.test_labels.to(device))
        self.description = {
            "name": data.name,
            "source": data.source,
            "train_examples": len(self.train_set),
            "test_examples": len(self.test_set),
        }
        self.runs: dict[Norm, dict[str, Any]] = {}
        if len(self.train_set) % settings.batch_size == 1:
            raise ValueError(
                f"the last batch of an epoch would hold one image ({len(self.train_set)} images in "
                f"batches of {settings.batch_size}), and one image has no variance; "
                f"choose another --batch-size."
            )

    def train(self, listener: Listener) -> None:
        """Trains every norm to the end, from its last checkpoint if there is one.

        Raises:
            RunError: A checkpoint cannot be read.
        """
        torch.set_num_threads(self.settings.threads)
        for norm in self.settings.norms:
            self._train_one(norm, listener)
        self._write_derived()

    def results(self) -> dict[str, Any]:
        """All that was measured so far, as `batchnorm.report` takes it."""
        settings = asdict(self.settings) | {"torch": torch.__version__, "batchnorm": __version__}
        return {
            "schema": 1,
            "data": self.description,
            "settings": settings,
            "runs": [self.runs.get(norm, self._new_run(norm, [])) for norm in self.settings.norms],
        }

    def _train_one(self, norm: Norm, listener: Listener) -> None:
        torch.manual_seed(self.settings.seed)
        model = lenet(norm).to(self.settings.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=self.settings.rate_of(norm))
        checkpoint = self.directory.last_checkpoint(norm)
        if checkpoint is None:
            run = self._new_run(norm, self._observe_activations(model, 0))
        else:
            run = _restore(checkpoint, norm, model, optimizer)
        self.runs[norm] = run
        listener.start(norm, len(run["epochs"]))
        for epoch in range(len(run["epochs"]) + 1, self.settings.epochs + 1):
            trained = self._train_epoch(model, optimizer, epoch, listener.step)
            record, layers = self._measure(model, epoch, trained)
            run["epochs"].append(record)
            run["norm_layers"] = layers
            for layer, new in zip(
                run["pre_activations"], self._observe_activations(model, epoch), strict=True
            ):
                layer["points"] += new["points"]
            run["complete"] = epoch == self.settings.epochs
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": run}
            self.directory.save_checkpoint(norm, epoch, state)
            self._write_derived()
            listener.epoch({"norm": norm, **record})

    def _train_epoch(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        on_step: Callable[[int], None],
    ) -> dict[str, float]:
        """One pass in an order that only the seed and the epoch decide."""
        generator = torch.Generator().manual_seed(self.settings.seed * 100_003 + epoch)
        order = torch.randperm(len(self.train_set), generator=generator)
        total_loss = torch.zeros((), dtype=torch.float64)
        correct = 0
        started = time.perf_counter()
        model.train()
        for images, labels in self.train_set.batches(order.split(self.settings.batch_size)):
            scores = model(images)
            loss = nn.functional.cross_entropy(scores, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.item() * len(labels)
            correct += int((scores.argmax(1) == labels).sum())
            on_step(len(labels))
        seconds = time.perf_counter() - started
        examples = len(self.train_set)
        return {
            "loss": total_loss.item() / examples,
            "train_accuracy": correct / examples,
            "examples_per_second": examples / seconds,
        }

    def _measure(
        self, model: nn.Sequential, epoch: int, trained: dict[str, float]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Accuracy of the same weights with running and with population statistics."""
        running = self._test_accuracy(model)
        layers = observation.norm_state(model)
        with preserved_buffers(model):
            population.use_population(model, self._population_batches())
            for layer, now in zip(layers, observation.norm_state(model), strict=True):
                layer["population_mean"] = now["running_mean"]
                layer["population_var"] = now["running_var"]
            accuracy = self._test_accuracy(model)
        record = {
            "epoch": epoch,
            "loss": trained["loss"],
            "train_accuracy": trained["train_accuracy"],
            "test_accuracy_running": running,
            "test_accuracy_population": accuracy,
            "examples_per_second": trained["examples_per_second"],
        }
        return record, layers

    @torch.no_grad()
    def _test_accuracy(self, model: nn.Module) -> float:
        model.eval()
        order = torch.arange(len(self.test_set)).split(EVALUATION_BATCH)
        correct = sum(
            int((model(images).argmax(1) == labels).sum())
            for images, labels in self.test_set.batches(order)
        )
        return correct / len(self.test_set)

    def _population_batches(self) -> Iterator[Tensor]:
        """Some training images, the same ones for every epoch and norm."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        order = torch.randperm(len(self.train_set), generator=generator)
        chosen = order[: self.settings.population_examples]
        parts = chosen.tensor_split(math.ceil(len(chosen) / self.settings.batch_size))
        return (images for images, _ in self.train_set.batches(parts))

    def _observe_activations(self, model: nn.Sequential, epoch: int) -> list[dict[str, Any]]:
        observed = torch.arange(min(OBSERVED_IMAGES, len(self.test_set)))
        images, _ = next(self.test_set.batches([observed]))
        return [
            {"layer": name, "points": [{"epoch": epoch, "quantiles": quantiles}]}
            for name, quantiles in observation.pre_activations(model, images).items()
        ]

    def _new_run(self, norm: Norm, pre_activations: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "norm": norm,
            "learning_rate": self.settings.rate_of(norm),
            "complete": False,
            "epochs": [],
            "pre_activations": pre_activations,
            "norm_layers": [],
        }

    def _write_derived(self) -> None:
        """Makes the files that are read by others from what the checkpoints hold."""
        lines = [
            {"norm": norm, **epoch} for norm, run in self.runs.items() for epoch in run["epochs"]
        ]
        self.directory.write_metrics(lines)
        self.directory.write_results(self.results())


def _restore(
    checkpoint: Mapping[str, Any], norm: Norm, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Loads the state after an epoch and returns what was measured until then."""
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        return checkpoint["run"]
    except (KeyError, RuntimeError, ValueError) as error:
        raise RunError(
            f"the last checkpoint of {norm} does not fit this network; delete it, and --resume "
            "goes on from the epoch before."
        ) from error
