"""Lays a benchmark out as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from batchnorm.bench.titles import (
    LAYOUTS,
    NETS,
    PASSES,
    RIVALS,
    VARIANTS,
    milliseconds,
    ratio,
    shape,
    title,
)

LISTED = 12
"""Rows slower than torch's that are listed; the others are counted."""

STEPS = "Training steps: forward, loss, backward, SGD · float32"
MEMORY = "Saved for backward, x and all, in bytes per byte of x"

NOTE = (
    "Times are medians in milliseconds, ± half the interquartile range of the rounds; all rivals "
    "take turns in one process. × torch: torch's time over ours. GB/s: the bytes that this work "
    "must move at least, each tensor once, over our time. copy: that speed as a share of the speed "
    "of y.copy_(x) on the same tensor in the same rounds; a tensor that fits in the cache is "
    "copied faster. cost: the time that our norm adds to a step without norm, in percent of what "
    "torch's adds."
)


def tables(results: Mapping[str, Any], warning: str | None = None) -> RenderableType:
    """Lays out the machine, one table for each kind of row, training steps and saved memory.

    Args:
        results: The object that ``batchnorm bench --json`` prints.
        warning: A sentence about the machine, shown at the top.
    """
    parts: list[RenderableType] = [Text(machine_line(results["machine"]))]
    if warning is not None:
        parts.append(Text(warning, style="yellow"))
    for rows in _by_kind(results["rows"]):
        parts.append(_titled(title(rows[0]), _rows(rows, _mean(rows, results["geometric_means"]))))
    if results["steps"]:
        parts.append(_titled(STEPS, _steps(results["steps"])))
    if results["memory"]:
        parts.append(_titled(MEMORY, _memory(results["memory"])))
    parts += [Text(line) for line in _losses(results["slower"])]
    parts.append(Text(NOTE, style="dim"))
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def machine_line(machine: Mapping[str, Any]) -> str:
    """Describes the machine in one or two lines."""
    numba = f"numba {machine['numba']}" if machine["numba"] else "no numba"
    waiting = f" ({machine['wait_policy']})" if machine["wait_policy"] else ""
    return (
        f"{machine['processor']} ({machine['vector_instructions']}), {machine['threads']} of "
        f"{machine['cores']} cores{waiting}; torch {machine['torch']}, {numba}, "
        f"Python {machine['python']}; load {machine['load']:.2f}"
    )


def _by_kind(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Groups rows by title, in the order of the first row of each group."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(title(row), []).append(row)
    return list(kinds.values())


def _mean(
    rows: Sequence[Mapping[str, Any]], means: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """Returns the geometric mean of a table; None if it has one row, or rows of several groups."""
    fitting = [mean for mean in means if title(mean) == title(rows[0])]
    return fitting[0] if len(fitting) == 1 and len(rows) > 1 else None


def _titled(name: str, table: Table) -> Group:
    return Group(Text(name, style="bold"), table)


def _table(headers: Sequence[str]) -> Table:
    drawn = Table(box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1))
    for place, header in enumerate(headers):
        drawn.add_column(Text(header), justify="right" if place else "left", no_wrap=True)
    return drawn


def _rows(rows: Sequence[Mapping[str, Any]], mean: Mapping[str, Any] | None) -> Table:
    others = [name for name in RIVALS if any(name in row["speedup"] for row in rows)]
    names = [RIVALS[name] for name in others]
    drawn = _table(["input", RIVALS["batchnorm"], "±", *names, "× torch", "GB/s", "copy"])
    for row in rows:
        ours = row["seconds"]["batchnorm"]
        drawn.add_row(
            shape(row["shape"]),
            milliseconds(ours["median"]),
            f"{50 * (ours['high'] - ours['low']) / ours['median']:.0f}%",
            *(_median(row["seconds"], name) for name in others),
            *_speeds(row),
        )
    if mean is not None:
        speedup = mean["speedup"]
        against = (f"×{ratio(speedup[name])}" if name in speedup else "" for name in others[1:])
        drawn.add_section()
        drawn.add_row("geometric mean", "", "", "", *against, *_speeds(mean))
    return drawn


def _speeds(row: Mapping[str, Any]) -> tuple[Text, str, str]:
    """Formats the last columns of a row or of a mean."""
    useful = f"{row['bytes_per_second'] / 1e9:.1f}"
    return _speedup(row["speedup"]["torch"]), useful, f"{100 * row['of_copy_speed']:.0f}%"


def _steps(steps: Sequence[Mapping[str, Any]]) -> Table:
    drawn = _table(["net and images", "no norm", "ours", "torch", "× torch", "cost"])
    for step in steps:
        drawn.add_row(
            f"{NETS[step['net']]}, {step['batch']} of {shape(step['image'])}",
            *(_median(step["seconds"], name) for name in ("none", "batchnorm", "torch")),
            _speedup(step["speedup"]),
            f"{100 * step['share_of_cost']:.0f}%",
        )
    return drawn


def _memory(memory: Sequence[Mapping[str, Any]]) -> Table:
    drawn = _table(["layer", "ours", "torch"])
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in memory:
        name = f"{VARIANTS[row['variant']]}, {row['dtype']} {LAYOUTS[row['layout']]}"
        kinds.setdefault(name, []).append(row)
    for name, rows in kinds.items():
        whole = sum(row["tensor_bytes"] for row in rows)
        kept = (sum(row["saved_bytes"][who] for row in rows) for who in ("batchnorm", "torch"))
        drawn.add_row(name, *(f"{held / whole:.4f}" for held in kept))
    return drawn


def _losses(slower: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not slower:
        yield "No row is slower than torch's by more than 5 %."
        return
    worst = sorted(slower, key=lambda row: row["speedup"])
    lines = [
        f"  ×{ratio(row['speedup'])}  {shape(row['shape'])} {row['dtype']} "
        f"{LAYOUTS[row['layout']]} {VARIANTS[row['variant']]} {PASSES[row['pass']]}"
        for row in worst[:LISTED]
    ]
    if len(worst) > LISTED:
        lines.append(f"  and {len(worst) - LISTED} more, all in --json")
    yield "\n".join([f"Slower than torch's by more than 5 %, {len(worst)} rows:", *lines])


def _median(seconds: Mapping[str, Any], name: str) -> str:
    return milliseconds(seconds[name]["median"]) if name in seconds else "—"


def _speedup(value: float) -> Text:
    return Text(ratio(value), style="green" if value > 1 else "red" if value * 1.05 < 1 else "")
