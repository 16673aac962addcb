"""Gradient accumulation as one large batch: batch norm sees all micro-batches at once."""

from batchnorm.tools.accumulation.large_batch import Accumulation, accumulate

__all__ = ["Accumulation", "accumulate"]
