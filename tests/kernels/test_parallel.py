"""Every share of a kernel is computed once, whoever computes it, and nothing hangs."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="the kernels that run in parallel are compiled by Numba")

from numba import cfunc, types

from batchnorm.kernels import machine, parallel

SIGNATURE = types.void(types.CPointer(types.intp), types.uintp, types.uintp)
STAGE, LENGTH, TEAM, HEADER = 0, 1, 2, 3

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="about torch's OpenMP on Linux")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


@cfunc(SIGNATURE)
def add_one(task, thread, team):
    """Adds one to each element of the share; tells the size of the team."""
    length = task[1]
    share, size = types.intp(thread), types.intp(team)
    task[2] = size
    for k in range(length * share // size, length * (share + 1) // size):
        task[3 + k] += 1


usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


@cfunc(SIGNATURE)
def meet(task, thread, team):
    """Waits, two seconds at most, until the other of two shares has begun; tells if it had."""
    share = types.intp(thread)
    task[1 + share] = 1
    for _ in range(2000):
        if task[2 - share] == 1:
            task[3 + share] = 1
            break
        usleep(1000)


def counts(team, times=1, length=1000):
    """How often each element was computed, by a team of which size."""
    task = np.zeros(HEADER + length, np.intp)
    task[LENGTH] = length
    for _ in range(times):
        parallel.run(add_one.address, task.ctypes.data, team)
    return task[HEADER:], task[TEAM]


def check(team, times=1):
    elements, size = counts(team, times)
    assert set(elements.tolist()) == {times}
    return size


def in_thread(function, *args):
    """The result of a function that another Python thread runs."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args).result()


def python(code, **environment):
    """The output of a script that sees the names of this file; a hang is a failure."""
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            f"from kernels.test_parallel import *\n{code}",
        ],
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def use_pool():
    parallel._team = parallel._ThreadPool()


@pytest.fixture(params=["found", "pool"])
def team_kind(request, monkeypatch):
    """The team that this machine offers, and the pool of machines that offer none."""
    if request.param == "pool":
        pool = parallel._ThreadPool()
        monkeypatch.setattr(parallel, "_team", pool)
        yield "pool"
        pool._helpers.shutdown()
    else:
        yield "found"


@pytest.mark.parametrize("team", [1, 2, 3, 5])
def test_every_share_is_computed_once(team_kind, team):
    assert check(team, times=50) == team


@pytest.mark.parametrize("team", [0, 1])
def test_alone_is_a_team_of_one(team_kind, team):
    assert check(team) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="the kernel sleeps by usleep")
def test_shares_are_computed_at_the_same_time(team_kind):
    task = np.zeros(5, np.intp)
    parallel.run(meet.address, task.ctypes.data, 2)
    assert task.tolist() == [0, 1, 1, 1, 1]


@cfunc(SIGNATURE)
def double_and_swap(task, thread, team):
    """Reads what all shares wrote in the stage before, and doubles it into the other half."""
    length, stage = task[1], task[0]
    share, size = types.intp(thread), types.intp(team)
    source, target = stage % 2 * length, (stage + 1) % 2 * length
    for k in range(length * share // size, length * (share + 1) // size):
        task[3 + target + k] = 2 * task[3 + source + length - 1 - k]


@pytest.mark.parametrize("team", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2, 7])
def test_a_stage_begins_when_the_one_before_has_ended(team_kind, team, stages):
    length = 5000
    task = np.zeros(HEADER + 2 * length, np.intp)
    task[LENGTH] = length
    for _ in range(20):
        task[HEADER : HEADER + length] = np.arange(length)
        parallel.run(double_and_swap.address, task.ctypes.data, team, stages)
        half = task[HEADER + stages % 2 * length :][:length]
        expected = np.arange(length)[:: -1 if stages % 2 else 1]
        assert (half == expected << stages).all()
    assert task[STAGE] == stages - 1


def test_from_several_python_threads_at_once(team_kind):
    callers, start = 8, threading.Barrier(8)

    def call(team):
        start.wait()
        return check(team, times=100)

    with ThreadPoolExecutor(callers) as threads:
        sizes = list(threads.map(call, range(1, callers + 1)))
    assert sizes == list(range(1, callers + 1))


class Noting(torch.autograd.Function):
    """The identity, whose backward computes on a team."""

    sizes = ()

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Noting.sizes += (check(3, times=20),)
        return grad


def backward():
    x = torch.ones(4, requires_grad=True)
    Noting.apply(x * 2).sum().backward()
    return x.grad.tolist()


def test_inside_backward(team_kind, monkeypatch):
    monkeypatch.setattr(Noting, "sizes", ())
    assert backward() == [2.0] * 4
    assert in_thread(backward) == [2.0] * 4
    assert Noting.sizes == (3, 3)


def test_helpers_that_are_busy_or_gone_are_not_waited_for(monkeypatch):
    pool, release = parallel._ThreadPool(), threading.Event()
    monkeypatch.setattr(parallel, "_team", pool)
    for _ in range(2 * (os.cpu_count() or 1)):
        pool._helpers.submit(release.wait, 60)
    assert check(5, times=3) == 5
    release.set()
    pool._helpers.shutdown()
    assert check(5, times=3) == 5


def test_an_interrupted_pool_leaves_no_share_running(monkeypatch):
    pool, begun, release = parallel._ThreadPool(), threading.Event(), threading.Event()
    ended = []

    def kernel(task, share, team):
        if share == 0:
            begun.wait(60)
            release.set()
            raise KeyboardInterrupt
        begun.set()
        release.wait(60)
        ended.append(share)

    monkeypatch.setattr(parallel, "_Kernel", lambda address: kernel)
    with pytest.raises(KeyboardInterrupt):
        pool.run(0, np.zeros(1, np.intp).ctypes.data, 2, 1)
    assert ended == [1]
    pool._helpers.shutdown()


def test_team_for_respects_the_threads_of_torch(two_threads):
    assert parallel.team_for(parallel.SERIAL_BELOW) == 2
    assert in_thread(parallel.team_for, parallel.SERIAL_BELOW) == 2
    assert parallel.team_for(parallel.SERIAL_BELOW - 1) == 1
    assert parallel.team_for(0) == 1
    torch.set_num_threads(1)
    assert parallel.team_for(1 << 40) == 1


def openmp_files():
    """The OpenMP runtimes that are mapped into this process."""
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
    return sorted(p for p in paths if Path(p).name.startswith(("libgomp", "libomp", "libiomp")))


torch_has_gnu_openmp = "libgomp" in "".join(openmp_files()) if sys.platform == "linux" else False
needs_gnu_openmp = pytest.mark.skipif(
    not torch_has_gnu_openmp, reason="this torch runs on no GNU OpenMP"
)


@needs_gnu_openmp
def test_the_team_is_that_of_torch_and_no_second_runtime_is_loaded():
    code = "before = openmp_files(); torch.randn(1 << 20).exp(); size = check(3)\n"
    code += "assert before == openmp_files(), openmp_files()\n"
    code += "print(size, len(before), parallel.backend(), sep=', ')"
    assert python(code) == "3, 1, torch's OpenMP team"


@needs_gnu_openmp
def test_the_kernel_is_told_the_team_that_openmp_allows():
    code = "print(check(3), parallel.backend(), sep=', ')"
    assert python(code, OMP_THREAD_LIMIT="1") == "1, torch's OpenMP team"


@linux_only
def test_the_pool_serves_where_torch_has_no_gnu_openmp(monkeypatch):
    monkeypatch.setattr(parallel, "_team", None)
    monkeypatch.setattr(parallel, "_file_at", lambda address: Path("/usr/lib/libiomp5.so"))
    assert parallel.backend() == "a pool of threads (torch runs on no GNU OpenMP)"
    assert check(3) == 3
    parallel._team._helpers.shutdown()
    monkeypatch.setattr(parallel, "_team", None)
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    assert isinstance(parallel._found(), parallel._ThreadPool)


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_the_pool_serves_on_other_systems(monkeypatch, platform):
    monkeypatch.setattr(parallel, "_team", None)
    monkeypatch.setattr(sys, "platform", platform)
    assert isinstance(parallel._found(), parallel._ThreadPool)


@linux_only
def test_files_are_told_by_their_addresses():
    assert parallel._file_at(0) == Path()
    assert parallel._file_at(add_one.address) == Path()
    libc = parallel.ctypes.CDLL(None)
    assert parallel._file_at(machine.address_of(libc.getpid)).name.startswith("libc")


def test_the_team_is_found_once_by_threads_that_start_together(monkeypatch):
    monkeypatch.setattr(parallel, "_team", None)
    start = threading.Barrier(4)

    def find(_):
        start.wait()
        return parallel._found()

    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(find, range(4)))) == 1


class Shares(torch.utils.data.Dataset):
    """Computes on a team for each item, in whatever process it is asked for."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.set_num_threads(2)
        return check(parallel.team_for(1 << 30)), os.getpid()


def item_sizes():
    """The sizes of the teams in forked workers of a loader whose parent has used a team."""
    check(3)
    context = multiprocessing.get_context("fork")
    loader = torch.utils.data.DataLoader(
        Shares(), num_workers=2, timeout=60, multiprocessing_context=context
    )
    items = [(int(size), int(worker)) for size, worker in loader]
    assert os.getpid() not in {worker for _, worker in items}
    check(3)
    return [size for size, _ in items]


def child_of_fork():
    """What a forked child says, whose parent has used a team and goes on using it."""
    check(3)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(60)
        os.write(writing, f"{check(3)}, {in_thread(check, 3)}, {parallel.backend()}".encode())
        sys.exit()
    os.close(writing)
    assert check(3) == 3
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return said


@forks
@pytest.mark.parametrize("prepare", ["", "use_pool()\n"])
def test_in_forked_workers_of_a_loader(prepare):
    assert python(f"{prepare}print(item_sizes())") == "[1, 1, 1, 1]"


@forks
@pytest.mark.parametrize("prepare", ["", "use_pool()\n"])
def test_a_forked_child_computes_alone(prepare):
    said = python(f"{prepare}print(child_of_fork())")
    assert said == "1, 1, the calling thread alone (forked process)"


@pytest.mark.parametrize("prepare", ["", "use_pool()\n"])
def test_the_interpreter_ends_with_callers_at_work(prepare):
    code = "import atexit, itertools\natexit.register(lambda: print(check(3)))\n"
    code += "work = lambda: [check(3) for _ in itertools.count()]\n"
    code += "threading.Thread(target=work, daemon=True).start()\ncheck(3, times=100)"
    assert python(prepare + code) == "3"


def test_no_cache_folder_is_needed(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert python("print(check(3))", NUMBA_CACHE_DIR=str(file / "folder")) == "3"


def test_importing_needs_no_jit():
    code = "import numba\nassert numba.config.DISABLE_JIT\nprint(parallel.team_for(0))"
    assert python(code, NUMBA_DISABLE_JIT="1") == "1"
