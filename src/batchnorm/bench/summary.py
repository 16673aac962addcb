"""What rows say together: geometric means, rows that lost, batch norm's share of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

KIND = ("group", "layout", "dtype", "variant", "pass")
CLEARLY = 1.05

Row = Mapping[str, Any]


def geometric_mean(values: Iterable[float]) -> float:
    """The n-th root of the product; NaN of nothing."""
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else math.nan


def geometric_means(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means over the shapes of one group, layout, dtype, variant and pass, in the rows' order.

    Returns:
        For each such kind how many ``shapes`` it has, and the means of ``speedup`` (by rival),
        ``bytes_per_second``, ``of_copy_speed`` and ``to_copy_time``.
    """
    order = {kind: place for place, kind in enumerate(dict.fromkeys(map(kind_of, rows)))}
    sorted_rows = sorted(rows, key=lambda row: order[kind_of(row)])
    return [
        dict(zip(KIND, kind, strict=True)) | _means(list(members))
        for kind, members in groupby(sorted_rows, key=kind_of)
    ]


def kind_of(row: Row) -> tuple[str, ...]:
    """What the rows of one mean have in common."""
    return tuple(row[key] for key in KIND)


def slower(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows in which torch's own layer is faster than ours by more than 5 %."""
    return [
        {**{key: row[key] for key in (*KIND, "shape")}, "speedup": row["speedup"]["torch"]}
        for row in rows
        if row["speedup"]["torch"] * CLEARLY < 1
    ]


def share_of_cost(seconds: Mapping[str, Mapping[str, float]]) -> float | None:
    """What ours adds to a step without norm, over what torch's adds; None if that was not measured.

    Args:
        seconds: Summaries of ``batchnorm``, ``torch`` and perhaps ``none``.
    """
    if "none" not in seconds:
        return None
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
