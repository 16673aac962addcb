"""Measures the overhead of a call: a layer on a tiny input, in µs, ours beside torch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchnorm import BatchNorm2d
from batchnorm.bench.clock import Effort, Timed, interleaved, summary

SHAPE = (2, 4, 3, 3)


def main() -> None:
    """Prints medians of forward, and of forward and backward, ours beside torch's."""
    torch.manual_seed(0)
    x, grad_output = torch.randn(SHAPE).requires_grad_(), torch.randn(SHAPE)

    def forward(layer: nn.Module) -> Timed:
        return Timed(lambda _: layer(x))

    def both(layer: nn.Module) -> Timed:
        def call(_: object) -> tuple[Tensor, ...]:
            return torch.autograd.grad(layer(x), (x, *layer.parameters()), grad_output)

        return Timed(call)

    print(f"{'':<22}{'ours':>8}{'torch':>8}   µs a call, {torch.get_num_threads()} threads")
    for name, timed in (("forward", forward), ("forward and backward", both)):
        layers = {"ours": BatchNorm2d(SHAPE[1]), "torch": nn.BatchNorm2d(SHAPE[1])}
        samples = interleaved({who: timed(layers[who]) for who in layers}, Effort(1.0, 50))
        medians = (1e6 * summary(samples[who])["median"] for who in layers)
        print(f"{name:<22}" + "".join(f"{median:8.1f}" for median in medians))


if __name__ == "__main__":
    main()
