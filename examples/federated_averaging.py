"""Four hospitals train one model; their scanners differ, so their statistics do.

A mean of their running variances forgets how far the hospitals are apart, and a sum of their
counters counts what the server had seen before four times in every round.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import merge_state_dicts

CLASSES, FEATURES = 3, 6


def hospital(number: int, size: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(CLASSES, (size,))
    signal = F.one_hot(labels, FEATURES).float() * 3
    return signal + torch.randn(size, FEATURES) + 4.0 * number, labels


def train(model: nn.Module, data: tuple[Tensor, Tensor], rounds: int = 60) -> nn.Module:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    for _ in range(rounds):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    return model


def main() -> None:
    torch.manual_seed(0)
    clients = [hospital(number, size) for number, size in enumerate((60, 100, 150, 300))]
    counts = [len(labels) for _, labels in clients]
    server = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, CLASSES))
    for _ in range(3):
        sent = copy.deepcopy(server.state_dict())
        trained = [train(copy.deepcopy(server), data).state_dict() for data in clients]
        merged = merge_state_dicts(trained, counts, base=sent)
        server.load_state_dict(merged)

    shares = [count / sum(counts) for count in counts]
    variances = [share * s["0.running_var"] for share, s in zip(shares, trained, strict=True)]
    everything = torch.cat([images for images, _ in clients])
    print(f"variance of all data:    {everything.var(0)[0]:.1f}")
    print(f"mean of variances:       {sum(variances)[0]:.1f}")
    print(f"merge_state_dicts:        {merged['0.running_var'][0]:.1f}")
    print(f"sum of the counters:     {sum(int(s['0.num_batches_tracked']) for s in trained)}")
    print(f"3 x 4 x 60 batches:      {merged['0.num_batches_tracked']}")


if __name__ == "__main__":
    main()
