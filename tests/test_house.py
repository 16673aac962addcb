"""Rules of the house, executed: the public face, its weight, its budgets, its independence."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
OURS = [
    path
    for folder in ("src", "tests", "docs", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".md", ".toml", ".html", ".css", ".json", ""} and path.is_file()
] + [path for path in ROOT.iterdir() if path.is_file() and path.suffix in {".md", ".toml", ".txt"}]


def functions(path):
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


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


@pytest.mark.parametrize(
    "heavy", ["typer", "rich", "matplotlib", "jinja2", "pooch", "sklearn", "platformdirs"]
)
def test_library_needs_nothing_of_the_command_line(heavy):
    code = (
        f"import sys; sys.modules[{heavy!r}] = None\n"
        "import torch, batchnorm, batchnorm.scratch, batchnorm.learn.walkthrough\n"
        "batchnorm.BatchNorm2d(3)(torch.randn(2, 3, 4, 4))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_importing_changes_nothing_in_torch():
    code = (
        "import torch; before = dict(vars(torch.nn)), torch.get_num_threads()\n"
        "import batchnorm; batchnorm.BatchNorm2d; batchnorm.batch_norm\n"
        "assert before == (dict(vars(torch.nn)), torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_scratch_stands_alone():
    tree = ast.parse((ROOT / "src/batchnorm/scratch.py").read_text())
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert imported == {"__future__", "torch"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_the_budget(path):
    assert path.read_text().count("\n") <= (450 if "kernels" in path.parts else 400)
    assert path.name not in {"utils.py", "helpers.py", "common.py"}


def test_functions_are_short():
    lengths = [f.end_lineno - f.lineno + 1 for path in SOURCES for f in functions(path)]
    assert sum(length < 60 for length in lengths) >= 0.95 * len(lengths)


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


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_points_outside_the_repository(path):
    text = path.read_text(errors="ignore")
    outside = re.compile("|".join(["\\.\\./" + "shared", "/work" + "/", "pypi\\." + "org"]))
    assert not outside.search(text)


def test_links_in_the_documents_lead_somewhere():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_constraints_pin_every_dependency():
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split()
    }
    text = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r'^    "([A-Za-z0-9-]+)(?:\[\w+\])?[>=]=', text, re.MULTILINE)
    assert "torch" in named
    assert {name.lower() for name in named} <= pinned


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_python_of_the_readme_runs(name):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        done = subprocess.run([sys.executable, "-W", "error", "-c", block], capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
