"""Figures by matplotlib as SVG that takes its colours and fonts from the page around it."""

from __future__ import annotations

import io
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchnorm.charts import embedding

INK, MUTED, RULE, GRID, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05"
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
    "#0a0c01": "var(--line-1)",
    "#0a0c02": "var(--line-2)",
    "#0a0c03": "var(--line-3)",
    "#0a0c04": "var(--line-4)",
}
WIDTH, HEIGHT = 4.4 * 72, 2.9 * 72
FONT = 10.5


@dataclass(frozen=True)
class Style:
    """How one run is drawn: colour, dashes and marker each tell it apart on their own."""

    color: str
    dash: tuple[float, ...]
    marker: str

    @property
    def linestyle(self) -> tuple[int, tuple[float, ...] | None]:
        """The dashes as matplotlib takes them, in points."""
        return (0, self.dash or None)


STYLES = (
    Style("#0a0c01", (), "o"),
    Style("#0a0c02", (6.0, 3.0), "s"),
    Style("#0a0c03", (9.0, 3.0, 2.0, 3.0), "^"),
    Style("#0a0c04", (2.0, 2.5), "D"),
)


def draw(
    paint: Callable[[Axes], None],
    name: str,
    description: str,
    left: float = 40.0,
    top: float = 24.0,
    height: float = HEIGHT,
) -> str:
    """Draw one chart.

    Args:
        paint: draws on the empty axes, with the colours of this module.
        name: tells this chart's ids from those of the other charts on the page.
        description: what the chart shows, for those who do not see it.
        left: room left of the axes for their tick labels, in points.
        top: room above the axes for the name of the vertical one, in points.
        height: height of the whole chart, in points; its width is `WIDTH`.

    Returns:
        An <svg> element for an HTML page that defines --ink, --muted, --rule, --grid, --paper
        and --line-1 to --line-4. The same arguments give the same text.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}
        )
        # The browser has the glyphs that matplotlib's own font lacks.
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
    """Name both axes, with their units; the vertical one above its upper end, to be read flat."""
    axes.set_xlabel(x, fontsize=FONT, color=MUTED, labelpad=5)
    corner = {"xy": (0, 1), "xycoords": "figure fraction", "annotation_clip": False}
    axes.annotate(y, **corner, fontsize=FONT, color=MUTED, ha="left", va="top")


def fit(text: str, columns: int = 12) -> str:
    """Shorten a label to so many columns; a Chinese character takes two."""
    widths = [2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text]
    if sum(widths) <= columns:
        return text
    kept = next(n for n in range(len(text), -1, -1) if sum(widths[:n]) < columns)
    return text[:kept] + "…"


def columns(text: str) -> int:
    """How many columns a label takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def calm(axes: Axes, rule: str, muted: str, grid: str) -> None:
    """Leave only a base line, labels and a horizontal grid, in these colours."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(rule)
    axes.tick_params(length=0, labelsize=FONT, labelcolor=muted, pad=5)
    axes.grid(axis="y", color=grid, linewidth=1)
    axes.set_axisbelow(True)
