"""Measures batch norm layers and training steps against others, and shows the results.

The scripts that write the README and guard against regressions are not here but in ``benchmarks/``.
"""
