"""Colors of all pictures by name, on light and on dark paper; their CSS is made from these."""

from __future__ import annotations

from collections.abc import Mapping

LIGHT = {
    "ink": "#1b2026",
    "muted": "#59636e",
    "rule": "#b9c0c8",
    "grid": "#e8ebee",
    "paper": "#ffffff",
    "line-1": "#1d5bb5",
    "line-2": "#c2410c",
    "line-3": "#0b7468",
    "line-4": "#7c3aed",
}
DARK = {
    "ink": "#e7eaee",
    "muted": "#a2acb7",
    "rule": "#4a545f",
    "grid": "#262d35",
    "paper": "#12161b",
    "line-1": "#82b4ff",
    "line-2": "#ff9d66",
    "line-3": "#4fd0bf",
    "line-4": "#c3a6ff",
}


def css_variables(colors: Mapping[str, str]) -> str:
    """Writes a palette as CSS declarations: ``--ink:#1b2026;--muted:...``."""
    return ";".join(f"--{name}:{color}" for name, color in colors.items())
