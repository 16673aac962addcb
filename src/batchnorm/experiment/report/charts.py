"""The charts of the report: each takes numbers and gives one SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator

from batchnorm.charts import drawing, numerals
from batchnorm.charts.drawing import FONT, GRID, HEIGHT, INK, MUTED, PAPER, Style
from batchnorm.charts.scales import ROUND, Frame, Scale, epoch_ticks

SATURATED = 4.0  # sigmoid'(4) is 7% of sigmoid'(0)


@dataclass(frozen=True)
class Labels:
    """The words of one chart: axes with units, description, and the sentence of an empty chart."""

    x: str
    y: str
    description: str
    empty: str


@dataclass(frozen=True)
class Line:
    """One value per epoch; a hollow line is drawn with markers that are not filled."""

    style: Style
    epochs: Sequence[int]
    values: Sequence[float]
    hollow: bool = False


def curves(name: str, labels: Labels, lines: Sequence[Line], frame: Frame) -> str:
    """Draws values by epoch, one line per run; a cross marks where a run stopped being finite."""

    def paint(axes: Axes) -> None:
        _by_epoch(axes, labels, frame)
        _say_if_empty(axes, labels, [v for line in lines for v in line.values])
        for line in lines:
            _line(axes, line)
            _cross(axes, line)

    return drawing.draw(paint, name, labels.description)


def estimates(name: str, labels: Labels, lower: Line, upper: Line, frame: Frame) -> str:
    """Draws two estimates of one quantity by epoch, and shades the gap between them."""

    def paint(axes: Axes) -> None:
        _by_epoch(axes, labels, frame)
        _say_if_empty(axes, labels, [*lower.values, *upper.values])
        axes.fill_between(
            upper.epochs,
            _known(lower.values),
            _known(upper.values),
            color=upper.style.color,
            alpha=0.13,
            linewidth=0,
        )
        _line(axes, lower)
        _line(axes, upper)

    return drawing.draw(paint, name, labels.description)


def memory(name: str, labels: Labels, momentum: float, recent: int, note: str) -> str:
    """Draws how much each past mini-batch weighs in a running statistic, m (1 - m)^k.

    Args:
        name: Name of the chart.
        labels: Words of the chart.
        momentum: Weight m of the newest mini-batch, between 0 and 1.
        recent: Number of the newest mini-batches to set off from the others.
        note: Text beside those.

    Returns:
        The chart.
    """
    ages = range(4 * recent)

    def paint(axes: Axes) -> None:
        weights = [momentum * (1 - momentum) ** age for age in ages]
        colors = [INK if age < recent else MUTED for age in ages]
        axes.bar([age + 1 for age in ages], weights, width=0.62, color=colors, linewidth=0)
        axes.axvline(recent + 0.5, color=MUTED, linewidth=1, dashes=(3, 3))
        axes.text(recent + 1.4, 0.93 * momentum, note, fontsize=FONT, color=INK, va="top")
        axes.set_xlim(0.2, len(ages) + 0.8)
        axes.set_ylim(0, 1.06 * momentum)
        axes.set_xticks([1, *range(recent, len(ages) + 1, recent)])
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
        drawing.label_axes(axes, labels.x, labels.y)

    return drawing.draw(paint, name, labels.description)


def strips(
    name: str,
    labels: Labels,
    rows: Sequence[tuple[str, Sequence[float]]],
    scale: Scale,
    bounds: tuple[float, float],
    style: Style,
) -> str:
    """Draws one dot per channel, a row per layer, with the row's median as a short line.

    Args:
        name: Name of the chart.
        labels: Words of the chart.
        rows: The layers in the order of the network, each with one value per channel.
        scale: The horizontal axis.
        bounds: Ends of that axis, as places.
        style: Style of the run.

    Returns:
        The chart, without the values that have no place on the axis.
    """
    places = [[scale.place(value) for value in values] for _, values in rows]
    names = [drawing.fit(layer) for layer, _ in rows]
    everything = [place for row in places for place in row]

    def paint(axes: Axes) -> None:
        axes.grid(visible=False)
        axes.axvline(scale.reference, color=MUTED, linewidth=1, dashes=(3, 3))
        axes.set_xlim(*bounds)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), names, color=INK)
        for row, row_places in enumerate(places):
            axes.axhline(row, color=GRID, linewidth=1, zorder=0)
            _dots(axes, row, numerals.finite(row_places), bounds, style)
        ticks = scale.ticks(bounds)
        axes.set_xticks(ticks, [scale.tick(round(place, 9)) for place in ticks])
        _say_if_empty(axes, labels, everything)
        drawing.label_axes(axes, labels.x, labels.y)

    left = 12 + 6.2 * max((drawing.columns(name) for name in names), default=0)
    height = max(HEIGHT, 60.0 + 36 * len(rows))
    return drawing.draw(paint, name, labels.description, left=left, top=6.0, height=height)


def bands(
    name: str,
    labels: Labels,
    epochs: Sequence[int],
    quantiles: Sequence[Sequence[float]],
    frame: Frame,
    style: Style,
) -> str:
    """Draw a distribution by epoch: its median in a band of the middle 50% in one of 90%."""

    def paint(axes: Axes) -> None:
        _by_epoch(axes, labels, frame)
        _say_if_empty(axes, labels, [value for values in quantiles for value in values])
        for level in (-SATURATED, SATURATED):
            if frame.values[0] < level < frame.values[1]:
                axes.axhline(level, color=MUTED, linewidth=1, dashes=(1, 3))
        for low, high, alpha in ((0, 4, 0.16), (1, 3, 0.3)):
            lower = _known([values[low] for values in quantiles])
            upper = _known([values[high] for values in quantiles])
            where = epochs
            if len(epochs) == 1:
                lower, upper, where = lower * 2, upper * 2, [epochs[0] - 0.12, epochs[0] + 0.12]
            axes.fill_between(where, lower, upper, color=style.color, alpha=alpha, linewidth=0)
        _line(axes, Line(style, epochs, [values[2] for values in quantiles]))

    return drawing.draw(paint, name, labels.description)


def _known(values: Sequence[float]) -> list[float]:
    """Replaces values that are not finite by NaN, which is not drawn."""
    return [value if math.isfinite(value) else math.nan for value in values]


def _by_epoch(axes: Axes, labels: Labels, frame: Frame) -> None:
    first, last = frame.epochs
    room = 0.35 if last - first < 20 else 0.02 * (last - first)
    axes.set_xlim(first - room, last + room)
    axes.set_ylim(*frame.values)
    axes.set_xticks(epoch_ticks(first, last))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: frame.tick(value)))
    drawing.label_axes(axes, labels.x, labels.y)


def _line(axes: Axes, line: Line) -> None:
    color = line.style.color
    axes.plot(
        line.epochs,
        _known(line.values),
        color=color,
        linewidth=1.8,
        linestyle=line.style.linestyle,
        marker=line.style.marker,
        markersize=4.6,
        markerfacecolor=PAPER if line.hollow else color,
        markeredgecolor=color,
        markeredgewidth=1.2,
    )


def _cross(axes: Axes, line: Line) -> None:
    known = [(e, v) for e, v in zip(line.epochs, line.values, strict=True) if math.isfinite(v)]
    if known and not math.isfinite(line.values[-1]):
        axes.plot(*known[-1], "x", color=line.style.color, markersize=13, markeredgewidth=2)


def _dots(
    axes: Axes, row: int, places: Sequence[float], bounds: tuple[float, float], style: Style
) -> None:
    if not places:
        return
    bins: dict[int, list[float]] = {}
    for place in sorted(places):
        bins.setdefault(int(60 * (place - bounds[0]) / (bounds[1] - bounds[0])), []).append(place)
    step = min(0.11, 0.36 / max(1, max(len(held) for held in bins.values()) // 2))
    points = [
        (place, row + step * ((nth + 1) // 2) * (1 if nth % 2 else -1))
        for held in bins.values()
        for nth, place in enumerate(held)
    ]
    # A dot is a line of no length with round ends: a sixth of a marker's bytes.
    path = Path([p for p in points for _ in range(2)], [Path.MOVETO, Path.LINETO] * len(points))
    path.should_simplify = False
    patch = PathPatch(path, facecolor="none", edgecolor=style.color, linewidth=4.4, alpha=0.6)
    patch.set_capstyle("round")
    axes.add_patch(patch)
    middle = median(places)
    axes.plot([middle, middle], [row - 0.42, row + 0.42], color=INK, linewidth=1.6)


def _say_if_empty(axes: Axes, labels: Labels, values: Sequence[float]) -> None:
    if not numerals.finite(values):
        axes.text(
            0.5,
            0.5,
            labels.empty,
            transform=axes.transAxes,
            fontsize=FONT,
            color=MUTED,
            ha="center",
        )
