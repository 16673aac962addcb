"""recalibrate(sequential=True): what the whole data at once would give, for any split."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import model_nets as nets
from batchnorm.tools.recalibration import recalibrate
from everywhere import accelerate
from recalibration_cases import KINDS, bits, layer_by_layer, net, normal


@pytest.mark.untyped
@settings(deadline=None, max_examples=8, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
)
def test_every_layer_gets_what_all_data_at_once_would_give(sizes, kind, seed):
    x = normal(sum(sizes), 3, 8, 8, seed=seed)
    model = net(kind).eval()
    expected = layer_by_layer(model, x)
    recalibrate(model, x.split(sizes), sequential=True)
    for name, (mean, var) in expected.items():
        layer = model.get_submodule(name)
        assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
        assert_close(layer.running_var.double(), var, rtol=1e-5, atol=1e-6)


def test_rows_one_by_one_are_enough():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    whole = copy.deepcopy(model)
    x = normal(20, 2, mean=5)
    recalibrate(model, x.split(1), sequential=True)
    recalibrate(whole, [x], sequential=True)
    assert model[0].num_batches_tracked == 20
    for name, value in whole.state_dict().items():
        if "running" in name:
            assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_evaluation_then_gives_normalized_activations_in_a_real_network():
    torch.manual_seed(0)
    model = nets.ResNet()
    accelerate(model)
    x = normal(24, 3, 8, 8)
    recalibrate(model, x.split(5), sequential=True)
    model.eval()
    seen = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.register_forward_pre_hook(
                lambda layer, args, name=name: seen.update({name: (layer, args[0])})
            )
    with torch.no_grad():
        model(x)
    assert len(seen) == 8
    for layer, given_to_it in seen.values():
        assert_close(layer.running_mean, given_to_it.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        assert_close(layer.running_var, given_to_it.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


class Tail(nn.Module):
    """Three layers in a row, one of them also at the end if the first number is positive."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.Identity()
        self.heads, self.again = 0, False
        self.head.register_forward_hook(self.count)

    def count(self, *call):
        self.heads += 1

    def forward(self, x):
        x = self.second(self.first(x))
        if self.again and x.shape[0] == 5:
            x = self.first(3 + x)
        return self.head(x)


def test_passes_end_at_their_layer():
    model, batches = Tail(), [normal(4, 2), normal(5, 2)]
    result = recalibrate(model, batches, sequential=True)
    assert model.heads == 2  # in the first pass, none in those of the layers
    assert (result.samples, result.batches, result.sequential) == (9, 2, True)
    assert ", layer by layer" in str(result)


def test_passes_go_on_where_a_layer_may_come_again():
    model, batches = Tail(), [normal(4, 2), normal(5, 2)]
    model.again = True
    result = recalibrate(model, batches, sequential=True)
    assert model.heads == 4  # in the first pass, and in that of the first layer
    calls = {change.name: change.calls for change in result.layers}
    assert calls == {"first": 3, "second": 2}


def test_a_model_that_raises_in_a_later_pass_stays_as_it_was():
    model = net()
    before = bits(model)
    calls = []

    def forward(model, batch):
        calls.append(None)
        if len(calls) == 5:
            raise RuntimeError("out of luck")
        model(batch)

    with pytest.raises(RuntimeError, match="out of luck"):
        recalibrate(
            model, [normal(2, 3, 8, 8), normal(3, 3, 8, 8)], forward=forward, sequential=True
        )
    assert len(calls) == 5
    assert bits(model) == before


@pytest.mark.parametrize(
    ("batches", "kind"), [(iter([torch.zeros(2, 1)]), "list_iterator"), ((b for b in ()), "gene")]
)
def test_batches_that_can_be_had_once_are_refused(batches, kind):
    with pytest.raises(ValueError, match=rf"sequential=True goes .* a {kind}\w* gives them only"):
        recalibrate(nn.BatchNorm1d(1), batches, sequential=True)


def test_batches_that_become_fewer_are_refused():
    class Draining:
        def __init__(self):
            self.left = [normal(3, 3, 8, 8) for _ in range(3)]

        def __iter__(self):
            while self.left:
                yield self.left.pop()

    model = net()
    before = bits(model)
    with pytest.raises(ValueError, match="gave 3 batches in the first pass and 0 in another"):
        recalibrate(model, Draining(), sequential=True)
    assert bits(model) == before


def test_a_layer_that_only_the_first_pass_reaches_is_refused():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.calls = nn.BatchNorm1d(2), 0

        def forward(self, x):
            self.calls += 1
            return self.norm(x) if self.calls == 1 else x

    with pytest.raises(ValueError, match="layer 'norm' was reached in the first pass only"):
        recalibrate(Once(), [normal(3, 2)], sequential=True)


def test_all_passes_take_the_batches_of_the_first():
    model = net()
    batches = [normal(4, 3, 8, 8, seed=seed) for seed in range(5)]
    done = []
    result = recalibrate(model, batches, max_samples=9, sequential=True, progress=done.append)
    assert (result.samples, result.batches, result.stopped) == (12, 3, "max_samples")
    assert done == [4 * count for count in range(1, 10)]
    whole = torch.cat(batches[:3])
    assert_close(model[1].running_mean, model[0](whole).mean((0, 2, 3)).detach())
