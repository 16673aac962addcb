"""The latest records as a table of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchnorm.tools.monitoring.record import Record, severity
from batchnorm.tools.wording import counted, displayed, shortened, wrapped

_LAYER = 16
"""Width of the names, which leaves 64 of 80 columns for numbers."""
_LEGEND = (
    "shift: batch mean - running mean, in running deviations, of the worst channel.",
    "var ratio: batch variance / running variance, from the lowest to the highest.",
    "drift: change of the running mean since the last record, in deviations.",
    "dead: channels with a constant output; weight, bias: from lowest to highest.",
)


def table(records: Sequence[Record]) -> str:
    """Writes the latest record of each layer as a table, the worst first."""
    latest = {record["layer"]: record for record in records}
    if not latest:
        return "Nothing recorded yet."
    rows = sorted(latest.values(), key=severity, reverse=True)
    step = max(record["step"] for record in rows)
    title = f"Step {step}, {counted(len(rows), 'layer')}, worst first."
    head = _row("layer", "shift", "var ratio", "drift", "dead", "weight", "bias")
    names = shortened([row["layer"] for row in rows], _LAYER)
    lines = [_line(names[row["layer"]], row) for row in rows]
    return "\n".join([title, head, *lines, "", *_LEGEND, *_zero_weights(rows)])


def _zero_weights(rows: Sequence[Record]) -> list[str]:
    """Explains layers that are dead because they were initialized so."""
    zero = [row["layer"] for row in rows if row["weight_low"] == row["weight_high"] == 0]
    if not zero:
        return []
    more = f" and {len(zero) - 1} more" if len(zero) > 1 else ""
    why = (
        f"All weights are zero in {displayed(zero[0])}{more}. Many networks initialize the last "
        "layer of a residual block so (timm: zero_init_last); training makes it live."
    )
    return ["", wrapped(why)]


def _line(name: str, record: Record) -> str:
    return _row(
        name,
        _number(record["mean_shift"]),
        _span(record["var_ratio_low"], record["var_ratio_high"]),
        _number(record["mean_drift"]),
        f"{100 * record['dead']:.0f}%",
        _span(record["weight_low"], record["weight_high"]),
        _span(record["bias_low"], record["bias_high"]),
    )


def _row(layer: str, *cells: str) -> str:
    widths = (7, 15, 7, 5, 15, 15)
    columns = "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return (layer.ljust(_LAYER) + columns).rstrip()


def _span(low: float | None, high: float | None) -> str:
    return "-" if low is None else f"{_number(low)}..{_number(high)}"


def _number(value: float | None) -> str:
    """Writes a number in at most six characters."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.2f}" if abs(value) < 99.995 else f"{value:.0e}"
