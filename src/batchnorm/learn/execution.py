"""Runs the code of the lesson and notes what it reads, what it computes and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.learn import arithmetic, notation
from batchnorm.learn.recipes import Recipe
from batchnorm.learn.step import Part, Step


def run(
    recipes: Sequence[Recipe], variables: dict[str, Any], data: Tensor, part: Part
) -> list[Step]:
    """Runs recipes in order.

    Args:
        recipes: The steps, in the order in which they need each other's results.
        variables: The variables that their code reads, by name. The results are added; nothing
            else that the code assigns is.
        data: The data that the steps are about, given under their name in ``variables``.
        part: The part of the lesson.
    """
    channels, count = data.shape[1], data.numel() // data.shape[1]
    facts = {
        "examples": data.shape[0],
        "channels": channels,
        **{f"axis_{axis}": length for axis, length in enumerate(data.shape[2:], start=2)},
        "count": count,
        "count_less_one": count - 1,
        "dims": notation.dims(data.dim()),
        "eps": variables["eps"],
        "momentum": variables["momentum"],
        "rest": 1.0 - variables["momentum"],
    }
    return [_run(recipe, variables, data, part, dict(facts)) for recipe in recipes]


class _Locals(dict[str, Any]):
    """Local variables of one step. Reads of other names go to ``outer`` and are noted."""

    def __init__(self, outer: dict[str, Any]) -> None:
        super().__init__()
        self.outer = outer
        self.read: dict[str, Any] = {}

    def __missing__(self, name: str) -> Any:
        self.read[name] = self.outer[name]
        return self.read[name]


def _run(
    recipe: Recipe, variables: dict[str, Any], data: Tensor, part: Part, facts: dict[str, Any]
) -> Step:
    name, topic = recipe.name, recipe.topic or recipe.name
    if not recipe.code:
        formula = f"{name}: {notation.lay_out(data.dim())} = {tuple(data.shape)}"
        return Step(name=name, topic=topic, part=part, formula=formula, value=data, facts=facts)
    local = _Locals(variables)
    exec(recipe.code, {"torch": torch}, local)
    value = local.pop(name)
    step = Step(
        name=name,
        topic=topic,
        part=part,
        formula=recipe.formula,
        code=recipe.code,
        worked=arithmetic.work_out(recipe.formula, {**variables, **local, "x": data}, value),
        inputs={key: read for key, read in local.read.items() if isinstance(read, Tensor)},
        intermediates=dict(local),
        value=value,
        facts=facts,
    )
    variables[name] = value
    return step
