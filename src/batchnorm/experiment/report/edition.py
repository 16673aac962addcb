"""The results in one language: the runs with their names and styles, and the parts of a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from batchnorm.charts import drawing, numerals
from batchnorm.charts.drawing import Style
from batchnorm.experiment.report.words import Say
from batchnorm.experiment.results import Results, Run

_NAMES = {
    "batchnorm": "run.batchnorm",
    "scratch": "run.scratch",
    "torch": "run.torch",
    "none": "run.none",
}


@dataclass(frozen=True)
class Swatch:
    """An entry of a legend: a picture of the template and its meaning, for one run or for all."""

    kind: str
    label: str
    position: int = -1


@dataclass(frozen=True)
class Shown:
    """A run with its name on the page; ``position`` counts from 0 and picks the style."""

    position: int
    run: Run
    label: str

    @property
    def style(self) -> Style:
        """Color, dashes and marker of the run."""
        return drawing.STYLES[self.position]

    @property
    def swatch(self) -> Swatch:
        """The run's entry in a legend."""
        return Swatch("run", self.label, self.position)


@dataclass(frozen=True)
class Panel:
    """A chart with its title and, where needed, a remark below; it may have to start a row."""

    title: str
    svg: str
    remark: str = ""
    starts_row: bool = False


@dataclass(frozen=True)
class Table:
    """The numbers behind a group of charts."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A chapter: text, charts, text below them, and tables of their numbers."""

    key: str
    title: str
    paragraphs: Sequence[str]
    legend: Sequence[Swatch]
    panels: Sequence[Panel]
    tables: Sequence[Table]
    asides: Sequence[str] = ()
    printed: Sequence[tuple[str, Sequence[tuple[str, Sequence[str]]]]] = ()


@dataclass(frozen=True)
class Edition:
    """Results, and the function that says sentences in one language."""

    results: Results
    say: Say

    @cached_property
    def shown(self) -> tuple[Shown, ...]:
        """All runs, each under a name that no other run has."""
        runs = self.results.runs
        names = [self.say(_NAMES[run.norm]).unescape() for run in runs]
        if len({run.learning_rate for run in runs}) > 1:
            rates = [numerals.short(run.learning_rate) for run in runs]
            names = [
                self.say("run.at_rate", name=name, rate=rate).unescape()
                for name, rate in zip(names, rates, strict=True)
            ]
        return tuple(
            Shown(at, run, name if names.count(name) == 1 else f"{name} ({at + 1})")
            for at, (run, name) in enumerate(zip(runs, names, strict=True))
        )

    @cached_property
    def normalized(self) -> tuple[Shown, ...]:
        """The runs whose network has batch norm layers."""
        return tuple(shown for shown in self.shown if shown.run.normalized)

    @property
    def epochs(self) -> tuple[int, int]:
        """The first and the last epoch that any run has finished."""
        numbers = [epoch.epoch for shown in self.shown for epoch in shown.run.epochs]
        return (min(numbers), max(numbers)) if numbers else (0, 1)
