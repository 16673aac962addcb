"""Listening: what a layer gets, by whatever name, and what it gets instead."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from batchnorm.tools.patching.inputs import listen
from layer_kinds import everything


class Gated(nn.BatchNorm1d):
    def forward(self, gate, x=None, *, scale=1.0):
        return super().forward(x if gate is None else gate) * scale


def test_it_hears_every_call_until_it_is_removed():
    model, heard = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)), []
    before, x = everything(model), torch.randn(3, 2)
    with listen({"1": model[1]}, lambda name, x: heard.append((name, x)), caller="test"):
        model(x)
    model(x)
    assert [(name, torch.equal(got, model[0](x))) for name, got in heard] == [("1", True)]
    assert everything(model)["modules"] == before["modules"]


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x: layer(x),
        lambda layer, x: layer(None, x),
        lambda layer, x: layer(gate=None, x=x, scale=1.0),
    ],
)
def test_it_finds_and_replaces_the_input(call):
    layer, x, other = Gated(2).eval(), torch.randn(3, 2), torch.randn(3, 2)
    expected = layer(other)

    def swap(name, found):
        assert found is x
        return other

    with listen({"": layer}, swap, caller="test"):
        assert torch.equal(call(layer, x), expected)
    assert not torch.equal(call(layer, x), expected)


def test_an_error_ends_the_call_and_a_call_without_a_tensor_is_one():
    layer, before = Gated(2), everything(Gated(2))["modules"]

    def stop(name, x):
        raise KeyError(name)

    with listen({"bn": layer}, stop, caller="test"):
        with pytest.raises(KeyError, match="bn"):
            layer(torch.randn(3, 2))
        message = r"^test: layer 'bn' \(Gated\) is called without a tensor; give it its input\.$"
        with pytest.raises(TypeError, match=message):
            layer(None, x=3)
    assert layer.num_batches_tracked == 0
    assert everything(layer)["modules"].keys() == before.keys()


class Counter:
    def __init__(self):
        self.calls = 0

    def hear(self, name, x):
        self.calls += 1


def test_a_copy_has_a_listener_of_its_own():
    layer, counter = nn.BatchNorm1d(2), Counter()
    handle = listen({"": layer}, counter.hear, caller="test")
    twin = copy.deepcopy(layer)
    twin(torch.randn(3, 2))
    assert counter.calls == 0
    layer(torch.randn(3, 2))
    assert counter.calls == 1
    handle.remove()
    assert len(twin._forward_pre_hooks) == 1
    assert not layer._forward_pre_hooks
