"""A figure of the records of running statistics: three panels, by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from batchnorm.charts import drawing, scales
from batchnorm.charts.drawing import STYLES, Style
from batchnorm.charts.palette import LIGHT
from batchnorm.tools.wording import counted, displayed

PANELS = (
    ("mean_shift", "shift of the batch's mean, in standard deviations"),
    ("var_ratio", "batch's variance over the running one, furthest channel"),
    ("dead", "dead channels"),
)
_COLORS: dict[str, str] = {
    name: color for name, _, color in (entry.partition(":") for entry in LIGHT.split(";"))
}
_SIZE = (7.2, 7.6)

Record = Mapping[str, Any]
Lines = dict[str, tuple[list[int], list[float]]]


def chart(records: Sequence[Record]) -> Figure:
    """Draws one line a layer; the layers that were worst at any step are named and colored.

    Args:
        records: Records of `batchnorm.watch`; it reads ``step``, ``layer``, ``mean_shift``,
            ``var_ratio_low``, ``var_ratio_high`` and ``dead``.

    Returns:
        A figure on light paper. A line ends where the value is not finite or not known.

    Raises:
        ValueError: There are no records.
    """
    if not records:
        raise ValueError("a chart needs at least one record, got none.")
    lines = {key: _lines(records, key) for key, _ in PANELS}
    styles = dict(zip(_worst(lines), STYLES, strict=False))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"text.parse_math": False, "svg.fonttype": "none"})
        figure = Figure(figsize=_SIZE, facecolor=_COLORS["--paper"])
        panels = figure.subplots(3, 1, sharex=True)
        figure.subplots_adjust(left=0.1, right=0.97, top=0.855, bottom=0.08, hspace=0.4)
        for axes, (key, title) in zip(panels, PANELS, strict=True):
            _panel(axes, title, lines[key], styles)
        others = len(lines["dead"]) - len(styles)
        _name_layers(figure, panels[0].lines[others:], list(styles), others)
        _scale(*panels)
    return figure


def _lines(records: Sequence[Record], key: str) -> Lines:
    lines: Lines = {}
    for record in records:
        steps, values = lines.setdefault(record["layer"], ([], []))
        steps.append(record["step"])
        values.append(_ratio(record) if key == "var_ratio" else _known(record[key]))
    return lines


def _ratio(record: Record) -> float:
    """Decimal logarithm of the ratio of the channel that is furthest from one."""
    found = [scales.log10(_known(record[f"var_ratio_{end}"])) for end in ("low", "high")]
    return math.nan if any(map(math.isnan, found)) else max(found, key=abs)


def _known(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else value


def _worst(lines: Mapping[str, Lines]) -> list[str]:
    """Sorts layers by the largest distance of any batch from the running statistics."""

    def distance(layer: str) -> float:
        values = [abs(v) for key in ("mean_shift", "var_ratio") for v in lines[key][layer][1]]
        return max((value for value in values if math.isfinite(value)), default=0.0)

    return sorted(lines["dead"], key=distance, reverse=True)


def _panel(axes: Axes, title: str, lines: Lines, styles: Mapping[str, Style]) -> None:
    drawing.calm(axes, _COLORS["--rule"], _COLORS["--muted"], _COLORS["--grid"])
    axes.set_facecolor(_COLORS["--paper"])
    axes.set_title(title, loc="left", fontsize=drawing.FONT, color=_COLORS["--muted"])
    for layer, (steps, values) in lines.items():
        if layer not in styles:
            axes.plot(steps, values, color=_COLORS["--rule"], linewidth=0.9)
    for number, (layer, style) in enumerate(styles.items()):
        steps, values = lines[layer]
        axes.plot(
            steps,
            values,
            color=_color(number),
            linewidth=1.8,
            linestyle=style.linestyle,
            marker=style.marker,
            markersize=4.6,
            markevery=max(1, len(steps) // 10),
        )


def _scale(shift: Axes, ratio: Axes, dead: Axes) -> None:
    shift.set_ylim(bottom=0)
    ratio.axhline(0, color=_COLORS["--muted"], linewidth=1, dashes=(3, 3))
    low, high = ratio.get_ylim()
    low, high = min(low, -0.31), max(high, 0.31)
    ticks = scales.ratio_ticks((low, high))
    ratio.set_ylim(low, high)
    ratio.set_yticks(ticks, [f"{scales.ratio_tick(tick)}×" for tick in ticks])
    dead.set_ylim(0, max(0.05, 1.05 * dead.get_ylim()[1]))
    dead.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scales.percent_tick(value)))
    for axes in (shift, dead):
        axes.yaxis.set_major_locator(MaxNLocator(4))
    dead.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    dead.set_xlabel("step", fontsize=drawing.FONT, color=_COLORS["--muted"], labelpad=5)


def _name_layers(
    figure: Figure, lines: Sequence[Line2D], layers: Sequence[str], others: int
) -> None:
    """Draws the legend, two columns above the panels."""
    names = [drawing.fit(displayed(layer), 40) for layer in layers]
    handles = list(lines)
    if others > 0:
        names.append(counted(others, "other layer"))
        handles.append(Line2D([], [], color=_COLORS["--rule"], linewidth=0.9))
    figure.legend(
        handles,
        names,
        loc="upper left",
        ncols=2,
        frameon=False,
        fontsize=drawing.FONT,
        labelcolor=_COLORS["--ink"],
        handlelength=4,
    )


def _color(number: int) -> str:
    return _COLORS[f"--line-{number + 1}"]
