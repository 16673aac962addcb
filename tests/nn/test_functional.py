"""batch_norm against torch's: values, gradients, running statistics, dtype, layout, edges."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from batchnorm.nn.functional import batch_norm, moments
from calls import ours, results, torchs
from cases import CASES, LOW_PRECISION, Case, arguments_of
from scales import assert_close_for, scales

BY_TORCH = {
    torch.float64: 1e-9,
    torch.float32: 2e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}
# With 16 bits torch rounds between its operators, so that its ReLU may decide otherwise.
AS_TORCH = [
    case
    for case in CASES
    if case.values == "normal"
    and case.statistics
    and not (case.dtype in LOW_PRECISION and (case.residual or case.relu))
]


def by_reference(arguments, case, training):
    return ours(arguments, case, training, "reference")


def assert_rounded_once(got, exact, name):
    """``got`` is the float64 result, but for one rounding to its dtype."""
    eps = max(torch.finfo(got.dtype).eps, 1e-9 if got.dtype == torch.float64 else 0.0)
    atol = eps * 1e-3 * (1 + exact.abs().max().item())
    torch.testing.assert_close(
        got.double(), exact, rtol=eps, atol=atol, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize(
    ("case", "training"),
    [
        pytest.param(case, training, id=f"{case}-{'training' if training else 'inference'}")
        for case in CASES
        for training in ((True, False) if case.statistics else (True,))
    ],
)
def test_a_call_is_torchs(case, training):
    """In float64, rounded once by the reference; and in the same dtype, layout and buffers."""
    arguments, of_reference = arguments_of(case), arguments_of(case)
    sizes = scales(arguments, training)
    exact = results(torchs, arguments.widened(), case, training)
    reference = results(by_reference, of_reference, case, training)
    got = results(ours, arguments, case, training)
    assert got.keys() == reference.keys() == exact.keys()
    for name in exact:
        assert_rounded_once(reference[name], exact[name], name)
        assert_close_for(sizes[name], got[name], exact[name], name)

    x = arguments.x
    for y in (got["y"], reference["y"]):
        assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, torch.empty_like(x).stride())
    if not training:
        before = arguments_of(case)
        for used in (arguments, of_reference):
            assert torch.equal(used.running_mean, before.running_mean)
            assert torch.equal(used.running_var, before.running_var)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("case", AS_TORCH, ids=str)
def test_as_torch_in_the_same_dtype(case, training):
    got = results(ours, arguments_of(case), case, training)
    expected = results(torchs, arguments_of(case), case, training)
    tolerance = BY_TORCH[case.dtype]
    for name in expected:
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(
            got[name], expected[name], rtol=tolerance, atol=tolerance * (1 + scale)
        )


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (4, 0), (2, 3, 0), (0, 0)])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_nothing_gives_nothing(shape, training):
    channels = shape[1]
    x, residual = (torch.zeros(shape, requires_grad=True) for _ in range(2))
    weight, bias = (torch.ones(channels, requires_grad=True) for _ in range(2))
    running_mean, running_var = torch.full((channels,), 2.0), torch.full((channels,), 3.0)
    y = batch_norm(
        x, running_mean, running_var, weight, bias, training, residual=residual, activation="relu"
    )
    assert (y.shape, y.dtype) == (shape, torch.float32)
    y.sum().backward()
    for leaf in (x, residual, weight, bias):
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.count_nonzero() == 0
    assert running_mean.tolist() == [2] * channels
    assert running_var.tolist() == [3] * channels


@pytest.mark.untyped
def test_an_empty_vector_comes_back():
    x = torch.zeros(0, requires_grad=True)
    y = batch_norm(x, None, None, training=True)
    assert y.shape == (0,)
    assert y is not x


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, -0.5, 2.0])
def test_any_momentum_moves_the_statistics_as_torch(momentum):
    case = Case((6, 3, 4), torch.float64)
    mine, yours = arguments_of(case), arguments_of(case)
    before = mine.running_mean.clone(), mine.running_var.clone()
    batch_norm(mine.x, mine.running_mean, mine.running_var, training=True, momentum=momentum)
    F.batch_norm(yours.x, yours.running_mean, yours.running_var, training=True, momentum=momentum)
    torch.testing.assert_close(mine.running_mean, yours.running_mean)
    torch.testing.assert_close(mine.running_var, yours.running_var)
    unmoved = torch.equal(mine.running_mean, before[0]), torch.equal(mine.running_var, before[1])
    assert unmoved == ((momentum == 0.0),) * 2


def test_momentum_may_be_a_tensor():
    x = arguments_of(Case((6, 3))).x.detach()
    statistics = [
        [torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)] for _ in range(2)
    ]
    batch_norm(x, *statistics[0], training=True, momentum=0.25)
    batch_norm(x, *statistics[1], training=True, momentum=torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close(statistics[0], statistics[1], rtol=0, atol=0)


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1.0])
def test_eps_is_added_to_the_biased_variance(eps):
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    y = batch_norm(x, None, None, training=True, eps=eps)
    torch.testing.assert_close(y, x / (1 + eps) ** 0.5)


def test_inference_allows_an_eps_of_zero():
    x = torch.tensor([[2.0], [4.0]])
    y = batch_norm(x, torch.tensor([2.0]), torch.tensor([4.0]), eps=0.0)
    assert y.tolist() == [[0.0], [1.0]]


def test_training_ignores_the_values_of_the_statistics():
    case = Case((6, 3))
    arguments = arguments_of(case)
    kept = batch_norm(arguments.x, None, None, training=True)
    for fill in (0.0, 7.0, float("nan")):
        statistics = [torch.full((3,), fill, dtype=torch.float64) for _ in range(2)]
        assert torch.equal(batch_norm(arguments.x, *statistics, training=True), kept)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_the_reference_may_be_asked_for(training):
    arguments, again = (arguments_of(Case((6, 3, 2), torch.float32)) for _ in range(2))
    chosen = ours(arguments, Case((6, 3, 2)), training)
    named = by_reference(again, Case((6, 3, 2)), training)
    torch.testing.assert_close(chosen, named)
    torch.testing.assert_close(arguments.running_var, again.running_var)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_under_autocast_as_torch(dtype, training):
    case = Case((8, 3, 5), dtype)
    arguments, plain, expected = (arguments_of(case) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        got = results(ours, arguments, case, training)
        theirs = torchs(expected, case, training)
    without = results(ours, plain, case, training)
    assert got["y"].dtype == theirs.dtype == dtype
    for name in got:
        assert torch.equal(got[name], without[name])


def test_autocast_feeds_bfloat16_to_float32_parameters():
    arguments = arguments_of(Case((8, 3), torch.float32))
    linear = torch.eye(3)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = F.linear(arguments.x, linear)
        y = ours(replace(arguments, x=hidden), Case((8, 3)), training=True)
    assert hidden.dtype == y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert arguments.weight.grad.dtype == arguments.x.grad.dtype == torch.float32


def test_no_grad_gives_the_same_values_without_a_graph():
    case = Case((8, 3, 5), torch.float32, residual=True, relu=True)
    arguments, again = arguments_of(case), arguments_of(case)
    with torch.no_grad():
        y = ours(arguments, case, True)
    assert not y.requires_grad
    assert torch.equal(y, ours(again, case, True))
    assert torch.equal(arguments.running_mean, again.running_mean)


def test_arguments_stay_as_they_are():
    case = Case((8, 3, 5), torch.float32, "sliced", residual=True, relu=True)
    arguments = arguments_of(case)
    before = {name: leaf.detach().clone() for name, leaf in arguments.leaves().items()}
    ours(arguments, case, True).sum().backward()
    for name, leaf in arguments.leaves().items():
        assert torch.equal(leaf, before[name])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_moments_are_those_of_the_values(case):
    x = arguments_of(case).x.detach()
    got = moments(x, "reference")
    dims = [dim for dim in range(x.dim()) if dim != 1]
    assert got.count == x.numel() // x.shape[1]
    assert got.mean.dtype == got.var.dtype == torch.float64
    torch.testing.assert_close(got.mean, x.double().mean(dims), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.var, x.double().var(dims, correction=0), rtol=1e-8, atol=1e-12)
    chosen = moments(x)
    assert chosen.count == got.count
    far = 1 + got.mean.abs() / (got.var + 1e-12).sqrt()
    assert ((chosen.mean - got.mean).abs() <= 1e-6 * (got.var.sqrt() + 1e-6)).all()
    assert ((chosen.var - got.var).abs() <= 1e-6 * got.var + 1e-12 * far).all()


def test_moments_can_be_differentiated():
    x = arguments_of(Case((6, 3))).x
    (grad,) = torch.autograd.grad(moments(x).var.sum(), x)
    (expected,) = torch.autograd.grad(x.var(0, correction=0).sum(), x)
    torch.testing.assert_close(grad, expected)
    mapped = torch.vmap(lambda x: moments(x).var)(x.detach().reshape(2, 3, 3))
    torch.testing.assert_close(mapped, x.detach().reshape(2, 3, 3).var(1, correction=0))


def test_fast_moments_refuse_to_be_differentiated():
    pytest.importorskip("numba")
    with pytest.raises(
        RuntimeError,
        match=r"^backend='numba' cannot take this input: its moments are differentiated or "
        r"traced, and that needs the reference; leave backend out\.$",
    ):
        moments(arguments_of(Case((6, 3))).x, "numba")


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (2, 3, 0)])
def test_moments_of_nothing(shape):
    got = moments(torch.zeros(shape))
    assert got.count == 0
    assert got.mean.tolist() == got.var.tolist() == [0] * shape[1]


def test_a_nan_channel_does_not_hide_a_huge_one():
    x = torch.tensor([[1e30, float("nan")], [-1e30, 1.0]])
    with pytest.warns(RuntimeWarning, match=r"^batch_norm: the variance of a channel is 1\.0e\+60"):
        batch_norm(x, torch.zeros(2), torch.ones(2), training=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_huge_variance_is_told_whoever_moves_the_buffers(dtype):
    x = torch.tensor([[1e30], [-1e30]])
    running = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
    with pytest.warns(RuntimeWarning, match=r"^batch_norm: the variance of a channel is 1\.0e\+60"):
        batch_norm(x, *running, training=True, momentum=torch.tensor(0.5))
    assert running[1].isinf()


def test_without_buffers_a_huge_variance_harms_nobody():
    y = batch_norm(torch.tensor([[1e30], [-1e30]]), None, None, training=True)
    torch.testing.assert_close(y, torch.tensor([[1.0], [-1.0]]))
