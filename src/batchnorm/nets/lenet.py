"""d2l's LeNet, with any batch normalization in it, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import nn

from batchnorm.nn.layers import BatchNorm1d, BatchNorm2d
from batchnorm.scratch import BatchNorm

Norm = Literal["batchnorm", "scratch", "torch", "none"]
NORMS: tuple[Norm, ...] = get_args(Norm)

NormFactory = Callable[[int, int], nn.Module]
"""Makes the layer for ``num_features`` channels of an input with ``num_dims`` dimensions."""

LAYERS = ("conv1", "conv2", "fc1", "fc2")
"""The layers of `lenet` that are followed by a norm and a sigmoid."""


def norm_factory(norm: Norm) -> NormFactory:
    """The layers that go by a name.

    Args:
        norm: ``batchnorm`` (this library), ``scratch`` (`batchnorm.scratch`), ``torch``
            (``torch.nn``), or ``none``.

    Raises:
        ValueError: There is no norm of that name.
    """
    match norm:
        case "batchnorm":
            return lambda features, dims: (BatchNorm1d if dims == 2 else BatchNorm2d)(features)
        case "torch":
            return lambda features, dims: (nn.BatchNorm1d if dims == 2 else nn.BatchNorm2d)(
                features
            )
        case "scratch":
            return BatchNorm
        case "none":
            return lambda features, dims: nn.Identity()
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}.")


def lenet(norm: Norm, classes: int = 10) -> nn.Sequential:
    """LeNet for 28 x 28 grey images, a norm after each convolution and linear layer but the last.

    Sigmoids and average pooling; weights from Xavier's uniform distribution. The layers of every
    norm draw the same random numbers, so one seed gives one network.

    Args:
        norm: Which layers normalize, see `norm_factory`.
        classes: Number of outputs.

    Source:
        LeCun et al. (1998), in the form of "Dive into Deep Learning", sections 7.6 and 8.5.
    """
    make = norm_factory(norm)
    model = nn.Sequential()
    for name, layer, features, dims in (
        ("conv1", nn.Conv2d(1, 6, 5), 6, 4),
        ("conv2", nn.Conv2d(6, 16, 5), 16, 4),
        ("fc1", nn.Linear(16 * 4 * 4, 120), 120, 2),
        ("fc2", nn.Linear(120, 84), 84, 2),
    ):
        model.add_module(name, layer)
        model.add_module(f"{name}_norm", make(features, dims))
        model.add_module(f"{name}_sigmoid", nn.Sigmoid())
        if dims == 4:
            model.add_module(f"{name}_pool", nn.AvgPool2d(2))
        if name == "conv2":
            model.add_module("flatten", nn.Flatten())
    model.add_module("output", nn.Linear(84, classes))
    model.apply(_initialize)
    return model


def _initialize(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
