"""Whole training steps: the same network with torch's layers, with ours and, LeNet, with none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.bench.cases import Net
from batchnorm.bench.clock import Timed
from batchnorm.bench.rivals import OURS, TORCH
from batchnorm.bench.truth import Disagreement
from batchnorm.nets import norms
from batchnorm.nets.lenet import lenet
from batchnorm.nets.resnet import ResNet

NONE = "none"
# How far from float64 gradients may be, as a share of their norm, and how many times torch's error.
TOLERANCE, MARGIN = 1e-3, 3.0

LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Setting:
    """How a net is measured.

    Args:
        batch: Images a step.
        image: Their shape, (C, H, W).
        make: Builds the net for each of the rivals, by name.
    """

    batch: int
    image: tuple[int, int, int]
    make: dict[str, Callable[[], nn.Module]]


SETTINGS: dict[Net, Setting] = {
    "lenet": Setting(
        256,
        (1, 28, 28),
        {
            OURS: lambda: lenet("batchnorm"),
            TORCH: lambda: lenet("torch"),
            NONE: lambda: lenet("none"),
        },
    ),
    "resnet18": Setting(
        32,
        (3, 64, 64),
        {OURS: lambda: ResNet(18, norms.fused), TORCH: lambda: ResNet(18, norms.NormThen)},
    ),
    "resnet50": Setting(
        32,
        (3, 64, 64),
        {OURS: lambda: ResNet(50, norms.fused), TORCH: lambda: ResNet(50, norms.NormThen)},
    ),
}


class Step:
    """Forward, loss, backward and one step of SGD on images that stay the same.

    Args:
        model: What is trained.
        images: Of shape (N, C, H, W).
        labels: Of shape (N,).
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model = model.train()
        self.images = images
        self.labels = labels
        self._optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def gradients(self) -> Tensor:
        """All gradients of a first step, one after the other; no weight is changed."""
        self._backward()
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])

    def timed(self) -> Timed:
        """The step for the clock."""
        return Timed(lambda _: self._step())

    def _step(self) -> None:
        self._backward()
        self._optimizer.step()

    def _backward(self) -> None:
        self._optimizer.zero_grad()
        F.cross_entropy(self.model(self.images), self.labels).backward()


def steps_of(net: Net, batch: int | None = None) -> dict[str, Step]:
    """The step of every rival, from the same weights on the same random images.

    Args:
        net: Which network.
        batch: Images a step; None is the setting's.

    Raises:
        Disagreement: Our gradients are clearly further from float64's than torch's are.
    """
    setting = SETTINGS[net]
    random = torch.Generator().manual_seed(0)
    images = torch.randn(batch or setting.batch, *setting.image, generator=random)
    labels = torch.randint(10, (len(images),), generator=random)
    models: dict[str, nn.Module] = {}
    for name, make in setting.make.items():
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            models[name] = make()
    true = Step(copy.deepcopy(models[TORCH]).double(), images.double(), labels).gradients()
    steps = {name: Step(model, images, labels) for name, model in models.items()}
    _check(net, steps[OURS].gradients(), steps[TORCH].gradients(), true)
    return steps


def _check(net: Net, ours: Tensor, torchs: Tensor, true: Tensor) -> None:
    """A deep network magnifies rounding, ours and torch's alike: float64 is the judge of both."""
    error, torchs_error = (float((got - true).norm() / true.norm()) for got in (ours, torchs))
    allowed = TOLERANCE + MARGIN * torchs_error
    if not error <= allowed:
        raise Disagreement(
            [
                f"a training step of {net}: batchnorm's gradients are off by {error:.1e} of their "
                f"norm, torch's by {torchs_error:.1e}, {allowed:.1e} is allowed."
            ]
        )
