"""Machine code on disk: kept, found, refused if damaged, and never missed if it cannot be kept."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
from numba import config, types

from batchnorm.kernels.compiled import compiling, numba_internals, storage

pytestmark = [
    pytest.mark.untyped,
    pytest.mark.skipif(bool(config.DISABLE_JIT), reason="nothing is compiled"),
]

SIGNATURE = types.int64(types.int64)
Function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)


def plus_seven(x):
    return x + 7


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "new" / "folder"))
    return tmp_path / "new" / "folder"


def test_code_is_kept_and_linked_again(folder):
    first = compiling.compiled("plus", plus_seven, SIGNATURE)
    assert [path.name for path in folder.iterdir()] == [f"plus-{storage.fingerprint()}.bin"]
    again = storage.link(storage.read(f"plus-{storage.fingerprint()}"))
    assert first != again
    assert Function(first)(35) == Function(again)(35) == 42


def test_what_is_kept_is_not_compiled(folder, monkeypatch):
    compiling.compiled("plus", plus_seven, SIGNATURE)
    monkeypatch.setattr(compiling, "object_code", lambda *_, **__: pytest.fail("compiled"))
    assert Function(compiling.compiled("plus", plus_seven, SIGNATURE))(1) == 8


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:99] + b[100:]])
def test_damaged_code_is_compiled_anew_and_replaced(folder, damage):
    compiling.compiled("plus", plus_seven, SIGNATURE)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert storage.read(path.stem) is None
    assert Function(compiling.compiled("plus", plus_seven, SIGNATURE))(1) == 8
    assert storage.read(path.stem) is not None


def test_the_next_folder_serves_where_the_first_cannot(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(storage, "_folders", lambda: [tmp_path / "file" / "a", tmp_path / "b"])
    kept = storage.MachineCode("symbol", b"code\nand more")
    storage.write("name", kept)
    assert storage.read("name") == kept
    assert (tmp_path / "b" / "name.bin").exists()


def test_without_any_folder_nothing_is_kept_and_nothing_fails(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert Function(compiling.compiled("plus", plus_seven, SIGNATURE))(1) == 8
    assert storage.read(f"plus-{storage.fingerprint()}") is None


def test_the_folders_are_numbas_or_ours(monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    beside, users = storage._folders()
    assert beside.name == "__pycache__"
    assert users.parts[-2:] == ("somewhere", "batchnorm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert storage._folders()[1].parts[-2:] == (".cache", "batchnorm")


def test_a_new_process_finds_what_another_one_kept(folder):
    code = (
        "import torch, batchnorm\n"
        "from batchnorm.kernels.compiled import compiling\n"
        "compiled = []\n"
        "real = compiling.object_code\n"
        "compiling.object_code = lambda *a, **k: compiled.append(1) or real(*a, **k)\n"
        "running = torch.zeros(2), torch.ones(2)\n"
        "batchnorm.batch_norm(torch.randn(4, 2), *running, training=True)\n"
        "print(len(compiled), running[0].abs().sum() > 0)"
    )
    for expected in ("1 tensor(True)", "0 tensor(True)"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env={**os.environ},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == expected


COMPILE = """
import sys
from batchnorm.kernels.compiled import compiling
from kernels.test_storage import SIGNATURE, plus_seven
compiled = []
real = compiling.object_code
compiling.object_code = lambda *a, **k: compiled.append(1) or real(*a, **k)
print("ready", flush=True)
sys.stdin.readline()
compiling.compiled("plus", plus_seven, SIGNATURE)
print(len(compiled))
"""


@pytest.mark.skipif(storage.fcntl is None, reason="files cannot be locked here")
def test_of_several_processes_one_compiles(folder):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COMPILE],
            cwd=os.path.dirname(os.path.dirname(__file__)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    counts = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert sorted(counts) == [0, 0, 1]
    assert [path.suffix for path in folder.iterdir()] == [".bin"]


@pytest.mark.skipif(storage.fcntl is None, reason="files cannot be locked here")
def test_nobody_waits_for_ever(folder, monkeypatch):
    monkeypatch.setattr(storage, "_PATIENCE", 0.1)
    folder.mkdir(parents=True)
    with (folder / "name.lock").open("w") as other:
        storage.fcntl.flock(other, storage.fcntl.LOCK_EX)
        with storage.one_at_a_time("name"):
            pass
    assert not any(folder.iterdir())


def test_a_signal_handler_does_not_wait_for_what_it_interrupted(folder, monkeypatch):
    monkeypatch.setattr(storage, "_wait_for", lambda file: None)
    with storage.one_at_a_time("name"):
        monkeypatch.setattr(storage, "_wait_for", lambda file: pytest.fail("waits for itself"))
        with storage.one_at_a_time("name"):
            pass


@pytest.mark.parametrize("error", [OSError(95, "not supported"), None])
def test_where_files_cannot_be_locked_everybody_compiles(folder, monkeypatch, error):
    if error is None:
        monkeypatch.setattr(storage, "fcntl", None)
    else:
        monkeypatch.setattr(storage, "_wait_for", raising(error))
    assert Function(compiling.compiled("plus", plus_seven, SIGNATURE))(1) == 8


def raising(error):
    def wait(file):
        raise error

    return wait


def test_numba_gives_the_object_code_of_a_function():
    kept = storage.MachineCode(*numba_internals.object_code(plus_seven, SIGNATURE))
    assert Function(storage.link(kept))(1) == 8
