"""The two examples of the study notes that this project grew from, and simple parameters for them.

The inputs are the notes' random numbers as they were printed, to four decimals. That is why one
result differs in its last digit: the first feature's variance is 0.0225 here, 0.0224 in the notes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.learn.step import Step
from batchnorm.learn.walkthrough import walkthrough

NAMES = ("fully-connected", "convolution")


@dataclass(frozen=True, eq=False)
class Example:
    """The arguments of a walkthrough.

    Attributes:
        X: The mini-batch.
        gamma: Scale, shape (C,).
        beta: Shift, shape (C,).
        prediction: The data to predict.
    """

    X: Tensor
    gamma: Tensor
    beta: Tensor
    prediction: Tensor


def load(name: str) -> Example:
    """Returns an example by its name.

    Args:
        name: ``fully-connected``, ten examples with two features, or ``convolution``, two images
            with three channels of 2 x 3 pixels.

    Raises:
        ValueError: There is no example of that name.
    """
    match name:
        case "fully-connected":
            return _fully_connected()
        case "convolution":
            return _convolution()
    raise ValueError(f"examples: the names are {', '.join(NAMES)}, got {name!r}; pick one of them.")


def walk(name: str) -> list[Step]:
    """Returns the walkthrough of an example, from moving statistics of 0 and 1.

    Raises:
        ValueError: There is no example of that name.
    """
    example = load(name)
    return walkthrough(
        example.X, gamma=example.gamma, beta=example.beta, prediction=example.prediction
    )


def _fully_connected() -> Example:
    return Example(
        X=torch.tensor(
            [
                [0.2182, 0.9085],
                [0.3319, 0.3531],
                [0.3642, 0.6632],
                [0.3902, 0.5621],
                [0.3267, 0.0696],
                [0.1570, 0.3461],
                [0.4564, 1.0000],
                [0.5459, 0.1419],
                [0.0855, 0.2092],
                [0.5688, 0.2629],
            ]
        ),
        gamma=torch.tensor([2.0, 0.5]),
        beta=torch.tensor([1.0, -1.0]),
        prediction=torch.tensor([[0.2, 0.9], [0.4, 0.5], [0.6, 0.1]]),
    )


def _convolution() -> Example:
    """Two images; the data to predict are the same two in half the light."""
    X = torch.tensor(
        [
            [
                [[0.3377, 0.0040, 0.1068], [0.8988, 0.8476, 0.4406]],
                [[0.2373, 0.8555, 0.5407], [0.0875, 0.8951, 0.0701]],
                [[0.9436, 0.8168, 0.6496], [0.9063, 0.3542, 0.3073]],
            ],
            [
                [[0.5269, 0.7035, 0.4117], [0.2906, 0.5506, 0.3359]],
                [[0.9111, 0.6993, 0.8829], [0.9526, 0.2769, 0.9301]],
                [[0.2550, 0.0682, 0.5667], [0.2577, 0.5471, 0.3435]],
            ],
        ]
    )
    return Example(
        X=X,
        gamma=torch.tensor([1.0, 2.0, 0.5]),
        beta=torch.tensor([0.0, 1.0, -1.0]),
        prediction=X / 2,
    )
