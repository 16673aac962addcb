"""d2l's LeNet, with any batch normalization in it, or none."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from batchnorm.nets import MOMENTUM, NORMS, Norm
from batchnorm.nn.layers import BatchNorm1d, BatchNorm2d
from batchnorm.scratch import BatchNorm

NormFactory = Callable[[int, int], nn.Module]
"""Makes the layer for ``num_features`` channels of an input with ``num_dims`` dimensions."""

LAYERS = ("conv1", "conv2", "fc1", "fc2")
"""The layers of `lenet` that are followed by a norm and a sigmoid."""


def norm_factory(norm: Norm) -> NormFactory:
    """Returns the factory of the layers that go by a name.

    Args:
        norm: ``batchnorm`` (this library), ``scratch`` (`batchnorm.scratch`), ``torch``
            (``torch.nn``), or ``none``.

    Raises:
        ValueError: There is no norm of that name.
    """
    match norm:
        case "batchnorm":
            kinds = {2: BatchNorm1d, 4: BatchNorm2d}
            return lambda features, dims: kinds[dims](features, momentum=MOMENTUM)
        case "torch":
            kinds = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}
            return lambda features, dims: kinds[dims](features, momentum=MOMENTUM)
        case "scratch":  # Its momentum is the weight of the old statistics.
            return lambda features, dims: BatchNorm(features, dims, momentum=1 - MOMENTUM)
        case "none":
            return lambda features, dims: nn.Identity()
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}.")


def lenet(norm: Norm, classes: int = 10) -> nn.Sequential:
    """Builds LeNet for 28 x 28 gray images, with a norm after each layer of weights but the last.

    It has sigmoids and average pooling; its weights come from Xavier's uniform distribution. All
    norms draw the same random numbers, so one seed gives one network.

    Args:
        norm: The layers that normalize, see `norm_factory`.
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
