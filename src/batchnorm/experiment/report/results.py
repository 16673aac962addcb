"""The results of a training comparison, as the report sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass

QUANTILES = (5, 25, 50, 75, 95)
MOMENTUM = 0.1  # weight of the new mini-batch in the running statistics of every run


@dataclass(frozen=True)
class Data:
    """The data set that every run was trained on."""

    name: str
    source: str
    train_examples: int
    test_examples: int


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    epochs: int
    batch_size: int
    seed: int
    threads: int
    device: str
    population_examples: int
    torch: str
    batchnorm: str


@dataclass(frozen=True)
class Epoch:
    """One pass over the training set; accuracies are fractions, NaN stands for null."""

    number: int
    loss: float
    train_accuracy: float
    test_accuracy_running: float
    test_accuracy_population: float
    examples_per_second: float


@dataclass(frozen=True)
class Band:
    """Quantiles (`QUANTILES`, in per cent) of one layer's pre-activations after each epoch."""

    layer: str
    epochs: tuple[int, ...]
    quantiles: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class NormLayer:
    """Parameters and statistics of one batch norm layer, one value per channel."""

    layer: str
    gamma: tuple[float, ...]
    beta: tuple[float, ...]
    running_mean: tuple[float, ...]
    running_var: tuple[float, ...]
    population_mean: tuple[float, ...]
    population_var: tuple[float, ...]

    @property
    def mean_shift(self) -> tuple[float, ...]:
        """(running_mean - population_mean) / sqrt(population_var), NaN where that is undefined."""
        triples = zip(self.running_mean, self.population_mean, self.population_var, strict=True)
        return tuple(
            (running - population) / math.sqrt(var) if var > 0 else math.nan
            for running, population, var in triples
        )

    @property
    def var_ratio(self) -> tuple[float, ...]:
        """running_var / population_var, NaN where that is undefined."""
        pairs = zip(self.running_var, self.population_var, strict=True)
        return tuple(running / var if var > 0 else math.nan for running, var in pairs)


@dataclass(frozen=True)
class Run:
    """One training run."""

    norm: str
    learning_rate: float
    complete: bool
    epochs: tuple[Epoch, ...]
    pre_activations: tuple[Band, ...]
    norm_layers: tuple[NormLayer, ...]

    @property
    def normalised(self) -> bool:
        """Whether the network has batch norm layers."""
        return self.norm != "none"

    @property
    def diverged_in(self) -> int | None:
        """The first epoch whose loss is not a finite number, or None."""
        return next((e.number for e in self.epochs if not math.isfinite(e.loss)), None)

    def series(self, field: str) -> tuple[float, ...]:
        """One value per epoch of the field with this name."""
        return tuple(getattr(epoch, field) for epoch in self.epochs)


@dataclass(frozen=True)
class Results:
    """Everything the report is made from."""

    data: Data
    settings: Settings
    runs: tuple[Run, ...]

    @property
    def baseline(self) -> Run | None:
        """The run without batch norm, when there is exactly one."""
        plain = [run for run in self.runs if not run.normalised]
        return plain[0] if len(plain) == 1 else None
