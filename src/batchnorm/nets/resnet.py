"""Residual networks written with ``torch.nn`` as their users write them, around any norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

MakeNorm = Callable[[int], nn.Module]
"""Makes the norm for a number of channels; ``nn.Identity`` makes none."""

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


class Block(nn.Module):
    """Convolutions around a shortcut; ReLU follows the sum.

    Args:
        make: Makes the norms.
        channels: Of the input, within the block, and of the output. If the last two are equal, this
            is the basic block of two convolutions, otherwise the bottleneck of three.
        stride: Of the convolution that shrinks the image.
    """

    def __init__(self, make: MakeNorm, channels: tuple[int, int, int], stride: int) -> None:
        super().__init__()
        first, inner, output = channels
        if inner == output:
            self.body = nn.Sequential(*_conv_norm_relu(make, first, inner, 3, stride))
        else:
            self.body = nn.Sequential(
                *_conv_norm_relu(make, first, inner, 1),
                *_conv_norm_relu(make, inner, inner, 3, stride),
            )
        self.conv = _conv(inner, output, 3 if inner == output else 1)
        self.norm = make(output)
        self.shortcut = nn.Sequential()
        if stride > 1 or first != output:
            self.shortcut.append(_conv(first, output, 1, stride)).append(make(output))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """Computes ``relu(norm(conv(body(x))) + shortcut(x))``."""
        output = self.norm(self.conv(self.body(x)))
        output += self.shortcut(x)
        return self.relu(output)


class ResNet(nn.Module):
    """ResNet-18 or ResNet-50 for images of 224 x 224; it works from 32 x 32 on.

    Args:
        depth: 18 (basic blocks) or 50 (bottlenecks).
        make: Makes the norms.
        classes: Number of outputs.

    Source:
        He et al. (2015), "Deep Residual Learning for Image Recognition", table 1; in a bottleneck
        the 3 x 3 convolution has the stride, as in torchvision.
    """

    def __init__(
        self, depth: Literal[18, 50], make: MakeNorm = nn.BatchNorm2d, classes: int = 10
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_norm_relu(make, 3, 64, 7, 2), nn.MaxPool2d(3, 2, padding=1)
        )
        self.blocks = nn.Sequential()
        channels, growth = 64, 1 if depth == 18 else 4
        for stage, blocks in enumerate(BLOCKS[depth]):
            inner = 64 * 2**stage
            for number in range(blocks):
                stride = 2 if stage > 0 and number == 0 else 1
                self.blocks.append(Block(make, (channels, inner, growth * inner), stride))
                channels = growth * inner
        self.output = nn.Linear(channels, classes)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Computes scores."""
        features = self.blocks(self.stem(images))
        return self.output(F.adaptive_avg_pool2d(features, 1).flatten(1))


def _conv(given: int, output: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(given, output, size, stride, padding=size // 2, bias=False)


def _conv_norm_relu(
    make: MakeNorm, given: int, output: int, size: int, stride: int = 1
) -> tuple[nn.Module, nn.Module, nn.Module]:
    return _conv(given, output, size, stride), make(output), nn.ReLU(inplace=True)
