"""Training steps: the networks, that ours and torch's compute the same, what is told of them."""

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm2d
from batchnorm.bench import measure, steps
from batchnorm.bench.cases import Plan
from batchnorm.bench.clock import Effort
from batchnorm.bench.truth import Disagreement
from batchnorm.nets import norms
from batchnorm.nets.resnet import ResNet


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize(
    ("depth", "convolutions", "parameters"), [(18, 20, 11_689_512), (50, 53, 25_557_032)]
)
def test_a_resnet_is_the_paper_s(depth, convolutions, parameters):
    for make in (norms.fused, norms.NormThen):
        model = ResNet(depth, make, classes=1000)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert count(model, nn.Conv2d) == convolutions
        assert count(model, nn.BatchNorm2d) == convolutions


def test_ours_has_every_relu_and_every_addition_fused():
    model = ResNet(18, norms.fused)
    assert count(model, nn.ReLU) == 0
    fused = [m for m in model.modules() if isinstance(m, BatchNorm2d) and m.activation == "relu"]
    assert len(fused) == 1 + 2 * 8


def test_images_shrink_as_in_the_paper():
    seen = []
    model = ResNet(50, norms.NormThen)
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


@pytest.mark.parametrize(
    ("net", "rivals"),
    [
        ("lenet", ["batchnorm", "torch", "none"]),
        ("resnet18", ["batchnorm", "torch"]),
        ("resnet50", ["batchnorm", "torch"]),
    ],
)
def test_every_rival_starts_from_the_same_weights(net, rivals):
    found = steps.steps_of(net, batch=8)
    assert list(found) == rivals
    ours, theirs = (list(found[name].model.parameters()) for name in ("batchnorm", "torch"))
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


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
