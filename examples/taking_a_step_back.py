"""A step that made the loss worse is undone: the weights, and the statistics with them.

Line searches, trust regions and meta-learning try a step and judge it before they keep it. The
weights are easy to restore. But the running statistics have moved, towards batches that passed
through weights that are gone. `transaction` keeps them or rolls them back.
"""

import contextlib
import copy

import torch
from torch import nn

from batchnorm import transaction

STEPS = 150


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 1)
    )


def loss_of(model, x):
    return nn.functional.mse_loss(model(x), x.square().sum(1, keepdim=True))


def try_step(model, optimizer, x, entered):
    """Makes one step of SGD, and undoes it if it does not help; returns True if it was undone."""
    before = copy.deepcopy({name: p.detach() for name, p in model.named_parameters()})
    with entered(model) as statistics:
        loss = loss_of(model, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss_of(model, x) < loss:
            return False
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])
        if statistics is not None:
            statistics.rollback()
        return True


def main():
    ways = {"weights alone": lambda model: contextlib.nullcontext(), "transaction": transaction}
    for name, entered in ways.items():
        model, generator = network(), torch.Generator().manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters())
        taken_back = 0
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = 0.5 if step % 5 == 0 else 0.05  # Some are bold.
            x = torch.randn(128, 4, generator=generator)
            taken_back += try_step(model, optimizer, x, entered)
        counted = int(model[1].num_batches_tracked) - 2 * (STEPS - taken_back)
        print(
            f"{name + ':':<16}{taken_back} of {STEPS} steps taken back, "
            f"{counted} batches of theirs in the statistics"
        )


if __name__ == "__main__":
    main()
