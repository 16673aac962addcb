"""The model fits into memory with 8 images at a time, but batch norm wants 32.

Plain gradient accumulation normalizes every 8 by themselves; the gradient is not that of 32.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import accumulate


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def main() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(32, 3, 12, 12), torch.randint(5, (32,))
    micro_batches = list(zip(images.split(8), labels.split(8), strict=True))
    model = make_model()
    large, plain = copy.deepcopy(model), copy.deepcopy(model)

    loss(large, (images, labels)).backward()

    for micro_batch in micro_batches:
        (loss(plain, micro_batch) / len(micro_batches)).backward()

    # Then optimizer.step(), as usual.
    print(accumulate(model, micro_batches, loss))

    for name, other in (("plain accumulation", plain), ("accumulate", model)):
        difference = (gradient(other) - gradient(large)).norm() / gradient(large).norm()
        counted = int(other[1].num_batches_tracked)
        print(f"{name}: gradient off by {difference:.1e}, statistics moved {counted} times")


if __name__ == "__main__":
    main()
