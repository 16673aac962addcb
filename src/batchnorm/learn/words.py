"""Titles, explanations and labels of the walkthrough, in one language."""

from __future__ import annotations

from collections.abc import Sequence

from batchnorm.learn.step import Step
from batchnorm.words import speak


def headline(steps: Sequence[Step], lang: str) -> str:
    """Returns the title of a walkthrough: of a fully connected layer (2-D) or a convolution."""
    kind = "fully_connected" if len(steps[0].shape) == 2 else "convolution"
    return speak("walkthrough", lang, str)(f"headline.{kind}")


def part(step: Step, lang: str) -> str:
    """Returns the heading of the part that a step belongs to: training or inference."""
    return speak("walkthrough", lang, str)(f"part.{step.part}")


def explain(step: Step, lang: str) -> tuple[str, str]:
    """Returns the title and the explanation of a step, with its numbers."""
    say = speak("walkthrough", lang, str)
    facts = {"unit": unit(step, lang), **step.facts}
    return say(f"{step.topic}.title", **facts), say(f"{step.topic}.text", **facts)


def unit(step: Step, lang: str) -> str:
    """Returns what axis 1 counts: features, or channels after a convolution."""
    kind = "feature" if len(step.shape) == 2 else "channel"
    return speak("walkthrough", lang, str)(f"unit.{kind}")


def label(key: str, lang: str) -> str:
    """Returns a short word that the terminal prints beside the numbers."""
    return speak("walkthrough", lang, str)(f"label.{key}")
