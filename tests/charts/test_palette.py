"""The palette, and files made of figures that take their colors from it."""

import re
from xml.etree import ElementTree

import pytest

from batchnorm.charts import drawing, embedding
from batchnorm.charts.palette import DARK, LIGHT, css_variables

SVG = "{http://www.w3.org/2000/svg}"


def luminance(color):
    channels = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_texts_and_lines_can_be_read_on_their_paper(colors):
    for name in ("ink", "muted", "line-1", "line-2", "line-3", "line-4"):
        low, high = sorted(luminance(colors[key]) for key in (name, "paper"))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name


def test_the_palettes_have_the_same_names_and_become_css():
    assert list(LIGHT) == list(DARK)
    assert (
        css_variables({"ink": "#1b2026", "line-1": "#1d5bb5"}) == "--ink:#1b2026;--line-1:#1d5bb5"
    )


def test_a_file_has_colors_for_both_schemes_and_room_around_the_figure():
    element = drawing.draw(lambda axes: axes.plot([0, 1], color=drawing.INK), "a", "A line.")
    text = embedding.as_file(element)
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    style = root.find(f"{SVG}style").text
    assert css_variables(LIGHT) in style
    assert f"@media(prefers-color-scheme:dark){{svg{{{css_variables(DARK)}}}}}" in style
    assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= set(LIGHT)
    left, top, width, height = map(float, root.get("viewBox").split())
    assert (left, top) == (-8, -8)
    assert (width, height) == pytest.approx((drawing.WIDTH + 16, drawing.HEIGHT + 16))
    paper = root.find(f"{SVG}rect")
    assert (paper.get("x"), paper.get("y"), paper.get("style")) == ("-8", "-8", "fill:var(--paper)")
