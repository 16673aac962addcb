"""The section about the course of the training: loss, accuracy and speed by epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

from batchnorm.charts import numerals, scales
from batchnorm.charts.scales import Frame, percent_tick
from batchnorm.experiment.report import charts
from batchnorm.experiment.report.charts import Labels, Line
from batchnorm.experiment.report.edition import Edition, Panel, Section, Swatch, Table

Write = Callable[[float], str]


def curves(edition: Edition) -> Section:
    """Shows loss, accuracies and speed by epoch, all runs in each chart."""
    say = edition.say
    charted = (
        ("loss", say("curves.loss"), say("axis.loss"), 1.0, numerals.decimal),
        ("train_accuracy", say("curves.train"), say("axis.accuracy"), 1.0, numerals.percent),
        ("test_accuracy_running", say("curves.test"), say("axis.accuracy"), 1.0, numerals.percent),
        ("examples_per_second", say("curves.speed"), say("axis.speed"), 1000.0, numerals.count),
    )
    panels = [_curve(edition, *what) for what in charted]
    header = [say("table.run"), say("axis.epoch"), *(title for _, title, *_ in charted[:-1])]
    header.append(say("table.speed"))
    rows = [
        [shown.label, str(epoch.epoch)]
        + [write(getattr(epoch, field)) for field, _, _, _, write in charted]
        for shown in edition.shown
        for epoch in shown.run.epochs
    ]
    return Section(
        key="curves",
        title=say("curves.title"),
        paragraphs=[say("curves.see"), *_overtaking(edition), say("curves.why"), *_speeds(edition)],
        legend=[*(shown.swatch for shown in edition.shown), *_cross(edition)],
        panels=panels,
        tables=[Table(say("curves.title"), header, rows)],
    )


def _curve(edition: Edition, field: str, title: str, axis: str, unit: float, write: Write) -> Panel:
    lines = [
        Line(
            shown.style,
            [epoch.epoch for epoch in shown.run.epochs],
            [value / unit for value in shown.run.series(field)],
        )
        for shown in edition.shown
    ]
    accuracy = "accuracy" in field
    values = [value for line in lines for value in line.values]
    ends = [
        f"{shown.label} {write(shown.run.series(field)[-1])}"
        for shown in edition.shown
        if shown.run.epochs
    ]
    say = edition.say
    empty = say("chart.empty")
    labels = Labels(
        x=say("axis.epoch"),
        y=axis,
        description=say(
            "chart.by_epoch", title=title, ends=say("list.comma").join(ends) or empty
        ).striptags(),
        empty=empty,
    )
    if accuracy:
        frame = Frame(edition.epochs, scales.limits(values, ceiling=1.0), percent_tick)
    else:
        frame = Frame(edition.epochs, (0.0, scales.limits([0.0, *values])[1]), numerals.short)
    return Panel(title, charts.curves(field.replace("_", "-"), labels, lines, frame))


def _overtaking(edition: Edition) -> list[str]:
    """Says when each run with batch norm passes the final accuracy of the run without."""
    baseline = edition.results.baseline
    if baseline is None or not baseline.epochs:
        return []
    goal = baseline.epochs[-1].train_accuracy
    if not math.isfinite(goal) or baseline.diverged_in is not None:
        return []
    runs = []
    for shown in edition.normalized:
        passed = [e.epoch for e in shown.run.epochs if e.train_accuracy > goal]
        key = "curves.passes" if passed else "curves.never_passes"
        runs.append(edition.say(key, run=shown.label, epoch=passed[0] if passed else 0))
    if not runs:
        return []
    said = edition.say("list.semicolon").join(runs)
    return [edition.say("curves.goal", goal=numerals.percent(goal), runs=said)]


def _speeds(edition: Edition) -> list[str]:
    known = [
        (shown.label, numerals.finite(shown.run.series("examples_per_second")))
        for shown in edition.shown
    ]
    speeds = [
        edition.say("curves.one_speed", run=label, speed=numerals.count(median(values)))
        for label, values in known
        if values
    ]
    if not speeds:
        return []
    return [edition.say("curves.speeds", speeds=edition.say("list.comma").join(speeds))]


def _cross(edition: Edition) -> list[Swatch]:
    diverged = any(shown.run.diverged_in is not None for shown in edition.shown)
    return [Swatch("cross", edition.say("legend.cross"))] if diverged else []
