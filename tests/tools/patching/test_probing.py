"""Layers that people write are tried on a copy, in the shapes that they take."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from batchnorm import freeze, is_frozen, keep_statistics_in_float32, recalibrate, watch
from batchnorm.tools.patching import probe
from look_alikes import D2l, Own

pytestmark = pytest.mark.untyped


class Rows(Own):
    """For inputs of shape (N, C) only, as the formulas of a textbook."""

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(x.var(0), 0.1)
        return (x - mean) / (var + 1e-5).sqrt() * self.weight + self.bias


class RowsInNewTensors(Own):
    """The same, with a new tensor in each step, which takes any shape."""

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            self.running_mean = (0.9 * self.running_mean + 0.1 * mean).detach()
            self.running_var = (0.9 * self.running_var + 0.1 * x.var(0)).detach()
        return (x - mean) / (var + 1e-5).sqrt() * self.weight + self.bias


class Last(Own):
    """Has its channels in the last dimension."""

    def forward(self, x):
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class LastInPlace(Own):
    def forward(self, x):
        mean, var, axes = self.running_mean, self.running_var, tuple(range(x.dim() - 1))
        if self.training:
            mean, var = x.mean(axes), x.var(axes, unbiased=False)
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(x.var(axes), 0.1)
        return (x - mean) / (var + 1e-5).sqrt() * self.weight + self.bias


class Sequences(Last):
    """Takes inputs of shape (N, L, C) only."""

    def forward(self, x):
        n, length, channels = x.shape
        assert channels == len(self.weight), (n, length)
        return super().forward(x)


class Volumes(Own):
    def forward(self, x):
        if x.dim() != 5:
            raise ValueError(f"expected 5-D input, got {x.dim()}-D")
        return super().forward(x)


class BiasedVolumes(Volumes):
    def forward(self, x):
        y = super().forward(x)
        if self.training:
            self.running_var -= 0.1 * (x.var((0, 2, 3, 4)) - x.var((0, 2, 3, 4), unbiased=False))
        return y


def data_for(kind, channels):
    torch.manual_seed(0)
    shapes = {
        Rows: (8, channels),
        RowsInNewTensors: (8, channels),
        Last: (4, 5, channels, channels),
        LastInPlace: (4, channels, channels, channels),
        Sequences: (4, channels, channels),
        Volumes: (2, channels, 1, 1, 2),
        BiasedVolumes: (2, channels, 1, 2, 1),
    }
    scales = torch.linspace(1, 3, channels)
    is_last = kind in (Rows, RowsInNewTensors, Last, LastInPlace, Sequences)
    x = torch.randn(3, *shapes[kind])
    return x * (scales if is_last else scales.view(-1, 1, 1, 1)) + 2, is_last


SHAPED = [Rows, RowsInNewTensors, Last, LastInPlace, Sequences, Volumes, BiasedVolumes]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("kind", SHAPED)
def test_a_layer_that_takes_one_shape_is_frozen_and_recalibrated(kind, channels):
    batches, is_last = data_for(kind, channels)
    layer = kind(channels)
    result = recalibrate(layer, list(batches))
    values = (batches if is_last else batches.movedim(2, -1)).reshape(-1, channels)
    assert_close(layer.running_mean, values.mean(0))
    assert_close(layer.running_var, values.var(0, unbiased=kind is not BiasedVolumes))
    assert result.layers[0].values == len(values)
    assert freeze(layer).layers == ("",)
    with pytest.warns(RuntimeWarning, match=r"passed over layer '' .*, because it returns torch"):
        keep_statistics_in_float32(layer)


@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("kind", SHAPED)
def test_a_watch_finds_the_channels(kind, channels):
    batches, is_last = data_for(kind, channels)
    layer = kind(channels)
    with watch(layer) as watched:
        layer(batches[0])
        watched.step()
    values = (batches[0] if is_last else batches[0].movedim(1, -1)).reshape(-1, channels)
    record = watched.records[0]
    assert record["batch_mean_high"] == pytest.approx(float(values.mean(0).max()), rel=1e-5)
    assert record["batch_var_low"] == pytest.approx(float(values.var(0).min()), rel=1e-5)


class InPlace(Own):
    """Writes into its input."""

    def forward(self, x):
        with torch.no_grad():
            return x.copy_(super().forward(x))


class WithAxes(nn.Module):
    """Keeps statistics that broadcast with its inputs."""

    def __init__(self, shape, names=("running_mean", "running_var")):
        super().__init__()
        self.names = names
        self.register_buffer(names[0], torch.zeros(shape))
        self.register_buffer(names[1], torch.ones(shape))
        self.axes = [d for d, size in enumerate(shape) if size == 1] if len(shape) > 2 else [0]

    def forward(self, x):
        mean, var = (getattr(self, name) for name in self.names)
        if self.training:
            new = x.mean(self.axes, keepdim=True), x.var(self.axes, keepdim=True)
            with torch.no_grad():
                mean.lerp_(new[0], 0.1)
                var.lerp_(new[1], 0.1)
            mean, var = new[0], x.var(self.axes, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt()


@pytest.mark.parametrize(
    ("shape", "inputs"),
    [
        ((1, 4), (6, 4)),
        ((1, 4, 1), (6, 4, 5)),
        ((1, 1, 4), (6, 5, 4)),
        ((1, 1, 1, 4), (3, 4, 4, 4)),
        ((1, 4, 1, 1, 1), (3, 4, 4, 4, 4)),
    ],
)
@pytest.mark.parametrize("names", [("running_mean", "running_var"), ("moving_mean", "moving_var")])
def test_statistics_of_any_shape_that_broadcasts(shape, inputs, names):
    layer, x = WithAxes(shape, names), torch.randn(inputs) * 3 + 1
    recalibrate(layer, [x])
    assert_close(getattr(layer, names[0]), x.mean(layer.axes, keepdim=True))
    assert_close(getattr(layer, names[1]), x.var(layer.axes, keepdim=True))


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_a_layer_that_writes_into_its_input(channels):
    layer, x = InPlace(channels), torch.randn(8, channels)
    expected = x.mean(0)
    assert freeze(layer).layers == ("",)
    layer = InPlace(channels)
    assert recalibrate(layer, [x]).layers
    assert_close(layer.running_mean, expected)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("kind", [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d])
def test_instance_norm_is_frozen_without_a_word(kind, channels, affine):
    layer = kind(channels, affine=affine, track_running_stats=True)
    x = torch.randn(4, channels, *(5,) * int(kind.__name__[-2]))
    with pytest.warns(RuntimeWarning, match="recalibrate: passed over") as caught:
        recalibrate(layer, [x])
    assert len(caught) == 1
    assert freeze(layer).layers == ("",)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype):
    torch.set_default_dtype(dtype)
    try:
        assert probe(Own(4)) == probe(Own(4).float())
        assert probe(Own(4)).trains is None
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_default_device_does_not_matter():
    layer = Own(4)
    with torch.device("meta"):
        assert probe(layer).trains is None
        assert freeze(layer).layers == ("",)


def test_channels_in_another_dimension_are_refused():
    message = r"layer '' \(Last\) must get its 4 channels in the last dimension, got .*; leave it"
    with pytest.raises(ValueError, match=message):
        recalibrate(Last(4), [torch.ones(2, 4, 3)])


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("momentum", [1e-4, 0.01, 0.5, 1.0])
def test_variances_of_any_momentum_are_told_apart(momentum, biased):
    class Some(Volumes):
        def forward(self, x):
            y, count = super().forward(x), x.numel() // x.shape[1]
            if self.training and biased:
                self.running_var -= self.momentum * x.var((0, 2, 3, 4)) / count
            return y

    assert probe(Some(3, momentum)).stores_unbiased is not biased


# Layers that fail.

IN_TRAINING = {
    "assertion": AssertionError("inference only"),
    "key": KeyError("labels"),
    "no memory": RuntimeError("out of memory"),
    "not done": NotImplementedError(),
}


@pytest.mark.parametrize("name", IN_TRAINING)
def test_a_layer_that_fails_in_training_is_frozen_and_not_recalibrated(name):
    class Failing(Own):
        def forward(self, x):
            if self.training:
                raise IN_TRAINING[name]
            return super().forward(x)

    model = nn.Sequential(nn.BatchNorm1d(3), Failing(3)).eval()
    reason = f"it fails in training ({type(IN_TRAINING[name]).__name__}: {IN_TRAINING[name]})"
    with pytest.warns(RuntimeWarning, match="recalibrate: passed over layer '1' .*, because it f"):
        result = recalibrate(model, [torch.randn(8, 3)])
    assert result.left == {"1": reason}
    assert [change.name for change in result.layers] == ["0"]
    assert freeze(model).layers == ("0", "1")
    assert is_frozen(model)


@pytest.mark.parametrize("tool", [freeze, keep_statistics_in_float32])
@pytest.mark.parametrize("name", IN_TRAINING)
def test_a_layer_that_always_fails_is_passed_over(name, tool):
    class Failing(Own):
        def forward(self, x):
            raise IN_TRAINING[name]

    model = nn.Sequential(nn.BatchNorm1d(3), Failing(3))
    reason = rf"it could not be tried on the CPU \({type(IN_TRAINING[name]).__name__}: "
    message = f"{tool.__name__}: passed over layer '1' .*, because {reason}"
    with pytest.warns(RuntimeWarning, match=message):
        tool(model)


def test_integer_statistics_cannot_be_tried():
    layer = Own(3)
    layer.running_mean, layer.running_var = torch.zeros(3).long(), torch.ones(3).long()
    message = r"because it could not be tried on the CPU \(TypeError: its statistics are integers\)"
    with pytest.warns(RuntimeWarning, match=message):
        assert not freeze(layer).layers


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")
def test_statistics_with_a_graph():
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(4))
            self.register_buffer("running_var", torch.ones(4))

        def forward(self, x):
            mean, var = self.running_mean, self.running_var
            if self.training:
                mean, var = x.mean(0), x.var(0, unbiased=False)
                self.running_mean = 0.9 * self.running_mean + 0.1 * mean
                self.running_var = 0.9 * self.running_var + 0.1 * x.var(0)
            return (x - mean) / (var + 1e-5).sqrt()

    model = nn.Sequential(nn.Linear(4, 4), Careless())
    model(torch.randn(8, 4))
    assert model[1].running_mean.requires_grad
    assert freeze(model).layers == ("1",)


# Evaluation.


class ByBatch(Own):
    """Normalizes by the batch also in evaluation; the statistics are for show."""

    share = 1.0

    def forward(self, x):
        if self.training:
            return super().forward(x)
        shape = (1, -1, *(1,) * (x.dim() - 2))
        mean, var = self.of_batch(x)
        mean = self.share * mean + (1 - self.share) * self.running_mean.view(shape)
        var = self.share * var + (1 - self.share) * self.running_var.view(shape)
        return (x - mean) / (var + 1e-5).sqrt() * self.weight.view(shape) + self.bias.view(shape)

    def of_batch(self, x):
        axes = (0, *range(2, x.dim()))
        return x.mean(axes, keepdim=True), x.var(axes, unbiased=False, keepdim=True)


class Mixed(ByBatch):
    share = 0.3


class ByInstance(ByBatch):
    def of_batch(self, x):
        axes = tuple(range(2, x.dim()))
        return x.mean(axes, keepdim=True), x.var(axes, unbiased=False, keepdim=True)


class MixedByInstance(ByInstance):
    share = 0.5


class ByNothing(ByBatch):
    def of_batch(self, x):
        return 0.0, torch.ones(())


@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize("kind", [ByBatch, Mixed, ByInstance, MixedByInstance, ByNothing])
def test_a_layer_that_does_not_evaluate_by_its_statistics_is_passed_over(kind, weight):
    layer = kind(4)
    nn.init.constant_(layer.weight, weight)
    reason = "its forward does not normalize by the running statistics in evaluation"
    with pytest.warns(RuntimeWarning, match=f"freeze: passed over layer '' .*, because {reason}"):
        assert not freeze(layer).layers
    with pytest.warns(RuntimeWarning, match=f"recalibrate: passed over .*, because {reason}"):
        assert not recalibrate(layer, [torch.randn(4, 4, 3, 3)]).layers


@pytest.mark.parametrize("kind", [Own, Rows, Last])
def test_a_weight_of_zero_hides_nothing(kind):
    layer = kind(4)
    nn.init.zeros_(layer.weight)
    assert freeze(layer).layers == ("",)


def test_a_weight_that_is_a_buffer_may_be_zero():
    layer = Own(4)
    del layer.weight
    layer.register_buffer("weight", torch.zeros(4))
    assert freeze(layer).layers == ("",)


ACTIVATIONS = {
    "relu": torch.relu,
    "negative relu": lambda y: torch.relu(-y),
    "leaky relu": nn.functional.leaky_relu,
    "relu6": nn.functional.relu6,
    "sigmoid": torch.sigmoid,
    "scripted": torch.jit.script(nn.ReLU()),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("kind", "fits"), [(Own, True), (Last, True), (Mixed, False)])
def test_an_activation_inside_does_not_matter(kind, fits, name):
    class Activated(kind):
        def __init__(self, channels):
            super().__init__(channels)
            self.activation = ACTIVATIONS[name]

        def forward(self, x):
            return self.activation(super().forward(x))

    behavior = probe(Activated(4))
    assert (behavior.evaluates is None, behavior.trains) == (fits, None)


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
def test_a_part_in_torchscript_is_copied():
    class Scripted(Own):
        def __init__(self, channels):
            super().__init__(channels)
            self.scale = torch.jit.trace(nn.Linear(channels, channels), torch.ones(2, channels))

    assert freeze(Scripted(4)).layers == ("",)


# Random numbers.


class WithDropout(Own):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class WithNoise(Own):
    def forward(self, x):
        return super().forward(x + 0 * torch.rand_like(x))


class WithSeed(Own):
    def forward(self, x):
        torch.manual_seed(7)
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:.*passed over:RuntimeWarning")
@pytest.mark.parametrize("tool", [freeze, keep_statistics_in_float32, watch])
@pytest.mark.parametrize("kind", [WithDropout, WithNoise, WithSeed])
def test_random_numbers_stay_what_they_would_be(kind, tool):
    x = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), kind(4))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    tool(model)
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(3)
    before = nn.Dropout(0.5)(x)
    torch.manual_seed(3)
    recalibrate(nn.Sequential(Own(4)), [x])
    assert torch.equal(nn.Dropout(0.5)(x), before)


def test_the_class_of_the_book_is_tried_in_its_shapes():
    for dims in (2, 4):
        behavior = probe(D2l(3, dims))
        assert (behavior.evaluates_without_grad, behavior.trains) == (None, None)
        assert (behavior.channel_dim, behavior.stores_unbiased) == (1, False)
