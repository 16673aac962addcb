"""What `accumulate` costs: one large batch of 64 in four parts, beside plain accumulation.

The share of the forward pass before each call of batch norm is measured too, so that the formula
in the documentation can be held against the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.bench.clock import Effort, Timed, interleaved, summary
from batchnorm.bench.steps import SETTINGS
from batchnorm.tools.accumulation import accumulate

BATCH, PARTS = 64, 4
Part = tuple[Tensor, Tensor]


def loss(model: nn.Module, part: Part) -> Tensor:
    """Mean loss of one part."""
    return F.cross_entropy(model(part[0]), part[1])


def shares(model: nn.Module, images: Tensor) -> list[float]:
    """The share of the forward pass that is over when each call of batch norm begins."""
    marks: list[float] = []
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [
        m.register_forward_pre_hook(lambda *_: marks.append(time.perf_counter())) for m in layers
    ]
    started = time.perf_counter()
    with torch.no_grad():
        model(images)
    whole = time.perf_counter() - started
    for hook in hooks:
        hook.remove()
    return [(mark - started) / whole for mark in marks]


def main() -> None:
    """Prints a line a network."""
    torch.manual_seed(0)
    for net in ("lenet", "resnet18"):
        setting = SETTINGS[net]
        model = setting.make["batchnorm"]().train()
        images = torch.randn(BATCH, *setting.image)
        parts = list(
            zip(images.chunk(PARTS), torch.randint(10, (BATCH,)).chunk(PARTS), strict=True)
        )
        rivals = {
            "plain": _timed(lambda m=model, p=parts: _plain(m, p)),
            "accumulate": _timed(lambda m=model, p=parts: accumulate(m, p, loss)),
            "forward": _timed(lambda m=model, p=parts: _forward(m, p)),
        }
        samples = interleaved(rivals, Effort(20.0, 5))
        medians = {who: summary(times)["median"] for who, times in samples.items()}
        before = shares(model, parts[0][0])
        formula = 3 + 1 / PARTS + 4 * sum(before)
        print(
            f"{net}: {len(before)} calls, sum of shares {sum(before):.2f}, formula "
            f"{formula:.1f} forwards; measured: plain {medians['plain'] / medians['forward']:.1f}, "
            f"accumulate {medians['accumulate'] / medians['forward']:.1f} forwards, "
            f"{medians['accumulate'] / medians['plain']:.1f} times plain; "
            f"{torch.get_num_threads()} threads"
        )


def _timed(call: Callable[[], object]) -> Timed:
    return Timed(lambda _: call())


def _plain(model: nn.Module, parts: list[Part]) -> None:
    for part in parts:
        (loss(model, part) / len(parts)).backward()


@torch.no_grad()
def _forward(model: nn.Module, parts: list[Part]) -> None:
    for part in parts:
        loss(model, part)


if __name__ == "__main__":
    main()
