"""Wording that all tools share: counts, names of layers, and lines of 80 columns."""

from __future__ import annotations

import textwrap

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


def shortened(name: str, width: int) -> str:
    """Cuts a long name to ``width`` characters, keeping the end, which differs most."""
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]


def wrapped(line: str, indent: str = "") -> str:
    """Breaks a line that is wider than 80 columns.

    Args:
        line: One line.
        indent: Begins all lines but the first.
    """
    return line if len(line) <= WIDTH else textwrap.fill(line, WIDTH, subsequent_indent=indent)
