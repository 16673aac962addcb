"""A mean teacher, with three policies for the running statistics of the averaged copy."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import ema_update

DECAY = 0.95


def batch(size: int = 64) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 10) * 2 + 5
    return x, (x[:, 0] * x[:, 1] > 25).long()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float((model.eval()(data[0]).argmax(1) == data[1]).float().mean())


@torch.no_grad()
def update_parameters_only(target: nn.Module, model: nn.Module) -> None:
    for old, new in zip(target.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - DECAY)


def main() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Linear(10, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64)
    )
    student.extend([nn.ReLU(), nn.Linear(64, 2)])
    forgetful = copy.deepcopy(student)
    teachers = {policy: copy.deepcopy(student) for policy in ("copy", "average", "merge")}
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    for _ in range(400):
        x, labels = batch()
        optimizer.zero_grad()
        F.cross_entropy(student.train()(x), labels).backward()
        optimizer.step()
        update_parameters_only(forgetful, student)
        for policy, teacher in teachers.items():
            ema_update(teacher, student, DECAY, policy)
    data = batch(4000)
    print(f"student                        {accuracy(student, data):.3f}")
    print(f"teacher, parameters only       {accuracy(forgetful, data):.3f}")
    for policy, teacher in teachers.items():
        counted = int(teacher[1].num_batches_tracked)
        print(
            f"teacher, statistics={policy!r:<10} {accuracy(teacher, data):.3f}, counter {counted}"
        )


if __name__ == "__main__":
    main()
