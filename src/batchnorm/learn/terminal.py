"""The walkthrough for the terminal: each step with its formula, its code and its numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from torch import Tensor

from batchnorm.learn import words
from batchnorm.learn.step import Step
from batchnorm.learn.tables import tabulate_maps, tabulate_rows

WIDTH = 80
INDENT = 4
GAP = 2
NO_BREAK = "\u00a0"

STYLES = {
    "headline": "bold",
    "part": "bold magenta",
    "rule": "dim",
    "title": "bold cyan",
    "label": "dim",
    "formula": "green",
}

# Pieces of a line: white space, or a Latin word or one Chinese character with its punctuation.
PIECE = re.compile(r"\s+|（?(?:[!-\u2fff]+|\S)[，。；：、）？！]*")


def render(steps: Sequence[Step], lang: str = "en") -> RenderableType:
    """Lays a walkthrough out for a terminal of 80 columns or more.

    Args:
        steps: The result of `walkthrough`.
        lang: ``en`` or ``zh``.

    Returns:
        A rich renderable of at most 80 columns. The console that prints it decides about color.

    Raises:
        ValueError: There are no words in that language.
    """
    told: list[RenderableType] = [
        Text(),
        Text(words.headline(steps, lang), style=STYLES["headline"], justify="center"),
        Text(words.label("legend", lang), style=STYLES["label"], justify="center"),
    ]
    part = None
    for number, step in enumerate(steps, start=1):
        if step.part != part:
            part = step.part
            heading = Text(words.part(step, lang), style=STYLES["part"])
            told += [Text(), Rule(heading, style=STYLES["rule"], align="left")]
        told += [Text(), _tell(step, number, lang)]
    return Constrain(Group(*told, Text()), WIDTH)


def wrap(text: str, width: int) -> str:
    """Breaks text into lines of at most `width` cells, between Chinese characters too.

    A line never begins with a comma or another closing mark.
    """
    lines = [""]
    for piece in PIECE.findall(text):
        if cell_len(lines[-1]) + cell_len(piece.rstrip()) > width:
            lines[-1] = lines[-1].rstrip()
            lines.append("")
        if lines[-1] or not piece.isspace():
            lines[-1] += piece
    return "\n".join(lines)


def _tell(step: Step, number: int, lang: str) -> RenderableType:
    title, explanation = words.explain(step, lang)
    heading = Text.assemble((f"{number:2d}  ", STYLES["label"]), (title, STYLES["title"]))
    body = [
        Text(wrap(explanation, WIDTH - 2 * INDENT)),
        Text(),
        _notes(step, lang),
        Text(),
        *_numbers(step, lang),
    ]
    return Group(heading, Padding(Group(*body), (0, 0, 0, INDENT)))


def _notes(step: Step, lang: str) -> Table:
    """Lays out formula, code, shapes and the first number, each after its label."""
    notes = Table.grid(padding=(0, GAP, 0, 0))
    notes.add_column(style=STYLES["label"], no_wrap=True)
    notes.add_column()
    labels = {key: words.label(key, lang) for key in ("formula", "code", "shapes", "worked")}
    room = WIDTH - INDENT - max(map(cell_len, labels.values())) - GAP
    entries = {
        "formula": Text(step.formula, style=STYLES["formula"]),
        "code": Text(step.code),
        "shapes": Text(wrap(_shapes(step), room).replace(NO_BREAK, " ")),
        "worked": Text(step.worked),
    }
    for key, entry in entries.items():
        if entry.plain:
            notes.add_row(labels[key], entry)
    return notes


def _shapes(step: Step) -> str:
    """Returns ``X (10, 2); mean, var (1, 2) → X_hat (10, 2)``, or nothing for data."""
    if not step.inputs:
        return ""
    names: dict[tuple[int, ...], list[str]] = {}
    for name, shape in step.input_shapes.items():
        names.setdefault(shape, []).append(name)
    read = "; ".join(f"{', '.join(group)} {_shape(shape)}" for shape, group in names.items())
    return f"{read} → {step.name}{NO_BREAK}{_shape(step.shape)}"


def _shape(shape: tuple[int, ...]) -> str:
    return str(shape).replace(" ", NO_BREAK)


def _numbers(step: Step, lang: str) -> list[RenderableType]:
    """Lays out the result, and above it the tensors of one number per channel."""
    unit, room = words.unit(step, lang), WIDTH - INDENT
    given = [
        (f"{words.label('old', lang)} {name}" if name == step.name else name, tensor)
        for name, tensor in {**step.intermediates, **step.inputs}.items()
        if _is_per_channel(tensor)
    ]
    if len(step.shape) == 2 or _is_per_channel(step.value):
        one = step.shape[0] == 1
        rows = [
            (step.name if one else f"{step.name}[{n}]", row) for n, row in enumerate(step.value)
        ]
        return [tabulate_rows(given, rows, unit, room)]
    maps = tabulate_maps(step.name, step.value, unit, room)
    return [tabulate_rows(given, [], unit, room), Text(), maps] if given else [maps]


def _is_per_channel(tensor: Tensor) -> bool:
    return tensor.numel() == tensor.shape[1]
