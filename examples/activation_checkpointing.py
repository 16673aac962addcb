"""Activation checkpointing trades time for memory, and should not change the statistics.

torch's checkpoint calls each block again in the backward pass, and batch norm counts that as a
second batch. `checkpoint` is a drop-in that does not; `count_recomputation_once` is for code that
calls torch's checkpoint itself, here a model from elsewhere.
"""

import torch
from torch import nn
from torch.utils import checkpoint as torchs

from batchnorm import checkpoint, count_recomputation_once


def block():
    return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())


class Network(nn.Module):
    """Four blocks, each called by ``run``."""

    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.run = nn.ModuleList(block() for _ in range(4)), run

    def forward(self, x):
        """One block after the other."""
        for each in self.blocks:
            x = self.run(each, x)
        return x


def directly(function, x):
    return function(x)


def with_torchs(function, x):
    return torchs.checkpoint(function, x, use_reentrant=False)


def train(model):
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(32, 16, generator=generator) + 3).square().mean().backward()
        optimizer.step()


def report(name, model, expected):
    layer, right = model.blocks[0][1], expected.blocks[0][1]
    weights = all(map(torch.allclose, model.parameters(), expected.parameters()))
    same = all(torch.equal(a, b) for a, b in zip(model.buffers(), expected.buffers(), strict=True))
    ratio = (layer.running_mean / right.running_mean).mean().item()
    print(
        f"{name}: {layer.num_batches_tracked.item()} updates, running_mean {ratio:.2f}x, "
        f"weights as without checkpointing: {weights}, statistics: {same}"
    )


def main():
    expected = Network(directly)
    train(expected)
    for name, run in (("torch's checkpoint", with_torchs), ("ours", checkpoint)):
        model = Network(run)
        train(model)
        report(name, model, expected)

    model = Network(with_torchs)
    with count_recomputation_once(model):
        train(model)
    report("torch's within count_recomputation_once", model, expected)


if __name__ == "__main__":
    main()
