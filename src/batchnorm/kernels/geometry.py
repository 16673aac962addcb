"""How the Numba kernels see a tensor, and where the bits of a mask lie.

A tensor that is neither contiguous nor channels last is copied into contiguous memory first; its
mask is that of the copy.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Planes of fewer elements than this are worked on as columns.
SHORT = 32
# Rows narrower than this are put side by side.
WIDE = 64


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Geometry(NamedTuple):
    """A tensor as planes (rows, channels, length), or as rows of fold * channels * repeat columns.

    ``slabs`` depends on the shape alone, so that sums are merged in the same order by any number of
    threads.
    """

    columns: bool
    rows: int
    channels: int
    length: int
    fold: int
    repeat: int
    slabs: int

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and width of the mask: each row of bits begins a new byte."""
        if self.columns:
            return self.rows, self.fold * self.channels * self.repeat
        return self.rows * self.channels, self.length


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of ``x`` lie next to each other, and nothing else between."""
    if x.is_contiguous():
        return False
    if x.dim() in _LAST:
        return x.is_contiguous(memory_format=_LAST[x.dim()])
    return x.movedim(1, -1).is_contiguous()


def geometry_of(x: Tensor) -> Geometry:
    """How the kernels will see ``x``."""
    return geometry_of_shape(x.shape, channels_last=is_channels_last(x))


@lru_cache(1024)
def geometry_of_shape(shape: torch.Size, *, channels_last: bool) -> Geometry:
    """The same, of any contiguous or channels-last tensor of that shape."""
    n, channels = shape[:2]
    length = math.prod(shape[2:])
    if not channels_last and length >= SHORT:
        slabs = 1 << min(n * -(-length // 4096), max(2, n * length // 4096), 32).bit_length() - 1
        return Geometry(False, n, channels, length, 1, 1, slabs)
    rows, repeat = (n * length, 1) if channels_last else (n, length)
    fold = _fold(rows, channels * repeat)
    rows, width = rows // fold, fold * channels * repeat
    slabs = min(64, max(16, 32768 // width), max(1, rows * width // 131072), rows)
    return Geometry(True, rows, channels, 1, fold, repeat, slabs)


def _fold(rows: int, width: int) -> int:
    """How many narrow rows are put side by side: a divisor of their number."""
    most = min(rows, -(-4 * WIDE // width)) if width < WIDE else 1
    return next(fold for fold in range(most, 0, -1) if rows % fold == 0)


def mask_size(x: Tensor) -> int | torch.SymInt:
    """Bytes that are enough for the mask of ``x``, whatever its geometry; symbolic in a trace."""
    if is_channels_last(x) or x.dim() == 2:
        return x.numel() // x.shape[1] * ((x.shape[1] + 7) // 8)
    length = x.numel() // (x.shape[0] * x.shape[1])
    return x.shape[0] * x.shape[1] * ((length + 7) // 8)


def pack(passes: Tensor, like: Tensor) -> Tensor:
    """Flags in the shape of ``like`` as a mask, one bit an element."""
    rows, width = geometry_of(like).matrix
    flags = passes.movedim(1, -1) if is_channels_last(like) else passes
    flags = F.pad(flags.reshape(rows, width).to(torch.uint8), (0, -width % 8))
    places = torch.arange(8, dtype=torch.uint8, device=passes.device)
    bits = (flags.reshape(rows, -1, 8) << places).sum(-1, dtype=torch.uint8).flatten()
    return F.pad(bits, (0, int(mask_size(like)) - bits.numel()))


def unpack(mask: Tensor, like: Tensor) -> Tensor:
    """The flags of a mask, as booleans in the shape of ``like``."""
    rows, width = geometry_of(like).matrix
    bits = mask[: rows * -(-width // 8)].reshape(rows, -1, 1)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    flags = (bits >> places & 1).reshape(rows, -1)[:, :width].bool()
    if not is_channels_last(like):
        return flags.reshape(like.shape)
    return flags.reshape(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)
