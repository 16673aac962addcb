"""Colors of all pictures as CSS variables, on light and on dark paper."""

from __future__ import annotations

LIGHT = (
    "--ink:#1b2026;--muted:#59636e;--rule:#b9c0c8;--grid:#e8ebee;--paper:#ffffff;"
    "--line-1:#1d5bb5;--line-2:#c2410c;--line-3:#0b7468;--line-4:#7c3aed"
)
DARK = (
    "--ink:#e7eaee;--muted:#a2acb7;--rule:#4a545f;--grid:#262d35;--paper:#12161b;"
    "--line-1:#82b4ff;--line-2:#ff9d66;--line-3:#4fd0bf;--line-4:#c3a6ff"
)
