"""``norm_layer=batchnorm.BatchNorm2d`` in the networks and blocks of torchvision and timm."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm
from everywhere import accelerate
from real_networks import import_torchvision

EPS = {"eps": 1e-3, "momentum": 0.01}


def vision(name):
    return lambda norm_layer: getattr(import_torchvision().models, name)(norm_layer=norm_layer)


def timm():
    import_torchvision()  # timm does so, too.
    return pytest.importorskip("timm", reason="timm is not installed")


def timms(name):
    return lambda norm_layer: timm().create_model(name, num_classes=7, norm_layer=norm_layer)


def both(make, *, options=None, rank=2):
    """The network with torch's layers and with ours, in float64, from one seed."""
    made = []
    for library in (nn, batchnorm):
        norm_layer = getattr(library, f"BatchNorm{rank}d")
        torch.manual_seed(0)
        made.append(make(partial(norm_layer, **options) if options else norm_layer).double())
    return made


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def step(model, x):
    """The output of a training step that leaves its gradients."""
    torch.manual_seed(1)  # For dropout.
    y = model(x)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    (y * weights).sum().backward()
    return y


def assert_equal(ours, theirs, x):
    """Compares values, gradients and buffers; then each loads what the other saved."""
    compare = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-9)
    compare(step(ours, x), step(theirs, x))
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            assert ours.get_parameter(name).grad is None
        else:
            compare(ours.get_parameter(name).grad, parameter.grad, msg=name)
    for name, buffer in theirs.named_buffers():
        compare(ours.get_buffer(name), buffer, msg=name)
    for other, model in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for tensor in (*other.parameters(), *other.buffers()):
                tensor.add_(1)
        model.load_state_dict(other.state_dict())
        compare(model.eval()(x), other.eval()(x))


def images(size=64, channels=3):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, channels, size, size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (vision("resnet18"), None),
        (vision("mobilenet_v2"), None),
        (vision("mobilenet_v3_small"), EPS),
        (vision("efficientnet_b0"), EPS),
        (vision("regnet_y_400mf"), None),
        (timms("resnet10t"), None),
        (timms("resnet18"), EPS),
        (timms("resnest14d"), None),
        (timms("ecaresnet26t"), None),
        (timms("convnext_atto"), None),
    ],
)
def test_networks_with_our_layers(make, options):
    theirs, ours = both(make, options=options)
    kinds = {type(layer) for layer in batch_norms(ours)}
    assert kinds == {batchnorm.BatchNorm2d}
    assert {layer.eps for layer in batch_norms(ours)} == {
        layer.eps for layer in batch_norms(theirs)
    }
    assert_equal(ours, theirs, images())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("efficientnet_lite0", None),
        ("regnetx_002", EPS),
        ("mixnet_s", EPS),
        ("darknet17", None),
        ("resnetv2_18", None),
    ],
)
def test_blocks_of_timm_with_an_activation_are_timms_and_accelerate_serves_them(name, options):
    theirs, ours = both(timms(name), options=options)
    layers = timm().layers
    assert {type(layer) for layer in batch_norms(ours)} == {layers.BatchNormAct2d}
    assert_equal(ours, theirs, images())
    torch.manual_seed(0)
    accelerated = timms(name)(batchnorm.BatchNorm2d).double()
    report = accelerate(accelerated)
    assert len(report.replaced) == len(batch_norms(ours))
    torch.manual_seed(0)
    assert_equal(accelerated, timms(name)(nn.BatchNorm2d).double(), images())


def test_a_network_of_timm_with_both():
    theirs, ours = both(timms("xception41"))
    layers = timm().layers
    assert {type(layer) for layer in batch_norms(ours)} == {
        layers.BatchNormAct2d,
        batchnorm.BatchNorm2d,
    }
    assert_equal(ours, theirs, images())


def test_names_are_timms_own():
    model = timms("resnet10t")("batchnorm2d")
    assert {type(layer) for layer in batch_norms(model)} == {nn.BatchNorm2d}


def test_an_activation_of_ours_is_not_lost_in_blocks_of_timm():
    norm_layer = partial(batchnorm.BatchNorm2d, activation="relu")
    block = timm().layers.ConvNormAct
    with pytest.raises(TypeError, match="unexpected keyword argument 'activation'"):
        block(3, 4, norm_layer=norm_layer)


def test_blocks_of_torchvision():
    misc = import_torchvision().ops.misc
    theirs, ours = both(lambda norm_layer: misc.Conv2dNormActivation(3, 4, norm_layer=norm_layer))
    assert_equal(ours, theirs, images(8))
    theirs, ours = both(
        lambda norm_layer: misc.Conv3dNormActivation(3, 4, norm_layer=norm_layer), rank=3
    )
    assert_equal(ours, theirs, images(8).unflatten(-1, (2, 4)))
    theirs, ours = both(lambda norm_layer: misc.MLP(8, [6, 3], norm_layer=norm_layer), rank=1)
    assert_equal(ours, theirs, images(8).flatten(0, 2))
    theirs, ours = both(
        lambda norm_layer: nn.Sequential(
            misc.Conv2dNormActivation(3, 4, norm_layer=norm_layer, activation_layer=None), nn.ReLU()
        )
    )
    fused = misc.Conv2dNormActivation(
        3, 4, norm_layer=partial(batchnorm.BatchNorm2d, activation="relu"), activation_layer=None
    ).double()
    fused.load_state_dict(ours[0].state_dict())
    assert_equal(ours, theirs, images(8))
    fused.load_state_dict(ours[0].state_dict())
    torch.testing.assert_close(fused.eval()(images(8)), ours.eval()(images(8)))
