"""Describes the machine of a measurement, and warns if it was busy."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Returns the processor, threads and versions that speed depends on, and the current load."""
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
    """Returns the name of the processor; its architecture where no name can be read."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def load() -> float:
    """Returns the load average of the last minute; 0 where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def warning(described: dict[str, Any]) -> str | None:
    """Returns one sentence if other programs keep more than half a core busy, otherwise None."""
    if described["load"] <= 0.5:
        return None
    return (
        f"The load of this machine was {described['load']:.1f} when the measurement began. Other "
        "programs slow the rows unevenly: trust the ratios more than the milliseconds."
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
