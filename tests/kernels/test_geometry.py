"""How tensors are seen by the compiled kernels, and where the bits of a mask lie."""

import pytest
import torch

from batchnorm.kernels.geometry import SHORT, geometry_of, is_channels_last, mask_size, pack, unpack
from cases import SHAPES, laid_out

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")
LARGER = (*SHAPES, (4, 3, 7, 5), (2, 9, 100), (8, 4), (6, 2, 3), (2, 2, 5000), (300, 20, 2))


def flags_of(shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", LARGER, ids=str)
def test_a_mask_gives_back_what_was_packed(shape, layout):
    flags = flags_of(shape)
    like = laid_out(torch.zeros(shape), layout)
    mask = pack(flags, like)
    assert mask.dtype == torch.uint8
    assert mask.shape == (mask_size(like),)
    assert torch.equal(unpack(mask, like), flags)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", LARGER, ids=str)
def test_a_geometry_covers_every_element_once(shape, layout):
    x = laid_out(torch.zeros(shape), layout)
    geometry = geometry_of(x)
    rows, width = geometry.matrix
    assert rows * width == x.numel()
    assert geometry.channels == shape[1]
    assert geometry.slabs >= 1
    assert mask_size(x) >= rows * ((width + 7) // 8)
    if geometry.columns:
        assert geometry.slabs <= geometry.rows
    else:
        assert geometry.length >= SHORT
        assert not is_channels_last(x)


def test_rows_of_bits_begin_new_bytes():
    like = torch.zeros(1, 2, 33)
    flags = torch.zeros(1, 2, 33, dtype=torch.bool)
    flags[0, 0, 0] = flags[0, 0, 9] = flags[0, 1, 32] = True
    assert pack(flags, like).tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 1]


def test_channels_last_of_every_rank():
    for shape in ((2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6)):
        x = torch.zeros(shape)
        assert not is_channels_last(x)
        assert is_channels_last(laid_out(x, "channels_last"))
        assert not is_channels_last(laid_out(x, "transposed"))
    assert not is_channels_last(torch.zeros(4, 3).t())
    assert not is_channels_last(laid_out(torch.zeros(2, 1, 4, 5), "channels_last"))


def test_slabs_do_not_depend_on_threads(two_threads):
    x = torch.zeros(64, 3, 64, 64)
    two = geometry_of(x)
    torch.set_num_threads(1)
    assert geometry_of(x) == two


@pytest.mark.parametrize("shape", [(2, 1000), (1568, 512), (8192, 4096), (32, 64, 4, 4)])
def test_tall_or_narrow_matrices_stay_whole(shape):
    geometry = geometry_of(torch.zeros(shape))
    assert geometry.tiles == 1
    assert geometry.widest == shape[1]
