"""One step of the walkthrough, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Part = Literal["training", "inference"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One step: what is computed, from what, by which formula, and the result.

    Attributes:
        name: Name of the result in ``code``, unique in a walkthrough: ``mean``, ``X_hat``, ...
        topic: Key of the title and the explanation in `batchnorm.words`.
        part: ``training`` or ``inference``.
        formula: The formula in the notation of the book.
        code: The same in PyTorch. Running it gave ``value``. Empty for the data that are given.
        worked: The first number of ``value``, worked by hand; empty for the data that are given.
        inputs: Tensors that the code reads, by name; those per channel have the shape
            (1, C, 1, ...).
        intermediates: Tensors that the code computes on the way to ``value``, by name.
        value: The result; it keeps every axis of X.
        facts: Numbers that the explanation quotes.
    """

    name: str
    topic: str
    part: Part
    formula: str
    code: str = ""
    worked: str = ""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    intermediates: dict[str, Tensor] = field(default_factory=dict)
    value: Tensor
    facts: dict[str, int | float | str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Returns the code with the first number worked by hand as a comment."""
        return f"{self.code}  # {self.worked}" if self.code else f"# {self.formula}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return tuple(self.value.shape)

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that the code reads, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.inputs.items()}
