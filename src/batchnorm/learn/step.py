"""What one step of the walkthrough holds, and the layer whose steps they are."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One step: what is computed, from what, by which formula, and the result.

    Attributes:
        name: The name of the result in `code`, unique in a walkthrough: `mean`, `X_hat`, ...
        topic: Key of the title and the explanation in `batchnorm.learn.words`.
        part: `training` or `inference`.
        formula: The formula as the book writes it.
        code: The same in PyTorch, ready to run; empty for what is given.
        worked: The first number of `value` worked by hand; empty for what is given.
        inputs: What the step reads, by name; numbers per channel have the shape (1, C, 1, ...).
        value: The result; it keeps every axis of X.
        facts: Numbers that the explanation quotes.
    """

    name: str
    topic: str
    part: Literal["training", "inference"]
    formula: str
    code: str = ""
    worked: str = ""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    value: Tensor
    facts: dict[str, int | float | str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return tuple(self.value.shape)

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what the step reads, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.inputs.items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer:
    """What a batch norm layer holds; the tensors have the shape (1, C, 1, ...).

    Attributes:
        gamma: Scale.
        beta: Shift.
        moving_mean: Moving average of the means.
        moving_var: Moving average of the biased variances.
        eps: What is added to a variance before its root is taken.
        momentum: Weight of the old moving value.
    """

    gamma: Tensor
    beta: Tensor
    moving_mean: Tensor
    moving_var: Tensor
    eps: float
    momentum: float
