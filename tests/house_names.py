"""Private names of torch in our source: which there are, and which files use them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import nn


@cache
def torch_names() -> frozenset[str]:
    """Private attributes of torch's objects that a model is made of, or that compute with it."""
    parameter = nn.Parameter(torch.zeros(1))
    module = nn.BatchNorm1d(1)
    graph = torch.fx.symbolic_trace(nn.Sequential(module))
    objects = (
        *(parameter, (2 * parameter).grad_fn, torch.autograd.Function, torch.Generator()),
        *(module, nn.Sequential(module), nn.SyncBatchNorm(1), nn.modules.module),
        *(graph, graph.graph, next(iter(graph.graph.nodes)), torch.optim.SGD([parameter])),
    )
    return frozenset(name for thing in objects for name in dir(thing) if is_private(name))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_in(path: Path, private: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Line and name of each use in a file: ``torch._C``, ``module._buffers``, "_forward_hooks"."""
    tree = ast.parse(path.read_text())
    of_torch, of_ours = roots(tree), own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_torch(node.module):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, name) for name in names if is_private(name))
        elif isinstance(node, ast.Import):
            names = [part for a in node.names if is_torch(a.name) for part in a.name.split(".")]
            yield from ((node.lineno, name) for name in names if is_private(name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            root = ast.unparse(node).partition(".")[0]
            if root in of_torch or (node.attr in private and node.attr not in of_ours):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and node.value in private - of_ours:
            yield node.lineno, node.value


def is_torch(module: str | None) -> bool:
    return (module or "").split(".")[0] == "torch"


def roots(tree: ast.Module) -> set[str]:
    """Names under which a file knows torch or something out of it."""
    return {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if is_torch(node.module if isinstance(node, ast.ImportFrom) else alias.name)
    }


def own_names(tree: ast.Module) -> set[str]:
    """Attributes that classes of the file give themselves, and names that the file defines."""
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) == "self"
        ):
            own.add(node.attr)
    return own
