"""Docstrings: their examples run, and they are written as the house writes."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

import batchnorm
from real_networks import import_torchvision

PACKAGE = Path(batchnorm.__file__).parent
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
QUESTION = re.compile(
    r"((In|For|By|From|To|Of|On|With) )?(What|How|Whether|Who|Whom|Whose|Where|Why|Which)\b",
    re.IGNORECASE,
)
BANNED = re.compile(
    r"(?<!\bas it )\bstands\b(?! (for|in for|in the chain)\b)"
    r"|\b(so many|so manieth|at hand|gone through|lets through|of today|meanwhile)\b"
    r"|\b(what there is not|whatever comes|goes, also)\b",
    re.IGNORECASE,
)


def documented(node, name):
    """Dotted name, node and docstring of a module and of all in it."""
    if isinstance(node, DOCUMENTED):
        name = name if isinstance(node, ast.Module) else f"{name}.{node.name}"
        if ast.get_docstring(node):
            yield name, node, ast.get_docstring(node)
    for child in ast.iter_child_nodes(node):
        yield from documented(child, name)


MODULES = {
    ".".join(["batchnorm", *path.relative_to(PACKAGE).with_suffix("").parts]): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
DOCSTRINGS = [
    (module.removesuffix(".__init__"), *found)
    for module, path in MODULES.items()
    for found in documented(ast.parse(path.read_text()), module.removesuffix(".__init__"))
]
EXAMPLES = {name: (module, text) for module, name, _, text in DOCSTRINGS if ">>>" in text}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name):
    module, text = EXAMPLES[name]
    if module.startswith("batchnorm.integrations."):
        library = module.rpartition(".")[2]
        import_torchvision()  # These libraries do so, too.
        pytest.importorskip(library, reason=f"{library} is not installed")
    names = dict(vars(importlib.import_module(module)))
    example = doctest.DocTestParser().get_doctest(text, names, name, module, 0)
    output = []
    result = doctest.DocTestRunner().run(example, out=output.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(output)


def test_every_public_tool_has_an_example():
    tools = {
        f"{tool.__module__}.{tool.__name__}"
        for name in batchnorm.__all__
        if (tool := getattr(batchnorm, name)) is not batchnorm.__version__
        and tool.__module__.startswith("batchnorm.tools.")
    }
    assert len(tools) >= 15
    assert not {name for name in tools if not any(e.startswith(name) for e in EXAMPLES)}


def first_line(text):
    return text.partition("\n")[0]


def test_docstrings_are_no_noun_clauses():
    found = [f"{name}: {first_line(t)}" for _, name, _, t in DOCSTRINGS if QUESTION.match(t)]
    assert not found, "\n".join(found)


def test_the_source_has_none_of_the_banned_words():
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in MODULES.values()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BANNED.search(line)
    ]
    assert not found, "\n".join(found)
