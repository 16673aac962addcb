"""`accelerate` as most tests want it: their inputs are so small that torch's kernels are faster."""

from __future__ import annotations

from functools import partial

from batchnorm.tools.acceleration import accelerate as by_time

accelerate = partial(by_time, everywhere=True)
