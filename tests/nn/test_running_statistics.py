"""Running statistics: moved in a forward pass once and exactly, or not at all; read as they are."""

import pytest
import torch

import batchnorm
from batchnorm import scratch
from batchnorm.kernels import dispatch
from batchnorm.moments import Moments, unbiased_var
from batchnorm.nn.functional import batch_norm
from batchnorm.nn.functional import moments as moments_of
from batchnorm.nn.running_statistics import update_running, weight_of_new_batch

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


def data(values, channels=3, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(values, channels, generator=chance, dtype=torch.float64)


def test_weight_of_new_batch():
    assert weight_of_new_batch(0.1, None) == 0.1
    assert weight_of_new_batch(0.0, torch.tensor(5)) == 0.0
    for before in (0, 1, 9):
        counter = torch.tensor(before)
        weight = weight_of_new_batch(None, counter)
        assert weight.dtype == torch.float64
        assert weight.item() == 1 / (before + 1)
        assert counter.item() == before


def test_the_cumulative_average_needs_a_counter():
    with pytest.raises(
        ValueError,
        match=r"^momentum=None \(the cumulative average\) needs num_batches_tracked, got None; "
        r"give a momentum between 0 and 1, or keep the counter\.$",
    ):
        weight_of_new_batch(None, None)


def test_update_running_by_hand():
    mean, var = torch.tensor([10.0]), torch.tensor([100.0])
    batch = Moments(5, torch.tensor([20.0]), torch.tensor([8.0]))
    update_running(mean, var, batch, 0.25)
    assert mean.item() == 0.75 * 10 + 0.25 * 20
    assert var.item() == 0.75 * 100 + 0.25 * 8 * 5 / 4


def test_update_running_as_torch():
    x = data(6).float()
    ours = [torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 6])]
    theirs = [tensor.clone() for tensor in ours]
    update_running(*ours, moments_of(x), 0.3)
    torch.nn.functional.batch_norm(x, *theirs, training=True, momentum=0.3)
    torch.testing.assert_close(ours, theirs)


def test_a_decay_of_the_book_gives_the_book_its_mean():
    x = data(6)
    start = torch.full((1, 3), 2.0, dtype=torch.float64)
    ones = torch.ones(1, 3, dtype=torch.float64)
    _, book_mean, book_var = scratch.batch_norm(
        x, ones, 0 * ones, start, start, eps=1e-5, momentum=0.9, training=True
    )
    mean, var = start[0].clone(), start[0].clone()
    update_running(mean, var, moments_of(x), 0.1)
    torch.testing.assert_close(mean, book_mean[0])
    biased = moments_of(x).var
    torch.testing.assert_close(var - book_var[0], 0.1 * (biased * 6 / 5 - biased))


def test_the_cumulative_average_is_the_plain_mean_of_the_batches():
    batches = [moments_of(data(4 + k, seed=k)) for k in range(6)]
    mean, var = torch.full((3,), 99.0).double(), torch.full((3,), 99.0).double()
    counter = torch.tensor(0)
    for batch in batches:
        update_running(mean, var, batch, weight_of_new_batch(None, counter))
        counter += 1
    torch.testing.assert_close(mean, torch.stack([b.mean for b in batches]).mean(0))
    torch.testing.assert_close(var, torch.stack([unbiased_var(b) for b in batches]).mean(0))


def test_an_update_rounds_once():
    mean, var = torch.tensor([1.0]).bfloat16(), torch.tensor([1.0]).bfloat16()
    batch = Moments(3, torch.tensor([1 / 3]).double(), torch.tensor([0.1]).double())
    update_running(mean, var, batch, 0.01)
    assert mean.item() == torch.tensor(0.99 + 0.01 / 3).bfloat16().item()
    assert var.item() == torch.tensor(0.99 + 0.01 * 0.15).bfloat16().item()


def test_running_statistics_get_no_graph():
    mean, var = torch.zeros(3), torch.ones(3)
    x = data(5).requires_grad_()
    update_running(mean, var, Moments(5, x.mean(0), x.var(0)), 0.5)
    assert not mean.requires_grad
    assert not var.requires_grad


def overflowing(kind, size, dtype):
    """A batch whose mean, or variance, is about ``size``; the other is small."""
    x = torch.randn((64, CHANNELS), generator=torch.Generator().manual_seed(0)).double()
    x = x + size if kind == "mean" else x * size**0.5
    return x.to(dtype)


def overflow_message(kind, dtype):
    dtype = str(dtype).removeprefix("torch.")
    what, name = ("mean", "mean") if kind == "mean" else ("variance", "var")
    remedy = "" if dtype == "float32" else "keep the statistics in float32, or "
    return (
        rf"^batch_norm: the {what} of a channel is \d\.\de\+\d\d, more than {dtype} can hold: the "
        rf"output is right, but a {dtype} running_{name} becomes inf; {remedy}scale the input "
        r"down\.$"
    )


ROUTES = ["direct", "no_grad", "reference", "grad", "subclass"]


def on_route(route, x, mean, var, momentum=0.5):
    if route == "no_grad":
        with torch.no_grad():
            return batch_norm(x, mean, var, training=True, momentum=momentum)
    if route == "grad":
        torch.func.grad(lambda x: batch_norm(x, mean, var, training=True, momentum=momentum).sum())(
            x
        )
    elif route == "subclass":
        x = x.as_subclass(type("Subclass", (torch.Tensor,), {}))
        batch_norm(x, mean, var, training=True, momentum=momentum)
    else:
        backend = "reference" if route == "reference" else None
        x = x.clone().requires_grad_()
        batch_norm(x, mean, var, training=True, momentum=momentum, backend=backend)
    return None


# The operator, which does not know the buffers, speaks of float32.
@pytest.mark.filterwarnings("ignore:batch_norm. the variance .* more than float32:RuntimeWarning")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("kind", "size", "dtype", "x_dtype"),
    [
        ("var", 1e7, torch.float16, torch.float32),
        ("var", 1e7, torch.float16, torch.float16),
        ("var", 1e9, torch.float16, torch.float64),
        ("mean", 1e6, torch.float16, torch.float32),
        ("mean", 1e6, torch.float16, torch.bfloat16),
        ("var", 1e39, torch.float32, torch.float64),
        ("var", 1e41, torch.float32, torch.float32),
        ("mean", 1e40, torch.float32, torch.float64),
        ("var", 1e41, torch.bfloat16, torch.bfloat16),
        ("mean", 1e40, torch.bfloat16, torch.float64),
    ],
)
def test_statistics_that_overflow_are_said_in_every_dtype(route, kind, size, dtype, x_dtype):
    x = overflowing(kind, size, x_dtype)
    mean, var = torch.zeros(CHANNELS, dtype=dtype), torch.ones(CHANNELS, dtype=dtype)
    with pytest.warns(RuntimeWarning, match=overflow_message(kind, dtype)):
        on_route(route, x, mean, var)
    assert (mean if kind == "mean" else var).isinf().all()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (overflowing("var", 1e4, torch.float32), torch.float16),
        (overflowing("var", 1e41, torch.float64), torch.float64),
        (overflowing("mean", 6e4, torch.float32), torch.float16),
        (torch.full((4, CHANNELS), torch.inf), torch.float16),
        (torch.full((4, CHANNELS), torch.nan), torch.float32),
    ],
)
def test_what_fits_or_was_no_number_before_is_not_called_an_overflow(route, x, dtype):
    """pytest turns warnings into errors."""
    on_route(route, x, torch.zeros(CHANNELS, dtype=dtype), torch.ones(CHANNELS, dtype=dtype))


def test_statistics_that_were_infinite_before_are_not_called_an_overflow():
    mean, var = torch.full((2, CHANNELS), torch.inf).half()
    batch_norm(overflowing("var", 4.0, torch.float32), mean, var, training=True)
    assert var.isinf().all()


def test_a_map_over_statistics_that_overflow_does_not_fail():
    x = torch.stack([overflowing("var", 1e9, torch.float32)] * 2)
    mean, var = torch.zeros(2, CHANNELS).half(), torch.ones(2, CHANNELS).half()
    torch.func.vmap(lambda *args: batch_norm(*args, training=True))(x, mean, var)
    assert var.isinf().all()
