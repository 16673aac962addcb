"""Watches statistics in training: halfway a layer dies, and at the end the data changes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from batchnorm import watch


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 32, bias=False),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 32, bias=False),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 2),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, every=5) as watched:
        for step in range(200):
            if step == 100:
                print(f"Before the change\n{watched}\n")
                with torch.no_grad():
                    model[4].bias[:16] = -5.0  # as after a learning rate that was too large
            x = torch.randn(64, 8) * (3.0 if step >= 190 else 1.0)
            labels = (x.sum(1) > 0).long()
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
            watched.step()
    print(f"After the change\n{watched}\n")
    # watched.figure().savefig("statistics.svg") draws all of it; it needs matplotlib.
    dead = [r["step"] for r in watched.records if r["layer"] == "4" and r["dead_relu"] >= 0.5]
    print(f"Half of layer 4 is dead from step {min(dead)}.")
    loud = [r["step"] for r in watched.records if (r["var_ratio_high"] or 0) > 4 and r["step"] > 50]
    print(f"Batches unlike the running statistics from step {min(loud)}.")


if __name__ == "__main__":
    main()
