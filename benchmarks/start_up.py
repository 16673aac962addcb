"""Measures how long a new process waits for imports and for the first call.

Each figure is the median of several new processes. Cold: the cache of compiled kernels is empty, so
they are compiled. Warm: they are loaded from the cache.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile

PROCESSES = 5

PROBE = """
import json, time
marks = [time.perf_counter()]
def mark(): marks.append(time.perf_counter())
import torch; mark()
from batchnorm import BatchNorm2d; mark()
layer, x = BatchNorm2d(64), torch.randn(8, 64, 28, 28, requires_grad=True)
mark(); y = layer(x)
mark(); y.backward(torch.ones_like(y))
mark(); layer(x).backward(torch.ones_like(y)); mark()
print(json.dumps([after - before for before, after in zip(marks, marks[1:])]))
"""
STAGES = (
    "import torch",
    "import batchnorm",
    "make a layer",
    "first forward",
    "first backward",
    "second step",
)


def seconds(cache: str) -> list[float]:
    """Measures the seconds of each of `STAGES` in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "NUMBA_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    """Prints the table."""
    cold, warm = [], []
    for _ in range(PROCESSES):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(seconds(cache))
            warm.append(seconds(cache))
    print(f"{'':<18}{'cold':>9}{'warm':>9}   milliseconds")
    for place, stage in enumerate(STAGES):
        medians = (1e3 * statistics.median(run[place] for run in runs) for runs in (cold, warm))
        print(f"{stage:<18}" + "".join(f"{median:9.1f}" for median in medians))


if __name__ == "__main__":
    main()
