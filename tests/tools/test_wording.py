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
    assert shortened(["", "layer1.0.bn1"], 16) == {
        "": "the model itself",
        "layer1.0.bn1": "layer1.0.bn1",
    }
    assert shortened(["layer1.0.bn1"], 8) == {"layer1.0.bn1": "…1.0.bn1"}


@pytest.mark.parametrize(
    "names",
    [
        [f"layer{n}.{b}.downsample.1" for n in (1, 2, 3) for b in range(3)],
        [f"backbone.body.layer{n}.downsample.bn" for n in range(9)],
        [f"{n}.a_very_long_name_of_a_layer.bn" for n in range(30)],
        [f"blocks_of_a_network.{n}.with_a_long_middle.normalization" for n in range(200)],
        ["stem.bn", "body.stem.bn", "encoder.of.images.body.stem.bn"],
    ],
)
@pytest.mark.parametrize("width", [16, 33])
def test_long_names_stay_distinguishable(names, width):
    shown = shortened(names, width)
    assert list(shown) == names
    assert len(set(shown.values())) == len(names)
    assert max(map(len, shown.values())) <= width
    assert all(shown[name] == name for name in names if len(name) <= width)


def test_lines():
    line = "word " * 15 + "end"
    assert wrapped(line) == line
    broken = wrapped(line + " more", "  ").splitlines()
    assert [len(part) <= 80 for part in broken] == [True, True]
    assert broken[1].startswith("  ")
