"""Summarizes rows: geometric means, rows slower than torch's, the cost of the norm in a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

KIND = ("group", "layout", "dtype", "variant", "pass")
CLEARLY = 1.05
"""A row is slower if it takes more than this many times torch's time; less is noise."""

Row = Mapping[str, Any]


def geometric_mean(values: Iterable[float]) -> float:
    """Computes the n-th root of the product; NaN without values."""
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else math.nan


def geometric_means(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Computes means over the shapes of one group, layout, dtype, variant and pass, in row order.

    Returns:
        For each such kind the number of ``shapes``, and the means of ``speedup`` (by rival),
        ``bytes_per_second``, ``of_copy_speed`` and ``to_copy_time``.
    """
    order = {kind: place for place, kind in enumerate(dict.fromkeys(map(kind_of, rows)))}
    sorted_rows = sorted(rows, key=lambda row: order[kind_of(row)])
    return [
        dict(zip(KIND, kind, strict=True)) | _means(list(members))
        for kind, members in groupby(sorted_rows, key=kind_of)
    ]


def kind_of(row: Row) -> tuple[str, ...]:
    """Returns what the rows of one mean have in common."""
    return tuple(row[key] for key in KIND)


def slower(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the rows in which torch's own layer is faster than ours by more than 5 %."""
    return [
        {**{key: row[key] for key in (*KIND, "shape")}, "speedup": row["speedup"]["torch"]}
        for row in rows
        if row["speedup"]["torch"] * CLEARLY < 1
    ]


def share_of_cost(seconds: Mapping[str, Mapping[str, float]]) -> float:
    """Divides the time that our norm adds to a step without norm by the time that torch's adds.

    Args:
        seconds: Summaries of ``batchnorm``, ``torch`` and ``none``.

    Returns:
        NaN if torch's norm adds nothing that could be measured.
    """
    ours, theirs, none = (seconds[name]["median"] for name in ("batchnorm", "torch", "none"))
    return (ours - none) / (theirs - none) if theirs > none else math.nan


def _means(rows: Sequence[Row]) -> dict[str, Any]:
    columns = ("bytes_per_second", "of_copy_speed", "to_copy_time")
    speedup = {
        rival: geometric_mean(row["speedup"][rival] for row in rows)
        for rival in rows[0]["speedup"]
        if all(rival in row["speedup"] for row in rows)
    }
    return {
        "shapes": len(rows),
        "speedup": speedup,
        **{column: geometric_mean(row[column] for row in rows) for column in columns},
    }
