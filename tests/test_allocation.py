"""Freed memory is kept where it can be, and the reason is named where it cannot."""

import ctypes
import json
import os
import shutil
import subprocess
import sys

import pytest

from batchnorm import allocation

FAULTS = """
import json, resource, sys
import torch
from batchnorm.allocation import keep_freed_memory

def faults(mebibytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(mebibytes * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = [faults(48) for _ in range(5)]
reasons = [keep_freed_memory(), keep_freed_memory()]
kept = [faults(48) for _ in range(40)]
print(json.dumps([given_back, reasons, kept]))
"""

needs_glibc = pytest.mark.skipif(
    allocation._refusal() is not None, reason="this process does not use glibc's malloc"
)


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_glibc
def test_freed_memory_comes_back_without_page_faults():
    pages = 48 * 2**20 // os.sysconf("SC_PAGESIZE")
    given_back, reasons, kept = python(FAULTS, THP_MEM_ALLOC_ENABLE="0")
    assert reasons == [None, None]
    assert min(given_back) >= pages
    assert max(kept[-8:]) < pages / 100


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_named(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    assert allocation.keep_freed_memory() == (
        f"only glibc on Linux can be told to keep freed memory, and this is {platform}"
    )


class Library:
    """A C library with some functions, none of which may be called unless given."""

    def __init__(self, **functions):
        self.__dict__.update(functions)


def pretend(monkeypatch, library, files=None):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(allocation, "_file_of", lambda function: (files or {}).get(function, ""))


def test_another_c_library_is_named(monkeypatch):
    pretend(monkeypatch, Library(malloc="malloc"))
    assert allocation.keep_freed_memory() == "the C library of this process is not glibc"


@pytest.mark.parametrize(
    ("file", "name"), [("/usr/lib/libjemalloc.so.2", "libjemalloc.so.2"), ("", "elsewhere")]
)
def test_another_malloc_is_named(monkeypatch, file, name):
    library = Library(malloc="malloc", gnu_get_libc_version="version")
    pretend(monkeypatch, library, {"malloc": file, "version": "/lib/libc.so.6"})
    assert allocation.keep_freed_memory() == f"malloc comes from {name}, not from glibc"


def test_an_old_glibc_is_named_and_left_as_it_was(monkeypatch):
    asked = []

    def mallopt(parameter, value):
        asked.append((parameter, value))
        return 0

    class Version:
        def __call__(self):
            return b"2.31"

    library = Library(malloc="malloc", gnu_get_libc_version=Version(), mallopt=mallopt)
    pretend(monkeypatch, library)
    reason = allocation.keep_freed_memory()
    assert reason == "glibc before 2.35 keeps no block above 32 MiB, and this is 2.31"
    assert asked == [(-3, 2**30)]


@needs_glibc
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_preloaded_malloc_is_found(tmp_path):
    source, library = tmp_path / "other.c", tmp_path / "libother.so"
    source.write_text(
        "#include <stddef.h>\n"
        "extern void *__libc_malloc(size_t);\n"
        "void *malloc(size_t size) { return __libc_malloc(size); }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    code = (
        "import json; from batchnorm.allocation import keep_freed_memory\n"
        "print(json.dumps(keep_freed_memory()))"
    )
    reason = python(code, LD_PRELOAD=str(library))
    assert reason == "malloc comes from libother.so, not from glibc"
