"""Rules of the house, executed: the public face, its weight, its budgets, its independence."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import batchnorm
from house_names import names_in, torch_names

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "batchnorm"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OURS = [
    path
    for folder in ("src", "tests", "docs", "benchmarks", "examples", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".md", ".toml", ".html", ".css", ".json", ""} and path.is_file()
] + [path for path in ROOT.iterdir() if path.is_file() and path.suffix in {".md", ".toml", ".txt"}]


def shown(path):
    return path.relative_to(ROOT).as_posix()


def in_a_new_process(code, *options):
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


# What is public.


def test_public_names_are_those_announced_and_documented():
    for name in batchnorm.__all__:
        public = getattr(batchnorm, name)
        if name != "__version__":
            assert inspect.getdoc(public), name
    assert dir(batchnorm) == batchnorm.__all__
    with pytest.raises(AttributeError, match="No batchnorm attribute nonsense"):
        batchnorm.nonsense  # noqa: B018


def test_every_module_imports_and_says_what_it_is():
    for module in pkgutil.walk_packages(batchnorm.__path__, "batchnorm."):
        if not module.name.endswith("__main__"):
            assert inspect.getdoc(importlib.import_module(module.name)), module.name


def test_library_needs_nothing_of_the_command_line():
    heavy = ["typer", "rich", "matplotlib", "jinja2", "pooch", "sklearn", "platformdirs"]
    in_a_new_process(
        f"import sys; sys.modules.update(dict.fromkeys({heavy}))\n"
        "import torch, batchnorm, batchnorm.scratch, batchnorm.learn.walkthrough\n"
        "batchnorm.BatchNorm2d(3)(torch.randn(2, 3, 4, 4))",
        "-W",
        "error",
    )


def test_importing_changes_nothing_in_torch():
    in_a_new_process(
        "import torch; before = dict(vars(torch.nn)), torch.get_num_threads()\n"
        "import batchnorm; batchnorm.BatchNorm2d; batchnorm.batch_norm\n"
        "assert before == (dict(vars(torch.nn)), torch.get_num_threads())"
    )


# Who may use what.


def test_scratch_stands_alone():
    tree = ast.parse((PACKAGE / "scratch.py").read_text())
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert imported == {"__future__", "torch"}


def test_the_linter_knows_seven_floors_and_every_room():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    floors = next(c for c in settings["contracts"] if c.get("containers") == ["batchnorm"])
    assert len(floors["layers"]) == 7
    assert floors["exhaustive"]


# Names of torch that begin with an underscore and are public in all but that.
DE_FACTO_PUBLIC = {
    "_BatchNorm": "the base class of every batch norm, which has no public name",
    "_NormBase": "as _BatchNorm, for instance norm, too",
    "_modules": "subclasses and state_dict hooks all over the world rely on it",
    "_parameters": "as _modules",
    "_buffers": "as _modules",
    "_apply": "a hook for subclasses: to(), cuda() and half() call it",
    "_assert": "a wrapper of assert for code that torch.fx traces, with a docstring",
}


def test_only_one_file_uses_private_names_of_torch():
    private = torch_names()
    found = [
        f"{shown(path)}:{line}: {name}"
        for path in SOURCES
        if path.name not in ("torch_internals.py", "numba_internals.py")
        for line, name in names_in(path, private)
        if name.rpartition(".")[2] not in DE_FACTO_PUBLIC
    ]
    assert not found, "\n".join(found)


def test_no_private_name_is_allowed_in_vain():
    private = torch_names()
    used = {
        name.rpartition(".")[2]
        for path in SOURCES
        if path.name != "torch_internals.py"
        for _, name in names_in(path, private)
    }
    assert used >= DE_FACTO_PUBLIC.keys()


def test_torch_load_is_always_restricted():
    calls = [
        node
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert calls
    for call in calls:
        assert "weights_only=True" in ast.unparse(call)


def test_nothing_points_outside_the_repository():
    outside = re.compile("|".join(["\\.\\./" + "shared", "/work" + "/", "pypi\\." + "org"]))
    found = [shown(path) for path in OURS if outside.search(path.read_text(errors="ignore"))]
    assert not found


def test_constraints_pin_every_dependency():
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split()
    }
    text = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r'^    "([A-Za-z0-9-]+)(?:\[\w+\])?[>=]=', text, re.MULTILINE)
    assert "torch" in named
    assert {name.lower() for name in named} <= pinned


# Budgets.


def test_files_keep_the_budget():
    lines = {shown(path): path.read_text().count("\n") for path in SOURCES}
    assert {name: count for name, count in lines.items() if count > 400} == {}
    rooms = [count for name, count in lines.items() if not name.endswith("__init__.py")]
    assert statistics.median(rooms) <= 150
    assert {path.stem for path in SOURCES}.isdisjoint({"utils", "helpers", "common"})


def test_functions_are_short():
    lengths = [
        node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert sum(length < 60 for length in lengths) >= 0.95 * len(lengths)


# Tests.


def test_every_test_of_an_error_checks_its_message():
    """By ``match``, or by what the same function caught; not for errors that the file raises."""
    found = []
    for path in TESTS:
        tree = ast.parse(path.read_text())
        read_later = {
            item.context_expr.lineno
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            for block in ast.walk(function)
            if isinstance(block, ast.With)
            for item in block.items
            if item.optional_vars
            and f"{ast.unparse(item.optional_vars)}.value" in ast.unparse(function)
        }
        own = {
            ast.unparse(node.exc).partition("(")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Raise) and node.exc
        }
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or ast.unparse(call.func) != "pytest.raises":
                continue
            expected = ast.unparse(call.args[0])
            matched = call.lineno in read_later or "match" in {word.arg for word in call.keywords}
            if expected not in own and not matched:
                found.append(f"{shown(path)}:{call.lineno}: {expected}")
    assert not found, "\n".join(found)
