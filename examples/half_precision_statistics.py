"""A model in bfloat16 whose running statistics stop moving, and one whose statistics do not.

With a small momentum a step of the running mean is less than half a unit in the last place of
bfloat16, so every step is rounded away. `keep_statistics_in_float32` keeps the statistics, the
weight and the bias of batch norm in float32; everything else becomes bfloat16.
"""

import torch
from torch import nn

from batchnorm import keep_statistics_in_float32


def network():
    return nn.Sequential(nn.BatchNorm1d(8, momentum=0.001))


def running_mean_after(model, batches):
    """Runs the model on data whose mean is 1, and returns its running mean."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(batches):
        model(torch.randn(64, 8, generator=generator).bfloat16() + 1)
    return model[0].running_mean.float().mean().item()


def main():
    cast = network().bfloat16()
    kept = network()
    keep_statistics_in_float32(kept)
    kept.bfloat16()
    with torch.no_grad():
        for name, model in (("bfloat16", cast), ("kept in float32", kept)):
            found = running_mean_after(model, 5000)
            print(f"{name + ':':<17}running mean {found:.2f} after 5,000 batches, truly 1.00")


if __name__ == "__main__":
    main()
