"""The section about the inputs of the sigmoids in the course of the training."""

from __future__ import annotations

from dataclasses import replace

from batchnorm.charts import numerals, scales
from batchnorm.charts.scales import Frame
from batchnorm.experiment.report import charts
from batchnorm.experiment.report.charts import Labels
from batchnorm.experiment.report.edition import Edition, Panel, Section, Shown, Swatch, Table
from batchnorm.experiment.results import QUANTILES, Inputs


def pre_activations(edition: Edition) -> Section:
    """Draws quantile bands by epoch: a row per layer with one vertical axis, a column per run."""
    say = edition.say
    layers = dict.fromkeys(
        band.layer for shown in edition.shown for band in shown.run.pre_activations
    )
    return Section(
        key="pre-activations",
        title=say("activations.title"),
        paragraphs=[say("activations.see"), say("activations.saturated"), say("activations.why")],
        legend=[
            Swatch("median", say("activations.median")),
            Swatch("half", say("activations.half")),
            Swatch("most", say("activations.most")),
            Swatch("saturated", say("activations.legend_saturated")),
        ],
        panels=[
            panel for at, layer in enumerate(layers) for panel in _row(edition, layer, f"{at}")
        ],
        tables=[_table(edition, shown) for shown in edition.shown],
    )


def _row(edition: Edition, layer: str, name: str) -> list[Panel]:
    bands = [
        (shown, band)
        for shown in edition.shown
        for band in shown.run.pre_activations
        if band.layer == layer
    ]
    frame = Frame(
        (0, max([1, *(epoch for _, band in bands for epoch in band.epochs)])),
        scales.limits([v for _, band in bands for point in band.quantiles for v in point]),
        numerals.short,
    )
    panels = [
        _panel(edition, shown, band, frame, f"band-{name}-{shown.position}")
        for shown, band in bands
    ]
    return [replace(panels[0], starts_row=len(panels) > 1), *panels[1:]]


def _panel(edition: Edition, shown: Shown, band: Inputs, frame: Frame, name: str) -> Panel:
    say = edition.say
    title = say("activations.panel", layer=band.layer, run=shown.label)
    remark = say("chart.empty")
    if band.epochs:
        first, *_, last = (numerals.decimal(value, 1) for value in band.quantiles[-1])
        remark = say("activations.remark", epoch=band.epochs[-1], first=first, last=last)
    labels = Labels(
        x=say("axis.epoch"),
        y=say("axis.input"),
        description=f"{title.striptags()}. {remark.striptags()}",
        empty=say("chart.empty"),
    )
    svg = charts.bands(name, labels, band.epochs, band.quantiles, frame, shown.style)
    return Panel(title, svg, remark)


def _table(edition: Edition, shown: Shown) -> Table:
    say = edition.say
    return Table(
        shown.label,
        [say("table.layer"), say("axis.epoch"), *(f"{100 * q:g}%" for q in QUANTILES)],
        [
            [band.layer, str(epoch), *map(numerals.significant, values)]
            for band in shown.run.pre_activations
            for epoch, values in zip(band.epochs, band.quantiles, strict=True)
        ],
    )
