"""What is measured: shapes, layouts, dtypes, variants, passes; and which of them when not asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Group = Literal["resnet50", "lenet", "nc", "1d", "3d"]
Layout = Literal["nchw", "channels_last"]
Precision = Literal["float32", "bfloat16"]
Variant = Literal["plain", "relu", "add-relu"]
Pass = Literal["forward", "backward", "both", "eval"]
Net = Literal["lenet", "resnet18", "resnet50"]
Extent = Literal["quick", "usual", "all"]

GROUPS: tuple[Group, ...] = get_args(Group)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
VARIANTS: tuple[Variant, ...] = get_args(Variant)
PASSES: tuple[Pass, ...] = get_args(Pass)
NETS: tuple[Net, ...] = get_args(Net)

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
"""The inputs of every batch norm layer of ResNet-50 at 32 images of 224 x 224, of d2l's LeNet at
256, and one input each of other ranks."""

QUICK_SHAPES: dict[Group, tuple[Shape, ...]] = {
    **SHAPES,
    "resnet50": ((32, 64, 56, 56), (32, 256, 14, 14), (32, 2048, 7, 7)),
}


@dataclass(frozen=True)
class Case:
    """One input and one layer, whose passes are measured with the same tensors.

    Args:
        group: Which list the shape is from.
        shape: Of the input, (N, C, ...).
        layout: Of the input in memory.
        precision: Of the input; parameters are float32.
        variant: Normalization alone, then ReLU, or then a residual added and ReLU.
        passes: Which are measured. ``both`` is forward and backward; ``backward`` alone has the
            forward outside of the clock; ``eval`` is inference without gradients.
    """

    group: Group
    shape: Shape
    layout: Layout = "nchw"
    precision: Precision = "float32"
    variant: Variant = "plain"
    passes: tuple[Pass, ...] = PASSES

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.group} {size} {self.precision} {self.layout} {self.variant}"


@dataclass(frozen=True)
class Selection:
    """What the user named; an empty choice is no choice."""

    only: tuple[Group | Literal["steps"], ...] = ()
    layouts: tuple[Layout, ...] = ()
    precisions: tuple[Precision, ...] = ()
    variants: tuple[Variant, ...] = ()
    passes: tuple[Pass, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What will be measured, in this order."""

    cases: tuple[Case, ...]
    nets: tuple[Net, ...]


_Kind = tuple[Layout, Precision, Variant, tuple[Pass, ...]]
_USUAL: tuple[_Kind, ...] = (
    ("nchw", "float32", "plain", PASSES),
    ("nchw", "float32", "relu", ("both",)),
    ("nchw", "float32", "add-relu", ("both",)),
    ("channels_last", "float32", "plain", ("both",)),
    ("nchw", "bfloat16", "plain", ("both",)),
)


def plan(selection: Selection, extent: Extent = "usual") -> Plan:
    """The cases and nets that a selection stands for.

    Nothing named: ResNet-50's shapes in `_USUAL` kinds, the other shapes in the first of them, and
    the training steps. Any of layout, dtype, variant or pass named: every combination of what is
    named, the rest plain NCHW in float32 and all passes, and no training steps unless they are
    named too.

    Args:
        selection: What the user named.
        extent: ``quick`` takes three shapes of ResNet-50 and only LeNet's step; ``all`` takes
            everything of what is not named.
    """
    shapes = QUICK_SHAPES if extent == "quick" else SHAPES
    named = (selection.layouts, selection.precisions, selection.variants, selection.passes)
    cases = tuple(
        Case(group, shape, *kind)
        for group in GROUPS
        if not selection.only or group in selection.only
        for kind in _kinds(selection, extent, group)
        for shape in shapes[group]
        if kind[0] == "nchw" or len(shape) in (4, 5)
    )
    steps = "steps" in selection.only or not (selection.only or any(named))
    return Plan(cases, (NETS[:1] if extent == "quick" else NETS) if steps else ())


def _kinds(selection: Selection, extent: Extent, group: Group) -> Sequence[_Kind]:
    named = (selection.layouts, selection.precisions, selection.variants, selection.passes)
    if extent != "all" and not any(named):
        return _USUAL if group == "resnet50" else _USUAL[:1]
    rest = None if extent == "all" else 1
    return [
        (layout, precision, variant, selection.passes or PASSES)
        for layout in selection.layouts or LAYOUTS[:rest]
        for precision in selection.precisions or PRECISIONS[:rest]
        for variant in selection.variants or VARIANTS[:rest]
    ]


def least_bytes(case: Case, measured: Pass) -> int:
    """Bytes that have to cross between memory and processor at least, each tensor counted once.

    A channel's part of the input is read once if it stays in the cache between the statistics and
    the normalization. So forward reads the input and writes the output; backward reads the input
    and the output's gradient and writes the input's. An added residual is one more tensor to read,
    and its gradient one more to write. ReLU costs nothing: its mask follows from the input.
    """
    tensor = math.prod(case.shape) * (2 if case.precision == "bfloat16" else 4)
    residual = case.variant == "add-relu"
    forward, backward = 2 + residual, 3 + residual
    tensors = {"forward": forward, "eval": forward, "backward": backward}
    return tensor * tensors.get(measured, forward + backward)
