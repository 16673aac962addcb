"""Draws a benchmark as one bar chart, in an SVG file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from batchnorm.bench.titles import NETS, RIVALS, ratio, short_title
from batchnorm.charts import drawing, embedding
from batchnorm.charts.drawing import FONT, INK, MUTED, STYLES

COLORS = {"batchnorm": STYLES[0].color, "compile": STYLES[1].color, "onednn": STYLES[2].color}
BAR, GAP = 17.0, 12.0
"""Height of a bar and of the gap between two groups, in points."""


@dataclass(frozen=True)
class Bars:
    """One kind of work, and the speed of each rival as a multiple of torch's."""

    name: str
    speeds: dict[str, float]


def chart(results: Mapping[str, Any]) -> str:
    """Draws the speed of every rival as a multiple of torch's, for each kind of work.

    Args:
        results: The object that ``batchnorm bench --json`` prints.

    Returns:
        An SVG file, light or dark as its reader prefers. The bars are geometric means over
        ResNet-50's shapes where they were measured, otherwise over the shapes of each group, and
        the training steps.

    Raises:
        ValueError: Nothing was measured.
    """
    bars = _bars(results)
    if not bars:
        raise ValueError("a chart needs at least one measured row, got none.")
    rivals = [name for name in COLORS if any(name in group.speeds for group in bars)]
    longest = max(speed for group in bars for speed in group.speeds.values())
    heights = [BAR * len(group.speeds) + GAP for group in bars]

    def paint(axes: Axes) -> None:
        axes.grid(visible=False)
        axes.set_xlim(0, max(1.1, longest) * 1.35)
        axes.set_ylim(sum(heights), 0)
        _paint_bars(axes, bars, heights)
        axes.axvline(1, color=MUTED, linewidth=1, dashes=(3, 3))
        axes.set_xlabel("times as fast as torch.nn", fontsize=FONT, color=MUTED, labelpad=5)
        _name_rivals(axes, rivals)

    svg = drawing.draw(
        paint,
        "bench",
        _description(bars),
        left=14 + 5.4 * max(drawing.columns(group.name) for group in bars),
        top=22.0,
        height=58 + sum(heights),
    )
    return embedding.as_file(svg)


def _bars(results: Mapping[str, Any]) -> list[Bars]:
    means = results["geometric_means"]
    of_resnet = [mean for mean in means if mean["group"] == "resnet50"]
    bars = [Bars(short_title(mean), _speeds(mean["speedup"])) for mean in of_resnet or means]
    return bars + [
        Bars(f"{NETS[step['net']]}, training step", {"batchnorm": step["speedup"]})
        for step in results["steps"]
    ]


def _speeds(speedup: Mapping[str, float]) -> dict[str, float]:
    """Converts multiples of our time into multiples of torch's speed."""
    others = {name: speedup["torch"] / speedup[name] for name in COLORS if name in speedup}
    return {"batchnorm": speedup["torch"], **others}


def _paint_bars(axes: Axes, bars: Sequence[Bars], heights: Sequence[float]) -> None:
    top, places = 0.0, []
    for group, height in zip(bars, heights, strict=True):
        for nth, (rival, speed) in enumerate(group.speeds.items()):
            y = top + GAP / 2 + BAR * (nth + 0.5)
            axes.barh(y, speed, height=BAR - 3, color=COLORS[rival], linewidth=0)
            axes.annotate(
                f"{ratio(speed)}×",
                (max(speed, 1), y),  # right of the line that marks torch's speed
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=FONT,
                color=INK,
            )
        places.append(top + height / 2)
        top += height
    axes.set_yticks(places, [group.name for group in bars], color=INK)


def _name_rivals(axes: Axes, rivals: Sequence[str]) -> None:
    names = {**RIVALS, "compile": "torch.compile", "onednn": "oneDNN"}
    at = 6.0
    for rival in rivals:
        axes.annotate(
            f"■ {names[rival]}",
            (0, 1),
            xycoords="figure fraction",
            xytext=(at, -4),
            textcoords="offset points",
            fontsize=FONT,
            color=COLORS[rival],
            va="top",
            annotation_clip=False,
        )
        at += 26 + 5.6 * len(names[rival])


def _description(bars: Sequence[Bars]) -> str:
    ours = "; ".join(f"{group.name}: {ratio(group.speeds['batchnorm'])}" for group in bars)
    return f"How many times as fast as torch.nn our batch norm is. {ours}."
