"""Stamps pictures with the version of the code that drew them, so that a test finds stale ones.

A stamp is the version of the package and a checksum of the sources behind the picture. Comments,
docstrings and layout of the code do not change it.
"""

from __future__ import annotations

import ast
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from batchnorm.files import whole_file, write_text
from batchnorm.version import __version__

ROOT = Path(__file__).parents[1]
_SOURCES = {
    "bench.svg": ("charts", "bench/chart.py", "bench/titles.py", "kernels/compiled"),
    "report.png": ("charts", "experiment/report"),
    "statistics.svg": ("charts",),
    "statistics.zh.svg": ("charts",),
}
"""Files and folders of the package behind each picture in ``docs/``. The kernels are behind the
speeds: a chart of other kernels is stale."""

_KEY = "batchnorm"
_NAMESPACE = "http://www.w3.org/2000/svg"


def stamp(picture: str) -> str:
    """Computes the stamp that a picture in ``docs/`` has if it is drawn now."""
    digest = hashlib.sha256()
    for path in _files(picture):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(_essence(path))
    return f"batchnorm {__version__}, drawn by {digest.hexdigest()[:12]}"


def write_svg(path: Path, svg: str) -> None:
    """Writes an SVG file with its stamp as ``<metadata>``."""
    start, bracket, rest = svg.partition(">")
    write_text(path, f"{start}{bracket}<metadata>{stamp(path.name)}</metadata>{rest}")


def write_png(path: Path, png: bytes) -> None:
    """Writes a PNG file with its stamp as a ``tEXt`` chunk."""
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_text(_KEY, stamp(path.name))
    with whole_file(path) as file:
        Image.open(io.BytesIO(png)).save(file, "PNG", pnginfo=text, optimize=True)


def stamp_in(path: Path) -> str | None:
    """Reads the stamp out of a picture; None if it has none."""
    if path.suffix == ".svg":
        return ElementTree.parse(path).getroot().findtext(f"{{{_NAMESPACE}}}metadata")
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(_KEY)


def _files(picture: str) -> Iterator[Path]:
    for source in _SOURCES[picture]:
        path = ROOT / "src/batchnorm" / source
        found = path.rglob("*") if path.is_dir() else [path]
        yield from sorted(p for p in found if p.suffix in (".py", ".html", ".css", ".json"))


def _essence(path: Path) -> bytes:
    """Returns what a checksum sees of a file: of Python the syntax tree without docstrings."""
    if path.suffix != ".py":
        return path.read_bytes()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [statement for statement in node.body if not _is_text(statement)]
    return ast.dump(tree).encode()


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
