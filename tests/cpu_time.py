"""CPU time of child processes: unlike the time on the wall, it leaves out tests that run beside."""

import resource
import subprocess
import sys

LIBRARIES = [sys.executable, "-c", "import typer.rich_utils, rich.markdown"]


def least_cpu_seconds(run):
    """The least CPU time of eight runs; ``run`` starts a child and waits for it."""
    return min(_cpu_seconds(run) for _ in range(8))


def budget_of_help():
    """0.3 s, the budget of ``--help``; on a slow machine 2.6 times its libraries, up to 0.45 s."""
    libraries = least_cpu_seconds(lambda: subprocess.run(LIBRARIES, check=True))
    return min(max(0.3, 2.6 * libraries), 0.45)


def _cpu_seconds(run):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
