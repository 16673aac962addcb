"""LeNet with every norm."""

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import scratch
from batchnorm.nets.lenet import LAYERS, NORMS, lenet, norm_factory

each_norm = pytest.mark.parametrize("norm", NORMS)
CLASSES = {
    "batchnorm": (batchnorm.BatchNorm2d, batchnorm.BatchNorm1d),
    "scratch": (scratch.BatchNorm, scratch.BatchNorm),
    "torch": (nn.BatchNorm2d, nn.BatchNorm1d),
    "none": (nn.Identity, nn.Identity),
}


def seeded(norm: str, seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return lenet(norm)


def learned_elsewhere(model: nn.Sequential) -> dict[str, torch.Tensor]:
    """The parameters of the convolutions and linear layers."""
    return {name: value for name, value in model.named_parameters() if "_norm." not in name}


def test_norms_are_named():
    assert NORMS == ("batchnorm", "scratch", "torch", "none")


@each_norm
def test_shapes_layer_by_layer(norm):
    x = torch.zeros(2, 1, 28, 28)
    shapes = {}
    for name, layer in seeded(norm).eval().named_children():
        x = layer(x)
        shapes[name] = tuple(x.shape[1:])

    assert list(shapes) == [
        *("conv1", "conv1_norm", "conv1_sigmoid", "conv1_pool"),
        *("conv2", "conv2_norm", "conv2_sigmoid", "conv2_pool", "flatten"),
        *("fc1", "fc1_norm", "fc1_sigmoid", "fc2", "fc2_norm", "fc2_sigmoid", "output"),
    ]
    assert shapes["conv1_norm"] == shapes["conv1"] == (6, 24, 24)
    assert shapes["conv1_pool"] == (6, 12, 12)
    assert shapes["conv2_norm"] == shapes["conv2"] == (16, 8, 8)
    assert shapes["flatten"] == (256,)
    assert shapes["fc1_norm"] == (120,)
    assert shapes["fc2_norm"] == (84,)
    assert shapes["output"] == (10,)


@each_norm
def test_layers_that_are_normalized(norm):
    children = dict(seeded(norm).named_children())
    convolution, linear = CLASSES[norm]

    assert [name for name in children if f"{name}_norm" in children] == list(LAYERS)
    assert [type(children[f"{name}_norm"]) for name in LAYERS] == [
        *(convolution, convolution),
        *(linear, linear),
    ]


@each_norm
def test_one_seed_gives_one_network(norm):
    mine, torchs = learned_elsewhere(seeded(norm)), learned_elsewhere(seeded("torch"))
    other = learned_elsewhere(seeded(norm, seed=4))

    assert list(mine) == list(torchs)
    assert len(mine) == 10
    assert all(torch.equal(mine[name], torchs[name]) for name in mine)
    assert not any(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("norm", ["batchnorm", "scratch"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_norms_give_torchs_logits(norm, training):
    x = torch.rand(8, 1, 28, 28)
    logits = seeded(norm).train(training)(x)

    torch.testing.assert_close(logits, seeded("torch").train(training)(x), rtol=1e-4, atol=1e-5)


@each_norm
def test_every_parameter_gets_a_gradient(norm):
    model = seeded(norm)

    model(torch.rand(4, 1, 28, 28)).square().sum().backward()

    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_weights_are_xaviers():
    weight = dict(seeded("none").named_parameters())["fc1.weight"]
    bound = (6 / (256 + 120)) ** 0.5

    assert 0.99 * bound < weight.abs().max() <= bound


def test_number_of_classes():
    assert lenet("none", classes=3)(torch.zeros(2, 1, 28, 28)).shape == (2, 3)


@pytest.mark.untyped
@pytest.mark.parametrize("make", [norm_factory, lenet])
def test_unknown_norm(make):
    message = r"^norm must be one of batchnorm, scratch, torch, none, got 'layer'\.$"
    with pytest.raises(ValueError, match=message):
        make("layer")
