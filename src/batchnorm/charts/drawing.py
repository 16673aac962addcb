"""Draws figures with matplotlib as SVG that takes its colors and fonts from the page around it."""

from __future__ import annotations

import io
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchnorm.charts import embedding, palette

INK, MUTED, RULE, GRID, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05"
LINES = ("#0a0c01", "#0a0c02", "#0a0c03", "#0a0c04")
_VARIABLES = {
    placeholder: f"var(--{name})"
    for placeholder, name in zip(
        (INK, MUTED, RULE, GRID, PAPER, *LINES), palette.LIGHT, strict=True
    )
}
"""CSS variables by the placeholder color that marks them in matplotlib's file."""

WIDTH, HEIGHT = 4.4 * 72, 2.9 * 72
"""Size of a figure in points."""

FONT = 10.5
"""Size of all text in points."""


@dataclass(frozen=True)
class Style:
    """Color, dashes and marker of one line; each of them alone tells it from the other lines."""

    color: str
    dash: tuple[float, ...]
    marker: str

    @property
    def linestyle(self) -> tuple[int, tuple[float, ...] | None]:
        """The dashes in the form of matplotlib, in points."""
        return (0, self.dash or None)


STYLES = (
    Style(LINES[0], (), "o"),
    Style(LINES[1], (6.0, 3.0), "s"),
    Style(LINES[2], (9.0, 3.0, 2.0, 3.0), "^"),
    Style(LINES[3], (2.0, 2.5), "D"),
)


def draw(
    paint: Callable[[Axes], None],
    name: str,
    description: str,
    left: float = 40.0,
    top: float = 24.0,
    height: float = HEIGHT,
) -> str:
    """Draws one chart.

    Args:
        paint: Draws on the empty axes, with the colors of this module.
        name: Makes the ids of this chart differ from those of other charts on the page.
        description: Text for readers who cannot see the chart.
        left: Room left of the axes for their tick labels, in points.
        top: Room above the axes for the name of the vertical axis, in points.
        height: Height of the whole chart, in points; its width is ``WIDTH``.

    Returns:
        An ``<svg>`` element for an HTML page that defines the CSS variables of
        `batchnorm.charts.palette`. The same arguments give the same text.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}
        )
        # The browser has the glyphs that are missing in matplotlib's font.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="none")
        right, bottom = 10, 36
        box = (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH)
        axes = figure.add_axes((*box, (height - top - bottom) / height), facecolor="none")
        calm(axes, RULE, MUTED, GRID)
        paint(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return embedding.embed(stream.getvalue(), description, _VARIABLES)


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Names both axes with their units; the name of the vertical axis is written above it."""
    axes.set_xlabel(x, fontsize=FONT, color=MUTED, labelpad=5)
    corner = {"xy": (0, 1), "xycoords": "figure fraction", "annotation_clip": False}
    axes.annotate(y, **corner, fontsize=FONT, color=MUTED, ha="left", va="top")


def fit(text: str, limit: int = 12) -> str:
    """Shortens a label to ``limit`` columns; a Chinese character takes two."""
    if columns(text) <= limit:
        return text
    length = next(n for n in range(len(text), -1, -1) if columns(text[:n]) < limit)
    return text[:length] + "…"


def columns(text: str) -> int:
    """Counts the columns that a label takes; a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def calm(axes: Axes, rule: str, muted: str, grid: str) -> None:
    """Removes everything but base line, labels and horizontal grid, and sets their colors."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(rule)
    axes.tick_params(length=0, labelsize=FONT, labelcolor=muted, pad=5)
    axes.grid(axis="y", color=grid, linewidth=1)
    axes.set_axisbelow(True)
