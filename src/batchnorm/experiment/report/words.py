"""Every sentence of the report, in both languages, by key."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from importlib import resources
from typing import Any

from markupsafe import Markup

LANGUAGES = ("en", "zh")


Say = Callable[..., Markup]
"""The words of one language: takes a key and the values for its places, by name."""


def speak(lang: str) -> Say:
    """Choose the language of a report.

    Args:
        lang: "en" or "zh" (simplified Chinese).

    Returns:
        A function that gives the text under a key. Values are escaped; the texts themselves are
        ours and may hold a little HTML.

    Raises:
        ValueError: there are no words in that language.
    """
    if lang not in LANGUAGES:
        raise ValueError(
            f"report: expected lang to be one of {', '.join(LANGUAGES)}, got {lang!r}."
        )
    return partial(_say, lang)


def _say(lang: str, key: str, **values: Any) -> Markup:
    return Markup(strings(lang)[key]).format(**values)


@cache
def strings(lang: str) -> dict[str, str]:
    """All texts of one language by their keys."""
    file = resources.files("batchnorm.experiment.report") / "strings" / f"{lang}.json"
    return json.loads(file.read_text(encoding="utf-8"))
