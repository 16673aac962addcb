"""Runs a serial kernel on a team of threads: torch's own team, where torch uses GNU OpenMP.

The idle threads of a second OpenMP runtime, or of a second pool of any kind, would spin against
torch's: on few cores that costs more than the team gains. So the kernel runs on the same team as
torch's own operations, through the ``GOMP_parallel`` that torch itself calls. Where torch has no
GNU OpenMP (macOS, Windows, builds on other runtimes), a small pool of Python threads takes its
place. After a fork neither has threads left, and the calling thread does everything.

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

import torch

from batchnorm import torch_internals
from batchnorm.kernels import machine

# Bytes of data. A single thread computes less than this sooner than a team wakes up.
SERIAL_BELOW = 256 * 1024

# In C, with the addresses of three functions of the OpenMP runtime:
#
#     struct call { void (*kernel)(int64_t *task, size_t thread, size_t team); int64_t *task; };
#
#     void share(struct call *call) {
#         call->kernel(call->task, omp_get_thread_num(), omp_get_num_threads());
#     }
#
#     void run(struct call *call, unsigned team, size_t stages) {
#         size_t stage = 0;
#         do {
#             *call->task = stage;
#             GOMP_parallel(share, call, team, 0);
#         } while (++stage < stages);
#     }
#
# GOMP_parallel calls ``share(call)`` on each thread of a team and returns when all have ended. The
# team may be smaller than the one asked for, so the kernel is told what OpenMP says.
_TEAM = """
define void @share(ptr %call) {{
  %kernel = load ptr, ptr %call
  %second = getelementptr ptr, ptr %call, i64 1
  %task = load ptr, ptr %second
  %thread = call i32 inttoptr (i64 {omp_get_thread_num} to ptr)()
  %team = call i32 inttoptr (i64 {omp_get_num_threads} to ptr)()
  %thread64 = zext i32 %thread to i64
  %team64 = zext i32 %team to i64
  call void %kernel(ptr %task, i64 %thread64, i64 %team64)
  ret void
}}

define void @run(ptr %call, i32 %team, i64 %stages) {{
start:
  %second = getelementptr ptr, ptr %call, i64 1
  %task = load ptr, ptr %second
  br label %next
next:
  %stage = phi i64 [ 0, %start ], [ %following, %next ]
  store i64 %stage, ptr %task
  call void inttoptr (i64 {GOMP_parallel} to ptr)(ptr @share, ptr %call, i32 %team, i32 0)
  %following = add i64 %stage, 1
  %more = icmp ult i64 %following, %stages
  br i1 %more, label %next, label %end
end:
  ret void
}}
"""
_OPENMP = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_parallel")

_Kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_Call = ctypes.c_void_p * 2
_Run = ctypes.CFUNCTYPE(None, _Call, ctypes.c_uint, ctypes.c_size_t)
_Stage = ctypes.c_int64


def team_for(size_in_bytes: int) -> int:
    """Returns how many threads to use: 1 below `SERIAL_BELOW`, else ``torch.get_num_threads()``.

    Args:
        size_in_bytes: Size of the tensor that the kernel reads.
    """
    return 1 if size_in_bytes < SERIAL_BELOW else torch.get_num_threads()


def run(kernel: int, task: int, team: int, stages: int = 1) -> None:
    """Computes all shares of a task, each exactly once, and returns when all are done.

    It releases the GIL while the shares are computed. Any Python thread may call it at any time.

    Args:
        kernel: Address of the compiled function; see the module's docstring.
        task: Address that the kernel receives. The memory there must live until this returns. The
            first eight bytes are the number of the stage.
        team: Number of threads to ask for. The kernel receives the number that there are.
        stages: How often all shares are computed; a stage begins when the one before has ended.
    """
    if team <= 1 or _forked:
        for stage in range(stages):
            _Stage.from_address(task).value = stage
            _Kernel(kernel)(task, 0, 1)
    else:
        _found().run(kernel, task, team, stages)


def backend() -> str:
    """Names whoever computes the shares of a team in this process, for a message."""
    return "the calling thread alone (forked process)" if _forked else _found().name


class _TorchTeam:
    """The OpenMP team on which torch computes."""

    name = "torch's OpenMP team"

    def __init__(self, runtime: ctypes.CDLL) -> None:
        functions = {name: machine.address_of(getattr(runtime, name)) for name in _OPENMP}
        self._engine = machine.engine(_TEAM.format(**functions))
        self._engine.finalize_object()
        self._run = _Run(self._engine.get_function_address("run"))

    def run(self, kernel: int, task: int, team: int, stages: int) -> None:
        self._run(_Call(kernel, task), team, stages)


class _ThreadPool:
    """Python threads, which take shares from the calling thread if they start in time."""

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
            # No thread may touch the task after this returns, not even after Ctrl-C.
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
    """Marks a forked child: it has no threads, and locks in their handles may be taken."""
    global _forked
    _forked = True


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_enter_child)


def _torch_openmp() -> ctypes.CDLL | None:
    """Returns the library in which torch's calls to GNU OpenMP end, or None if it makes none."""
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return None
    # The linker's order: what the whole process shares, then what torch was linked with.
    for path in (None, torch_internals.LIBRARY_FILE):
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel"):
            name = _file_at(machine.address_of(library.GOMP_parallel)).name
            return library if name.startswith("libgomp") else None
    return None


def _file_at(address: int) -> Path:
    """Returns the file mapped at an address, links resolved; ``Path()`` where there is none."""
    with contextlib.suppress(OSError), open("/proc/self/maps", errors="surrogateescape") as maps:
        for line in maps:
            span, *rest = line.split(maxsplit=5)
            first, end = (int(bound, 16) for bound in span.split("-"))
            if first <= address < end:
                return Path(rest[4].strip() if len(rest) == 5 else "")
    return Path()
