"""Machine code on disk, so that a new process links it in milliseconds instead of compiling anew.

Numba has a cache of its own. It takes a third of a second to load anything, because it first loads
all that a compilation might need. And it numbers its files under a function's name, so that two
processes that compile different kernels at the same time could end up with each other's code. Here
a file is named after everything that its content depends on, and begins with a checksum.
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
from typing import IO, Any, NamedTuple

import llvmlite.binding as llvm
import numba

from batchnorm.files import whole_file

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None

_LENGTH = 4
# How many seconds to wait for another process, and between two looks.
_PATIENCE, _PAUSE = 60.0, 0.02
# Of numba.config: what changes the code.
_SETTINGS = ("OPT", "CPU_NAME", "CPU_FEATURES", "BOUNDSCHECK", "DEBUGINFO_DEFAULT")

# What this process compiles at the moment.
_held: set[str] = set()
# Linked code lives as long as these.
_engines: list[llvm.ExecutionEngine] = []


class MachineCode(NamedTuple):
    """An object file, and the symbol of the function to call."""

    symbol: str
    code: bytes


def read(name: str) -> MachineCode | None:
    """What was kept under a name; None if there is nothing, or it is not whole."""
    for folder in _folders():
        with contextlib.suppress(OSError):
            content = (folder / f"{name}.bin").read_bytes()
            checksum, rest = content[:_LENGTH], content[_LENGTH:]
            if checksum == _checksum(rest):
                symbol, _, code = rest.partition(b"\n")
                return MachineCode(symbol.decode(), code)
    return None


def keep(name: str, kept: MachineCode) -> None:
    """Keeps code under a name, if there is a place for it."""
    content = b"\n".join((kept.symbol.encode(), kept.code))
    for folder in _folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(folder / f"{name}.bin") as file:
                file.write(_checksum(content) + content)
            return


@contextlib.contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Waits while another process holds the name: what it compiles will then be there.

    Only to save work: where files cannot be locked, or after a minute, nobody waits; and a signal
    handler does not wait for what it interrupted.
    """
    file = None if name in _held else _locked(name)
    _held.add(name)
    try:
        yield
    finally:
        _held.discard(name)
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


def linked(kept: MachineCode) -> int:
    """Brings code into this process; the address of its function."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(kept.code))
    engine.finalize_object()
    _engines.append(engine)
    address = engine.get_function_address(kept.symbol)
    assert address
    return address


@cache
def fingerprint() -> str:
    """A checksum of what compiled code depends on: the loops, the compiler, the processor."""
    processor = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    compiler = numba.__version__, llvm.llvm_version_info, sys.version
    settings = [getattr(numba.config, name) for name in _SETTINGS]
    checksum = zlib.crc32(repr((processor, compiler, settings)).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return f"{checksum:08x}"


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(_LENGTH, "big")


def _machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(jit=True)
