"""All sentences that people read in more than one language: a folder for each language.

It has one JSON file per section (``walkthrough``, ``report``) with the texts by key. Both languages
have the same keys with the same placeholders.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib import resources
from string import Formatter
from typing import Any, TypeVar

LANGUAGES = ("en", "zh")

Text = TypeVar("Text", bound=str)


def speak(section: str, lang: str, form: type[Text]) -> Callable[..., Text]:
    """Returns the function that says the sentences of one section in one language.

    Args:
        section: ``walkthrough`` or ``report``.
        lang: ``en``, or ``zh`` for simplified Chinese.
        form: Class of the texts: ``str``, or ``markupsafe.Markup``, which escapes the values.

    Returns:
        A function of a key and the values of its placeholders, by name. It raises ``KeyError`` if
        there is no such key, or if a value is missing.

    Raises:
        ValueError: There are no words in that language.

    Example:
        >>> say = speak("walkthrough", "en", str)
        >>> say("var.title", unit="channel")
        'The variance of each channel'
    """
    texts = read_texts(section, lang)

    def say(key: str, **values: Any) -> Text:
        if missing := placeholders(texts[key]) - values.keys():
            raise KeyError(
                f"{section}: the text {key!r} needs a value for {', '.join(sorted(missing))}."
            )
        return form(form(texts[key]).format(**values))

    return say


def read_texts(section: str, lang: str) -> dict[str, str]:
    """Returns all texts of one section in one language, by key.

    Raises:
        ValueError: There are no words in that language.
    """
    if lang not in LANGUAGES:
        raise ValueError(
            f"{section}: lang is one of {', '.join(LANGUAGES)}, got {lang!r}; pick one of them."
        )
    return _read_file(section, lang)


@cache
def placeholders(text: str) -> frozenset[str]:
    """Returns the names of the values that a text needs."""
    return frozenset(name for _, name, _, _ in Formatter().parse(text) if name)


@cache
def _read_file(section: str, lang: str) -> dict[str, str]:
    file = resources.files("batchnorm.words") / lang / f"{section}.json"
    return json.loads(file.read_text(encoding="utf-8"))
