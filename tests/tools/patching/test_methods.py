"""Replaced methods: they see every call, stack, and leave no trace in whatever order they go."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle

import pytest
import torch
from torch import nn

import batchnorm
import model_nets as nets
from batchnorm.tools.patching.methods import (
    ReplacedMethod,
    install,
    is_replaced_by_others,
    replacements,
)
from everywhere import accelerate
from layer_kinds import KINDS, built, everything, layers_of
from model_cases import assert_same_function, varied


class Noting(ReplacedMethod):
    def __init__(self, layer, notes, name):
        super().__init__(layer)
        self.notes, self.name = notes, name

    def call(self, *args, **kwargs):
        self.notes.append(f"{self.name} in")
        try:
            return self.original(*args, **kwargs)
        finally:
            self.notes.append(f"{self.name} out")


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_passes_and_nothing_is_left(kind):
    model, (batch, *_) = built(kind)
    expected = copy.deepcopy(model)(batch)
    before, notes = everything(model), []
    with install(Noting(layer, notes, "a") for layer in layers_of(model)) as handle:
        assert torch.equal(model(batch), expected)
    assert notes == ["a in", "a out"] * len(layers_of(model))
    assert everything(model)["modules"] == before["modules"]
    handle.remove()
    assert everything(model)["modules"] == before["modules"]


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_they_go_in_any_order(order):
    layer, notes = nn.BatchNorm1d(2), []
    before = everything(layer)["modules"]
    handles = {name: install([Noting(layer, notes, name)]) for name in "abc"}
    layer(torch.randn(3, 2))
    assert notes == ["c in", "b in", "a in", "a out", "b out", "c out"]
    left = ["a", "b", "c"]
    for name in order:
        handles[name].remove()
        left.remove(name)
        notes.clear()
        layer(torch.randn(3, 2))
        assert [note[0] for note in notes] == [*reversed(left), *left]
    assert everything(layer)["modules"] == before


def test_an_own_forward_stays_behind():
    layer, notes = nn.BatchNorm1d(2), []
    layer.forward = own = lambda x: x + 1
    with install([Noting(layer, notes, "a")]):
        assert torch.equal(layer(torch.zeros(1)), torch.ones(1))
    assert layer.forward is own


def test_behind_a_stranger_it_does_nothing():
    layer, notes = nn.BatchNorm1d(2), []
    handle = install([Noting(layer, notes, "a")])
    inner = layer.forward
    layer.forward = lambda x: inner(x)
    layer(torch.randn(3, 2))
    assert len(notes) == 2
    handle.remove()
    layer(torch.randn(3, 2))
    assert len(notes) == 2
    del layer.forward
    assert "forward" not in vars(layer)


def test_an_error_passes_through():
    layer, notes = nn.BatchNorm1d(2), []
    with (
        pytest.raises(ValueError, match="expected 2D or 3D input"),
        install([Noting(layer, notes, "a")]),
    ):
        layer(torch.zeros(2))
    assert notes == ["a in", "a out"]
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("network", [nets.ResNet, lambda: nets.ConvNormAct(nets.BatchNormAct2d(4))])
def test_fused_blocks_and_layers_go_past_the_fusion(network):
    model = varied(network())
    accelerate(model)
    original, notes = copy.deepcopy(model), []
    with install(Noting(layer, notes, "a") for layer in layers_of(model)):
        assert_same_function(model, original)
    assert len(notes) == 4 * len(layers_of(model))


def test_a_copy_has_interceptors_of_its_own():
    layer, notes = batchnorm.BatchNorm1d(2), []
    handle = install([Noting(layer, notes, "a")])
    twin = copy.deepcopy(layer)
    assert twin.forward.module is twin
    handle.remove()
    twin(torch.randn(3, 2))
    assert len(twin.forward.notes) == 2
    assert notes == []


def test_a_shallow_copy_shares_the_replacement_and_can_lose_it_alone():
    layer, notes = nn.BatchNorm1d(2), []
    install([Noting(layer, notes, "a")])
    twin = copy.copy(layer)
    twin(torch.randn(3, 2))
    assert len(notes) == 2
    Noting.find(twin).uninstall(twin)
    twin(torch.randn(3, 2))
    assert len(notes) == 2
    assert Noting.find(twin) is None
    layer(torch.randn(3, 2))
    assert len(notes) == 4


class Quiet(Noting):
    pass


def test_finding_one_in_a_chain_but_not_behind_foreign_code():
    layer = nn.BatchNorm1d(2)
    assert Noting.find(layer) is None
    first, second = Quiet(layer, [], "a"), Noting(layer, [], "b")
    install([first, second])
    assert Quiet.find(layer) is first
    assert Noting.find(layer) is second
    layer.forward = lambda x: x
    assert Quiet.find(layer) is None


def test_a_pickle_carries_a_replacement_of_its_own():
    model = nn.Sequential(nn.BatchNorm1d(2))
    handle = install([Noting(model[0], [], "a")])
    twin = pickle.loads(pickle.dumps(model))
    handle.remove()
    twin(torch.randn(3, 2))
    assert twin[0].forward.module is twin[0]
    assert len(twin[0].forward.notes) == 2


class Marked(Noting):
    mark = "_noted"


@pytest.mark.parametrize("earlier", ["", "a", "ab"])
@pytest.mark.parametrize("order", ["earlier first", "behind first"])
def test_one_behind_the_others_is_called_last_and_goes_alone(earlier, order):
    layer, notes = nn.BatchNorm1d(2), []
    before = everything(layer)["modules"]
    handles = [install([Noting(layer, notes, name)]) for name in earlier]
    behind = Marked(layer, notes, "z")
    behind.install_behind()
    layer(torch.randn(3, 2))
    names = [*earlier[::-1], "z"]
    assert notes == [f"{name} in" for name in names] + [f"{name} out" for name in names[::-1]]
    assert vars(layer)["_noted"]
    assert Marked.find(layer) is behind
    steps = [*(handle.remove for handle in handles), behind.uninstall]
    for step in steps if order == "earlier first" else steps[::-1]:
        step()
    assert everything(layer)["modules"] == before
    assert not behind._is_active


def test_one_behind_the_others_calls_the_foreign_method_behind_them():
    layer, notes = nn.BatchNorm1d(2), []
    layer.forward = own = lambda x: x + 1
    with install([Noting(layer, notes, "a")]):
        behind = Noting(layer, notes, "z")
        behind.install_behind()
        assert torch.equal(layer(torch.zeros(1)), torch.ones(1))
        behind.uninstall()
    assert notes == ["a in", "z in", "z out", "a out"]
    assert layer.forward is own


def test_foreign_code_is_found_on_both_sides():
    layer = nn.BatchNorm1d(2)
    assert not is_replaced_by_others(layer)
    install([Noting(layer, [], "a")])
    assert not is_replaced_by_others(layer)
    inner = layer.forward
    layer.forward = lambda x: inner(x)
    assert is_replaced_by_others(layer)
    assert list(replacements(layer)) == []
    install([Noting(layer, [], "b")])
    assert is_replaced_by_others(layer)
    assert [method.name for method in replacements(layer)] == ["b"]
    assert not is_replaced_by_others(layer, "train")


def test_a_replaced_method_has_the_signature_of_the_class():
    layer = nn.BatchNorm1d(2)
    expected = inspect.signature(layer.forward)
    install([Noting(layer, [], "a")])
    assert inspect.signature(layer.forward) == expected
    assert layer.forward.__code__ is nn.BatchNorm1d.forward.__code__
    with pytest.raises(AttributeError, match="'Noting' object has no attribute 'nonsense'"):
        layer.forward.nonsense  # noqa: B018
