"""accelerate on torchvision's and timm's own networks, where both are installed."""

from __future__ import annotations

import copy
import importlib
import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from batchnorm.tools.acceleration import restore
from everywhere import accelerate
from model_cases import is_ours
from real_networks import import_torchvision

pytestmark = pytest.mark.untyped
if find_spec("timm") is None or find_spec("torchvision") is None:
    if os.environ.get("CI") == "true":
        pytest.fail("timm and torchvision are not installed; CI must not skip this.")
    pytest.skip("timm and torchvision are not installed", allow_module_level=True)


def network(name: str) -> nn.Module:
    """A network with random weights and running statistics that are not at their defaults."""
    torch.manual_seed(0)
    library, _, name = name.rpartition(".")
    torchvision = import_torchvision()  # timm imports it, too
    if library == "timm":
        model = importlib.import_module("timm").create_model(name, num_classes=10)
    else:
        options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
        model = getattr(torchvision.models, name)(num_classes=10, **options)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1)
                layer.bias.uniform_(-0.2, 0.4)
                layer.running_mean.uniform_(-0.2, 0.2)
                layer.running_var.uniform_(0.2, 0.6)
    return model


def images(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def outcome(model: nn.Module) -> dict[str, Tensor]:
    """Output, gradients and state after one call."""
    torch.manual_seed(1)
    x = images(torch.float64).requires_grad_()
    output = model(x)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(output.square().sum(), [x, *parameters.values()])
    named = {f"grad {n}": g for n, g in zip(["input", *parameters], grads, strict=True)}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {"output": output.detach(), **named, **state}


each_network = pytest.mark.parametrize(
    ("name", "layers", "relus", "additions"),
    [
        ("torchvision.resnet18", 20, 9, 8),
        ("torchvision.resnet50", 53, 33, 16),
        ("torchvision.mobilenet_v2", 52, 0, 0),
        ("torchvision.densenet121", 121, 120, 0),
        ("torchvision.efficientnet_b0", 49, 0, 0),
        ("torchvision.googlenet", 57, 57, 0),
        ("torchvision.shufflenet_v2_x0_5", 56, 37, 0),
        ("torchvision.regnet_x_400mf", 71, 45, 0),
        ("timm.resnet50", 53, 33, 16),
        ("timm.densenet121", 121, 121, 0),
        ("timm.efficientnet_b0", 49, 0, 0),
        ("timm.regnety_002", 44, 27, 0),
    ],
)


@each_network
def test_real_networks(name, layers, relus, additions):
    """All digits agree in float64, and ``restore`` takes everything back."""
    original = network(name).double()
    model = copy.deepcopy(original)

    result = accelerate(model, images(torch.float64))

    assert result.verified
    assert result.left == {}
    assert len(result.replaced) == layers
    assert (len(result.relus), len(result.additions)) == (relus, additions)
    assert sum(map(is_ours, model.modules())) == layers
    assert list(map(type, model.modules())) == list(map(type, original.modules()))
    for training in (False, True):
        expected, actual = outcome(original.train(training)), outcome(model.train(training))
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            atol = 1e-9 * max(value.abs().max().item(), 1e-3)
            assert_close(
                actual[key], value, rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}"
            )

    assert restore(model).layers == layers
    assert list(map(type, model.modules())) == list(map(type, original.modules()))


@pytest.mark.parametrize(
    "name", ["torchvision.resnet18", "torchvision.mobilenet_v2", "timm.regnety_002"]
)
def test_rounding_to_float32_is_no_disagreement(name):
    assert accelerate(network(name), images(torch.float32)).verified
