"""Geometry of a tensor as the Numba kernels see it, and the layout of masks.

The kernels copy a tensor that is neither contiguous nor channels last into contiguous memory first;
its mask is that of the copy.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements of the shortest plane that is computed as a plane; shorter ones are columns.
# docs/decisions/0007: planes
SHORT = 32
# Width from which on rows of columns are not put side by side: a whole vector of the kernels.
WIDE = 64

# Limits of a tile of a matrix of few rows and many columns: bytes of ``x``, and columns.
# docs/decisions/0012: tiles
TILE_BYTES, TILE_COLUMNS, FEWEST_TILE_COLUMNS = 1 << 17, 1024, 256

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Geometry(NamedTuple):
    """A tensor as planes (rows, channels, length), or as rows of fold * channels * repeat columns.

    Attributes:
        columns: True for columns, False for planes.
        rows: Number of samples of planes, or rows of the matrix of columns.
        channels: Number of channels.
        length: Elements of a plane; 1 for columns.
        fold: Number of narrow rows that are put side by side.
        repeat: Neighboring columns that belong to one channel.
        slabs: Number of parts in which sums are collected. It depends on the shape alone, so that
            any number of threads merges the same sums in the same order.
        tiles: Number of parts of the columns of which one thread does all steps; 1 for none.
    """

    columns: bool
    rows: int
    channels: int
    length: int
    fold: int
    repeat: int
    slabs: int
    tiles: int = 1

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and width of the mask. Each row of bits begins a new byte."""
        if self.columns:
            return self.rows, self.fold * self.channels * self.repeat
        return self.rows * self.channels, self.length

    @property
    def widest(self) -> int:
        """The most channels of a tile, each of which begins at a whole vector."""
        return self.channels if self.tiles == 1 else -(-self.channels // self.tiles) + WIDE


def is_channels_last(x: Tensor) -> bool:
    """Returns whether the channels of each position of ``x`` are adjacent in dense memory."""
    if x.is_contiguous():
        return False
    if x.dim() in _LAST:
        return x.is_contiguous(memory_format=_LAST[x.dim()])
    return x.movedim(1, -1).is_contiguous()


def geometry_of(x: Tensor) -> Geometry:
    """Returns the geometry of ``x``."""
    return geometry_of_shape(x.shape, channels_last=is_channels_last(x))


@lru_cache(1024)
def geometry_of_shape(shape: torch.Size, *, channels_last: bool) -> Geometry:
    """Returns the geometry of any contiguous or channels-last tensor of that shape."""
    n, channels = shape[:2]
    length = math.prod(shape[2:])
    if not channels_last and length >= SHORT:
        slabs = 1 << min(n * -(-length // 4096), max(2, n * length // 4096), 32).bit_length() - 1
        return Geometry(False, n, channels, length, 1, 1, slabs)
    rows, repeat = (n * length, 1) if channels_last else (n, length)
    fold = _fold(rows, channels * repeat)
    rows, width = rows // fold, fold * channels * repeat
    tiles = _tiles(rows, channels, repeat)
    if tiles > 1:
        return Geometry(True, rows, channels, 1, fold, repeat, 1, tiles)
    slabs = min(64, max(16, 32768 // width), max(1, rows * width // 131072), rows)
    return Geometry(True, rows, channels, 1, fold, repeat, slabs)


def _tiles(rows: int, channels: int, repeat: int) -> int:
    """Returns into how many tiles to cut a matrix: 1 if it has many rows or few columns."""
    columns = min(TILE_COLUMNS, TILE_BYTES // (4 * rows))
    if columns < FEWEST_TILE_COLUMNS:
        return 1
    return max(1, min(channels * repeat // columns, channels // WIDE))


def _fold(rows: int, width: int) -> int:
    """Returns how many narrow rows to put side by side: a divisor of their number."""
    most = min(rows, -(-4 * WIDE // width)) if width < WIDE else 1
    return next(fold for fold in range(most, 0, -1) if rows % fold == 0)


def mask_size(x: Tensor) -> int | torch.SymInt:
    """Returns a size in bytes that any geometry of ``x`` fits into; symbolic in a trace."""
    length = math.prod(x.shape[2:])
    if is_channels_last(x) or x.dim() == 2:
        return x.shape[0] * length * ((x.shape[1] + 7) // 8)
    return x.shape[0] * x.shape[1] * ((length + 7) // 8)


def pack(passes: Tensor, like: Tensor) -> Tensor:
    """Packs flags in the shape of ``like`` into a mask, one bit an element."""
    rows, width = geometry_of(like).matrix
    flags = passes.movedim(1, -1) if is_channels_last(like) else passes
    flags = F.pad(flags.reshape(rows, width).to(torch.uint8), (0, -width % 8))
    places = torch.arange(8, dtype=torch.uint8, device=passes.device)
    bits = (flags.reshape(rows, -1, 8) << places).sum(-1, dtype=torch.uint8).flatten()
    return F.pad(bits, (0, int(mask_size(like)) - bits.numel()))


def unpack(mask: Tensor, like: Tensor) -> Tensor:
    """Unpacks a mask into booleans in the shape of ``like``."""
    rows, width = geometry_of(like).matrix
    bits = mask[: rows * -(-width // 8)].reshape(rows, -1, 1)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    flags = (bits >> places & 1).reshape(rows, -1)[:, :width].bool()
    if not is_channels_last(like):
        return flags.reshape(like.shape)
    return flags.reshape(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)
