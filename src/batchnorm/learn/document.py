"""The walkthrough as plain lists and dictionaries, ready for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from batchnorm.learn import words
from batchnorm.learn.step import Step


def steps_as_json(steps: Sequence[Step], lang: str = "en") -> list[dict[str, Any]]:
    """Turns each step into a dictionary of strings, numbers and nested lists.

    Args:
        steps: The result of `walkthrough`.
        lang: Language of ``title`` and ``explanation``, ``en`` or ``zh``.

    Returns:
        For each step its ``name``, ``part``, ``title``, ``explanation``, ``formula``, ``code``,
        ``worked``, ``inputs`` and ``intermediates`` (name to ``shape`` and ``value``), ``shape``,
        ``value`` and ``facts``.

    Raises:
        ValueError: There are no words in that language.
    """
    return [_as_dictionary(step, lang) for step in steps]


def _as_dictionary(step: Step, lang: str) -> dict[str, Any]:
    title, explanation = words.explain(step, lang)
    return {
        "name": step.name,
        "part": step.part,
        "title": title,
        "explanation": explanation,
        "formula": step.formula,
        "code": step.code,
        "worked": step.worked,
        "inputs": _tensors(step.inputs),
        "intermediates": _tensors(step.intermediates),
        "shape": list(step.shape),
        "value": step.value.tolist(),
        "facts": dict(step.facts),
    }


def _tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {
        name: {"shape": list(tensor.shape), "value": tensor.tolist()}
        for name, tensor in tensors.items()
    }
