"""One table of inputs for every test of the core: shapes, dtypes, layouts, options and values."""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)
SHAPES = (
    (3, 1),
    (2, 100),
    (100, 63),
    (63, 3, 3),
    (1, 3, 63),
    (2, 3, 100),
    (3, 63, 3, 3),
    (1, 1, 10, 10),
    (3, 100, 1, 1),
    (2, 3, 3, 3, 3),
    (3, 1, 1, 7, 9),
)


@dataclass(frozen=True)
class Case:
    """What one call of batch_norm looks like."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    weight: bool = True
    bias: bool = True
    statistics: bool = True
    residual: bool = False
    relu: bool = False
    values: str = "normal"

    def __str__(self):
        options = [
            name if on else f"no_{name}"
            for name, on, usual in (
                ("weight", self.weight, True),
                ("bias", self.bias, True),
                ("statistics", self.statistics, True),
                ("residual", self.residual, False),
                ("relu", self.relu, False),
            )
            if on != usual
        ]
        shape = "x".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([shape, dtype, self.layout, self.values, *options])


@dataclass(frozen=True)
class Arguments:
    """The tensors of a call; ``grad_output`` is what is sent back through it."""

    x: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    grad_output: Tensor

    def leaves(self):
        """The tensors that get a gradient, by name."""
        tensors = {name: getattr(self, name) for name in ("x", "weight", "bias", "residual")}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def widened(self):
        """The same values in float64, as leaves of a graph of their own."""
        wide = {
            name: None if tensor is None else tensor.detach().double().clone()
            for name, tensor in vars(self).items()
        }
        return Arguments(**wide).as_leaves()

    def on(self, device, layout):
        """The same values on a device, in that layout there."""
        there = {
            name: None if tensor is None else tensor.detach().to(device, copy=True)
            for name, tensor in vars(self).items()
        }
        for name in ("x", "residual"):
            there[name] = None if there[name] is None else laid_out(there[name], layout)
        return Arguments(**there).as_leaves()

    def as_leaves(self):
        for leaf in self.leaves().values():
            leaf.requires_grad_()
        return self


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Parameters and buffers stay in float32 where the input is narrower."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        wider = values.new_full([2 * size for size in values.shape], 7)
        view = wider[tuple(slice(None, None, 2) for _ in values.shape)]
        view.copy_(values)
        return view
    raise ValueError(f"unknown layout {layout!r}")


def arguments_of(case: Case, seed: int = 0) -> Arguments:
    """Tensors as the case asks, the same ones on each call."""
    chance = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=chance, dtype=torch.float64)

    channels = case.shape[1]
    kept = parameter_dtype(case.dtype)
    x = normal(*case.shape)
    if case.values == "far":
        x = 1000 + 0.1 * x
    elif case.values == "constant":
        x[:, 0] = 3.25
    x = laid_out(x.to(case.dtype), case.layout)
    residual = laid_out(normal(*case.shape).to(case.dtype), case.layout)
    weight, bias = (1 + 0.5 * normal(channels)).to(kept), normal(channels).to(kept)
    mean, var = normal(channels).to(kept), (0.5 + normal(channels).square()).to(kept)
    return Arguments(
        x=x,
        running_mean=mean if case.statistics else None,
        running_var=var if case.statistics else None,
        weight=weight if case.weight else None,
        bias=bias if case.bias else None,
        residual=residual if case.residual else None,
        grad_output=normal(*case.shape).to(case.dtype),
    ).as_leaves()


def _fits(case: Case) -> bool:
    return case.layout == "contiguous" or case.layout == "sliced" or len(case.shape) > 2


_OPTIONS = [
    Case((4, 3, 3, 3), torch.float32, "contiguous", *options)
    for options in product((True, False), repeat=5)
]
_LAYOUTS = [
    Case(shape, dtype, layout, residual=True, relu=True)
    for shape in ((63, 3), (2, 63, 3), (3, 3, 3, 4), (2, 3, 3, 2, 2))
    for dtype in (torch.float32, torch.bfloat16)
    for layout in ("channels_last", "sliced", "transposed")
]
_DTYPES = [
    Case(shape, dtype, values=values)
    for shape in ((63, 3), (3, 100, 3, 3))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for values in ("normal", "far", "constant")
]

# Few rows of many channels, which the kernels cut into tiles of whole vectors and a rest.
_WIDE = [
    Case((2, 2113), torch.float32, residual=True, relu=True),
    Case((5, 2400, 1), torch.bfloat16, residual=True, relu=True),
    Case((3, 700, 4), torch.float32, relu=True),
    Case((1, 2200, 2, 1), torch.float32, "channels_last", residual=True, relu=True),
    Case((64, 1100), torch.float32, values="far"),
    Case((4, 2500)),
    Case((3, 2085), torch.float16, weight=False, bias=False),
]

CASES = list(
    dict.fromkeys(
        [Case(shape, torch.float32) for shape in SHAPES]
        + [Case(shape) for shape in SHAPES]
        + _OPTIONS
        + [case for case in _LAYOUTS if _fits(case)]
        + [Case((63, 3), torch.float32, "transposed", residual=True, relu=True)]
        + _DTYPES
        + _WIDE
    )
)
