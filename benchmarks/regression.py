"""Measures speed and memory against bars that hold today, and exits with 1 if one has fallen.

    python benchmarks/regression.py                measures everything, about ten minutes
    python benchmarks/regression.py --save FILE    and saves the measurements
    python benchmarks/regression.py FILE           judges saved measurements

Speeds are geometric means over ResNet-50's shapes at two threads. The bars are about 10 % below
what was measured on two cores of an AMD EPYC (docs/decisions/0007), so a fall is seen on such a
machine. On other machines compare two checkouts with ``benchmarks/against.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.bench.summary import geometric_means
from batchnorm.files import write_text

THREADS = 2
FORWARD = {"layout": "nchw", "dtype": "float32", "variant": "bn", "pass": "forward"}
BACKWARD = {**FORWARD, "pass": "backward"}
BOTH = {**FORWARD, "pass": "both"}
ADD_RELU = {**BOTH, "variant": "add-relu"}


@dataclass(frozen=True)
class Figure:
    """One measured value and its bar.

    Attributes:
        name: What was measured.
        value: NaN if it was not measured.
        bar: The lowest value that is no fall; the highest one if ``sign`` is "≤".
        sign: "≥" or "≤".
    """

    name: str
    value: float
    bar: float
    sign: str = "≥"

    @property
    def verdict(self) -> str:
        """``ok``, ``FALLEN`` or ``not measured``."""
        if math.isnan(self.value):
            return "not measured"
        holds = self.value >= self.bar if self.sign == "≥" else self.value <= self.bar
        return "ok" if holds else "FALLEN"

    def __str__(self) -> str:
        return f"{self.name:<52} {self.value:8.3f} {self.sign} {self.bar:<6g} {self.verdict}"


def figures(results: dict[str, Any]) -> list[Figure]:
    """Lists all figures with their bars.

    Args:
        results: ``rows``, ``memory`` and ``steps`` of ``batchnorm bench --json``, and as
            ``compiled`` the rows that were measured beside ``torch.compile``.
    """
    means = geometric_means(results["rows"])
    compiled = geometric_means(results["compiled"])
    speeds = [
        ("forward", FORWARD, 3.0),
        ("forward and backward", BOTH, 1.95),
        ("with ReLU", {**BOTH, "variant": "relu"}, 2.3),
        ("with residual and ReLU", ADD_RELU, 2.0),
        ("channels_last", {**BOTH, "layout": "channels_last"}, 0.96),
        ("bfloat16", {**BOTH, "dtype": "bfloat16"}, 1.35),
        ("evaluation", {**FORWARD, "pass": "eval"}, 0.88),
    ]
    shares = [step["share_of_cost"] for step in results["steps"] if step["net"] == "lenet"]
    return [
        *(Figure(f"{name}, times torch", _speedup(means, kind), bar) for name, kind, bar in speeds),
        Figure(
            "with residual and ReLU, times torch.compile",
            _speedup(compiled, ADD_RELU, "compile"),
            5.0,
        ),
        Figure("forward, time over a copy", _to_copy(means, FORWARD), 2.3, "≤"),
        Figure("backward, time over a copy", _to_copy(means, BACKWARD), 3.2, "≤"),
        Figure("LeNet's step: cost of our norm over torch's", *shares[:1] or [math.nan], 1.05, "≤"),
        Figure("bytes saved for backward over torch's", _saved(results, "bn"), 1.0, "≤"),
        Figure("the same with ReLU", _saved(results, "relu", "add-relu"), 0.55, "≤"),
    ]


def measured() -> dict[str, Any]:
    """Measures everything that `figures` needs."""
    from batchnorm.allocation import keep_freed_memory
    from batchnorm.bench import cases, clock
    from batchnorm.bench.measure import measure

    keep_freed_memory()
    effort = clock.Effort(seconds=0.5, rounds=12)
    usual = cases.Plan(cases.plan("usual", ("resnet50",)).cases, ("lenet",))
    quick = cases.plan("quick", ("resnet50", "add-relu"))
    results = measure(usual, effort, threads=THREADS, announce=_say)
    beside = measure(quick, effort, threads=THREADS, compiled=True, announce=_say)
    return {**results, "compiled": beside["rows"]}


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="judge these measurements")
    parser.add_argument("--save", type=Path, help="save the measurements here")
    arguments = parser.parse_args()
    if arguments.file is not None:
        results = json.loads(arguments.file.read_text())
    else:
        from batchnorm.bench.expected import Disagreement

        try:
            results = measured()
        except Disagreement as disagreement:
            print(disagreement, file=sys.stderr)
            return 1
        if arguments.save is not None:
            write_text(arguments.save, json.dumps(results))
    found = figures(results)
    print("\n".join(map(str, found)))
    return 0 if all(figure.verdict == "ok" for figure in found) else 1


def _mean(means: Iterable[dict[str, Any]], kind: dict[str, str]) -> dict[str, Any]:
    wanted = {**kind, "group": "resnet50"}
    return next((m for m in means if all(m[key] == wanted[key] for key in wanted)), {})


def _speedup(means: Iterable[dict[str, Any]], kind: dict[str, str], rival: str = "torch") -> float:
    return _mean(means, kind).get("speedup", {}).get(rival, math.nan)


def _to_copy(means: Iterable[dict[str, Any]], kind: dict[str, str]) -> float:
    return _mean(means, kind).get("to_copy_time", math.nan)


def _saved(results: dict[str, Any], *variants: str) -> float:
    ratios = [
        row["saved_bytes"]["batchnorm"] / row["saved_bytes"]["torch"]
        for row in results["memory"]
        if row["variant"] in variants
    ]
    return max(ratios, default=math.nan)


def _say(name: str) -> None:
    print(name, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
