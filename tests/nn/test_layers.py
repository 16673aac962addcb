"""The layers against torch's: results, state, repr, errors."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm

LAYERS = {
    batchnorm.BatchNorm1d: nn.BatchNorm1d,
    batchnorm.BatchNorm2d: nn.BatchNorm2d,
    batchnorm.BatchNorm3d: nn.BatchNorm3d,
}
LAZY = {
    batchnorm.LazyBatchNorm1d: batchnorm.BatchNorm1d,
    batchnorm.LazyBatchNorm2d: batchnorm.BatchNorm2d,
    batchnorm.LazyBatchNorm3d: batchnorm.BatchNorm3d,
}
SHAPES = {
    batchnorm.BatchNorm1d: (6, 3, 4),
    batchnorm.BatchNorm2d: (4, 3, 5, 2),
    batchnorm.BatchNorm3d: (2, 3, 4, 2, 3),
}
EXACT = {"rtol": 0, "atol": 0}


def named(layer) -> str:
    return layer.__name__


each_layer = pytest.mark.parametrize("layer_class", LAYERS, ids=named)
each_lazy = pytest.mark.parametrize("lazy_class", LAZY, ids=named)


def batch(shape: tuple[int, ...], seed: int = 0, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1).to(**options)


def pair(layer_class, *args, **kwargs) -> tuple[nn.Module, nn.Module]:
    """Our layer and torch's, in float64, with the same random parameters and buffers."""
    ours = layer_class(*args, **kwargs, dtype=torch.float64)
    torchs = LAYERS[layer_class](*args, **kwargs, dtype=torch.float64)
    randomize(torchs)
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


def randomize(layer: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2, generator=generator)


def state(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def step(layer: nn.Module, x: torch.Tensor) -> dict:
    """Output and gradients for one input."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    output = layer(x)
    (output * batch(tuple(output.shape), seed=99).to(output.dtype)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    return {"output": output.detach(), "input": x.grad, **gradients}


@each_layer
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("tracks", [True, False], ids=["tracks", "tracks_not"])
@pytest.mark.parametrize(("momentum", "eps"), [(0.1, 1e-5), (None, 1e-3), (0.7, 0.5)])
def test_drop_in(layer_class, affine, tracks, momentum, eps):
    options = {"eps": eps, "momentum": momentum, "affine": affine, "track_running_stats": tracks}
    ours, torchs = pair(layer_class, 3, **options)

    for seed in range(4):
        x = batch(SHAPES[layer_class], seed) * (seed + 1)
        for training in (True, False):
            expected = step(torchs.train(training), x)
            assert_close(step(ours.train(training), x), expected, rtol=1e-10, atol=1e-10)
            assert_close(state(ours), state(torchs), rtol=1e-12, atol=1e-12)

    assert repr(ours) == repr(torchs)
    assert ("num_batches_tracked" in state(ours)) == tracks
    assert not tracks or ours.num_batches_tracked == 4


@each_layer
def test_bias_may_be_left_out(layer_class):
    ours, torchs = pair(layer_class, 3, bias=False)
    x = batch(SHAPES[layer_class])

    assert repr(ours) == repr(torchs)
    assert_close(step(ours, x), step(torchs, x), rtol=1e-10, atol=1e-10)


def test_one_dimensional_layer_takes_fully_connected_input():
    ours, torchs = pair(batchnorm.BatchNorm1d, 5)
    x = batch((7, 5))

    assert_close(step(ours, x), step(torchs, x), rtol=1e-10, atol=1e-10)
    assert_close(state(ours), state(torchs), rtol=1e-12, atol=1e-12)


@each_layer
def test_is_a_layer_of_torch(layer_class):
    layer = layer_class(3, activation="relu")

    assert isinstance(layer, LAYERS[layer_class])
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)


@each_layer
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("tracks", [True, False], ids=["tracks", "tracks_not"])
def test_state_dict_goes_both_ways(layer_class, affine, tracks):
    options = {"affine": affine, "track_running_stats": tracks}
    ours, torchs = layer_class(3, **options), LAYERS[layer_class](3, **options)
    randomize(ours)

    torchs.load_state_dict(ours.state_dict(), strict=True)
    again = layer_class(3, **options)
    again.load_state_dict(torchs.state_dict(), strict=True)

    assert list(ours.state_dict()) == list(torchs.state_dict())
    assert_close(state(again), state(ours), **EXACT)
    metadata = [layer.state_dict()._metadata for layer in (ours, torchs)]
    assert metadata[0] == metadata[1]


def test_state_dict_of_version_1_has_no_counter():
    ours = batchnorm.BatchNorm2d(3)
    ours(batch((4, 3, 2, 2), dtype=torch.float32))
    old = nn.BatchNorm2d(3).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1

    ours.load_state_dict(old, strict=True)

    assert ours.num_batches_tracked == 1
    assert_close(ours.running_mean, torch.zeros(3))


def test_activation_is_no_state():
    plain, fused = batchnorm.BatchNorm2d(3), batchnorm.BatchNorm2d(3, activation="relu")

    assert list(plain.state_dict()) == list(fused.state_dict())
    fused.load_state_dict(plain.state_dict(), strict=True)
    assert fused.activation == "relu"


@each_layer
def test_repr_names_the_activation(layer_class):
    plain, fused = layer_class(3, momentum=None), layer_class(3, momentum=None, activation="relu")
    torchs = LAYERS[layer_class](3, momentum=None)

    assert repr(plain) == repr(torchs)
    assert repr(fused) == repr(torchs)[:-1] + ", activation='relu')"


def reloaded(layer: nn.Module) -> nn.Module:
    """Through torch.save of the whole layer."""
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": reloaded,
}


@each_layer
@pytest.mark.parametrize("how", COPIES)
def test_copies(layer_class, how):
    layer = layer_class(3, eps=0.5, momentum=0.3, activation="relu")
    x = batch(SHAPES[layer_class], dtype=torch.float32)
    layer(x)

    copied = COPIES[how](layer)

    assert type(copied) is layer_class
    assert repr(copied) == repr(layer)
    assert_close(state(copied), state(layer), **EXACT)
    assert_close(copied.eval()(x), layer.eval()(x), **EXACT)


def test_deepcopy_shares_nothing():
    layer = batchnorm.BatchNorm2d(3)
    copied = copy.deepcopy(layer)

    layer(batch((4, 3, 2, 2), dtype=torch.float32))

    assert layer.num_batches_tracked == 1
    assert copied.num_batches_tracked == 0
    assert_close(copied.running_mean, torch.zeros(3), **EXACT)


def test_weights_are_loaded_without_unpickling_code(tmp_path):
    layer, other = batchnorm.BatchNorm2d(3), batchnorm.BatchNorm2d(3)
    randomize(layer)
    torch.save(layer.state_dict(), tmp_path / "weights.pt")

    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))

    assert_close(state(other), state(layer), **EXACT)


@each_layer
def test_class_of_a_layer_of_torch_may_be_swapped(layer_class):
    layer, torchs = LAYERS[layer_class](3).double(), LAYERS[layer_class](3).double()
    layer.__class__ = layer_class
    x = batch(SHAPES[layer_class])

    assert layer.activation is None
    assert repr(layer) == repr(torchs)
    assert_close(step(layer, x), step(torchs, x), rtol=1e-10, atol=1e-10)
    assert_close(state(layer), state(torchs), rtol=1e-12, atol=1e-12)


@each_lazy
def test_lazy_layer_becomes_ours(lazy_class):
    layer_class = LAZY[lazy_class]
    x = batch(SHAPES[layer_class], dtype=torch.float32)
    lazy = lazy_class(eps=0.5, momentum=0.3, activation="relu")
    direct = layer_class(3, eps=0.5, momentum=0.3, activation="relu")

    assert isinstance(lazy, getattr(nn, lazy_class.__name__))
    assert lazy.has_uninitialized_params()
    output = lazy(x)

    assert type(lazy) is layer_class
    assert lazy.activation == "relu"
    assert lazy.num_features == 3
    assert repr(lazy) == repr(direct)
    assert_close(output, direct(x), **EXACT)
    assert_close(state(lazy), state(direct), **EXACT)


@each_lazy
def test_lazy_layer_loads_a_state(lazy_class):
    layer_class = LAZY[lazy_class]
    x = batch(SHAPES[layer_class], dtype=torch.float32)
    trained, lazy = layer_class(3), lazy_class()
    randomize(trained)

    lazy.load_state_dict(trained.state_dict(), strict=True)

    assert not lazy.has_uninitialized_params()
    assert_close(lazy.eval()(x), trained.eval()(x), **EXACT)
    assert type(lazy) is layer_class
    assert_close(state(lazy), state(trained), **EXACT)


@each_layer
def test_activation_and_residual(layer_class):
    fused, torchs = pair(layer_class, 3)
    fused.activation = "relu"
    x, residual, cotangent = (batch(SHAPES[layer_class], seed) for seed in range(3))
    leaves = [x.requires_grad_(), residual.requires_grad_()]

    for training in (True, False):
        got = fused.train(training)(x, residual)
        expected = (torchs.train(training)(x) + residual).relu()
        assert_close(got, expected, rtol=1e-10, atol=1e-10)
        assert 0.1 < (got == 0).double().mean() < 0.9
        assert_close(
            torch.autograd.grad(got, [*leaves, *fused.parameters()], cotangent),
            torch.autograd.grad(expected, [*leaves, *torchs.parameters()], cotangent),
            rtol=1e-10,
            atol=1e-10,
        )
    assert_close(state(fused), state(torchs), rtol=1e-12, atol=1e-12)


def test_each_of_activation_and_residual_alone():
    layer, torchs = pair(batchnorm.BatchNorm2d, 3)
    x, residual = batch((4, 3, 2, 2)), batch((4, 3, 2, 2), seed=1)

    assert_close(layer(x, residual=residual), torchs(x) + residual, rtol=1e-10, atol=1e-10)
    layer.activation = "relu"
    assert_close(layer(x), torchs(x).relu(), rtol=1e-10, atol=1e-10)


@pytest.mark.untyped
@pytest.mark.parametrize("layer_class", [*LAYERS, *LAZY], ids=named)
def test_unknown_activation(layer_class):
    arguments = () if layer_class in LAZY else (3,)
    with pytest.raises(ValueError, match=r"^activation must be None or 'relu', got 'gelu'\.$"):
        layer_class(*arguments, activation="gelu")


RANKS = {
    batchnorm.BatchNorm1d: "2-D input (N, C) or 3-D input (N, C, L)",
    batchnorm.BatchNorm2d: "4-D input (N, C, H, W)",
    batchnorm.BatchNorm3d: "5-D input (N, C, D, H, W)",
}


@pytest.mark.parametrize(
    ("layer_class", "shape"),
    [
        (batchnorm.BatchNorm1d, (2, 3, 4, 4)),
        (batchnorm.BatchNorm2d, (8, 3)),
        (batchnorm.BatchNorm2d, (2, 3, 4, 4, 4)),
        (batchnorm.BatchNorm3d, (2, 3, 4, 4)),
        pytest.param(batchnorm.BatchNorm1d, (3,), marks=pytest.mark.untyped),
        pytest.param(batchnorm.BatchNorm2d, (), marks=pytest.mark.untyped),
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_wrong_rank(layer_class, shape, training):
    layer = layer_class(3).train(training)
    before = state(layer)

    with pytest.raises(ValueError, match=r"^BatchNorm[123]d expects a ") as raised:
        layer(torch.ones(shape))
    assert str(raised.value) == (
        f"{layer_class.__name__} expects a {RANKS[layer_class]}, got shape {shape}."
    )
    assert_close(state(layer), before, **EXACT)


def test_wrong_rank_in_a_lazy_layer():
    lazy = batchnorm.LazyBatchNorm2d()
    for shape in ((8, 3), (8,)):
        with pytest.raises(ValueError, match=r"^LazyBatchNorm2d expects a 4-D input") as raised:
            lazy(torch.ones(shape))
        assert str(raised.value).endswith(f"input (N, C, H, W), got shape {shape}.")
        assert lazy.has_uninitialized_params()
        assert type(lazy) is batchnorm.LazyBatchNorm2d


@pytest.mark.untyped
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_channels_last_by_mistake_gets_a_hint(training):
    layer = batchnorm.BatchNorm2d(3).train(training)
    before = state(layer)
    message = (
        r"^running_mean should contain 6 elements, one a channel \(dimension 1 of the input of "
        r"shape \(2, 6, 5, 3\)\), got shape \(3,\); dimension 3 has size 3, but channels are "
        r"dimension 1\.$"
    )
    with pytest.raises(RuntimeError, match=message):
        layer(torch.ones(2, 6, 5, 3))
    assert_close(state(layer), before, **EXACT)


@pytest.mark.untyped
def test_wrong_number_of_channels_without_a_hint():
    layer = batchnorm.BatchNorm1d(3, track_running_stats=False)
    message = (
        r"^weight should contain 4 elements, one a channel \(dimension 1 of the input of shape "
        r"\(5, 4\)\), got shape \(3,\)\.$"
    )
    with pytest.raises(RuntimeError, match=message):
        layer(torch.ones(5, 4))


@each_layer
@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_value_a_channel_leaves_the_layer_as_it_was(layer_class, momentum):
    shape = (1, 3) + (1,) * (len(SHAPES[layer_class]) - 2)
    ours, torchs = layer_class(3, momentum=momentum), LAYERS[layer_class](3, momentum=momentum)
    before = state(ours)
    message = (
        r"^Expected more than 1 value per channel when training, got input size \(1, 3(, 1)+\); "
        r"use a larger batch, freeze the layer, or call eval\(\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        ours(torch.ones(shape))
    assert_close(state(ours), before, **EXACT)

    # torch counts the batch that it refused. Once it does not, say so no more.
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        torchs(torch.ones(shape))
    assert torchs.num_batches_tracked == 1


def test_one_value_a_channel_is_fine_in_evaluation():
    layer, torchs = pair(batchnorm.BatchNorm2d, 3)
    x = batch((1, 3, 1, 1))

    assert_close(layer.eval()(x), torchs.eval()(x), rtol=1e-12, atol=1e-12)


@each_layer
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_batch_leaves_the_layer_as_it_was(layer_class, training):
    layer = layer_class(3).train(training)
    before = state(layer)
    x = torch.ones((0, *SHAPES[layer_class][1:]), requires_grad=True)

    output = layer(x)
    output.sum().backward()

    assert output.shape == x.shape
    assert_close(state(layer), before, **EXACT)
    assert_close(layer.weight.grad, torch.zeros(3), **EXACT)
    assert x.grad.shape == x.shape


@each_layer
@pytest.mark.parametrize("built_with", [True, False], ids=["tracks", "tracks_not"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_tracking_toggled_after_construction(layer_class, built_with, momentum):
    layers = pair(layer_class, 3, track_running_stats=built_with, momentum=momentum)
    for layer in layers:
        layer.track_running_stats = not built_with
    ours, torchs = layers
    x = batch(SHAPES[layer_class])

    for training in (True, False):
        expected = step(torchs.train(training), x)
        assert_close(step(ours.train(training), x), expected, rtol=1e-10, atol=1e-10)
        assert_close(state(ours), state(torchs), **EXACT)


def test_layer_that_stopped_tracking_is_safe_from_a_bad_batch():
    layer = batchnorm.BatchNorm1d(3)
    layer.track_running_stats = False
    before = state(layer)

    output = layer(torch.full((4, 3), torch.nan))

    assert output.isnan().all()
    assert_close(state(layer), before, **EXACT)


def test_cumulative_average_without_a_counter_is_refused():
    layer = batchnorm.BatchNorm1d(3, momentum=None)
    layer.num_batches_tracked = None
    before = state(layer)
    message = (
        r"^momentum=None \(the cumulative average\) needs num_batches_tracked, got None; "
        r"give a momentum between 0 and 1, or keep the counter\.$"
    )
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(4, 3))
    assert_close(state(layer), before, **EXACT)


def test_cumulative_average_is_the_mean_over_the_batches():
    layer = batchnorm.BatchNorm1d(3, momentum=None, dtype=torch.float64)
    batches = torch.stack([batch((6, 3), seed) * (seed + 1) for seed in range(5)])

    for x in batches:
        layer(x)

    assert_close(layer.running_mean, batches.mean(1).mean(0))
    assert_close(layer.running_var, batches.var(1, correction=1).mean(0))


def test_momentum_is_given_without_a_counter():
    layer, torchs = pair(batchnorm.BatchNorm1d, 3)
    layer.num_batches_tracked = torchs.num_batches_tracked = None
    x = batch((6, 3))

    assert_close(step(layer, x), step(torchs, x), rtol=1e-10, atol=1e-10)
    assert_close(state(layer), state(torchs), rtol=1e-12, atol=1e-12)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_whole_layer_in_another_dtype(layer_class, dtype, training):
    layer = layer_class(3).to(dtype).train(training)
    exact = LAYERS[layer_class](3).double().train(training)
    x = batch(SHAPES[layer_class]).to(dtype)

    output, expected = layer(x), exact(x.double())

    step_of_dtype = max(torch.finfo(dtype).eps, 1e-14)
    assert {layer.weight.dtype, layer.running_mean.dtype, layer.running_var.dtype} == {dtype}
    assert layer.num_batches_tracked.dtype == torch.int64
    assert_close(output, expected.to(dtype), rtol=step_of_dtype, atol=step_of_dtype)
    for name in ("running_mean", "running_var"):
        truth = getattr(exact, name).to(dtype)
        assert_close(getattr(layer, name), truth, rtol=step_of_dtype, atol=step_of_dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_short_input_with_float32_parameters(dtype):
    layer, torchs = batchnorm.BatchNorm2d(3), nn.BatchNorm2d(3)
    x = batch((4, 3, 5, 2)).to(dtype)

    got, expected = step(layer, x), step(torchs, x)

    assert {name: value.dtype for name, value in got.items()} == {
        name: value.dtype for name, value in expected.items()
    }
    assert got["output"].dtype == dtype
    assert got["weight"].dtype == torch.float32
    assert_close(got, expected, rtol=0.02, atol=0.02)
    assert_close(state(layer), state(torchs))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_keeps_nothing_of_past_batches(momentum):
    layer = batchnorm.BatchNorm2d(3, momentum=momentum, activation="relu")
    past = []

    for seed in range(50):
        x = batch((2, 3, 4, 4), seed, dtype=torch.float32).requires_grad_()
        y = layer(x)
        past += [weakref.ref(x), weakref.ref(y)]
        assert [b.grad_fn for b in layer.buffers()] == [None] * 3
        assert not any(b.requires_grad for b in layer.buffers())
        del x, y

    assert [reference() for reference in past] == [None] * 100
    assert layer.num_batches_tracked == 50


def test_evaluation_changes_nothing():
    layer = batchnorm.BatchNorm2d(3).eval()
    randomize(layer)
    before = state(layer)

    layer(batch((4, 3, 2, 2), dtype=torch.float32))

    assert_close(state(layer), before, **EXACT)


def test_reset_running_stats():
    layer = batchnorm.BatchNorm2d(3)
    fresh = state(layer)
    layer(batch((4, 3, 2, 2), dtype=torch.float32))
    assert layer.num_batches_tracked == 1

    layer.reset_running_stats()

    assert_close(state(layer), fresh, **EXACT)
