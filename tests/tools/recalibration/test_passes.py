"""recalibrate: kinds of batches, when to stop, and refusals and failures without a trace."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from batchnorm.moments import Moments
from batchnorm.tools.patching import SavedBuffers
from batchnorm.tools.recalibration import recalibrate
from batchnorm.tools.recalibration.collector import ChunkedMoments
from recalibration_cases import KINDS, bits, net, normal

# Batches.


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x, factor=1.0):
        return self.norm(factor * x)


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(1)),
        lambda x: [x],
        lambda x: Pair(x, None),
        lambda x: {"x": x},
        lambda x: OrderedDict(x=x / 2, factor=2.0),
        lambda x: UserDict(x=x),
        lambda x: ({"factor": 2.0, "x": x / 2}, "label"),
    ],
)
def test_batches_come_in_many_shapes(wrap):
    model, x = Keywords(), normal(7, 2)
    result = recalibrate(model, [wrap(part) for part in x.split(3)])
    assert_close(model.norm.running_mean, x.mean(0))
    assert result.samples == 7


def test_forward_takes_what_it_likes():
    class Sample:
        def __init__(self, x):
            self.x = x

    model, x = Keywords(), normal(7, 2)
    samples = [Sample(part) for part in x.split(3)]
    result = recalibrate(model, samples, forward=lambda m, s: m(s.x, factor=2))
    assert_close(model.norm.running_mean, 2 * x.mean(0))
    assert result.samples == 3  # a batch in which no tensor is found counts as one


@pytest.mark.parametrize(
    ("batch", "got"),
    [(3, "int"), ("text", "str"), ((None, 1), "tuple of NoneType"), ([[1]], "list of list")],
)
def test_batches_of_other_kinds_are_refused(batch, got):
    with pytest.raises(TypeError, match=f"a batch must be a tensor, .* got {got}; give forward="):
        recalibrate(nn.BatchNorm1d(2), [batch])


def test_an_empty_tuple_is_refused():
    with pytest.raises(ValueError, match="a batch is an empty list"):
        recalibrate(nn.BatchNorm1d(2), [()])


@pytest.mark.parametrize(
    ("batches", "got"),
    [(torch.zeros(3, 2), "Tensor"), ({"x": 1}, "dict"), ("images", "str"), (None, "NoneType")],
)
@pytest.mark.untyped
def test_one_batch_is_not_several(batches, got):
    with pytest.raises(TypeError, match=f"must be several batches, got one {got}; give"):
        recalibrate(nn.BatchNorm1d(2), batches)


# Stopping.


def test_max_samples_ends_with_the_batch_that_reaches_it():
    taken, done = [], []

    def batches():
        for part in normal(20, 2).split(4):
            taken.append(part)
            yield part

    layer = nn.BatchNorm1d(2)
    result = recalibrate(layer, batches(), max_samples=8, progress=done.append)
    assert (result.samples, result.batches, result.stopped) == (8, 2, "max_samples")
    assert len(taken) == 2
    assert done == [4, 8]
    assert_close(layer.running_mean, torch.cat(taken).mean(0))
    assert ", stopped early by max_samples." in " ".join(str(result).split())


def test_tolerance_stops_when_the_error_is_small_enough():
    batches = [normal(100, 2, seed=seed) for seed in range(200)]
    result = recalibrate(nn.BatchNorm1d(2), batches, tolerance=0.02)
    assert result.stopped == "tolerance"
    assert 8 < result.batches < 200
    assert result.standard_error < 0.02
    finer = recalibrate(nn.BatchNorm1d(2), batches, tolerance=0.01)
    # half the error takes four times the data, up to the noise of the estimate
    assert 2 < finer.samples / result.samples < 8


def test_tolerance_wants_eight_batches():
    batches = [torch.tensor([[-1.0], [1.0]])] * 20  # no spread at all
    result = recalibrate(nn.BatchNorm1d(1), batches, tolerance=0.9)
    assert (result.batches, result.stopped, result.standard_error) == (8, "tolerance", 0.0)
    assert recalibrate(nn.BatchNorm1d(1), batches[:7]).standard_error is None


def test_tolerance_that_is_not_reached_takes_all():
    batches = [normal(4, 2, seed=seed) for seed in range(12)]
    result = recalibrate(nn.BatchNorm1d(2), batches, tolerance=1e-6)
    assert (result.batches, result.stopped) == (12, None)


def test_tolerance_of_layers_that_no_batch_reaches_takes_all():
    model = nn.ModuleDict({"spare": nn.BatchNorm1d(2)})
    with pytest.warns(RuntimeWarning, match="nothing was recalibrated; layer 'spare': no batch"):
        result = recalibrate(model, [normal(4, 2)] * 9, forward=lambda m, x: None, tolerance=0.5)
    assert (result.batches, result.unreached) == (9, ("spare",))


@pytest.mark.parametrize("sizes", [[50] * 40, [10, 90] * 20])
def test_the_standard_error_is_that_of_repeated_experiments(sizes):
    """Values of one batch hang together: their batch's own shift is most of their variance."""
    errors, means, variances = [], [], []
    for seed in range(200):
        chunks = ChunkedMoments()
        shifts = normal(len(sizes), 1, seed=seed)
        data = [
            shift + normal(size, 1, seed=7919 * seed + place, std=0.5)
            for place, (size, shift) in enumerate(zip(sizes, shifts, strict=True))
        ]
        for x in data:
            chunks.add(Moments(len(x), x.double().mean(0), x.double().var(0, correction=0)))
        errors.append(chunks.standard_error(0.0))
        whole = torch.cat(data)
        means.append(whole.mean().item() / math.sqrt(1.25))
        variances.append(whole.var().item() / 1.25)
    spread = max(torch.tensor(means).std().item(), torch.tensor(variances).std().item())
    assert torch.tensor(errors).median().item() == pytest.approx(spread, rel=0.2)


def test_chunks_grow_instead_of_their_number():
    few, many = ChunkedMoments(), ChunkedMoments()
    for seed in range(256):
        x = normal(20, 3, seed=seed).double()
        many.add(Moments(20, x.mean(0), x.var(0, correction=0)))
        if seed < 4:
            few.add(Moments(20, x.mean(0), x.var(0, correction=0)))
    assert len(many._full) < 64
    assert few.standard_error(0.0) is None
    # of 256 * 20 independent values: sqrt(2 / 5120) of the variance, the largest of three channels
    assert many.standard_error(0.0) == pytest.approx(math.sqrt(2 / 5120), rel=0.35)


# What is refused, without a trace.


def failing(error):
    yield normal(4, 3, 8, 8)
    raise error


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("error", [OSError("disk gone"), KeyboardInterrupt("stop")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_that_fails_changes_nothing(kind, error, sequential):
    class Loader:
        def __iter__(self):
            return failing(error)

    model = net(kind)
    model[1].eval()
    before = bits(model)
    with pytest.raises(type(error), match=str(error)):
        recalibrate(model, Loader(), sequential=sequential)
    assert bits(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_model_that_fails_changes_nothing(error):
    model = net()

    def fail(*call):
        raise error("broken layer")

    handle = model[3].register_forward_hook(fail)
    before = bits(model)
    with pytest.raises(error, match="broken layer"):
        recalibrate(model, [normal(4, 3, 8, 8)])
    assert bits(model) == before
    handle.remove()
    assert recalibrate(model, [normal(4, 3, 8, 8)]).unreached == ()


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("place", ["loader", "model", "first layer", "last layer"])
def test_an_interruption_of_any_pass_leaves_no_trace(place, sequential):
    model = net()
    batches = [normal(4, 3, 8, 8, seed=seed) for seed in range(3)]
    due = 5 if sequential else 2  # in the pass of the first layer, or in the only one
    if place == "last layer" and sequential:
        due = 4  # the pass of the first layer ends before it; this is that of the last

    class Loader:
        taken = 0

        def __iter__(self):
            for batch in batches:
                self.taken += 1
                if place == "loader" and self.taken == due:
                    raise KeyboardInterrupt
                yield batch

    calls = []

    def interrupt(*call):
        calls.append(None)
        if len(calls) == due:
            raise KeyboardInterrupt

    hooked = {"model": model[0], "first layer": model[1], "last layer": model[4]}.get(place)
    if hooked is not None:
        hooked.register_forward_pre_hook(interrupt)
    before = bits(model)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, Loader(), sequential=sequential)
    assert place == "loader" or len(calls) == due
    assert bits(model) == before


@pytest.mark.parametrize("sequential", [False, True])
def test_calls_from_another_thread_are_no_data(sequential):
    model, alone = net().eval(), net().eval()
    batches = [normal(4, 3, 8, 8, seed=seed) for seed in range(6)]
    others = normal(4, 3, 8, 8, mean=100)
    stop, failures = threading.Event(), []

    def evaluate():
        try:
            with torch.no_grad():
                while not stop.is_set():
                    assert model(others).shape == (4, 5, 4, 4)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=evaluate)
    before = bits(model)
    thread.start()
    result = recalibrate(model, batches, sequential=sequential)
    stop.set()
    thread.join()
    assert failures == []
    recalibrate(alone, batches, sequential=sequential)
    assert_close(model.state_dict(), alone.state_dict(), rtol=0, atol=0)
    assert [change.calls for change in result.layers] == [6, 6]
    after = bits(model)
    assert after["modules"] == before["modules"]
    moved = {name for name, value in before["tensors"].items() if after["tensors"][name] != value}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert moved == {f"{layer}.{kind}" for layer in "14" for kind in kinds}


def test_an_interrupted_write_is_undone(monkeypatch):
    model = net()
    before = bits(model)

    class Interrupted(torch.Tensor):
        def fill_(self, value):
            raise KeyboardInterrupt("now")

    counter = model[4].num_batches_tracked
    model[4].num_batches_tracked = counter.as_subclass(Interrupted)
    restored = []
    original = SavedBuffers.restore
    monkeypatch.setattr(
        SavedBuffers, "restore", lambda self: (restored.append(None), original(self))
    )
    with pytest.raises(KeyboardInterrupt, match="now"):
        recalibrate(model, [normal(4, 3, 8, 8)])
    assert len(restored) == 2  # buffers of other modules after the pass, and what was written
    model[4].num_batches_tracked = counter
    assert bits(model) == before


@pytest.mark.parametrize("batches", [[], iter(()), [torch.zeros(0, 3, 8, 8)]])
def test_no_data_is_refused(batches):
    model = net()
    before = bits(model)
    with pytest.raises(ValueError, match="batches gave no samples; the model is as it was"):
        recalibrate(model, batches)
    assert bits(model) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_with_the_first_layer_they_reach(value):
    model = net()
    before = bits(model)
    batches = [normal(4, 3, 8, 8, seed=seed) for seed in range(3)]
    batches[1][2, 0, 4, 4] = value
    with pytest.raises(ValueError, match=r"layer '1' \(BatchNorm2d\) got values that are not fini"):
        recalibrate(model, batches)
    assert bits(model) == before


def test_statistics_too_large_for_the_buffers_are_refused():
    layer = nn.BatchNorm1d(2).half()
    with pytest.raises(ValueError, match=r"statistics that are too large for torch\.float16; the"):
        recalibrate(layer, [normal(9, 2, std=1e3)], forward=lambda layer, x: layer(x.half()))


def test_one_value_in_all_is_refused():
    layer = nn.BatchNorm1d(2)
    before = bits(layer)
    with pytest.raises(ValueError, match="got one value a channel in all, and one value has no"):
        recalibrate(layer, [normal(1, 2)])
    assert bits(layer) == before


def test_channels_in_another_dimension_are_refused():
    class ChannelsLast(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    model = nn.Sequential(ChannelsLast(3))
    with pytest.raises(ValueError, match=r"layer '0' .* its 3 channels in dimension 1, got shape"):
        recalibrate(model, [normal(4, 5, 3)])


def test_layers_may_name_their_input_as_they_like():
    class Named(nn.BatchNorm1d):
        def forward(self, x, scale=1.0):
            return super().forward(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Named(2)

        def forward(self, x):
            return self.norm(scale=2.0, x=x)

    model, x = Net(), normal(7, 2)
    recalibrate(model, x.split(3))
    assert_close(model.norm.running_mean, x.mean(0))


def test_a_layer_without_a_tensor_is_refused():
    class OfArrays(nn.BatchNorm1d):
        def forward(self, values):
            return super().forward(torch.tensor(values))

    model = nn.Sequential(OfArrays(2))
    with pytest.raises(TypeError, match=r"layer '0' \(OfArrays\) is called without a tensor; give"):
        recalibrate(model, [normal(4, 2)], forward=lambda m, x: m(x.tolist()))


@pytest.mark.parametrize("sequential", [False, True])
def test_lazy_modules_are_refused(sequential):
    model = nn.Sequential(nn.LazyLinear(2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"0\.weight is lazy and has no shape yet; call the model"):
        recalibrate(model, [normal(4, 2)], sequential=sequential)
    model(normal(4, 2))
    assert recalibrate(model, [normal(4, 2)], sequential=sequential).unreached == ()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
        ({"tolerance": 0.0}, "tolerance must be between 0 and 1, got 0.0"),
        ({"tolerance": math.nan}, "tolerance must be between 0 and 1, got nan"),
        ({"layers": ["5"]}, "recalibrate: no batch norm layer fits '5'; the model has '1', '4'"),
    ],
)
def test_numbers_and_names_that_make_no_sense_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        recalibrate(net(), [normal(4, 3, 8, 8)], **options)
