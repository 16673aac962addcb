"""What a layer is given, as its hooks see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def input_of(
    layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, name: str, caller: str
) -> Tensor:
    """The first tensor among the arguments of a call, whatever a subclass calls its input.

    Args:
        layer: Who is called.
        args: By position.
        kwargs: By name; ``input`` comes first.
        name: The layer's.
        caller: The tool, for the message.

    Raises:
        TypeError: There is no tensor.
    """
    for value in (*args, kwargs.get("input"), *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise TypeError(
        f"{caller}: layer {name!r} ({type(layer).__name__}) is called without a tensor; give it "
        "its input."
    )
