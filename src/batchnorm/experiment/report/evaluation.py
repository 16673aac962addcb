"""The section about two ways to evaluate the same weights: running and population statistics."""

from __future__ import annotations

import math

from markupsafe import Markup

from batchnorm.charts import numerals, scales
from batchnorm.charts.drawing import Style
from batchnorm.charts.scales import Frame, percent_tick
from batchnorm.experiment.report import charts
from batchnorm.experiment.report.charts import Labels, Line
from batchnorm.experiment.report.edition import Edition, Panel, Section, Shown, Swatch, Table
from batchnorm.nets import MOMENTUM

LAST = 5


def estimates(edition: Edition) -> Section:
    """Shows test accuracy with running and with population statistics, for runs with batch norm."""
    say = edition.say
    values = [
        value
        for shown in edition.normalized
        for field in ("test_accuracy_running", "test_accuracy_population")
        for value in shown.run.series(field)
    ]
    frame = Frame(edition.epochs, scales.limits(values, ceiling=1.0), percent_tick)
    return Section(
        key="estimates",
        title=say("estimates.title"),
        paragraphs=[
            say("estimates.what"),
            *(sentence for shown in edition.normalized for sentence in _gap(edition, shown)),
            say("estimates.so"),
        ],
        legend=[
            Swatch("population", say("estimates.legend_population")),
            Swatch("running", say("estimates.legend_running")),
        ],
        panels=[
            *(_estimate(edition, shown, frame) for shown in edition.normalized if shown.run.epochs),
            *([_memory(edition)] if edition.normalized else []),
        ],
        tables=[_estimates_table(edition)],
        asides=_definitions(edition),
    )


def _definitions(edition: Edition) -> list[str]:
    say, settings, data = edition.say, edition.results.settings, edition.results.data
    recent, share = _remembered()
    rates = sorted({shown.run.learning_rate for shown in edition.normalized})
    return [
        say(
            "estimates.running",
            keep=percent_tick(1 - MOMENTUM),
            add=percent_tick(MOMENTUM),
            recent=recent,
            share=share,
            rate=say("list.comma").join(numerals.short(rate) for rate in rates),
        ),
        say(
            "estimates.population",
            n=numerals.count(min(settings.population_examples, data.train_examples)),
        ),
    ]


def _remembered() -> tuple[int, str]:
    """Returns the number 1 / m of mini-batches, and their weight in a running statistic."""
    recent = round(1 / MOMENTUM)
    return recent, f"{100 * (1 - (1 - MOMENTUM) ** recent):.0f}%"


def _memory(edition: Edition) -> Panel:
    say = edition.say
    recent, share = _remembered()
    note = say("estimates.share", n=recent, share=share)
    labels = Labels(
        x=say("axis.age"),
        y=say("axis.weight"),
        description=" ".join([say("estimates.memory_description"), *note.splitlines()]),
        empty=say("chart.empty"),
    )
    return Panel(say("estimates.memory"), charts.memory("memory", labels, MOMENTUM, recent, note))


def _estimate(edition: Edition, shown: Shown, frame: Frame) -> Panel:
    say, run = edition.say, shown.run
    epochs = [epoch.epoch for epoch in run.epochs]
    color = shown.style.color
    title = say("estimates.panel", run=shown.label)
    labels = Labels(
        x=say("axis.epoch"),
        y=say("axis.accuracy"),
        description=" ".join(
            [f"{title.striptags()}.", *(g.striptags() for g in _gap(edition, shown))]
        ),
        empty=say("chart.empty"),
    )
    running = Line(Style(color, (4.0, 2.0), "o"), epochs, run.series("test_accuracy_running"), True)
    population = Line(Style(color, (), "o"), epochs, run.series("test_accuracy_population"))
    name = f"estimates-{shown.position}"
    return Panel(title, charts.estimates(name, labels, running, population, frame))


def _gap(edition: Edition, shown: Shown) -> list[Markup]:
    gaps = [
        (abs(epoch.test_accuracy_population - epoch.test_accuracy_running), epoch.epoch)
        for epoch in shown.run.epochs
    ]
    known = [gap for gap in gaps if math.isfinite(gap[0])]
    if not known:
        return []
    last = shown.run.epochs[-LAST:]
    gap, epoch = max(known, key=lambda pair: pair[0])
    key = "estimates.numbers" if len(shown.run.epochs) > 1 else "estimates.number"
    return [
        edition.say(
            key,
            run=shown.label,
            first=last[0].epoch,
            last=last[-1].epoch,
            running=numerals.span(e.test_accuracy_running for e in last),
            population=numerals.span(e.test_accuracy_population for e in last),
            gap=numerals.decimal(100 * gap, 1),
            epoch=epoch,
        )
    ]


def _estimates_table(edition: Edition) -> Table:
    say = edition.say
    header = [
        say("table.run"),
        say("axis.epoch"),
        say("estimates.legend_running"),
        say("estimates.legend_population"),
        say("table.gap"),
    ]
    rows = [
        [
            shown.label,
            str(epoch.epoch),
            numerals.percent(epoch.test_accuracy_running),
            numerals.percent(epoch.test_accuracy_population),
            numerals.decimal(
                100 * (epoch.test_accuracy_population - epoch.test_accuracy_running), 1
            ),
        ]
        for shown in edition.normalized
        for epoch in shown.run.epochs
    ]
    return Table(say("estimates.title"), header, rows)
