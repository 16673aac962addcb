"""Residual networks for small images, around any norm that takes a residual and may end in ReLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

MakeNorm = Callable[..., nn.Module]
"""``make(features, dims, relu=False)``, see `batchnorm.nets.norms`; the layer takes
``(x, residual=None)``."""

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


class Block(nn.Module):
    """Convolutions around a shortcut; the last norm adds the shortcut and applies ReLU.

    Args:
        make: Makes the norms.
        channels: Of the input, within the block, and of the output; as many within as at the output
            makes the basic block of two convolutions, otherwise it is the bottleneck of three.
        stride: Of the convolution that shrinks the image.
    """

    def __init__(self, make: MakeNorm, channels: tuple[int, int, int], stride: int) -> None:
        super().__init__()
        given, inner, output = channels
        last, first = (3, 3) if inner == output else (1, 1)
        self.body = nn.Sequential(_conv(given, inner, first, stride if first == 3 else 1))
        self.body.append(make(inner, 4, relu=True))
        if inner != output:
            self.body.append(_conv(inner, inner, 3, stride))
            self.body.append(make(inner, 4, relu=True))
        self.body.append(_conv(inner, output, last))
        self.norm = make(output, 4, relu=True)
        self.shortcut = nn.Sequential()
        if stride > 1 or given != output:
            self.shortcut.append(_conv(given, output, 1, stride)).append(make(output, 4))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """``relu(norm(body(x)) + shortcut(x))``."""
        return self.norm(self.body(x), self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18 or ResNet-50, as it is for images of 224 x 224 but usable from 32 x 32 on.

    Args:
        depth: 18 (basic blocks) or 50 (bottlenecks).
        make: Makes the norms.
        classes: Number of outputs.

    Source:
        He et al. (2015), "Deep Residual Learning for Image Recognition", table 1; in a bottleneck
        the 3 x 3 convolution has the stride, as in torchvision.
    """

    def __init__(self, depth: Literal[18, 50], make: MakeNorm, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _conv(3, 64, 7, 2), make(64, 4, relu=True), nn.MaxPool2d(3, 2, padding=1)
        )
        self.blocks = nn.Sequential()
        given, growth = 64, 1 if depth == 18 else 4
        for stage, blocks in enumerate(BLOCKS[depth]):
            inner = 64 * 2**stage
            for number in range(blocks):
                stride = 2 if stage > 0 and number == 0 else 1
                self.blocks.append(Block(make, (given, inner, growth * inner), stride))
                given = growth * inner
        self.output = nn.Linear(given, classes)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Scores."""
        features = self.blocks(self.stem(images))
        return self.output(F.adaptive_avg_pool2d(features, 1).flatten(1))


def _conv(given: int, output: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(given, output, size, stride, padding=size // 2, bias=False)
