"""Checks every annotation of the library at run time: shapes by jaxtyping, the rest by beartype.

jaxtyping remembers sizes during a call, so that one name is one size. That makes each call slow, so
only modules that have annotations of shapes pay for it. beartype's own import hook does not know
the ``__new__`` of a ``NamedTuple``; the one here decorates what is written in the source.
"""

from __future__ import annotations

import ast
import sys
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

PACKAGE = Path(__file__).parents[1] / "src" / "batchnorm"
# Numba cannot compile functions that are wrapped by checks.
UNCHECKED = "batchnorm.kernels.compiled"
DECORATOR = "_checked_at_run_time"
checked = beartype(conf=BeartypeConf(violation_type=TypeError))


def check() -> None:
    """Checks the modules that are imported from now on."""
    early = [name for name in sys.modules if name.split(".")[0] == "batchnorm"]
    assert not early, f"imported before the checks: {early}"
    shaped = [_name(file) for file in PACKAGE.rglob("*.py") if "jaxtyping" in file.read_text()]
    assert shaped
    sys.meta_path.insert(0, _Finder())
    install_import_hook(shaped, "beartype.beartype")


def _name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != "batchnorm" or name.startswith(UNCHECKED):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname):
        """Compiles the decorated source; nothing of it is kept on disk."""
        tree = _Decorated().visit(ast.parse(self.get_data(self.path)))
        future = any(
            isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body
        )
        place = 1 + future if ast.get_docstring(tree) is not None else int(future)
        names = ast.alias("checked", DECORATOR)
        tree.body.insert(place, ast.ImportFrom("annotations", [names], 0))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class _Decorated(ast.NodeTransformer):
    def visit_FunctionDef(self, node):
        """Decorates the function first, before other decorators hide its annotations."""
        self.generic_visit(node)
        if not any("no_type_check" in ast.unparse(one) for one in node.decorator_list):
            node.decorator_list.append(ast.Name(DECORATOR, ast.Load()))
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node):
        """Decorates a dataclass last, when it has its ``__init__``."""
        self.generic_visit(node)
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            node.decorator_list.insert(0, ast.Name(DECORATOR, ast.Load()))
        return node
