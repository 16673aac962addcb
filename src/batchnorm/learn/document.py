"""The walkthrough as plain lists and dictionaries, ready for JSON."""

from collections.abc import Sequence
from typing import Any

from batchnorm.learn import words
from batchnorm.learn.step import Step


def steps_as_json(steps: Sequence[Step], lang: str = "en") -> list[dict[str, Any]]:
    """Write each step as a dictionary of strings, numbers and nested lists.

    Args:
        steps: What `walkthrough` returns.
        lang: Language of `title` and `explanation`, `en` or `zh`.

    Returns:
        For each step its `name`, `part`, `title`, `explanation`, `formula`, `code`, `worked`,
        `inputs` (name to `shape` and `value`), `shape`, `value` and `facts`.

    Raises:
        ValueError: If the language is not known.
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
        "inputs": {
            name: {"shape": list(tensor.shape), "value": tensor.tolist()}
            for name, tensor in step.inputs.items()
        },
        "shape": list(step.shape),
        "value": step.value.tolist(),
        "facts": dict(step.facts),
    }
