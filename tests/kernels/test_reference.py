"""The reference: accurate, and reproducible to the last bit."""

import pytest
import torch
from torch.nn import functional as F

from batchnorm.kernels import reference
from batchnorm.kernels.contract import ReluGate
from batchnorm.kernels.geometry import unpack
from batchnorm.moments import Moments
from batchnorm.nn.functional import batch_norm
from cases import laid_out


@pytest.fixture
def threads():
    """Sets the number of threads; afterwards it is as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape, dtype=torch.float32, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=chance, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("count", [1, 2])
def test_the_variance_survives_a_large_mean(threads, count):
    threads(count)
    x = (1e4 + normal(262144, 4, dtype=torch.float64)).float()
    exact = (x.double() - 1e4).var(0, correction=0)
    error = (reference.moments(x).var - exact).abs() / exact
    assert error.max() < 1e-5


@pytest.mark.parametrize(
    "shape", [(65536, 4), (200000, 1), (16384, 1), (16385, 1), (64, 3, 40, 40)]
)
def test_the_number_of_threads_changes_no_bit(threads, shape):
    x, grad_output = 5 + normal(*shape), normal(*shape, seed=1)
    results = []
    for count in (1, 2):
        threads(count)
        y, batch, _ = reference.forward(x, None, None, 1e-5)
        grads = reference.backward(grad_output, x, batch.mean, batch.var, 1e-5, None)
        results.append((y, batch.mean, batch.var, grads.x, grads.weight, grads.bias))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("shape", [(1000, 5), (16, 3, 40, 40), (20000, 1, 2), (2, 3, 4, 5, 6)])
def test_the_layout_changes_no_bit(shape, layout):
    x, grad_output = 3 + normal(*shape), normal(*shape, seed=1)
    results = []
    for values in (x, laid_out(x, layout)):
        y, batch, mask = reference.forward(values, None, None, 1e-5, laid_out(x, layout), relu=True)
        grads = reference.backward(
            laid_out(grad_output, layout),
            values,
            batch.mean,
            batch.var,
            1e-5,
            None,
            ReluGate(None, mask),
        )
        results.append((y, batch.mean, batch.var, *grads))
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other)


@pytest.mark.parametrize("values", [1, 2, 16384, 16385, 40000])
def test_blocks_add_up_one_channel(values):
    x = normal(values, 1, dtype=torch.float64) + 2
    batch = reference.moments(x)
    assert batch.count == values
    torch.testing.assert_close(batch.mean, x.mean(0))
    torch.testing.assert_close(batch.var, x.var(0, correction=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1000.0, -3.3])
def test_a_constant_channel_has_no_variance(dtype, value):
    x = torch.full((999, 2), value, dtype=dtype)
    batch = reference.moments(x)
    assert batch.var.tolist() == [0, 0]
    torch.testing.assert_close(batch.mean, x[0].double(), rtol=1e-15, atol=0)


def test_huge_values_come_out_right_and_warn():
    x = 1e30 * normal(1000, 2)
    running_mean, running_var = torch.zeros(2), torch.ones(2)
    with pytest.warns(
        RuntimeWarning,
        match=r"^batch_norm: the variance of a channel is \d\.\de\+\d\d, more than float32 can "
        r"hold: the output is right, but a float32 running_var becomes inf; scale the input "
        r"down\.$",
    ):
        y = batch_norm(x, running_mean, running_var, training=True)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(2))
    assert running_var.isinf().all()
    assert running_mean.isfinite().all()


def test_float64_holds_huge_values_without_a_warning():
    y = batch_norm(1e30 * normal(1000, 2, dtype=torch.float64), None, None, training=True)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(2).double())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_channel(value):
    x = normal(6, 3)
    x[2, 1] = value
    y = batch_norm(x, None, None, training=True)
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()
    fixed = batch_norm(x, torch.zeros(3), torch.ones(3))
    assert torch.equal(fixed[2, 1].isnan(), x[2, 1].isnan())
    assert not fixed[2, 1].isfinite()


def test_normalize_rounds_once():
    x, residual = normal(50, 2, dtype=torch.float16), normal(50, 2, dtype=torch.float16, seed=1)
    vectors = [normal(2, dtype=torch.float64, seed=seed) for seed in (2, 3, 4, 5)]
    mean, spread, weight, bias = vectors
    var = spread.square()
    y, mask = reference.normalize(x, mean, var, 0.5, weight, bias, residual, relu=True)
    exact = (x.double() - mean) * (var + 0.5).rsqrt() * weight + bias + residual.double()
    assert y.dtype == torch.float16
    assert torch.equal(y, exact.relu().half())
    assert torch.equal(unpack(mask, x), exact.half() > 0)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_backward_is_the_gradient_that_autograd_finds(relu, with_residual, fixed):
    x = normal(8, 3, 2, dtype=torch.float64).requires_grad_()
    residual = normal(8, 3, 2, dtype=torch.float64, seed=1).requires_grad_()
    residual = residual if with_residual else None
    weight, bias = (normal(3, dtype=torch.float64, seed=s).requires_grad_() for s in (2, 3))
    grad_output = normal(8, 3, 2, dtype=torch.float64, seed=4)
    leaves = [leaf for leaf in (x, weight, bias, residual) if leaf is not None]
    batch = reference.moments(x)
    if fixed:
        batch = Moments(16, batch.mean.detach() + 1, batch.var.detach() + 1)
    y, mask = reference.normalize(x, batch.mean, batch.var, 1e-5, weight, bias, residual, relu=relu)
    assert (mask is None) is not (relu and with_residual)
    expected = torch.autograd.grad(y, leaves, grad_output, retain_graph=True)
    gate = ReluGate(bias, mask) if relu else None
    with torch.no_grad():
        known = (grad_output, x, batch.mean, batch.var, 1e-5, weight)
        got = reference.backward(*known, gate, fixed=fixed)
        assert (got.residual is None) is (mask is None)
        torch.testing.assert_close(got[:3], tuple(expected[:3]))
        if with_residual:
            before_relu = grad_output if got.residual is None else got.residual
            torch.testing.assert_close(before_relu, expected[3])
        if not fixed:
            sums = reference.grad_sums(*known, gate)
            grad_x, before_relu = reference.grad_input(*known, *(s / 16 for s in sums), gate)
            torch.testing.assert_close((grad_x, *sums), (got.x, got.bias, got.weight))
            assert (before_relu is None) is (mask is None)


def test_the_gate_passes_what_is_not_below_zero():
    x = torch.tensor([[-1.0], [0.0], [1.0], [float("nan")], [1e-30]], dtype=torch.float16)
    grad = torch.ones(5, 1, dtype=torch.float16)
    known = (grad, x, torch.zeros(1).double(), torch.ones(1).double(), 0.0, None)
    for residual in (None, torch.zeros_like(x)):
        _, mask = reference.normalize(*known[1:], None, residual, relu=True)
        sum_grad, _ = reference.grad_sums(*known, ReluGate(None, mask))
        assert sum_grad.tolist() == [2]


def test_forward_is_what_torch_computes():
    x = normal(8, 3, 2, dtype=torch.float64)
    y, batch, mask = reference.forward(x, None, None, 0.1)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True, eps=0.1))
    assert batch.count == 16
    assert mask is None
