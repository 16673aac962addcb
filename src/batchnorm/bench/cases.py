"""The rows of a benchmark: shapes, layouts, dtypes, variants and passes, and the usual choice."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, get_args

Group = Literal["resnet50", "lenet", "nc", "1d", "3d"]
Layout = Literal["nchw", "channels_last"]
Precision = Literal["float32", "bfloat16"]
Variant = Literal["bn", "relu", "add-relu"]
Pass = Literal["forward", "backward", "both", "eval"]
Net = Literal["lenet", "resnet18", "resnet50"]
Extent = Literal["quick", "usual", "all"]
Word = Literal[Group, "steps", Layout, Precision, Variant, Pass]
"""Words that select rows; ``steps`` are the training steps."""

GROUPS: tuple[Group, ...] = get_args(Group)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
VARIANTS: tuple[Variant, ...] = get_args(Variant)
PASSES: tuple[Pass, ...] = get_args(Pass)
WORDS: tuple[Word, ...] = get_args(Word)

NETS: dict[Extent, tuple[Net, ...]] = {
    "quick": ("lenet",),
    "usual": ("lenet", "resnet18"),
    "all": ("lenet", "resnet18", "resnet50"),
}
"""Training steps by extent. One of ResNet-50 takes seconds."""

Shape = tuple[int, ...]

SHAPES: dict[Group, tuple[Shape, ...]] = {
    "resnet50": tuple(
        (32, channels, size, size)
        for channels, size in (
            *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
            *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
        )
    ),
    "lenet": ((256, 6, 24, 24), (256, 16, 8, 8), (256, 120), (256, 84)),
    "nc": ((4096, 512),),
    "1d": ((64, 256, 1000),),
    "3d": ((4, 64, 16, 56, 56),),
}
"""The inputs of every batch norm layer of ResNet-50 for 32 images of 224 x 224, of d2l's LeNet for
256 images, and one input each of other ranks."""

QUICK_SHAPES: dict[Group, tuple[Shape, ...]] = {
    **SHAPES,
    "resnet50": ((32, 64, 56, 56), (32, 256, 14, 14), (32, 2048, 7, 7)),
}


@dataclass(frozen=True)
class Case:
    """One input and one layer, whose passes are measured on the same tensors.

    Attributes:
        group: The list that the shape is from.
        shape: Of the input, (N, C, ...).
        layout: Of the input in memory.
        precision: The dtype of the input; parameters are float32.
        variant: Normalization alone, then ReLU, or then a residual added and ReLU.
        passes: The measured ones. ``both`` is forward and backward; ``backward`` alone has the
            forward pass outside of the clock; ``eval`` is inference without gradients.
    """

    group: Group
    shape: Shape
    layout: Layout = "nchw"
    precision: Precision = "float32"
    variant: Variant = "bn"
    passes: tuple[Pass, ...] = PASSES

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.group} {size} {self.precision} {self.layout} {self.variant}"


@dataclass(frozen=True)
class Plan:
    """The cases and the training steps that will be measured, in this order."""

    cases: tuple[Case, ...]
    nets: tuple[Net, ...]


_Kind = tuple[Layout, Precision, Variant, tuple[Pass, ...]]
_USUAL: tuple[_Kind, ...] = (
    ("nchw", "float32", "bn", PASSES),
    ("nchw", "float32", "relu", ("both",)),
    ("nchw", "float32", "add-relu", ("both",)),
    ("channels_last", "float32", "bn", ("both",)),
    ("nchw", "bfloat16", "bn", ("both",)),
)
_ALL: tuple[_Kind, ...] = tuple(
    (layout, precision, variant, PASSES)
    for layout in LAYOUTS
    for precision in PRECISIONS
    for variant in VARIANTS
)


def plan(extent: Extent = "usual", only: Collection[Word] = ()) -> Plan:
    """Lists the rows of an extent, or those of them that are selected.

    Args:
        extent: ``usual`` has ResNet-50's shapes in five kinds, the other shapes in the first of
            these, and training steps of LeNet and ResNet-18. ``quick`` has three of ResNet-50's
            shapes and LeNet's step. ``all`` has all shapes in all kinds and ResNet-50's step too.
        only: Rows that are selected; empty for all. Words of one sort are alternatives
            (``relu``, ``add-relu``), words of different sorts apply together (``relu``, ``eval``).

    Raises:
        ValueError: Rows were selected that the extent does not have.
    """
    nets = NETS[extent] if not only or "steps" in only else ()
    if set(only) == {"steps"}:
        return Plan((), nets)
    words = frozenset(only)
    cases = tuple(found for case in _cases(extent) if (found := _selected(case, words)))
    if not cases:
        raise ValueError(
            f"no row fits {', '.join(only)}; leave out a word, or choose from all rows with --all "
            "(channels_last needs images)."
        )
    return Plan(cases, nets)


def _cases(extent: Extent) -> list[Case]:
    shapes = QUICK_SHAPES if extent == "quick" else SHAPES
    kinds = {group: _ALL if extent == "all" else _USUAL[:1] for group in GROUPS}
    if extent != "all":
        kinds["resnet50"] = _USUAL
    return [
        Case(group, shape, *kind)
        for group in GROUPS
        for kind in kinds[group]
        for shape in shapes[group]
        if kind[0] == "nchw" or len(shape) in (4, 5)
    ]


def _selected(case: Case, only: frozenset[Word]) -> Case | None:
    """Returns the case with the selected passes; None if it is not selected."""
    alternatives = ((case.group, (*GROUPS, "steps")), (case.layout, LAYOUTS))
    alternatives += ((case.precision, PRECISIONS), (case.variant, VARIANTS))
    if not all(value in only or only.isdisjoint(sort) for value, sort in alternatives):
        return None
    passes = tuple(p for p in case.passes if p in only or only.isdisjoint(PASSES))
    return replace(case, passes=passes) if passes else None


def least_bytes(case: Case, measured: Pass) -> int:
    """Counts the bytes that must move between memory and processor at least, each tensor once.

    A channel's part of the input is read once if it stays in the cache between the statistics and
    the normalization. So forward reads the input and writes the output; backward reads the input
    and the output's gradient and writes the input's. An added residual is one more tensor to read,
    and its gradient one more to write. ReLU adds nothing: its mask follows from the input.
    """
    tensor = math.prod(case.shape) * (2 if case.precision == "bfloat16" else 4)
    residual = case.variant == "add-relu"
    forward, backward = 2 + residual, 3 + residual
    tensors = {"forward": forward, "eval": forward, "backward": backward}
    return tensor * tensors.get(measured, forward + backward)
