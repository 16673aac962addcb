"""Compares the speed of this checkout with another one, and exits with 1 if a row became slower.

    python benchmarks/against.py OTHER            all rows, about ten minutes on a quiet machine
    python benchmarks/against.py OTHER --pairs 3  fewer pairs of processes
    python benchmarks/against.py OTHER --only tiny,channels_last

OTHER is the root of another checkout. Both are measured in fresh processes in turn, through the
public layers only, so OTHER may be a version whose modules have other names. The ratio of a row is
the median over pairs of processes. Rows slower than allowed are measured again in three times as
many pairs, and then all their pairs count: of forty rows one seems slower by chance.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALLOWED = 1.03
"""Times as long as OTHER. Beyond this a row counts as slower."""

SAMPLES, SAMPLE_SECONDS = 15, 0.005
"""Samples of a row in one process, and the least seconds of each."""

TINY = (2, 4, 3, 3)
SHAPES = {
    "LeNet conv": (256, 6, 24, 24),
    "LeNet conv 2": (256, 16, 8, 8),
    "ResNet 56": (32, 64, 56, 56),
    "ResNet 14": (32, 256, 14, 14),
    "ResNet 7": (32, 512, 7, 7),
}

Row = tuple[str, tuple[int, ...], str, str, str, str]
"""Name, shape, pass, layer, layout and dtype."""


def rows() -> list[Row]:
    """Lists the rows: tiny inputs for the overhead of a call, then LeNet's and ResNet's shapes."""
    passes = ("forward", "training", "evaluation")
    found: list[Row] = [("tiny", TINY, which, "bn", "planes", "float32") for which in passes]
    for name, shape in SHAPES.items():
        found += [(name, shape, which, "bn", "planes", "float32") for which in passes]
        found.append((name, shape, "training", "relu", "planes", "float32"))
        if name.startswith("ResNet"):
            found.append((name, shape, "training", "add-relu", "planes", "float32"))
            found.append((name, shape, "evaluation", "add-relu", "planes", "float32"))
            found += [(name, shape, w, "bn", "channels_last", "float32") for w in passes[1:]]
            found += [(name, shape, w, "bn", "planes", "bfloat16") for w in passes[1:]]
    return found


def title(row: Row) -> str:
    """Names a row: ``ResNet 14, training, relu, channels_last``; defaults are left out."""
    return ", ".join(word for word in (row[0], *row[2:]) if word not in ("bn", "planes", "float32"))


def seconds(row: Row) -> float:
    """Measures one call in this process: the lower quartile, which other programs disturb least."""
    call = _call(row)
    for _ in range(3):
        call()
    started = time.perf_counter()
    call()
    repeats = max(1, round(SAMPLE_SECONDS / (time.perf_counter() - started)))
    samples = []
    gc.collect()
    gc.disable()
    for _ in range(SAMPLES):
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        samples.append((time.perf_counter() - started) / repeats)
    gc.enable()
    return statistics.quantiles(samples)[0]


def _call(row: Row) -> Callable[[], object]:
    import torch

    from batchnorm import BatchNorm2d

    _, shape, which, variant, layout, dtype = row
    torch.manual_seed(0)

    def tensor() -> torch.Tensor:
        values = torch.randn(shape).to(getattr(torch, dtype))
        return values.to(memory_format=torch.channels_last) if layout != "planes" else values

    x, grad_output, residual = tensor(), tensor(), tensor()
    layer = BatchNorm2d(shape[1], activation=None if variant == "bn" else "relu")
    inputs = [x, residual] if variant == "add-relu" else [x]
    if which == "evaluation":
        layer.eval()
        return torch.no_grad()(lambda: layer(*inputs))
    for value in inputs:
        value.requires_grad_()
    if which == "forward":
        return lambda: layer(*inputs)
    leaves = (*inputs, *layer.parameters())
    return lambda: torch.autograd.grad(layer(*inputs), leaves, grad_output)


def measured(checkout: Path, wanted: Sequence[Row]) -> list[float]:
    """Runs the rows in a new process that imports the library from ``checkout``."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", json.dumps(wanted)],
        env={**os.environ, "PYTHONPATH": str(checkout / "src")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    source, times = json.loads(done.stdout)
    if not Path(source).is_relative_to(checkout):
        raise SystemExit(f"{checkout}: the library was imported from {source} instead.")
    return times


def pairs(other: Path, wanted: Sequence[Row]) -> Iterator[list[tuple[float, float]]]:
    """Yields the seconds of each row here and in ``other``, one pair of processes after another."""
    for number in count():
        order = [ROOT, other] if number % 2 == 0 else [other, ROOT]
        times = {checkout: measured(checkout, wanted) for checkout in order}
        yield list(zip(times[ROOT], times[other], strict=True))


def compare(
    other: Path, wanted: Sequence[Row], number: int
) -> dict[Row, list[tuple[float, float]]]:
    """Measures ``number`` pairs of every row, and three times as many of rows that seem slower."""
    found: dict[Row, list[tuple[float, float]]] = {row: [] for row in wanted}
    for again, more in ((wanted, number), (None, 3 * number)):
        chosen = again or [row for row in wanted if ratio(found[row]) > ALLOWED]
        for nth, pair in zip(range(more), pairs(other, chosen) if chosen else (), strict=False):
            print(f"pair {nth + 1} of {more}, {len(chosen)} rows", file=sys.stderr)
            for row, times in zip(chosen, pair, strict=True):
                found[row].append(times)
    return found


def ratio(times: Sequence[tuple[float, float]]) -> float:
    """Returns the median over pairs of our time divided by the other's."""
    return statistics.median(ours / theirs for ours, theirs in times)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("other", nargs="?", type=Path, help="root of the other checkout")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of processes")
    parser.add_argument("--only", default="", help="words of the titles of rows, with commas")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        import batchnorm

        times = [seconds(row) for row in json.loads(arguments.measure)]
        print(json.dumps([batchnorm.__file__, times]))
        return 0
    if arguments.other is None or not (arguments.other / "src/batchnorm").is_dir():
        parser.error("OTHER must be the root of a checkout, a folder with src/batchnorm in it")
    words = [word.strip() for word in arguments.only.split(",")]
    wanted = [row for row in rows() if any(word in title(row) for word in words)]
    found = compare(arguments.other.resolve(), wanted, arguments.pairs)
    print(f"{'row':<44}{'here':>11}{'other':>11} µs{'ratio':>8}")
    for row, times in found.items():
        here, there = (1e6 * statistics.median(values) for values in zip(*times, strict=True))
        verdict = "SLOWER" if ratio(times) > ALLOWED else ""
        print(f"{title(row):<44}{here:11.1f}{there:11.1f}{ratio(times):11.3f} {verdict}".rstrip())
    return 1 if any(ratio(times) > ALLOWED for times in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
