"""Mixed precision: GradScaler skips a step that overflows, but not its statistics.

One batch in a hundred has features that are too large for float16. With torch alone, running_var is
NaN from then on, and the model is useless as soon as it is evaluated. With `guard` it is not.
"""

import torch
from torch import nn

from batchnorm import guard, reset_poisoned_statistics


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))


def batches(count):
    generator = torch.Generator().manual_seed(1)
    for step in range(count):
        x = torch.randn(64, 8, generator=generator)
        y = x[:, :1] * x[:, 1:2]
        if step == 50:
            x[3] = 1e6
        yield x, y


def train(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    skipped = 0
    for x, y in batches(100):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = (model(x).float() - y).square().mean()
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
    return skipped


def evaluation_loss(model):
    x, y = next(batches(1))
    with torch.no_grad():
        return (model.eval()(x) - y).square().mean().item()


def main():
    alone = network()
    print(
        f"torch alone: {train(alone)} step skipped, loss in evaluation {evaluation_loss(alone):.3f}"
    )
    print(reset_poisoned_statistics(alone, dry_run=True))
    print()

    guarded = network()
    with guard(guarded) as guarding:
        print(f"guarded: {train(guarded)} step skipped,", end=" ")
    print(f"loss in evaluation {evaluation_loss(guarded):.3f}")
    print(guarding)
    print(reset_poisoned_statistics(guarded))


if __name__ == "__main__":
    main()
