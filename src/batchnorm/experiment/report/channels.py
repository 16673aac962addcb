"""The sections about single channels: γ and β, and the errors of the running statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from batchnorm.charts import numerals, scales
from batchnorm.charts.scales import Scale
from batchnorm.experiment.report import charts
from batchnorm.experiment.report.charts import Labels
from batchnorm.experiment.report.edition import Edition, Panel, Section, Shown, Swatch, Table
from batchnorm.experiment.results import NormLayer

PRINTED_CHANNELS = 16

Values = Callable[[NormLayer], Sequence[float]]


@dataclass(frozen=True)
class Strip:
    """A chart with a strip of dots per layer, one dot per channel."""

    name: str
    title: str
    axis: str
    values: Values
    scale: Scale


def parameters(edition: Edition) -> Section:
    """Shows γ and β of every channel at the end of the training."""
    say = edition.say
    strips = [
        Strip("gamma", say("parameters.gamma"), say("axis.gamma"), _gamma, scales.AROUND_1),
        Strip("beta", say("parameters.beta"), say("axis.beta"), _beta, scales.AROUND_0),
    ]
    return Section(
        key="parameters",
        title=say("parameters.title"),
        paragraphs=[say("parameters.see"), say("parameters.why")],
        legend=_legend(edition, say("parameters.start")),
        panels=_panels(edition, strips),
        tables=_tables(edition, [("γ", _gamma), ("β", _beta)]),
        printed=_printed(edition),
    )


def statistics(edition: Edition) -> Section:
    """Shows the distance of each channel's running statistics from the population's."""
    say = edition.say
    strips = [
        Strip("shift", say("statistics.shift"), say("axis.shift"), _shift, scales.AROUND_0),
        Strip("ratio", say("statistics.ratio"), say("axis.ratio"), _ratio, scales.RATIO),
    ]
    columns = [
        (say("table.running_mean"), lambda layer: layer.running_mean),
        (say("table.population_mean"), lambda layer: layer.population_mean),
        (say("table.running_var"), lambda layer: layer.running_var),
        (say("table.population_var"), lambda layer: layer.population_var),
    ]
    return Section(
        key="statistics",
        title=say("statistics.title"),
        paragraphs=[say("statistics.see"), say("statistics.read")],
        legend=_legend(edition, say("statistics.exact")),
        panels=_panels(edition, strips),
        tables=_tables(edition, columns),
        asides=[say("statistics.why")],
    )


def _legend(edition: Edition, reference: str) -> list[Swatch]:
    return [
        Swatch("channel", edition.say("strip.channel")),
        Swatch("middle", edition.say("strip.median")),
        Swatch("reference", reference),
    ]


def _gamma(layer: NormLayer) -> Sequence[float]:
    return layer.gamma


def _beta(layer: NormLayer) -> Sequence[float]:
    return layer.beta


def _shift(layer: NormLayer) -> Sequence[float]:
    return layer.mean_shift


def _ratio(layer: NormLayer) -> Sequence[float]:
    return layer.var_ratio


def _with_layers(edition: Edition) -> list[Shown]:
    return [shown for shown in edition.normalized if shown.run.norm_layers]


def _panels(edition: Edition, strips: Sequence[Strip]) -> list[Panel]:
    bounds = [_bounds(edition, strip) for strip in strips]
    return [
        _panel(edition, shown, strip, ends)
        for shown in _with_layers(edition)
        for strip, ends in zip(strips, bounds, strict=True)
    ]


def _bounds(edition: Edition, strip: Strip) -> tuple[float, float]:
    """Returns the ends of one horizontal axis for all runs, so that they can be compared."""
    places = [
        strip.scale.place(value)
        for shown in _with_layers(edition)
        for layer in shown.run.norm_layers
        for value in strip.values(layer)
    ]
    return scales.limits([strip.scale.reference, *places])


def _panel(edition: Edition, shown: Shown, strip: Strip, ends: tuple[float, float]) -> Panel:
    say = edition.say
    rows = [(layer.layer, strip.values(layer)) for layer in shown.run.norm_layers]
    drawn = [numerals.finite(map(strip.scale.place, values)) for _, values in rows]
    medians = [
        f"{layer} {strip.scale.tick(round(median(places), 3))}"
        for (layer, _), places in zip(rows, drawn, strict=True)
        if places
    ]
    left_out = sum(len(values) for _, values in rows) - sum(map(len, drawn))
    title = strip.title
    if len(edition.normalized) > 1:
        title = say("chart.of_run", title=title, run=shown.label)
    listed = say("list.comma").join(medians) or say("chart.empty")
    labels = Labels(
        x=strip.axis,
        y="",
        description=say("chart.medians", title=title, medians=listed).striptags(),
        empty=say("chart.empty"),
    )
    svg = charts.strips(
        f"{strip.name}-{shown.position}", labels, rows, strip.scale, ends, shown.style
    )
    return Panel(title, svg, say("chart.left_out", n=left_out) if left_out else "")


def _printed(edition: Edition) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Prints γ and β of the first layer as numbers, if it has few channels."""
    printed = []
    for shown in _with_layers(edition):
        layer = shown.run.norm_layers[0]
        if len(layer.gamma) <= PRINTED_CHANNELS:
            title = edition.say("parameters.printed", layer=layer.layer, run=shown.label)
            rows = [("γ", layer.gamma), ("β", layer.beta)]
            printed.append(
                (title, [(name, [numerals.decimal(v) for v in values]) for name, values in rows])
            )
    return printed


def _tables(edition: Edition, columns: Sequence[tuple[str, Values]]) -> list[Table]:
    say = edition.say
    header = [say("table.layer"), say("table.channel"), *(name for name, _ in columns)]
    return [
        Table(
            shown.label,
            header,
            [
                [layer.layer, str(channel), *map(numerals.significant, values)]
                for layer in shown.run.norm_layers
                for channel, values in enumerate(
                    zip(*(of(layer) for _, of in columns), strict=True)
                )
            ],
        )
        for shown in _with_layers(edition)
    ]
