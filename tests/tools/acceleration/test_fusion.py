"""Which ReLUs and additions accelerate fuses, and that hooks see what they saw."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import model_nets as nets
from everywhere import accelerate
from model_cases import (
    accelerated,
    assert_same_function,
    images,
    relus_and_additions,
    tail,
    varied,
)

RELUS = {
    "module": lambda self, out, residual: self.relu(out),
    "F.relu": lambda self, out, residual: F.relu(out),
    "F.relu inplace": lambda self, out, residual: F.relu(out, inplace=True),
    "F.relu_": lambda self, out, residual: F.relu_(out),
    "torch.relu": lambda self, out, residual: torch.relu(out),
    "torch.relu_": lambda self, out, residual: torch.relu_(out),
    "method": lambda self, out, residual: out.relu(),
    "method in place": lambda self, out, residual: out.relu_(),
}


def add_in_place(self, out, residual):
    out += residual
    return self.relu(out)


ADDITIONS = {
    "operator": lambda self, out, residual: F.relu(out + residual),
    "operator, other order": lambda self, out, residual: F.relu(residual + out),
    "in place": add_in_place,
    "torch.add": lambda self, out, residual: torch.add(out, residual).relu(),
    "torch.add with alpha": lambda self, out, residual: torch.add(out, residual, alpha=1).relu(),
    "method": lambda self, out, residual: torch.relu(residual.add(out)),
    "method in place": lambda self, out, residual: out.add_(residual).relu_(),
    "layer on its own output": lambda self, out, residual: F.relu(out + self.bn(out)),
}


@pytest.mark.parametrize("function", RELUS.values(), ids=RELUS)
def test_relus(function):
    model = tail(function)
    original = copy.deepcopy(model)
    result = accelerate(model, images())
    assert (result.relus, result.additions) == (("bn",), ())
    assert relus_and_additions(model)[0] == 0
    assert_same_function(model, original)


@pytest.mark.parametrize("function", ADDITIONS.values(), ids=ADDITIONS)
def test_additions(function):
    model = tail(function)
    original = copy.deepcopy(model)
    separate = relus_and_additions(model)
    result = accelerate(model, images())
    assert (result.relus, result.additions) == ((), ("bn",))
    assert relus_and_additions(model) == (0, separate[1] - 1)
    assert_same_function(model, original)


def use_twice(self, out, residual):
    return F.relu(out) + out.mean()


def relu_in_place_and_return(self, out, residual):
    F.relu_(out)
    return out


def add_into_residual(self, out, residual):
    residual += out
    return self.relu(residual) + residual


UNFUSED = {
    "used twice": use_twice,
    "changed in place and returned": relu_in_place_and_return,
    "added into something else": add_into_residual,
    "alpha": lambda self, out, residual: torch.add(out, residual, alpha=2).relu(),
    "alpha of a method": lambda self, out, residual: out.add(residual, alpha=-1).relu_(),
    "a number": lambda self, out, residual: F.relu(out + 1),
    "itself": lambda self, out, residual: F.relu(out + out),
    "another activation": lambda self, out, residual: F.relu6(out),
    "returned": lambda self, out, residual: out,
}


@pytest.mark.parametrize("function", UNFUSED.values(), ids=UNFUSED)
def test_what_data_flow_forbids_is_not_fused(function):
    model = tail(function)
    original = copy.deepcopy(model)
    result = accelerate(model, images())
    assert result.replaced == ("bn",)
    assert (result.relus, result.additions, result.left) == ((), (), {})
    assert_same_function(model, original)


def into_out(self, out, residual):
    return F.relu(torch.add(residual, out, out=residual)) + residual


def into_out_with_alpha(self, out, residual):
    return torch.add(out, residual, alpha=1, out=residual).relu() + residual


def into_a_new_tensor(self, out, residual):
    target = residual + 1
    F.relu_(torch.add(out, residual, out=target))
    return target


@pytest.mark.parametrize("function", [into_out, into_out_with_alpha, into_a_new_tensor])
def test_an_addition_into_a_given_tensor_is_not_fused(function):
    model = tail(function)
    original = copy.deepcopy(model)
    assert accelerate(model).additions == ()
    with torch.no_grad():
        assert_close(model(images()), original(images()))


class Preactivated(nn.Module):
    """Between the layer and the addition its input changes in place."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(x)
        with_side_effect = x.mul_(2)
        return F.relu(out + with_side_effect)


class TwoBranches(nn.Module):
    """Both operands are normalized: only the later one can be fused."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nets.conv(3, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nets.conv(3, 4), nn.BatchNorm2d(4)
        self.aa = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.aa(self.bn1(self.conv1(x)) + self.aa(self.bn2(self.conv2(x)))))


class SharedInShortcut(nn.Module):
    """The shortcut moves the statistics of the same layer in between."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nets.conv(3, 3), nn.BatchNorm2d(3)
        self.shortcut = nn.Sequential(self.bn)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        return F.relu(out + self.shortcut(x))


@pytest.mark.parametrize(
    ("network", "additions"),
    [(TwoBranches, ("bn2",)), (SharedInShortcut, ())],
)
def test_what_lies_between_a_layer_and_its_addition(network, additions):
    model = varied(network())
    original = copy.deepcopy(model)
    assert accelerate(model, images()).additions == additions
    assert_same_function(model, original)


@pytest.mark.parametrize("training", [True, False])
def test_an_input_that_changes_in_place_is_not_read_later(training):
    model = varied(Preactivated()).train(training)
    original = copy.deepcopy(model)
    assert accelerate(model).additions == ()
    with torch.no_grad():
        assert_close(model(images()), original(images()))


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 1, 8), (2, 1, 4, 8, 8)])
def test_broadcast_additions_fall_back(shape):
    model = tail(lambda self, out, residual: F.relu(out + self.other))
    model.register_buffer("other", torch.randn(shape).double())
    original = copy.deepcopy(model)
    assert accelerate(model, images()).additions == ("bn",)
    assert_same_function(model, original)


def test_additions_of_another_dtype_or_layout_fall_back():
    model = tail(lambda self, out, residual: F.relu(out + residual.float()))
    original = copy.deepcopy(model)
    accelerate(model, images())
    assert_same_function(model, original)

    model = tail(
        lambda self, out, residual: F.relu(
            residual.contiguous(memory_format=torch.channels_last) + out
        )
    )
    strides = model(images()).stride()
    accelerate(model)
    assert model(images()).stride() == strides


def test_in_place_additions_that_do_not_fit_still_raise():
    model = tail(add_in_place)
    accelerate(model)
    model.tail = lambda out, residual: add_in_place(model, out, residual[:1, :1])
    model.tail(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    bigger = tail(lambda self, out, residual: F.relu(out.add_(residual.unsqueeze(0))))
    accelerate(bigger)
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        bigger(images())


# Hooks.


def listen(module: nn.Module, kind: str, seen: list):
    if kind == "forward":
        return module.register_forward_hook(lambda m, args, out: seen.append(out.detach().clone()))
    if kind == "before":
        return module.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    return module.register_full_backward_hook(lambda m, grad, out: seen.append(out[0].clone()))


class OutOfPlace(nets.BasicBlock):
    """Torch allows no backward hooks where something changes in place."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + x)

    def __init__(self, *channels: int):
        super().__init__(*channels)
        self.relu = nn.ReLU()


@pytest.mark.parametrize("kind", ["forward", "before", "backward"])
@pytest.mark.parametrize("name", ["bn1", "relu", "bn2"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_see_what_they_saw(kind, name, when):
    model = varied(OutOfPlace(3, 3))
    original = copy.deepcopy(model)
    expected, seen = [], []
    listen(original.get_submodule(name), kind, expected)
    if when == "before":
        handle = listen(model.get_submodule(name), kind, seen)
        left = accelerate(model).left
        assert any("it has hooks" in reason for reason in left.values())
    else:
        assert accelerate(model).left == {}
        handle = listen(model.get_submodule(name), kind, seen)

    assert_same_function(model, original)

    assert len(seen) == len(expected) > 0
    assert_close(seen, expected)
    handle.remove()
    if when == "after":
        assert relus_and_additions(model) == (0, 0)


def test_hooks_elsewhere_do_not_hinder():
    model = varied(nets.ResNet())
    seen = []
    for name in ("layer1", "layer1.0", "layer1.0.conv2", ""):
        listen(model.get_submodule(name), "forward", seen)
    result = accelerate(model)
    assert (len(result.relus), len(result.additions)) == (4, 3)
    model(images())
    assert len(seen) == 4


def test_hooks_on_all_modules_see_every_module():
    model = accelerated(nets.BasicBlock(3, 3))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m))
    try:
        model(images())
    finally:
        handle.remove()
    assert seen.count(model.relu) == 2
    assert {model.bn1, model.bn2} <= set(seen)
