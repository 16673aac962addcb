"""Every promise about speed and memory next to what was measured; exits with 1 if one is broken.

    python benchmarks/acceptance.py                    measures everything, some fifteen minutes
    python benchmarks/acceptance.py --save FILE        and keeps the measurements
    python benchmarks/acceptance.py FILE               judges kept ones

The speeds are geometric means over ResNet-50's shapes at two threads. A row that seems slower than
torch's is measured again, five times as long, and then that counts: of hundreds of rows some lose
by chance.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.bench.cases import Case
from batchnorm.bench.summary import CLEARLY, geometric_means
from batchnorm.files import write_text

THREADS = 2
LAST = "channels_last"


@dataclass(frozen=True)
class Figure:
    """One promise: a value and the bound that it has to keep."""

    name: str
    value: float
    bound: float
    at_least: bool = True

    @property
    def holds(self) -> bool:
        """Whether the promise is kept; one that was not measured is not."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        verdict = "ok" if self.holds else "not measured" if math.isnan(self.value) else "BROKEN"
        return f"{self.name:<58} {self.value:8.3f} {sign} {self.bound:<6g} {verdict}"


def figures(results: dict[str, Any]) -> list[Figure]:
    """All promises.

    Args:
        results: ``rows``, ``memory`` and ``steps`` of `batchnorm bench --json`, and the ``rows``
            that were measured beside ``torch.compile`` as ``compiled``.
    """
    means = geometric_means(results["rows"])
    compiled = geometric_means(results["compiled"])
    plain = {"layout": "nchw", "dtype": "float32", "variant": "plain"}
    both = {**plain, "pass": "both"}
    fused = {**both, "variant": "add-relu"}
    return [
        Figure("forward, times torch", _speedup(means, {**plain, "pass": "forward"}), 2.5),
        Figure("forward and backward, times torch", _speedup(means, both), 1.8),
        Figure("BN + ReLU, times torch", _speedup(means, {**both, "variant": "relu"}), 2.2),
        Figure("BN + add + ReLU, times torch", _speedup(means, fused), 2.5),
        Figure("BN + add + ReLU, times torch.compile", _speedup(compiled, fused, "compile"), 1.3),
        Figure("channels_last, times torch", _speedup(means, {**both, "layout": LAST}), 1.3),
        Figure("bfloat16, times torch", _speedup(means, {**both, "dtype": "bfloat16"}), 1.2),
        _at_most("forward over a copy", _to_copy(means, {**plain, "pass": "forward"}), 1.3),
        _at_most("backward over a copy", _to_copy(means, {**plain, "pass": "backward"}), 2.0),
        _at_most("LeNet's step: cost of our norm, of torch's", _lenet_share(results), 0.40),
        _at_most("slowest row: our time over torch's", _slowest(results["rows"]), CLEARLY),
        _at_most("bytes kept for backward, of torch's, worst row", _kept(results, "plain"), 1.0),
        _at_most("the same with ReLU fused", _kept(results, "relu", "add-relu"), 0.999),
    ]


def measured() -> dict[str, Any]:
    """Everything that `figures` needs."""
    from batchnorm.allocation import keep_freed_memory
    from batchnorm.bench import cases, clock
    from batchnorm.bench.measure import measure

    keep_freed_memory()
    effort = clock.Effort(seconds=0.5, rounds=12)
    longer = clock.Effort(5 * effort.seconds, 5 * effort.rounds)
    rows = cases.plan(cases.Selection(), "all").cases
    fused = cases.Selection(only=("resnet50",), variants=("add-relu",), passes=("both",))
    results = measure(cases.Plan(rows, ("lenet",)), effort, threads=THREADS, announce=_say)
    lost = tuple(_case(row) for row in results["slower"])
    again = measure(cases.Plan(lost, ()), longer, threads=THREADS, announce=_say)["rows"]
    beside = measure(cases.plan(fused), effort, threads=THREADS, compiled=True, announce=_say)
    return {**results, "rows": replaced(results["rows"], again), "compiled": beside["rows"]}


def replaced(rows: Sequence[dict[str, Any]], again: Sequence[dict[str, Any]]) -> list[Any]:
    """The rows, those that were measured again by their second measurement."""
    second = {_case(row): row for row in again}
    return [second.get(_case(row), row) for row in rows]


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="judge these measurements")
    parser.add_argument("--save", type=Path, help="keep the measurements here")
    arguments = parser.parse_args()
    if arguments.file is not None:
        results = json.loads(arguments.file.read_text())
    else:
        from batchnorm.bench.truth import Disagreement

        try:
            results = measured()
        except Disagreement as disagreement:
            print(disagreement, file=sys.stderr)
            return 1
        if arguments.save is not None:
            write_text(arguments.save, json.dumps(results))
    promises = figures(results)
    print("\n".join(map(str, promises)))
    return 0 if all(figure.holds for figure in promises) else 1


def _at_most(name: str, value: float, bound: float) -> Figure:
    return Figure(name, value, bound, at_least=False)


def _mean(means: Iterable[dict[str, Any]], kind: dict[str, str]) -> dict[str, Any]:
    wanted = {**kind, "group": "resnet50"}
    return next((m for m in means if all(m[key] == wanted[key] for key in wanted)), {})


def _speedup(means: Iterable[dict[str, Any]], kind: dict[str, str], rival: str = "torch") -> float:
    return _mean(means, kind).get("speedup", {}).get(rival, math.nan)


def _to_copy(means: Iterable[dict[str, Any]], kind: dict[str, str]) -> float:
    return _mean(means, kind).get("to_copy_time", math.nan)


def _lenet_share(results: dict[str, Any]) -> float:
    shares = [step["share_of_cost"] for step in results["steps"] if step["net"] == "lenet"]
    return shares[0] if shares else math.nan


def _slowest(rows: Sequence[dict[str, Any]]) -> float:
    return max((1 / row["speedup"]["torch"] for row in rows), default=math.nan)


def _kept(results: dict[str, Any], *variants: str) -> float:
    return max(
        (
            row["saved_bytes"]["batchnorm"] / row["saved_bytes"]["torch"]
            for row in results["memory"]
            if row["variant"] in variants
        ),
        default=math.nan,
    )


def _case(row: dict[str, Any]) -> Case:
    kind = (row["layout"], row["dtype"], row["variant"], (row["pass"],))
    return Case(row["group"], tuple(row["shape"]), *kind)


def _say(name: str) -> None:
    print(name, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
