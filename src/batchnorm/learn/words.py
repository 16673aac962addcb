"""Titles, explanations and labels of the walkthrough, in the language that is asked for."""

from collections.abc import Sequence
from types import ModuleType

from batchnorm.learn import chinese, english
from batchnorm.learn.step import Step

LANGUAGES: dict[str, ModuleType] = {"en": english, "zh": chinese}


def headline(steps: Sequence[Step], lang: str) -> str:
    """The title of a whole walkthrough: of a fully connected layer (2-D) or a convolutional one."""
    kind = "fully_connected" if len(steps[0].shape) == 2 else "convolution"
    return _speaker(lang).TITLES[kind]


def part(step: Step, lang: str) -> str:
    """The heading of the part that a step belongs to: training or inference."""
    return _speaker(lang).PARTS[step.part]


def explain(step: Step, lang: str) -> tuple[str, str]:
    """The title and the explanation of a step, its numbers filled in."""
    title, explanation = _speaker(lang).TOPICS[step.topic]
    facts = {"unit": unit(step, lang), **step.facts}
    return title.format(**facts), explanation.format(**facts)


def unit(step: Step, lang: str) -> str:
    """What axis 1 counts: features after a fully connected layer, channels after a convolution."""
    return label("feature" if len(step.shape) == 2 else "channel", lang)


def label(key: str, lang: str) -> str:
    """A short word that the terminal prints beside the numbers.

    Args:
        key: One of the keys of `LABELS`.
        lang: `en` or `zh`.
    """
    return _speaker(lang).LABELS[key]


def _speaker(lang: str) -> ModuleType:
    if lang not in LANGUAGES:
        raise ValueError(
            f"walkthrough: the language is one of {', '.join(LANGUAGES)}, got {lang!r}; pick one."
        )
    return LANGUAGES[lang]
