"""Reuse of freed memory by glibc, because fresh pages cost more than the kernels that fill them.

glibc gives every block above 32 MiB back to Linux when it is freed. The next tensor of that size
gets new pages, which Linux has to map and fill with zeros first, and that takes longer than a
batch normalization of it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_KEPT = 2**30


class _SymbolOrigin(ctypes.Structure):
    """``Dl_info`` of dlfcn.h."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def keep_freed_memory() -> str | None:
    """Makes glibc keep freed memory for this process's next tensors, up to 1 GiB each.

    Call it once, early, in a program that trains or infers repeatedly on a CPU. It applies to the
    whole process and until its end; a second call changes nothing. It needs Linux with glibc 2.35
    or later; elsewhere it does nothing and returns the reason.

    What it costs: memory freed by a peak goes back to this process's next tensors, not to other
    programs, so the process stays as large as it ever was. And its peak is higher: glibc keeps the
    few bytes that it cuts off to align a block in a cache of its own, where they part free blocks,
    until that cache is full. A loop settles after some steps; until then blocks of the largest size
    may be taken several times over. For that reason blocks above 1 GiB are left alone: they are
    mapped and unmapped as ever.

    How: ``mallopt(M_MMAP_THRESHOLD, 1 GiB)`` has smaller blocks come from the heap instead of a
    mapping each, and ``mallopt(M_TRIM_THRESHOLD, -1)`` never gives the heap's end back. In threads
    other than the first, glibc's heaps end at 64 MiB and larger blocks are still mapped; torch's
    CPU operations, forward and backward, allocate in the thread that calls them.

    Returns:
        None if freed memory is kept from now on; otherwise why nothing was changed, as half a
        sentence without a full stop.

    Example:
        >>> from batchnorm import keep_freed_memory
        >>> keep_freed_memory()  # doctest: +SKIP
    """
    reason = _refusal()
    if reason is not None:
        return reason
    libc = ctypes.CDLL(None)
    if libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT) != 1:
        libc.gnu_get_libc_version.restype = ctypes.c_char_p
        version = libc.gnu_get_libc_version().decode()
        return f"glibc before 2.35 keeps no block above 32 MiB, and this is {version}"
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    return None


def _refusal() -> str | None:
    if sys.platform != "linux":
        return f"only glibc on Linux can be told to keep freed memory, and this is {sys.platform}"
    libc = ctypes.CDLL(None)
    try:
        glibc = _file_of(libc.gnu_get_libc_version)
        allocator = _file_of(libc.malloc)
    except AttributeError:
        return "the C library of this process is not glibc"
    if allocator != glibc:
        return f"malloc comes from {os.path.basename(allocator) or 'elsewhere'}, not from glibc"
    return None


def _file_of(function: Any) -> str:
    """Returns the library or program that contains a function of this process; empty if unknown."""
    origin = _SymbolOrigin()
    ctypes.CDLL(None).dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(origin))
    return (origin.file or b"").decode(errors="replace")
