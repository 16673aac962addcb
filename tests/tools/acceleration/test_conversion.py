"""to_torch gives torch's own layers back, whatever was built, accelerated or changed by tools."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import batchnorm
import model_nets as nets
from batchnorm import to_torch
from everywhere import accelerate
from model_cases import anatomy, images, is_ours, varied

OURS = {
    batchnorm.BatchNorm1d: nn.BatchNorm1d,
    batchnorm.BatchNorm2d: nn.BatchNorm2d,
    batchnorm.BatchNorm3d: nn.BatchNorm3d,
}
SHAPES = {
    batchnorm.BatchNorm1d: (6, 3),
    batchnorm.BatchNorm2d: (6, 3, 2, 2),
    batchnorm.BatchNorm3d: (6, 3, 2, 2, 2),
}
LAZY = {
    batchnorm.LazyBatchNorm1d: nn.LazyBatchNorm1d,
    batchnorm.LazyBatchNorm2d: nn.LazyBatchNorm2d,
    batchnorm.LazyBatchNorm3d: nn.LazyBatchNorm3d,
}
named = {"ids": lambda kind: kind.__name__}


@pytest.mark.parametrize("kind", OURS, **named)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"track_running_stats": False},
        {"eps": 0.1, "momentum": None, "dtype": torch.float64},
    ],
)
def test_a_layer_becomes_torchs_and_stays_the_same_object(kind, options):
    layer = kind(3, **options)
    x = torch.randn(SHAPES[kind], dtype=options.get("dtype"))
    layer(x)
    twin = copy.deepcopy(layer)
    tensors = layer.state_dict(keep_vars=True)

    assert to_torch(layer) is layer

    assert type(layer) is OURS[kind]
    assert vars(layer).keys() == vars(OURS[kind](3, **options)).keys()
    now = layer.state_dict(keep_vars=True)
    assert now.keys() == tensors.keys()
    assert all(now[name] is value for name, value in tensors.items())
    assert (layer.eps, layer.momentum) == (twin.eps, twin.momentum)
    for training in (True, False):
        assert_close(layer.train(training)(x), twin.train(training)(x))
    assert_close(dict(layer.state_dict()), dict(twin.state_dict()))
    assert repr(layer) == repr(twin)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", OURS, **named)
def test_a_fused_activation_becomes_a_module(kind, training):
    layer = kind(3, activation="relu").train(training)
    x = torch.randn(SHAPES[kind])
    twin = copy.deepcopy(layer)
    both = to_torch(layer)
    assert [type(part) for part in both] == [OURS[kind], nn.ReLU]
    assert both[0] is layer
    assert {part.training for part in both.modules()} == {training}
    assert_close(both(x), twin(x))
    assert list(both.state_dict()) == [f"0.{name}" for name in twin.state_dict()]


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("kind", LAZY, **named)
def test_lazy_layers(kind, activation):
    model = nn.Sequential(kind(activation=activation))
    x = torch.randn(SHAPES[kind.cls_to_become])
    assert to_torch(model) is model
    layer = model[0] if activation is None else model[0][0]
    assert type(layer) is LAZY[kind]
    twin = nn.Sequential(LAZY[kind](), nn.ReLU() if activation else nn.Identity())
    assert_close(model(x), twin(x))
    assert type(layer) is OURS[kind.cls_to_become]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.bn1 = batchnorm.BatchNorm2d(3, activation="relu")
        self.bn2 = nn.ModuleList([batchnorm.BatchNorm2d(3)])
        self.bn3, self.alias = nn.BatchNorm2d(3), self.bn1

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        return self.alias(self.bn3(self.bn2[0](self.conv2(x))))


def test_a_whole_model_with_shared_layers():
    model = varied(Block())
    original = copy.deepcopy(model)
    accelerate(model, images())
    parameters = list(model.parameters())

    assert to_torch(model) is model

    assert not any(map(is_ours, model.modules()))
    assert model.alias is model.bn1
    assert type(model.bn1) is nn.Sequential
    assert type(model.bn2[0]) is nn.BatchNorm2d
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    keys = {
        key.replace("bn1.", "bn1.0.").replace("alias.", "alias.0.") for key in original.state_dict()
    }
    assert set(model.state_dict()) == keys
    for training in (True, False):
        assert_close(model.train(training)(images()), original.train(training)(images()))


@pytest.mark.parametrize("network", [nets.ResNet, nets.VGG, nets.DenseNet])
def test_an_accelerated_model_is_restored(network):
    model = varied(network())
    before = anatomy(model)
    accelerate(model)
    to_torch(model)
    assert anatomy(model) == before
    assert to_torch(model) is model
    assert anatomy(model) == before


@pytest.mark.parametrize("activation", [None, "relu"])
def test_changes_by_tools_are_kept(activation):
    model = nn.Sequential(nn.Linear(3, 3), batchnorm.BatchNorm1d(3, activation=activation))
    layer = model[1]
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(type(module)))
    batchnorm.freeze(model)
    with batchnorm.keep_statistics_in_float32(model):
        to_torch(model)
        assert batchnorm.is_frozen(model)
        model.train().half()
        assert layer.running_mean.dtype is torch.float32
        assert not layer.training
    model.float()(torch.randn(4, 3))
    assert seen == [nn.BatchNorm1d]
    assert int(layer.num_batches_tracked) == 0
    assert len(batchnorm.unfreeze(model).layers) == 1
    assert layer.training
    assert layer.weight.requires_grad


def test_a_guarded_layer_stays_guarded():
    model = nn.Sequential(batchnorm.BatchNorm1d(3, activation="relu"))
    with batchnorm.guard(model) as guarded:
        to_torch(model)
        model(torch.full((4, 3), torch.inf))
        assert guarded.skipped == {"0": 1}
    assert "forward" not in vars(model[0][0])


def test_hooks_that_would_see_something_else_are_named():
    model = nn.Sequential(batchnorm.BatchNorm1d(3, activation="relu"), batchnorm.BatchNorm1d(3))
    for layer in model:
        layer.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="the hooks of 0 see the output before the ReLU from now"):
        to_torch(model)


@pytest.mark.parametrize("hooked", [(0,), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("kind", ["forward_hook", "full_backward_hook"])
def test_a_warning_that_is_an_error_leaves_the_model_whole(hooked, kind):
    kinds = (batchnorm.BatchNorm2d, batchnorm.BatchNorm2d, batchnorm.LazyBatchNorm2d)
    model = nn.Sequential(
        *(k(*() if "Lazy" in k.__name__ else (3,), activation="relu") for k in kinds)
    )
    accelerate(model)
    for index in hooked:
        getattr(model[index], f"register_{kind}")(lambda *_: None)
    before = anatomy(model)
    names = ", ".join(map(str, hooked))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=f"to_torch: the hooks of {names} see the output"):
            to_torch(model)
    assert anatomy(model) == before
    with pytest.warns(UserWarning, match=f"to_torch: the hooks of {names} see") as caught:
        to_torch(model)
    assert len(caught) == 1
    assert [type(part[0]) for part in model] == [nn.BatchNorm2d, nn.BatchNorm2d, nn.LazyBatchNorm2d]


def hold(model, name):
    return {
        "list": [model.bn1],
        "tuple": (1, model.bn1),
        "dict": {"a": model.bn1},
        "key": {model.bn1: "a"},
        "set": {model.bn1},
        "containers": [{"a": (model.conv1, [model.bn1])}],
        "block": [nn.Sequential(model.bn1)],
    }[name]


@pytest.mark.parametrize("name", ["list", "tuple", "dict", "key", "set", "containers", "block"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_layer_that_would_lose_its_relu_elsewhere_is_refused_by_name(name, inside):
    block = varied(Block())
    block.stages = hold(block, name)
    model, prefix, owner = block, "", "the model itself"
    if inside:
        model, prefix, owner = nn.Sequential(nn.Identity(), block), r"1\.", "1"
    accelerate(model)
    before = anatomy(model)
    message = rf"to_torch: {prefix}bn1 has an activation, and the attribute 'stages' of {owner} ho"
    with pytest.raises(RuntimeError, match=message):
        to_torch(model)
    assert anatomy(model) == before
    del block.stages
    assert type(to_torch(model).get_submodule("1" if inside else "").bn1) is nn.Sequential


def test_an_attribute_that_is_the_layer_itself_is_refused():
    model = Block()
    object.__setattr__(model, "first", model.bn1)
    with pytest.raises(
        RuntimeError, match="and the attribute 'first' of the model itself holds it"
    ):
        to_torch(model)


def test_layers_in_lists_without_an_activation_and_blocks_are_converted():
    model = varied(Block())
    model.stages = [model.bn2, model.bn3, model.conv1]
    outer = nn.Sequential(model)
    outer.blocks = [model, {"cycle": model.stages}]
    outer.blocks.append(outer.blocks)
    original = copy.deepcopy(outer)
    to_torch(outer)
    assert model.stages[0][0] is model.bn2[0]
    assert type(model.bn2[0]) is nn.BatchNorm2d
    assert_close(outer(images()), original(images()))


PARAMETRIZE = {
    "softplus": lambda m: parametrize.register_parametrization(m, "weight", nn.Softplus()),
    "weight norm": lambda m: parametrizations.weight_norm(m, "weight", dim=None),
    "both": lambda m: [
        parametrize.register_parametrization(m, name, nn.Tanh()) for name in ("weight", "bias")
    ],
    "buffer": lambda m: parametrize.register_parametrization(m, "running_var", nn.Softplus()),
}


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("how", PARAMETRIZE.values(), ids=PARAMETRIZE)
def test_parametrizations_stay(how, copied, activation):
    model = varied(
        nn.Sequential(nn.Conv2d(3, 4, 1), batchnorm.BatchNorm2d(4, activation=activation))
    )
    how(model[1])
    original = copy.deepcopy(model)  # of the same class
    to_torch(model)
    layer = model[1] if activation is None else model[1][0]
    assert type(layer).__mro__[1] is nn.BatchNorm2d
    assert type(original[1]).__mro__[1] is batchnorm.BatchNorm2d
    twin = copy.deepcopy(model) if copied else model
    for training in (False, True):
        assert_close(twin.train(training)(images()), original.train(training)(images()))
    layer = twin[1] if activation is None else twin[1][0]
    for name in list(layer.parametrizations):
        parametrize.remove_parametrizations(layer, name)
    assert type(layer) is nn.BatchNorm2d
    accelerate(twin)
    assert is_ours(layer)


class Doubled(batchnorm.BatchNorm2d):
    """A user's class, also when it is parametrized."""


def test_a_parametrized_subclass_is_refused_by_name():
    model = nn.Sequential(Doubled(3))
    parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    with pytest.raises(
        TypeError, match="to_torch: 0 is a ParametrizedDoubled, a subclass of a lay"
    ):
        to_torch(model)


class Subclass(batchnorm.BatchNorm2d):
    def forward(self, input, residual=None):
        return 2 * super().forward(input, residual)


def test_a_subclass_is_refused_by_name():
    model = nn.Sequential(batchnorm.BatchNorm2d(3), nn.Sequential(Subclass(3)), nn.BatchNorm2d(3))
    accelerate(model)
    before = anatomy(model)
    with pytest.raises(TypeError, match=r"to_torch: 1\.0 is a Subclass, a subclass of a layer"):
        to_torch(model)
    assert anatomy(model) == before


def test_a_forward_that_others_replaced_is_refused_by_name():
    model = nn.Sequential(batchnorm.BatchNorm2d(3), batchnorm.BatchNorm2d(3))
    inner = model[1].forward
    model[1].forward = lambda x: inner(x)
    before = anatomy(model)
    with pytest.raises(RuntimeError, match=r"to_torch: the forward of 1 \(.*\) was replaced by"):
        to_torch(model)
    assert anatomy(model) == before


@pytest.mark.parametrize("built", [True, False])
def test_libraries_that_go_by_class_take_it(built):
    kind = batchnorm.BatchNorm2d if built else nn.BatchNorm2d
    model = varied(nn.Sequential(nn.Conv2d(3, 4, 1), kind(4), nn.ReLU())).eval()
    accelerate(model)
    original = copy.deepcopy(model)
    to_torch(model)
    fused = torch.ao.quantization.fuse_modules(model, [["0", "1", "2"]])
    assert_close(fused(images()), original(images()))
    scripted = torch.jit.script(model)
    assert_close(scripted(images()), original(images()))
    traced = torch.fx.symbolic_trace(model)
    assert_close(traced(images()), original(images()))
