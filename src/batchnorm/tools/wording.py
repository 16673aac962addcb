"""Wording that all tools share: counts, names of layers, and lines of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping

WIDTH = 80
"""Columns of a table or a text, the width of a terminal that nobody has resized."""


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 layer``, ``3 layers``, ``2 batches``, ``1,000 samples``."""
    if number != 1:
        noun += "es" if noun.endswith(("ch", "sh", "s", "x")) else "s"
    return f"{number:,} {noun}"


def displayed(name: str) -> str:
    """The dotted name of a layer as a reader sees it; the name of the model itself is empty."""
    return name or "the model itself"


def shortened(names: Collection[str], width: int) -> dict[str, str]:
    """Cuts long names to ``width`` characters so that they stay distinguishable.

    The end stays, and as much of the beginning as tells them apart: ``layer1…ownsample.1``.

    Returns:
        The short names by name.
    """
    shown = {name: displayed(name) for name in names}
    for start in range(width - 1):
        cut = {name: _cut(text, start, width) for name, text in shown.items()}
        if len(set(cut.values())) == len(cut):
            return cut
    ends = {name: f"#{number}" for number, name in enumerate(names, 1)}
    return {
        name: text if len(text) <= width else _cut(text, 0, width - len(ends[name])) + ends[name]
        for name, text in shown.items()
    }


def _cut(name: str, start: int, width: int) -> str:
    """Keeps ``start`` characters of the beginning and fills up with the end."""
    if len(name) <= width:
        return name
    return name[:start] + "…" + name[len(name) - (width - start - 1) :]


class Printed:
    """Mixin: a prompt and a notebook show what ``print`` shows, for results that are a text."""

    def __repr__(self) -> str:
        return str(self)


def passed_over(left: Mapping[str, str]) -> list[str]:
    """Lines that name the layers that a tool left alone, and why."""
    return [wrapped(f"Left alone: {displayed(n)}: {why}.", "  ") for n, why in left.items()]


def wrapped(line: str, indent: str = "") -> str:
    """Breaks a line that is wider than 80 columns.

    Args:
        line: One line.
        indent: Begins all lines but the first.
    """
    return line if len(line) <= WIDTH else textwrap.fill(line, WIDTH, subsequent_indent=indent)
