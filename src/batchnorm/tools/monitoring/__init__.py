"""Watching the statistics of a model while it trains: records, a table and a plot.

It changes nothing: `guard` and `recalibrate` do.
"""

from batchnorm.tools.monitoring.watch import Watch, watch

__all__ = ["Watch", "watch"]
