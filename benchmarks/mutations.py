"""Counts how many small mistakes in the source the tests catch.

Changes one expression or statement of ``src/`` at a time, in a copy of the repository, and runs the
tests nearest to the changed file; if they pass, all tests of its area. The choice depends on the
source and the seed alone. Run it on a quiet machine: tests that do not end in time ("no end") may
have been slow or caught in a loop. ``python benchmarks/mutations.py`` takes about an hour on two
cores.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parents[1]
SOURCE = "src/batchnorm"
AREAS = {
    "moments": (["moments.py", "scratch.py"], ["tests/test_moments.py", "tests/test_scratch.py"]),
    "nn": (["nn/*.py"], ["tests/nn"]),
    "reference": (["kernels/reference.py"], ["tests/kernels/test_reference.py", "tests/nn"]),
    "kernels": (["kernels/[!r]*.py"], ["tests/kernels"]),
    "patching": (["tools/patching/*.py"], ["tests/tools"]),
    "tools": (["tools/*.py", "tools/averaging/*.py", "tools/monitoring/*.py"], ["tests/tools"]),
    "recalibration": (["tools/recalibration/*.py"], ["tests/tools/recalibration"]),
    "acceleration": (["tools/acceleration/*.py", "tools/flow/*.py"], ["tests/tools/acceleration"]),
    "learn": (["learn/**/*.py"], ["tests/learn"]),
    "experiment": (["experiment/**/*.py"], ["tests/experiment", "tests/cli/test_cli.py"]),
    "files": (["files.py", "charts/*.py"], ["tests/test_files.py", "tests/experiment"]),
}
"""Patterns of sources in ``src/batchnorm``, and all tests of the area."""

EQUIVALENT: dict[str, str] = {}
"""Why a change that no test can notice changes nothing, by `Mutation.key`."""

SWAPPED = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult},
}


@dataclass(frozen=True)
class Mutation:
    """One change of one file: the characters from ``start`` to ``end`` become ``new``."""

    area: str
    kind: str
    path: str
    place: str
    line: int
    start: int
    end: int
    old: str
    new: str

    @property
    def key(self) -> str:
        """The same in each version of the source that has this place in these words."""
        return f"{self.path}: {self.place}: {self.old} -> {self.new}"


def changed(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Kinds of mutation of a node, and what it becomes."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        yield "comparison", _with(node, ops=[SWAPPED[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        yield "arithmetic", _with(node, op=SWAPPED[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield "and, or", _with(node, op=SWAPPED[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "sign", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "constant", ast.Constant(node.value + 1)
    elif isinstance(node, ast.If | ast.IfExp | ast.While) and not isinstance(node.test, ast.Not):
        yield "condition", ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Expr | ast.AugAssign | ast.Assign | ast.Raise):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_local = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if not is_text and not is_local:
            yield "dropped line", ast.Pass()
    elif isinstance(node, ast.Return) and node.value and not _is(node.value, None):
        yield "returned value", ast.Return(ast.Constant(None))


def _with(node: ast.AST, **fields: object) -> ast.AST:
    node = copy.copy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def _is(node: ast.AST, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def nodes(node: ast.AST, place: str = "") -> Iterator[tuple[str, ast.AST]]:
    """All nodes in functions that may be changed, with the dotted names of their functions."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        place = f"{place}.{node.name}".removeprefix(".")
    if place:
        yield place, node
    if isinstance(node, ast.JoinedStr):  # Python 3.11 does not say where its parts are.
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "exc"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_type_checking(child):
                yield from nodes(child, place)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def mutations_of(root: Path, path: Path, area: str) -> Iterator[Mutation]:
    """All mutations of a file, in the order of its text."""
    text = path.read_text()
    lines = text.encode().splitlines(keepends=True)
    starts = [sum(map(len, lines[:number])) for number in range(len(lines))]
    for place, node in nodes(ast.parse(text)):
        for kind, new in changed(node):
            spot = node.test if kind == "condition" else node
            start = starts[spot.lineno - 1] + spot.col_offset
            end = starts[spot.end_lineno - 1] + spot.end_col_offset
            written = ast.unparse(ast.fix_missing_locations(new))
            if isinstance(new, ast.expr) and not isinstance(new, ast.Constant):
                written = f"({written})"
            old = " ".join(text.encode()[start:end].decode().split())
            name = path.relative_to(root).as_posix()
            yield Mutation(area, kind, name, place, spot.lineno, start, end, old, written)


def chosen(root: Path, count: int, seed: int) -> list[Mutation]:
    """``count`` mutations: as many from each area, and in it from each kind, as there are."""
    by_area = []
    for area, (patterns, _) in AREAS.items():
        paths = sorted({path for p in patterns for path in (root / SOURCE).glob(p)})
        found = [m for path in paths for m in mutations_of(root, path, area)]
        by_area.append(_in_turn(found, lambda m: m.kind, random.Random(f"{seed} {area}")))
    return list(_round_robin(by_area))[:count]


def _in_turn(found: list[Mutation], kind: Callable, chance: random.Random) -> list[Mutation]:
    groups = [[m for m in found if kind(m) == name] for name in sorted(set(map(kind, found)))]
    for group in (*groups, groups):
        chance.shuffle(group)
    return list(_round_robin(groups))


def _round_robin(groups: list[list[Mutation]]) -> Iterator[Mutation]:
    for turn in range(max(map(len, groups), default=0)):
        yield from (group[turn] for group in groups if turn < len(group))


def tests_of(root: Path, mutation: Mutation) -> Iterator[list[str]]:
    """The nearest tests of a mutation, if there are some; then all of its area."""
    path = Path(mutation.path).relative_to(SOURCE)
    stem, folder = path.stem.lstrip("_"), root / "tests" / path.parent
    near = sorted(folder.glob(f"test_{stem}*.py")) + sorted(folder.glob(f"test_*_{stem}.py"))
    if near:
        yield [test.relative_to(root).as_posix() for test in near]
    yield [test for test in AREAS[mutation.area][1] if (root / test).exists()]


@dataclass
class Outcome:
    """What became of a mutation."""

    mutation: Mutation
    fate: str
    seconds: float
    said: str = ""


class Workplace:
    """A copy of the repository in which one mutation at a time is tried."""

    def __init__(self, root: Path, folder: Path, machine_code: Path) -> None:
        ignored = shutil.ignore_patterns("__pycache__", ".*", "runs")
        shutil.copytree(root, folder, ignore=ignored)
        self.folder = folder
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(folder / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "NUMBA_CACHE_DIR": str(machine_code),
        }

    def run(self, tests: list[str], limit: float) -> tuple[int, str]:
        """Runs tests up to the first that fails: pytest's exit code, and its last lines."""
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return -1, "out of time"
        return process.returncode, output.strip().rpartition("\n")[2]

    def attempt(self, mutation: Mutation, limit: float) -> Outcome:
        """Applies a mutation, runs its tests, and takes it back."""
        path = self.folder / mutation.path
        original, started = path.read_bytes(), time.monotonic()
        mutated = original[: mutation.start] + mutation.new.encode() + original[mutation.end :]
        compile(mutated, path, "exec")
        path.write_bytes(mutated)
        fate, said = "survived", ""
        try:
            for tests in tests_of(self.folder, mutation):
                code, said = self.run(tests, limit)
                if code:
                    fate = "no end" if code < 0 else "caught"
                    break
        finally:
            path.write_bytes(original)
        if fate == "survived" and mutation.key in EQUIVALENT:
            fate, said = "equivalent", EQUIVALENT[mutation.key]
        return Outcome(mutation, fate, time.monotonic() - started, said)


def check_unchanged(place: Workplace, mutations: list[Mutation], limit: float) -> None:
    """Exits if tests fail without a mutation, because they would seem to catch everything."""
    tests = sorted({test for m in mutations for them in tests_of(place.folder, m) for test in them})
    code, said = place.run(tests, limit * 10)
    if code:
        raise SystemExit(f"mutations: the tests fail without a mutation: {said}")


def try_all(root: Path, mutations: list[Mutation], options: argparse.Namespace) -> list[Outcome]:
    """Tries mutations, ``options.jobs`` at a time, and prints each outcome."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        free: Queue[Workplace] = Queue()
        for job in range(options.jobs):
            free.put(Workplace(root, Path(folder, str(job)), Path(folder, "machine code")))
        if not options.unchecked:
            check_unchanged(free.queue[0], mutations, options.limit)

        def attempt(mutation: Mutation) -> Outcome:
            place = free.get()
            try:
                outcome = place.attempt(mutation, options.limit)
            finally:
                free.put(place)
            print(f"{outcome.fate:10} {outcome.seconds:4.0f} s  {mutation.key}", flush=True)
            return outcome

        with ThreadPoolExecutor(options.jobs) as pool:
            return list(pool.map(attempt, mutations))


def table(outcomes: list[Outcome]) -> str:
    """Fates by area, and in all."""
    known = ("caught", "survived", "no end", "equivalent")
    lines = [f"{'area':16}" + "  ".join(known)]
    for area in [*dict.fromkeys(o.mutation.area for o in outcomes), "all"]:
        fates = [o.fate for o in outcomes if area in (o.mutation.area, "all")]
        counts = (f"{fates.count(fate):{len(fate)}}" for fate in known)
        lines.append(f"{area:16}" + "  ".join(counts))
    return "\n".join(lines)


def main() -> None:
    """Tries mutations, and exits with 1 if the tests missed one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=66, help="mutations to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600, help="seconds for each run of pytest")
    parser.add_argument("--list", action="store_true", help="only list what would be tried")
    parser.add_argument("--unchecked", action="store_true", help="trust that the tests pass now")
    parser.add_argument("--json", type=Path, help="file for the outcomes")
    options = parser.parse_args()
    mutations = chosen(ROOT, options.count, options.seed)
    if options.list:
        print(*(f"{m.area:14} {m.kind:15} {m.key}" for m in mutations), sep="\n")
        return
    outcomes = try_all(ROOT, mutations, options)
    print(table(outcomes))
    if options.json:
        options.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    sys.exit(any(outcome.fate in ("survived", "no end") for outcome in outcomes))


if __name__ == "__main__":
    main()
