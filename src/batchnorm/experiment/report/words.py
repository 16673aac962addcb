"""The sentences of the report as HTML."""

from __future__ import annotations

from collections.abc import Callable

from markupsafe import Markup

from batchnorm import words

Say = Callable[..., Markup]
"""The sentences of one language: takes a key and the values of its placeholders, by name."""


def speak(lang: str) -> Say:
    """Returns the function that says the report's sentences in one language.

    It escapes the values. The sentences themselves are ours and may contain HTML.

    Args:
        lang: ``en`` or ``zh``.

    Raises:
        ValueError: There are no words in that language.
    """
    return words.speak("report", lang, Markup)
