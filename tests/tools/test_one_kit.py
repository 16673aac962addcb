"""Hooks, replaced methods and cloned buffers live in ``tools/patching/``, and nowhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import batchnorm

SOURCE = Path(batchnorm.__file__).parent
KIT = "tools/patching/"

EXCEPTIONS = {
    "bench/rivals.py: Rival.answers": "copies results, to compare them",
    "cli/checkpoint.py: Checkpoint.take_statistics": "copies statistics into a file's state",
    "nn/running_statistics.py: update_running": "puts the mean back if the variance cannot move",
    "tools/acceleration/replacement.py: _is_act_of_drop": "fills a probe that is in no model",
    "tools/acceleration/verification.py: Snapshot.restore": "restores all attributes at once",
    "tools/acceleration/verification.py: Verification._run": "copies results, to compare them",
    "tools/recalibration/collector.py: MomentCollector.__init__": "makes stand-ins in float64",
}
"""Why a function may do by itself what the kit does for all others, by file and function."""

METHODS = {"forward", "train", "eval", "_apply", "__call__", "__getattribute__", "state_dict"}
BUFFER = re.compile(r"buffer|running_(mean|var)|num_batches_tracked")


def hooks(tree: ast.AST) -> Iterator[ast.AST]:
    """Calls of ``register_forward_hook`` and its relatives."""
    for call in calls(tree):
        if re.match(r"register_\w*hook", name_of(call.func)):
            yield call


def replaced_methods(tree: ast.AST) -> Iterator[ast.AST]:
    """Writes of a method on an object, or straight into the dictionary of its attributes."""
    dictionaries = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and is_dictionary(node.value, set())
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Attribute) and target.attr in METHODS | {"__dict__"}:
                yield node
            if (
                isinstance(target, ast.Subscript)
                and is_dictionary(target.value, dictionaries)
                and may_be_method(target.slice)
            ):
                yield node
    for call in calls(tree):
        name = name_of(call.func)
        if name in ("setattr", "__setattr__") and any(
            isinstance(a, ast.Constant) and a.value in METHODS for a in call.args
        ):
            yield call
        writes = name in ("update", "clear") or (
            name in ("pop", "setdefault") and any(map(may_be_method, call.args[:1]))
        )
        if writes and is_dictionary(call.func.value, dictionaries):
            yield call


def cloned_buffers(tree: ast.AST) -> Iterator[ast.AST]:
    """Copies of what a function has taken from buffers, directly or by names in between."""
    tainted = tainted_names(tree)
    for call in calls(tree):
        name = name_of(call.func)
        copied = call.args[:1] if name == "deepcopy" else [getattr(call.func, "value", None)]
        copies = name in ("clone", "deepcopy") or any(
            keyword.arg == "copy" and ast.unparse(keyword.value) == "True"
            for keyword in call.keywords
        )
        if name == "clone" and call.args:
            copied = call.args[:1]
        if copies and any(part is not None and mentions(part, tainted) for part in copied):
            yield call


def tainted_names(tree: ast.AST) -> set[str]:
    """Names that a function gives to buffers."""
    bindings = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            bindings += [(target, node.value) for target in node.targets]
        elif isinstance(node, (ast.For, ast.comprehension)):
            bindings.append((node.target, node.iter))
        elif isinstance(node, ast.NamedExpr):
            bindings.append((node.target, node.value))
    tainted: set[str] = set()
    while True:
        more = {
            part.id
            for target, value in bindings
            if mentions(value, tainted)
            for part in ast.walk(target)
            if isinstance(part, ast.Name)
        }
        if more <= tainted:
            return tainted
        tainted |= more


def mentions(node: ast.AST, tainted: set[str]) -> bool:
    return any(
        (isinstance(part, ast.Name) and (part.id in tainted or BUFFER.search(part.id)))
        or (isinstance(part, ast.Attribute) and BUFFER.search(part.attr))
        or (isinstance(part, ast.Constant) and BUFFER.search(str(part.value)))
        for part in ast.walk(node)
    )


def may_be_method(key: ast.AST) -> bool:
    """Tells if an attribute may be a method by its name, which is unknown if it is computed."""
    return not isinstance(key, ast.Constant) or key.value in METHODS


def is_dictionary(node: ast.AST, dictionaries: set[str]) -> bool:
    if isinstance(node, ast.Call):
        return name_of(node.func) == "vars"
    if isinstance(node, ast.Name):
        return node.id in dictionaries
    return isinstance(node, ast.Attribute) and node.attr == "__dict__"


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def name_of(function: ast.AST) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


RULES = {"hook": hooks, "method": replaced_methods, "buffer": cloned_buffers}


class WithConstants(ast.NodeTransformer):
    """Puts strings in the place of the names that a file gives to them."""

    def __init__(self, tree: ast.Module) -> None:
        self.constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.constants.get(node.id, node) if isinstance(node.ctx, ast.Load) else node


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """The functions of a file by qualified name, and what is outside of all functions."""
    rest: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")
        else:
            rest.append(node)
    yield prefix.rstrip("."), ast.Module(rest, [])


def found_in(source: str) -> set[tuple[str, str]]:
    """Name of the function and of the rule, for all that is found."""
    tree = ast.parse(source)
    return {
        (name, rule)
        for name, function in functions(WithConstants(tree).visit(tree))
        for rule, find in RULES.items()
        if any(True for _ in find(function))
    }


def test_only_the_kit_changes_models():
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        file = path.relative_to(SOURCE).as_posix()
        if not file.startswith(KIT):
            for name, rule in found_in(path.read_text(encoding="utf-8")):
                found.setdefault(f"{file}: {name}", set()).add(rule)
    unexpected = {place: rules for place, rules in found.items() if place not in EXCEPTIONS}
    assert unexpected == {}, "use tools/patching, or give a reason in EXCEPTIONS"
    assert EXCEPTIONS.keys() - found.keys() == set(), "these are no exceptions any more"


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("hook", "layer.register_forward_hook(f)"),
        ("hook", "h = m.get_submodule(n).register_forward_pre_hook(f, with_kwargs=True)"),
        ("hook", "torch.nn.modules.module.register_module_forward_pre_hook(f)"),
        ("hook", "register_module_full_backward_hook(f)"),
        ("method", "layer.forward = f"),
        ("method", "layer.train: object = f"),
        ("method", "vars(layer)['train'] = f"),
        ("method", "layer.__dict__['_apply'] = f"),
        ("method", "layer.__dict__.update(forward=f)"),
        ("method", "attributes = vars(layer)\nattributes['forward'] = f"),
        ("method", "setattr(layer, 'forward', f)"),
        ("method", "object.__setattr__(layer, 'forward', f)"),
        ("method", "del vars(layer)['train']"),
        ("method", "vars(layer)[name] = f"),
        ("method", "NAME = 'train'\nvars(layer)[NAME] = f"),
        ("method", "layer.__dict__.pop('forward')"),
        ("method", "twin.__dict__ = layer.__dict__"),
        ("buffer", "layer.running_mean.clone()"),
        ("buffer", "kept = {n: b.detach().clone() for n, b in layer.named_buffers()}"),
        ("buffer", "for b in model.buffers():\n    kept.append(torch.clone(b))"),
        ("buffer", "kept = copy.deepcopy(dict(model.named_buffers()))"),
        ("buffer", "tensors = [*model.buffers()]\nkept = [t.detach().clone() for t in tensors]"),
        ("buffer", "mean = layer.running_mean.detach().to(dtype, copy=True)"),
        ("buffer", "before = getattr(layer, 'running_var').clone()"),
    ],
)
def test_each_rule_finds_what_it_is_for(rule, code):
    assert found_in(code) == {("", rule)}
    inside = "class C:\n    def f(self):\n" + "".join(f"        {x}\n" for x in code.splitlines())
    assert found_in(inside) == {("C.f", rule)}


@pytest.mark.parametrize(
    "code",
    [
        "y = layer.forward(x)",
        "model.train(mode)",
        "if 'forward' in vars(layer): pass",
        "layer.training = False",
        "layer.__dict__['training'] = False",
        "NAME = '_mark'\nvars(layer)[NAME] = kind",
        "block = vars(layer).pop('block', None)",
        "setattr(layer, 'training', False)",
        "kept = x.detach().clone()",
        "model.load_state_dict(state)",
        "self.records.update(more)",
        "layer.running_mean.copy_(mean)",
        "def register_hooks(): pass",
    ],
)
def test_nothing_else_is_found(code):
    assert found_in(code) == set()
