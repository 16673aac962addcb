"""Running statistics: moved in a forward pass once and exactly, or not at all; read as they are."""

import pytest
import torch

import batchnorm
from batchnorm.kernels import dispatch
from batchnorm.moments import update_running
from batchnorm.nn.functional import batch_norm

CHANNELS = 3


def state(layer):
    return [value.clone() for value in layer.state_dict().values()]


def assert_unmoved(layer, before):
    for value, old in zip(layer.state_dict().values(), before, strict=True):
        assert torch.equal(value, old)


def buffers_of(kind):
    if kind == "strided":
        return torch.arange(1.0, 7)[::2], torch.arange(1.0, 7)[1::2]
    if kind == "columns":
        return torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).unbind(1)
    if kind == "expanded":
        return torch.zeros(1).expand(CHANNELS), torch.full((1,), 2.0).expand(CHANNELS)
    return torch.ones(CHANNELS), torch.arange(1.0, 4).double()


@pytest.mark.parametrize("kind", ["strided", "columns", "expanded", "mixed"])
@pytest.mark.parametrize("shape", [(4, 3, 50), (4, 3), (4, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_inference_reads_any_buffers(kind, shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    mean, var = buffers_of(kind)
    with torch.no_grad():
        got = batch_norm(x, mean, var)
    expected = batch_norm(x, mean, var, backend="reference")
    torch.testing.assert_close(got, expected)


class Refused(Exception):
    pass


def refuse(tensor):
    raise Refused


@pytest.mark.parametrize("fused", [False, True])
def test_nothing_has_moved_where_nothing_can_be_kept(fused):
    layer = batchnorm.BatchNorm1d(CHANNELS, activation="relu" if fused else None)
    before = state(layer)
    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse), pytest.raises(Refused):
        layer(torch.randn(8, CHANNELS))
    assert_unmoved(layer, before)
    with torch.inference_mode():
        x = torch.randn(8, CHANNELS)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        layer(x)
    assert_unmoved(layer, before)


def test_a_weight_of_inference_mode_moves_nothing():
    with torch.inference_mode():
        weight = torch.ones(CHANNELS)
    running, counter = torch.zeros(2, CHANNELS), torch.tensor(0)
    x = torch.randn(8, CHANNELS, requires_grad=True)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        batch_norm(x, *running, weight, training=True)
    assert not running.any()
    assert counter == 0


def test_harmless_hooks_change_nothing():
    usual, hooked = (batchnorm.BatchNorm1d(CHANNELS) for _ in range(2))
    x = torch.randn(8, CHANNELS)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        expected = hooked(x)
    assert torch.equal(usual(x), expected)
    assert_unmoved(usual, state(hooked))


@pytest.mark.parametrize("shape", [(8, CHANNELS), (4, CHANNELS, 40)])
def test_buffers_that_are_read_meanwhile_move_last(shape):
    x = torch.randn(shape)
    weight, bias = torch.tensor([1.0, 2, 3]), torch.tensor([0.5, 0, -1])
    expected = batch_norm(x, None, None, weight, bias, training=True)
    mean, var = weight.clone(), bias.clone()
    batch = dispatch.choose(x).moments(x)
    update_running(mean, var, batch, 0.1)
    assert torch.equal(batch_norm(x, weight, bias, weight, bias, training=True), expected)
    assert torch.equal(weight, mean)
    assert torch.equal(bias, var)
    both, alone = torch.ones(CHANNELS), torch.ones(CHANNELS)
    batch_norm(x, both, both, training=True)
    update_running(alone, alone, batch, 0.1)
    assert torch.equal(both, alone)


def test_hooks_may_give_x_back_in_another_layout():
    """The sign of y is then still that of the forward pass."""
    x = torch.randn(6, 5, 4, 4).requires_grad_()
    layer = batchnorm.BatchNorm2d(5, activation="relu")
    last = torch.channels_last

    def turned(tensor):
        return tensor.contiguous(memory_format=last) if tensor.dim() == 4 else tensor

    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    with torch.autograd.graph.saved_tensors_hooks(turned, lambda t: t):
        y = layer(x)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(got, expected)
