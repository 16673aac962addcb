"""Whole training steps: one network with torch's layers, accelerated, and without batch norm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.bench.cases import Net
from batchnorm.bench.clock import Timed
from batchnorm.bench.expected import Disagreement
from batchnorm.bench.rivals import OURS, TORCH
from batchnorm.nets.lenet import lenet
from batchnorm.nets.resnet import ResNet
from batchnorm.tools.acceleration import accelerate

NONE = "none"

TOLERANCE, MARGIN = 1e-3, 3.0
"""Our gradients may differ from float64's by ``TOLERANCE`` of their norm plus ``MARGIN`` times the
error of torch's."""

LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Setting:
    """Settings in which a net is measured.

    Attributes:
        batch: Images a step.
        image: Their shape, (C, H, W).
        make: Builds the net with torch's layers.
        make_without_norm: Builds the same net without batch norm.
    """

    batch: int
    image: tuple[int, int, int]
    make: Callable[[], nn.Module]
    make_without_norm: Callable[[], nn.Module]


SETTINGS: dict[Net, Setting] = {
    "lenet": Setting(256, (1, 28, 28), partial(lenet, "torch"), partial(lenet, "none")),
    "resnet18": Setting(32, (3, 64, 64), partial(ResNet, 18), partial(ResNet, 18, nn.Identity)),
    "resnet50": Setting(8, (3, 224, 224), partial(ResNet, 50), partial(ResNet, 50, nn.Identity)),
}


class Step:
    """Forward, loss, backward and one step of SGD, always on the same images.

    Args:
        model: The model to train.
        images: Of shape (N, C, H, W).
        labels: Of shape (N,).
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model = model.train()
        self.images = images
        self.labels = labels
        self._optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def gradients(self) -> Tensor:
        """Computes all gradients of a first step, concatenated; no weight changes."""
        self._backward()
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])

    def timed(self) -> Timed:
        """Returns the step for the clock."""
        return Timed(lambda _: self._step())

    def _step(self) -> None:
        self._backward()
        self._optimizer.step()

    def _backward(self) -> None:
        self._optimizer.zero_grad()
        F.cross_entropy(self.model(self.images), self.labels).backward()


def steps_of(net: Net, batch: int | None = None) -> dict[str, Step]:
    """Makes the step of every rival, with the same weights and the same random images.

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
    torchs, without = _seeded(setting.make), _seeded(setting.make_without_norm)
    ours = copy.deepcopy(torchs)
    accelerate(ours)  # without an example: _check compares its gradients with float64's
    true = Step(copy.deepcopy(torchs).double(), images.double(), labels).gradients()
    models = {OURS: ours, TORCH: torchs, NONE: without}
    steps = {name: Step(model, images, labels) for name, model in models.items()}
    _check(net, steps[OURS].gradients(), steps[TORCH].gradients(), true)
    return steps


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return make()


def _check(net: Net, ours: Tensor, torchs: Tensor, true: Tensor) -> None:
    """Compares both with float64, because a deep network magnifies the rounding of both."""
    error, torchs_error = (float((got - true).norm() / true.norm()) for got in (ours, torchs))
    allowed = TOLERANCE + MARGIN * torchs_error
    if not error <= allowed:
        raise Disagreement(
            [
                f"a training step of {net}: batchnorm's gradients are off by {error:.1e} of their "
                f"norm, torch's by {torchs_error:.1e}, {allowed:.1e} is allowed."
            ]
        )
