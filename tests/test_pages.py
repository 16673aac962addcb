"""The pages are true: what they link, name, show and let run is there."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import batchnorm

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
PAGES = [
    path
    for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
    if path.name != "CHANGELOG.md"  # It speaks of the past.
]
FILES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("src", "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
]
# Names that the pages forbid.
UNWANTED = {"utils.py", "helpers.py", "common.py"}


def test_links_lead_somewhere():
    for path in [*PAGES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def references(path):
    """Line, file and name of each `` `file.py` `` and `` `file.py: name` `` on a page."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for code in re.findall(r"`([^`]+)`", line):
            for file, name in re.findall(r"([\w./-]+\.py)\b(?::+ ?([A-Za-z_][\w.]*))?", code):
                if file not in UNWANTED:
                    yield number, file, name


def defined(body, prefix=""):
    """Dotted names of all that a module defines: functions, classes, their members, constants."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from defined(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in ast.walk(ast.Tuple(targets)):
                if isinstance(target, ast.Name):
                    yield prefix + target.id
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from defined([*node.body, *getattr(node, "orelse", [])], prefix)


def mistake(file, name):
    """Says in what a reference is wrong; None if it is right."""
    files = [known for known in FILES if f"/{known}".endswith(f"/{file}")]
    if not files:
        return f"there is no {file}"
    trees = [ast.parse((ROOT / known).read_text()) for known in files]
    if name and not any(name in set(defined(tree.body)) for tree in trees):
        return f"{' and '.join(files)} defines no {name}"
    return None


def test_files_and_names_on_the_pages_exist():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {wrong}"
        for path in PAGES
        for number, file, name in references(path)
        if (wrong := mistake(file, name))
    ]
    assert not found, "\n".join(found)


def test_mistakes_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "`moments.py: Moments.count` and `batchnorm/moments.py: nonsense`, `nowhere.py`,\n"
        "`python tests/test_pages.py`, `utils.py`, `tests/test_pages.py: test_mistakes_are_found`\n"
    )
    found = [mistake(file, name) for _, file, name in references(page)]
    assert found == [
        None,
        "src/batchnorm/moments.py defines no nonsense",
        "there is no nowhere.py",
        None,
        None,
    ]


def test_the_design_lists_the_public_names():
    text = (ROOT / "docs/design.md").read_text()
    (section,) = re.findall(r"^## Public names\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    first_cells = re.findall(r"^\|([^|]*)\|", section, re.MULTILINE)
    names = [name for cell in first_cells for name in re.findall(r"`(\w+)", cell)]
    assert len(names) == len(set(names))
    assert set(names) == set(batchnorm.__all__)


def test_pictures_are_drawn_by_the_code_of_now():
    spec = importlib.util.spec_from_file_location("stamps", ROOT / "benchmarks/stamps.py")
    stamps = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stamps)
    pictures = {
        picture
        for page in READMES
        for picture in re.findall(r"docs/([\w.-]+\.(?:svg|png))", page.read_text())
    }
    assert pictures
    for picture in pictures:
        assert stamps.stamp_in(ROOT / "docs" / picture) == stamps.stamp(picture), picture


def test_the_python_of_the_readmes_runs():
    """Each block alone, as far as names go; what both languages show runs once."""
    blocks = {}
    for page in READMES:
        found = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        assert len(found) >= 2, page.name
        blocks |= {ast.dump(ast.parse(block)): block for block in found}
    code = "import sys\nfor block in sys.argv[1:]:\n    exec(block, {'__name__': '__main__'})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *blocks.values()], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
