"""One serial kernel on a team of threads: torch's own, where it can be had.

A second OpenMP runtime, or a second pool of any kind, would keep its idle threads spinning against
torch's: on few cores that costs more than the team gains. So the kernel runs on the very team that
torch computes on, through the ``GOMP_parallel`` that torch itself calls. Where torch has no GNU
OpenMP (macOS, Windows, builds on other runtimes) a small pool of Python threads does it. After a
fork neither has threads left, and the calling thread does everything.

A kernel is the address of a compiled ``void kernel(void *task, size_t thread, size_t team)``, which
needs no GIL and computes share ``thread`` of ``team``. Shares must not wait for one another: the
team may be smaller than asked for, and one thread may compute several shares, one after the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch

from batchnorm import torch_internals

# Less data than this is computed sooner than a team is woken.
SERIAL_BELOW = 256 * 1024

# ``%body`` is what GOMP_parallel calls on each thread. The team may be smaller than the one asked
# for, so the kernel is told what OpenMP says. ``%call`` points to an array of five addresses: the
# kernel, its task, omp_get_thread_num, omp_get_num_threads and GOMP_parallel. ``%conduct`` lets the
# team do one stage after the other.
_BODY = """
define void @body(ptr %call) {
  %at_task = getelementptr ptr, ptr %call, i64 1
  %at_number = getelementptr ptr, ptr %call, i64 2
  %at_size = getelementptr ptr, ptr %call, i64 3
  %kernel = load ptr, ptr %call
  %task = load ptr, ptr %at_task
  %number_of = load ptr, ptr %at_number
  %size_of = load ptr, ptr %at_size
  %number = call i32 %number_of()
  %size = call i32 %size_of()
  %thread = zext i32 %number to i64
  %team = zext i32 %size to i64
  call void %kernel(ptr %task, i64 %thread, i64 %team)
  ret void
}

define void @conduct(ptr %call, i32 %team, i64 %stages) {
start:
  %at_task = getelementptr ptr, ptr %call, i64 1
  %at_parallel = getelementptr ptr, ptr %call, i64 4
  %task = load ptr, ptr %at_task
  %parallel = load ptr, ptr %at_parallel
  br label %next
next:
  %stage = phi i64 [ 0, %start ], [ %following, %next ]
  store i64 %stage, ptr %task
  call void %parallel(ptr @body, ptr %call, i32 %team, i32 0)
  %following = add i64 %stage, 1
  %more = icmp ult i64 %following, %stages
  br i1 %more, label %next, label %end
end:
  ret void
}
"""

_Kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_Call = ctypes.c_void_p * 5
_Conduct = ctypes.CFUNCTYPE(None, _Call, ctypes.c_uint, ctypes.c_size_t)
_Stage = ctypes.c_int64


def team_for(size_in_bytes: int) -> int:
    """How many threads are worth waking: 1 below `SERIAL_BELOW`, else ``torch.get_num_threads()``.

    Args:
        size_in_bytes: All the memory that the kernel reads and writes.
    """
    return 1 if size_in_bytes < SERIAL_BELOW else torch.get_num_threads()


def run(kernel: int, task: int, team: int, stages: int = 1) -> None:
    """Computes all shares of a task, each exactly once, and returns when all are done.

    The GIL is released meanwhile. Any Python thread may call this at any time.

    Args:
        kernel: Address of the compiled function; see the module's docstring.
        task: Address handed to it. What lies there must live until this returns. The first eight
            bytes are the number of the stage.
        team: How many threads to ask for. The kernel is told how many there are.
        stages: How often all shares are computed; a stage begins when the one before has ended.
    """
    if team <= 1 or _forked:
        for stage in range(stages):
            _Stage.from_address(task).value = stage
            _Kernel(kernel)(task, 0, 1)
    else:
        _found().run(kernel, task, team, stages)


def backend() -> str:
    """Who computes the shares of a team in this process, in words fit for a message."""
    return "the calling thread alone (forked process)" if _forked else _found().name


class _TorchTeam:
    """The OpenMP team on which torch computes."""

    name = "torch's OpenMP team"

    def __init__(self, runtime: ctypes.CDLL) -> None:
        functions = "omp_get_thread_num", "omp_get_num_threads", "GOMP_parallel"
        self._functions = [_address(getattr(runtime, name)) for name in functions]
        self._code = _compiled(_BODY)
        self._conduct = _Conduct(self._code.get_function_address("conduct"))

    def run(self, kernel: int, task: int, team: int, stages: int) -> None:
        self._conduct(_Call(kernel, task, *self._functions), team, stages)


class _ThreadPool:
    """Python threads, which take shares off the calling thread's hands if they come in time."""

    name = "a pool of threads (torch runs on no GNU OpenMP)"

    def __init__(self) -> None:
        self._helpers = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="batchnorm")

    def run(self, kernel: int, task: int, team: int, stages: int) -> None:
        for stage in range(stages):
            _Stage.from_address(task).value = stage
            self._run_stage(_Kernel(kernel), task, team)

    def _run_stage(self, compute: Any, task: int, team: int) -> None:
        shares = {share: Future() for share in range(1, team)}

        def help_with(share: int) -> None:
            if shares[share].set_running_or_notify_cancel():
                compute(task, share, team)
                shares[share].set_result(None)

        try:
            # Refused when the interpreter ends or the system is out of threads.
            with contextlib.suppress(RuntimeError):
                for share in shares:
                    self._helpers.submit(help_with, share)
            compute(task, 0, team)
            for share, future in shares.items():
                if future.cancel():
                    compute(task, share, team)
        finally:
            # Nobody may touch the task once we have left, not even after Ctrl-C.
            for future in shares.values():
                if not future.cancel():
                    future.result()


_finding = threading.Lock()
_team: _TorchTeam | _ThreadPool | None = None
_forked = False


def _found() -> _TorchTeam | _ThreadPool:
    global _team
    if _team is None:
        with _finding:
            if _team is None:
                runtime = _torch_openmp()
                _team = _ThreadPool() if runtime is None else _TorchTeam(runtime)
    return _team


def _enter_child() -> None:
    """The threads stayed in the parent; their handles stay untouched: a lock may be held."""
    global _forked
    _forked = True


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_enter_child)


def _torch_openmp() -> ctypes.CDLL | None:
    """Where torch's own calls to GNU OpenMP end up, or None if it makes none."""
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return None
    # The linker's order: what the whole process shares, then what torch was linked with.
    for path in (None, torch_internals.LIBRARY_FILE):
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel"):
            name = _file_at(_address(library.GOMP_parallel)).name
            return library if name.startswith("libgomp") else None
    return None


def _address(function: Any) -> int:
    """Where the code of a C function lies."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _file_at(address: int) -> Path:
    """The file mapped at an address, symbolic links resolved; ``Path()`` where there is none."""
    with contextlib.suppress(OSError), open("/proc/self/maps", errors="surrogateescape") as maps:
        for line in maps:
            span, *rest = line.split(maxsplit=5)
            first, end = (int(bound, 16) for bound in span.split("-"))
            if first <= address < end:
                return Path(rest[4].strip() if len(rest) == 5 else "")
    return Path()


def _compiled(code: str) -> llvm.ExecutionEngine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(code), machine)
    engine.finalize_object()
    return engine
