"""Averaged weights have never seen data: their running statistics must be recomputed.

Stochastic weight averaging, then `recalibrate`: the statistics of the training data under the
weights that will be used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from batchnorm import recalibrate


def data(size: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 10) * 2 + 5
    return x, (x[:, 0] * x[:, 1] > 25).long()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def main() -> None:
    torch.manual_seed(0)
    images, labels = data(2000)
    test = data(4000)
    model = nn.Sequential(
        nn.Linear(10, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64)
    )
    model.extend([nn.ReLU(), nn.Linear(64, 2)])
    averaged = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for epoch in range(12):
        for x, y in zip(images.split(100), labels.split(100), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x), y).backward()
            optimizer.step()
        if epoch >= 4:
            averaged.update_parameters(model)

    print(f"last weights:                     {accuracy(model, *test):.3f}")
    print(f"averaged, statistics of the last: {accuracy(averaged, *test):.3f}")
    print(recalibrate(averaged, images.split(100)))
    print(f"averaged, recalibrated:           {accuracy(averaged, *test):.3f}")


if __name__ == "__main__":
    main()
