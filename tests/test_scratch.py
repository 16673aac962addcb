"""The from-scratch file against torch, d2l's formulas, and the traps that it warns of."""

import copy

import pytest
import torch
from torch.autograd import Function
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from batchnorm.scratch import BatchNorm, batch_norm

SHAPES = [(7, 3), (4, 3, 5), (3, 4, 5, 2), (2, 3, 2, 3, 4)]
EPS = 1e-5
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def arguments(shape: tuple[int, ...], *, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """X, gamma, beta, moving_mean, moving_var in float64."""
    torch.manual_seed(seed)
    along = (1, shape[1]) + (1,) * (len(shape) - 2)
    X = torch.randn(shape, dtype=torch.float64) * 2 + 3
    gamma, beta = torch.randn(2, *along, dtype=torch.float64)
    moving_mean = torch.randn(along, dtype=torch.float64)
    moving_var = torch.rand(along, dtype=torch.float64) + 0.5
    return X, gamma, beta, moving_mean, moving_var


def batch_statistics(X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    axes = tuple(axis for axis in range(X.dim()) if axis != 1)
    return X.mean(axes, keepdim=True), X.var(axes, correction=0, keepdim=True)


@each_shape
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_torch(shape, training):
    X, gamma, beta, moving_mean, moving_var = arguments(shape)
    leaves = [tensor.requires_grad_() for tensor in (X, gamma, beta)]
    cotangent = torch.randn(shape, dtype=torch.float64)

    Y, _, _ = batch_norm(X, gamma, beta, moving_mean, moving_var, EPS, 0.9, training=training)
    flat = [tensor.flatten() for tensor in (moving_mean, moving_var, gamma, beta)]
    expected = F.batch_norm(X, *flat, training=training, eps=EPS)

    assert_close(Y, expected, rtol=1e-12, atol=1e-12)
    assert_close(
        torch.autograd.grad(Y, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent),
        rtol=1e-12,
        atol=1e-12,
    )


@each_shape
def test_moving_statistics_follow_d2l(shape):
    X, gamma, beta, moving_mean, moving_var = arguments(shape)
    given = (moving_mean.clone(), moving_var.clone())
    mean, var = batch_statistics(X)

    _, new_mean, new_var = batch_norm(
        X, gamma, beta, moving_mean, moving_var, EPS, 0.9, training=True
    )

    assert_close(new_mean, 0.9 * moving_mean + 0.1 * mean, rtol=1e-13, atol=1e-13)
    assert_close(new_var, 0.9 * moving_var + 0.1 * var, rtol=1e-13, atol=1e-13)
    assert_close((moving_mean, moving_var), given, rtol=0, atol=0)


def test_inference_returns_the_moving_statistics_that_it_was_given():
    X, gamma, beta, moving_mean, moving_var = arguments((3, 4, 5, 2))

    _, *returned = batch_norm(X, gamma, beta, moving_mean, moving_var, EPS, 0.9, training=False)

    assert returned[0] is moving_mean
    assert returned[1] is moving_var


def test_moving_statistics_carry_no_graph():
    X, gamma, beta, moving_mean, moving_var = arguments((7, 3))

    Y, *moving = batch_norm(
        X.requires_grad_(), gamma, beta, moving_mean, moving_var, EPS, 0.9, training=True
    )

    assert Y.requires_grad
    assert [statistic.requires_grad for statistic in moving] == [False, False]


def test_normalized_batch_has_mean_zero_and_variance_one():
    X, gamma, beta, moving_mean, moving_var = arguments((3, 4, 5, 2))

    Y, _, _ = batch_norm(
        X,
        torch.ones_like(gamma),
        torch.zeros_like(beta),
        moving_mean,
        moving_var,
        0.0,
        0.9,
        training=True,
    )

    mean, var = batch_statistics(Y)
    assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-13)
    assert_close(var, torch.ones_like(var), rtol=1e-13, atol=0)


def test_stored_variance_is_three_quarters_of_torchs_for_a_batch_of_four():
    X, gamma, beta, _, _ = arguments((4, 3))
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    running_mean, running_var = torch.zeros(2, 3, dtype=torch.float64)

    _, _, moving_var = batch_norm(X, gamma, beta, zeros, zeros, EPS, 0.9, training=True)
    F.batch_norm(X, running_mean, running_var, training=True, momentum=0.1)

    ratio = moving_var.flatten() / running_var
    assert_close(ratio, torch.full_like(ratio, 0.75), rtol=1e-12, atol=0)


def test_momentum_is_the_weight_of_the_old_value():
    X, gamma, beta, moving_mean, moving_var = arguments((7, 3))
    mean, var = batch_statistics(X)

    _, *kept = batch_norm(X, gamma, beta, moving_mean, moving_var, EPS, 1.0, training=True)
    _, *replaced = batch_norm(X, gamma, beta, moving_mean, moving_var, EPS, 0.0, training=True)

    assert_close(kept, [moving_mean, moving_var], rtol=0, atol=0)
    assert_close(replaced, [mean, var], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
def test_training_none_follows_the_grad_mode(grad_mode):
    given = arguments((3, 4, 5, 2))

    with torch.set_grad_enabled(grad_mode):
        asked = batch_norm(*given, EPS, 0.9)

    told = batch_norm(*given, EPS, 0.9, training=grad_mode)
    other = batch_norm(*given, EPS, 0.9, training=not grad_mode)
    assert_close(asked, told, rtol=0, atol=0)
    assert not torch.allclose(asked[0], other[0])


class InsideAFunction(Function):
    """Calls `batch_norm` where autograd has switched the grad mode off."""

    @staticmethod
    def forward(ctx, *given):
        return batch_norm(*given, EPS, 0.9)[0]


def test_trap_an_autograd_function_turns_training_into_inference():
    X, *rest = arguments((7, 3))

    Y = InsideAFunction.apply(X.requires_grad_(), *rest)

    assert torch.is_grad_enabled()
    assert_close(Y.detach(), batch_norm(X.detach(), *rest, EPS, 0.9, training=False)[0])


def test_trap_the_first_pass_of_reentrant_checkpointing_is_inference():
    X, *rest = arguments((7, 3))
    passes = []

    def block(x):
        Y, moving_mean, _ = batch_norm(x, *rest, EPS, 0.9)
        passes.append((Y.detach(), moving_mean is not rest[2]))
        return Y

    checkpoint(block, X.requires_grad_(), use_reentrant=True).sum().backward()

    moved = [has_moved for _, has_moved in passes]
    inference = batch_norm(X.detach(), *rest, EPS, 0.9, training=False)[0]
    training = batch_norm(X.detach(), *rest, EPS, 0.9, training=True)[0]
    assert moved == [False, True]
    assert_close(passes[0][0], inference)
    assert_close(passes[1][0], training)


class AsksTheGradMode(BatchNorm):
    """d2l's own layer, which does not look at ``self.training``."""

    def forward(self, X):
        state = (self.moving_mean, self.moving_var)
        Y, self.moving_mean, self.moving_var = batch_norm(
            X, self.gamma, self.beta, *state, self.eps, self.momentum
        )
        return Y


def test_trap_eval_alone_changes_nothing():
    X = arguments((7, 3))[0].float()
    net = AsksTheGradMode(3, 2)

    in_training, in_eval = net.train()(X), net.eval()(X)

    assert_close(in_eval, in_training, rtol=0, atol=0)
    assert not torch.equal(net.moving_mean, torch.zeros(1, 3))


def test_layer_asks_its_own_mode_and_not_the_grad_mode():
    X = arguments((7, 3))[0].float()
    layer = BatchNorm(3, 2)
    ones, zeros = torch.ones(1, 3), torch.zeros(1, 3)

    with torch.no_grad():
        in_training = layer(X)
    moved = layer.moving_mean.clone()
    in_eval = layer.eval()(X)

    expected = batch_norm(X, ones, zeros, zeros, ones, EPS, 0.9, training=True)
    assert_close(in_training, expected[0])
    assert_close(layer.moving_mean, expected[1])
    assert_close(layer.moving_mean, moved, rtol=0, atol=0)
    assert_close(in_eval, (X - layer.moving_mean) / (layer.moving_var + EPS).sqrt())


@each_shape
def test_layer_is_the_function_step_by_step(shape):
    layer = BatchNorm(shape[1], len(shape), eps=1e-3, momentum=0.8).double()
    moving = (layer.moving_mean.clone(), layer.moving_var.clone())

    for seed in range(3):
        X = arguments(shape, seed=seed)[0]
        Y, *moving = batch_norm(X, layer.gamma, layer.beta, *moving, 1e-3, 0.8, training=True)
        assert_close(layer(X), Y)

    assert_close([layer.moving_mean, layer.moving_var], moving)


def test_layer_learns_gamma_and_beta_only():
    layer = BatchNorm(3, 4)

    layer(torch.randn(2, 3, 4, 5)).square().sum().backward()

    assert [name for name, _ in layer.named_parameters()] == ["gamma", "beta"]
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert [name for name, _ in layer.named_buffers()] == ["moving_mean", "moving_var"]
    assert not any(buffer.requires_grad for buffer in layer.buffers())


def test_layer_state_is_saved_loaded_and_copied():
    torch.manual_seed(0)
    layer = BatchNorm(3, 2)
    layer(torch.randn(6, 3))
    fresh, copied = BatchNorm(3, 2), copy.deepcopy(layer)

    fresh.load_state_dict(layer.state_dict())
    saved = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(torch.randn(6, 3))

    assert list(saved) == ["gamma", "beta", "moving_mean", "moving_var"]
    assert_close(dict(copied.state_dict()), saved, rtol=0, atol=0)
    assert not torch.equal(layer.moving_mean, saved["moving_mean"])
    x = torch.randn(2, 3)
    assert_close(fresh.eval()(x), copied.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_layer_takes_its_statistics_along_into_another_dtype(dtype):
    layer = BatchNorm(3, 2).to(dtype)

    Y = layer(torch.randn(6, 3, dtype=dtype))

    assert Y.dtype == dtype
    assert {value.dtype for value in layer.state_dict().values()} == {dtype}


@pytest.mark.untyped
@pytest.mark.parametrize("shape", [(3,), (1, 3, 1, 1, 1, 1)], ids=str)
def test_function_refuses_another_rank(shape):
    X = torch.ones(shape)
    ones = torch.ones(1, 3)
    message = rf"^batch_norm expects X with 2 to 5 dimensions, got shape \({shape[0]}, ?"
    with pytest.raises(ValueError, match=message):
        batch_norm(X, ones, ones, ones, ones, EPS, 0.9, training=True)


def test_function_refuses_one_value_a_channel_in_training_only():
    X, *rest = arguments((1, 3, 1, 1))
    message = (
        r"^batch_norm expects more than one value per channel when training, got shape "
        r"\(1, 3, 1, 1\); use a larger batch, or training=False\.$"
    )
    with pytest.raises(ValueError, match=message):
        batch_norm(X, *rest, EPS, 0.9, training=True)

    gamma, beta, moving_mean, moving_var = rest
    Y, _, _ = batch_norm(X, *rest, EPS, 0.9, training=False)
    assert_close(Y, gamma * (X - moving_mean) / (moving_var + EPS).sqrt() + beta)


def test_layer_is_untouched_by_a_refused_batch():
    layer = BatchNorm(3, 2)
    layer(torch.randn(6, 3))
    before = copy.deepcopy(layer.state_dict())

    with pytest.raises(ValueError, match="more than one value per channel"):
        layer(torch.randn(1, 3))

    assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize("num_dims", [0, 1, 6])
def test_layer_refuses_other_num_dims(num_dims):
    message = rf"^BatchNorm expects num_dims 2, 3, 4 or 5, got {num_dims}\.$"
    with pytest.raises(ValueError, match=message):
        BatchNorm(3, num_dims)


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 5, 5), (2, 5, 5, 3)], ids=str)
def test_layer_refuses_another_shape(shape):
    message = (
        r"^BatchNorm expects 4 dimensions and 3 channels \(dimension 1\), "
        rf"got shape \({', '.join(map(str, shape))}\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        BatchNorm(3, 4)(torch.ones(shape))
