"""The results of a run: training fills them in, ``report.json`` holds them, the report shows them.

They are checked when they are read, because the files of a run can be damaged, changed by hand, or
written by another version.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from batchnorm.nets import Norm

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Shares of the inputs of a sigmoid that lie below the values of `Point`."""


def _nan_for_null(value: Any) -> Any:
    return math.nan if value is None else value


def _printable(value: Any) -> Any:
    """Replaces what a page cannot show, such as control characters in the name of a layer."""
    if not isinstance(value, str):
        return value
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)


Number = Annotated[float, BeforeValidator(_nan_for_null)]
"""A number; JSON has null for NaN and infinities."""

Text = Annotated[str, BeforeValidator(_printable)]

Count = Annotated[int, Field(ge=1)]

_RULES = {
    "int_type": "an integer",
    "greater_than_equal": "at least 1",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "an object",
    "dict_type": "an object",
}
"""The rule that a value broke, by pydantic's name of the fault."""


class _Record(BaseModel):
    """Takes values of the right type only, and leaves out fields that it does not know."""

    model_config = ConfigDict(strict=True, validate_by_name=True, validate_by_alias=True)


class Data(_Record):
    """The data set of a run.

    Attributes:
        stand_in: Whether it stands in for Fashion-MNIST, which could not be had.
    """

    name: Text
    source: Text
    train_examples: int
    test_examples: int
    stand_in: bool = False


class Settings(_Record):
    """Settings with which every norm is trained.

    Attributes:
        norms: The norms to train, in turn.
        epochs: Passes over the training images.
        batch_size: Images per step.
        seed: Seed of the weights and of the order of the images.
        threads: CPU threads; the same number gives the same bits.
        device: Device, as torch spells it.
        population_examples: Training images behind the population statistics.
        learning_rate: Learning rate of SGD for every norm; None is the default of the data set.
        train_examples: Number of training images to use; None uses all.
        torch: Version of torch; training fills it in.
        batchnorm: Version of this library; training fills it in.
    """

    norms: list[Norm]
    epochs: Count
    batch_size: Count
    seed: int
    threads: Count
    device: Text
    population_examples: Count
    learning_rate: float | None = None
    train_examples: Count | None = None
    torch: Text = ""
    batchnorm: Text = ""


class Epoch(_Record):
    """One pass over the training images; accuracies are fractions."""

    epoch: int
    loss: Number
    train_accuracy: Number
    test_accuracy_running: Number
    test_accuracy_population: Number
    examples_per_second: Number


class Point(_Record):
    """The inputs of one layer's sigmoids after an epoch, as `QUANTILES`; epoch 0 is before all."""

    epoch: int
    quantiles: Annotated[list[Number], Field(min_length=len(QUANTILES), max_length=len(QUANTILES))]


class Inputs(_Record):
    """The inputs of one layer's sigmoids in the course of the training."""

    layer: Text
    points: list[Point]

    @property
    def epochs(self) -> list[int]:
        """The epochs after which the inputs were looked at; 0 is before training."""
        return [point.epoch for point in self.points]

    @property
    def quantiles(self) -> list[list[float]]:
        """The values of `QUANTILES` at each of ``epochs``."""
        return [point.quantiles for point in self.points]


class NormLayer(_Record):
    """Parameters and statistics of one batch norm layer, one value per channel."""

    layer: Text
    gamma: list[Number]
    beta: list[Number]
    running_mean: list[Number]
    running_var: list[Number]
    population_mean: list[Number]
    population_var: list[Number]

    @model_validator(mode="after")
    def _check_channels(self) -> NormLayer:
        for name, values in self:
            if name != "layer" and len(values) != len(self.gamma):
                raise ValueError(
                    f"{name} to have {len(self.gamma)} channels like gamma, got {len(values)}"
                )
        return self

    @property
    def mean_shift(self) -> list[float]:
        """(running_mean - population_mean) / sqrt(population_var), NaN where that is undefined."""
        triples = zip(self.running_mean, self.population_mean, self.population_var, strict=True)
        return [
            (running - population) / math.sqrt(var) if var > 0 else math.nan
            for running, population, var in triples
        ]

    @property
    def var_ratio(self) -> list[float]:
        """running_var / population_var, NaN where that is undefined."""
        pairs = zip(self.running_var, self.population_var, strict=True)
        return [running / var if var > 0 else math.nan for running, var in pairs]


class Run(_Record):
    """The training of one norm; ``complete`` if all epochs are done."""

    norm: Norm
    learning_rate: Number
    complete: bool = False
    epochs: list[Epoch]
    pre_activations: list[Inputs]
    norm_layers: list[NormLayer]

    @property
    def normalized(self) -> bool:
        """True if the network has batch norm layers."""
        return self.norm != "none"

    @property
    def diverged_in(self) -> int | None:
        """The first epoch whose loss is not a finite number, or None."""
        return next((e.epoch for e in self.epochs if not math.isfinite(e.loss)), None)

    def series(self, field: str) -> list[float]:
        """Returns the values of a field of `Epoch`, one per epoch."""
        return [getattr(epoch, field) for epoch in self.epochs]


class Results(_Record):
    """Everything the report is made from."""

    version: Annotated[Literal[1], Field(alias="schema")]
    data: Data
    settings: Settings
    runs: Annotated[list[Run], Field(min_length=1, max_length=4)]

    @property
    def baseline(self) -> Run | None:
        """The run without batch norm, when there is exactly one."""
        without_norm = [run for run in self.runs if not run.normalized]
        return without_norm[0] if len(without_norm) == 1 else None


class Config(_Record):
    """The settings of a run and the data that it was started with, as in ``config.json``."""

    settings: Settings
    data: Data


def first_fault(error: ValidationError) -> str:
    """Says what was expected where, and what came instead, without a full stop."""
    fault = error.errors()[0]
    kind, context = fault["type"], fault.get("ctx", {})
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]]
    place = "".join(parts).removeprefix(".") or "everything"
    if kind == "missing":
        return f"expected a field {place}, but it is missing"
    if kind == "value_error":
        return f"expected {place}.{context['error']}"
    if kind in ("too_short", "too_long"):
        least, most = context.get("min_length"), context.get("max_length")
        rule = f"at least {least}" if most is None else f"at most {most}"
        return f"expected {place} to have {rule} items, got {context['actual_length']}"
    rule = _RULES.get(kind) or context.get("expected") or kind.replace("_", " ")
    return f"expected {place} to be {rule}, got {fault['input']!r:.40}"
