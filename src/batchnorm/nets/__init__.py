"""Networks that the experiment and the benchmark train: LeNet and ResNets with any norm.

They are not for users: torchvision and timm have better ones.
"""

from __future__ import annotations

from typing import Literal, get_args

Norm = Literal["batchnorm", "scratch", "torch", "none"]
"""The norms of `batchnorm.nets.lenet`; named here so that nobody imports torch to list them."""

NORMS: tuple[Norm, ...] = get_args(Norm)

MOMENTUM = 0.1
"""Weight of the new mini-batch in LeNet's running statistics."""
