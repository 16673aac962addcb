"""SAM runs each batch twice, the second time with other weights: that must not count.

The second pass of sharpness-aware minimization runs uphill of the weights that are kept, so its
statistics belong to a network that nobody will use. `no_stats_update` leaves them out, and changes
nothing else of the pass.
"""

import contextlib

import torch
from torch import nn

from batchnorm import no_stats_update

RADIUS = 1.0


def network():
    torch.manual_seed(0)
    first = [nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU()]
    second = [nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Linear(16, 1))


def batch(generator):
    x = torch.randn(512, 4, generator=generator)
    return x, x.square().sum(1, keepdim=True)


def uphill(parameters, radius):
    """Moves the parameters along their gradients and returns the steps."""
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    steps = [p.grad * (radius / norm) for p in parameters]
    with torch.no_grad():
        for parameter, step in zip(parameters, steps, strict=True):
            parameter += step
    return steps


def sam_step(model, optimizer, x, y, second_pass):
    parameters = list(model.parameters())
    nn.functional.mse_loss(model(x), y).backward()
    steps = uphill(parameters, RADIUS)
    optimizer.zero_grad()
    with second_pass(model):
        nn.functional.mse_loss(model(x), y).backward()
    with torch.no_grad():
        for parameter, step in zip(parameters, steps, strict=True):
            parameter -= step
    optimizer.step()
    optimizer.zero_grad()


def train(second_pass):
    model, generator = network(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(200):
        sam_step(model, optimizer, *batch(generator), second_pass)
    return model


def gap(model):
    """Compares the second running variance with that of many samples under the same weights."""
    x = torch.cat([batch(torch.Generator().manual_seed(seed))[0] for seed in range(2, 50)])
    with torch.no_grad(), no_stats_update(model):
        truth = model[:4](x).var(0)
    return (model[4].running_var / truth - 1).abs().mean().item()


def main():
    counted, left_out = train(contextlib.nullcontext), train(no_stats_update)
    for name, model in (("both passes", counted), ("no_stats_update", left_out)):
        updates = model[4].num_batches_tracked.item()
        print(f"{name}: {updates} updates in 200 steps, running_var off by {gap(model):.0%}")


if __name__ == "__main__":
    main()
