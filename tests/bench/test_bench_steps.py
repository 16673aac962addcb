"""Training steps: the networks, that ours and torch's compute the same, what is told of them."""

import pytest
import torch
from torch import nn

from batchnorm import accelerate
from batchnorm.bench import measure, steps
from batchnorm.bench.cases import Plan
from batchnorm.bench.clock import Effort
from batchnorm.bench.expected import Disagreement
from batchnorm.nets.resnet import ResNet


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize(
    ("depth", "convolutions", "parameters"), [(18, 20, 11_689_512), (50, 53, 25_557_032)]
)
def test_a_resnet_is_the_paper_s(depth, convolutions, parameters):
    model = ResNet(depth, classes=1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert count(model, nn.Conv2d) == convolutions
    assert count(model, nn.BatchNorm2d) == convolutions
    assert count(ResNet(depth, nn.Identity), nn.BatchNorm2d) == 0


@pytest.mark.untyped
def test_ours_has_every_relu_and_every_addition_fused():
    done = accelerate(ResNet(18))
    assert len(done.replaced) == 20
    assert (len(done.relus), len(done.additions)) == (1 + 8, 8)
    assert done.left == {}


def test_images_shrink_as_in_the_paper():
    seen = []
    model = ResNet(50)
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape[1:])))
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    assert [seen[n] for n in (2, 6, 12, 15)] == [
        (256, 16, 16),
        (512, 8, 8),
        (1024, 4, 4),
        (2048, 2, 2),
    ]


@pytest.mark.parametrize("net", ["lenet", "resnet18"])
def test_every_rival_starts_from_the_same_weights(net):
    found = steps.steps_of(net, batch=8)
    assert list(found) == ["batchnorm", "torch", "none"]
    ours, theirs, without = (dict(step.model.named_parameters()) for step in found.values())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    norms = [module for module in found["none"].model.modules() if "Norm" in type(module).__name__]
    assert norms == []
    assert without
    assert all(torch.equal(without[key], theirs[key]) for key in without)


def test_resnet50_is_measured_at_the_size_of_imagenet():
    setting = steps.SETTINGS["resnet50"]
    assert (setting.batch, setting.image) == (8, (3, 224, 224))
    assert count(setting.make(), nn.BatchNorm2d) == 53
    assert count(setting.make_without_norm(), nn.BatchNorm2d) == 0


def test_other_gradients_are_refused(monkeypatch):
    monkeypatch.setattr(steps, "TOLERANCE", 0.0)
    monkeypatch.setattr(steps, "MARGIN", 0.0)
    with pytest.raises(
        Disagreement, match=r"a training step of lenet: batchnorm's gradients are off by .* allowed"
    ):
        steps.steps_of("lenet", batch=8)


def test_a_step_changes_the_weights_and_a_question_does_not():
    step = steps.steps_of("lenet", batch=8)["torch"]
    before = [p.clone() for p in step.model.parameters()]
    gradients = step.gradients()
    assert gradients.shape == (sum(p.numel() for p in before),)
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
    step.timed().call(None)
    assert not torch.equal(before[0], next(step.model.parameters()))


def test_a_measured_step_has_its_share_of_cost():
    (lenet,) = measure.measure(Plan((), ("lenet",)), Effort(0.0, 1))["steps"]
    assert (lenet["net"], lenet["batch"], lenet["image"]) == ("lenet", 256, [1, 28, 28])
    assert set(lenet["seconds"]) == {"batchnorm", "torch", "none"}
    assert isinstance(lenet["share_of_cost"], float)
    seconds = lenet["seconds"]
    assert lenet["speedup"] == seconds["torch"]["median"] / seconds["batchnorm"]["median"]
