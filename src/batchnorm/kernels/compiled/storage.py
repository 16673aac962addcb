"""Machine code on disk, so that a new process links it in milliseconds instead of compiling anew.

Numba has a cache of its own. It takes a third of a second to load anything, because it first loads
all that a compilation might need. And it numbers its files under a function's name, so that two
processes that compile different kernels at the same time can end up with each other's code. Here a
file is named after everything that its content depends on, and begins with a checksum.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

import llvmlite.binding as llvm
import numba

from batchnorm.files import whole_file
from batchnorm.kernels import machine

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None

# Bytes of a checksum.
_LENGTH = 4
# Seconds to wait for another process that compiles the same kernel, and between two looks.
_PATIENCE, _PAUSE = 60.0, 0.02
# Names in numba.config that change the code.
_SETTINGS = ("OPT", "CPU_NAME", "CPU_FEATURES", "BOUNDSCHECK", "DEBUGINFO_DEFAULT")

# Names that this process is compiling.
_compiling: set[str] = set()
# Linked code lives as long as its engine.
_engines: list[llvm.ExecutionEngine] = []


class MachineCode(NamedTuple):
    """An object file.

    Attributes:
        symbol: Name of the function to call.
        code: The file's content.
    """

    symbol: str
    code: bytes


def read(name: str) -> MachineCode | None:
    """Reads the code stored under a name; None if there is none, or it is damaged."""
    for folder in _folders():
        with contextlib.suppress(OSError):
            content = (folder / f"{name}.bin").read_bytes()
            checksum, rest = content[:_LENGTH], content[_LENGTH:]
            if checksum == _checksum(rest):
                symbol, _, code = rest.partition(b"\n")
                return MachineCode(symbol.decode(), code)
    return None


def write(name: str, machine_code: MachineCode) -> None:
    """Stores code under a name, in the first folder that can be written, if any."""
    content = b"\n".join((machine_code.symbol.encode(), machine_code.code))
    for folder in _folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(folder / f"{name}.bin") as file:
                file.write(_checksum(content) + content)
            return


@contextlib.contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Waits while another process compiles the code of that name, which is then on disk.

    It only saves work. Nobody waits where files cannot be locked, nor longer than a minute; and a
    signal handler does not wait for the compilation that it interrupted.
    """
    file = None if name in _compiling else _locked(name)
    _compiling.add(name)
    try:
        yield
    finally:
        _compiling.discard(name)
        if file is not None:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            file.close()


def _locked(name: str) -> IO[str] | None:
    for folder in _folders() if fcntl is not None else ():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / f"{name}.lock").open("w")
            with contextlib.suppress(OSError):
                _wait_for(file)
            return file
    return None


def _wait_for(file: IO[str]) -> None:
    started = time.monotonic()
    while time.monotonic() - started < _PATIENCE:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE)
        else:
            return


def _folders() -> list[Path]:
    """``NUMBA_CACHE_DIR`` alone; if that is not set, beside this file, then the user's cache."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    if named:
        return [Path(named)]
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return [Path(__file__).parent / "__pycache__", Path(caches) / "batchnorm"]


def link(machine_code: MachineCode) -> int:
    """Links code into this process; returns the address of its function."""
    engine = machine.engine()
    engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code.code))
    engine.finalize_object()
    _engines.append(engine)
    address = engine.get_function_address(machine_code.symbol)
    assert address
    return address


@cache
def fingerprint() -> str:
    """Returns a checksum of all that compiled code depends on: loops, compiler and processor."""
    processor = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    compiler = numba.__version__, llvm.llvm_version_info, sys.version
    settings = [getattr(numba.config, name) for name in _SETTINGS]
    checksum = zlib.crc32(repr((processor, compiler, settings)).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return f"{checksum:08x}"


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(_LENGTH, "big")
