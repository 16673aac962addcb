"""Counts, names and lines, as all tools write them."""

from __future__ import annotations

import pytest

from batchnorm.tools.wording import counted, displayed, shortened, wrapped


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "layer", "0 layers"),
        (1, "layer", "1 layer"),
        (2, "batch", "2 batches"),
        (1, "batch", "1 batch"),
        (12345, "sample", "12,345 samples"),
    ],
)
def test_counts(number, noun, text):
    assert counted(number, noun) == text


def test_names():
    assert displayed("") == "the model itself"
    assert displayed("layer1.0.bn1") == "layer1.0.bn1"
    assert shortened("layer1.0.bn1", 12) == "layer1.0.bn1"
    assert shortened("layer1.0.bn1", 8) == "…1.0.bn1"


def test_lines():
    line = "word " * 15 + "end"
    assert wrapped(line) == line
    broken = wrapped(line + " more", "  ").splitlines()
    assert [len(part) <= 80 for part in broken] == [True, True]
    assert broken[1].startswith("  ")
