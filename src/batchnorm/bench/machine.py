"""On what a measurement was made, and whether the machine was free."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """The processor, threads and versions that decide how fast things are, and the load now."""
    return {
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": _version("numba"),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "load": round(load(), 2),
    }


def processor() -> str:
    """The processor's own name, or its architecture where it has none to read."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def load() -> float:
    """Programs that wanted a core in the last minute, on average; 0 where nobody counts."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def warning(described: dict[str, Any]) -> str | None:
    """One sentence if other programs keep more than half a core busy."""
    if described["load"] <= 0.5:
        return None
    return (
        f"The load of this machine was {described['load']:.1f} when the measurement began: other "
        "programs slow the rows unevenly, so trust the ratios more than the milliseconds."
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
