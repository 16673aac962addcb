"""Charts as SVG: what they show, and that a page can take them in."""

import math
import re
from xml.etree import ElementTree

import matplotlib
import pytest

from batchnorm.charts import drawing, scales
from batchnorm.charts.drawing import STYLES, Style
from batchnorm.charts.embedding import embed
from batchnorm.charts.scales import Frame
from batchnorm.experiment.report import charts
from batchnorm.experiment.report.charts import Labels, Line

NAN, INF = math.nan, math.inf
LABELS = Labels(x="epoch", y="loss (nats)", description="what it shows", empty="nothing to draw")


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("text")]


def paths(svg, color):
    """The d of every path that is stroked in a colour."""
    return [
        element.get("d", "")
        for element in ElementTree.fromstring(svg).iter("path")
        if f"stroke:{color}" in element.get("style", "")
    ]


def frame(epochs=(1, 4), values=(0.0, 1.0)):
    return Frame(epochs, values, str)


def curve(values, name="c", **changes):
    line = Line(STYLES[0], list(range(1, len(values) + 1)), values, **changes)
    return charts.curves(name, LABELS, [line], frame((1, len(values))))


def test_a_chart_takes_colours_fonts_and_size_from_the_page():
    svg = curve([0.1, 0.2, 0.3])
    root = ElementTree.fromstring(svg)
    assert set(root.attrib) == {"class", "viewBox", "role", "aria-label"}
    assert root.get("viewBox") == "0 0 316.8 208.8"
    assert (root.get("role"), root.get("aria-label")) == ("img", "what it shows")
    assert "var(--line-1)" in svg
    assert "var(--muted)" in svg
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert "font-family" not in svg
    assert "http" not in svg
    assert "<metadata" not in svg
    assert "<style" not in svg


def test_axes_carry_their_labels_with_units():
    written = texts(curve([0.1, 0.2]))
    assert "epoch" in written
    assert "loss (nats)" in written


def test_the_same_chart_twice_is_the_same_text_and_another_has_other_ids():
    assert curve([0.1, 0.2]) == curve([0.1, 0.2])
    ids = re.findall(r'id="([^"]+)"', curve([0.1, 0.2], name="one"))
    others = re.findall(r'id="([^"]+)"', curve([0.1, 0.2], name="two"))
    assert ids
    assert not set(ids) & set(others)


def test_the_settings_of_the_process_do_not_reach_the_chart():
    expected = curve([0.1, 0.2])
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.grid": True, "svg.fonttype": "path"}):
        assert curve([0.1, 0.2]) == expected
        assert matplotlib.rcParams["lines.linewidth"] == 9


def test_chinese_and_foreign_text_stays_text():
    labels = Labels(x="迭代周期", y="损失 $\\frac$ <b>&", description="<损失>", empty="")
    svg = charts.curves("c", labels, [Line(STYLES[0], [1], [0.5])], frame())
    assert {"迭代周期", "损失 $\\frac$ <b>&"} <= set(texts(svg))
    assert ElementTree.fromstring(svg).get("aria-label") == "<损失>"
    assert "<b>" not in svg


def test_a_line_breaks_where_a_value_is_not_finite():
    whole = paths(curve([0.1, 0.2, 0.3, 0.4]), "var(--line-1)")[0]
    broken = paths(curve([0.1, 0.2, NAN, 0.4]), "var(--line-1)")[0]
    assert whole.count("M") == 1
    assert broken.count("M") == 2


@pytest.mark.parametrize(("values", "crosses"), [([0.1, 0.2], 0), ([0.1, INF], 1), ([NAN, NAN], 0)])
def test_a_cross_marks_the_last_finite_value_of_a_run_that_diverged(values, crosses):
    cross = [d for d in paths(curve(values), "var(--line-1)") if d.startswith("M -6.5 6.5 L 6.5")]
    assert len(cross) == crosses


def test_every_style_differs_in_colour_dash_and_marker():
    for part in ("color", "dash", "marker"):
        assert len({getattr(style, part) for style in STYLES}) == len(STYLES) == 4


def test_a_chart_without_a_finite_value_says_so():
    assert "nothing to draw" in texts(curve([NAN, INF]))
    assert "nothing to draw" not in texts(curve([NAN, 0.5]))
    empty = charts.strips("s", LABELS, [("a", [NAN])], scales.AROUND_0, (-1.0, 1.0), STYLES[0])
    assert "nothing to draw" in texts(empty)


def test_estimates_shade_the_gap_and_tell_the_two_lines_apart_without_colour():
    color = STYLES[2].color
    lower = Line(Style(color, (4.0, 2.0), "o"), [1, 2, 3], [0.2, INF, 0.4], hollow=True)
    upper = Line(Style(color, (), "o"), [1, 2, 3], [0.3, 0.5, 0.6])
    svg = charts.estimates("e", LABELS, lower, upper, frame((1, 3)))
    assert "fill:var(--line-3);fill-opacity:0.13" in svg
    assert svg.count("stroke-dasharray") == 1
    assert "fill:var(--paper)" in svg


def test_memory_sets_off_the_newest_mini_batches():
    svg = charts.memory("m", LABELS, 0.1, 10, "last 10:\n65%")
    bars = re.findall(r"fill:var\(--(ink|muted)\)\" />", svg)
    assert bars[:40] == ["ink"] * 10 + ["muted"] * 30
    assert {"last 10:", "65%", "1", "10", "40"} <= set(texts(svg))


def test_strips_draw_a_dot_for_every_finite_channel_and_a_median_for_every_layer():
    rows = [("conv1", [0.1, 0.2, 0.9]), ("fc1", [0.5, NAN, 0.5])]
    svg = charts.strips("s", LABELS, rows, scales.AROUND_0, (0.0, 1.0), STYLES[1])
    dots = paths(svg, "var(--line-2)")
    assert [d.count("h0") for d in dots] == [3, 2]
    assert len(paths(svg, "var(--ink)")) == 2
    first = [float(x) for x in re.findall(r"M (\S+) \S+?h0", dots[0])]
    assert first == sorted(first)
    assert {"conv1", "fc1"} <= set(texts(svg))


def test_dots_of_equal_value_do_not_cover_each_other():
    rows = [("fc1", [0.5] * 9)]
    svg = charts.strips("s", LABELS, rows, scales.AROUND_0, (0.0, 1.0), STYLES[0])
    (dots,) = paths(svg, "var(--line-1)")
    assert len(set(re.findall(r"M (\S+ \S+?)h0", dots))) == 9


def test_a_ratio_that_has_no_logarithm_is_not_drawn():
    rows = [("a", [0.0, -1.0, 2.0, INF])]
    svg = charts.strips("s", LABELS, rows, scales.RATIO, (-1.0, 1.0), STYLES[0])
    assert paths(svg, "var(--line-1)")[0].count("h0") == 1
    assert {"0.1", "1", "10"} <= set(texts(svg))


def test_a_chart_grows_with_its_layers_and_shortens_their_names():
    rows = [(f"backbone.stage{n}.norm", [1.0]) for n in range(12)]
    svg = charts.strips("s", LABELS, rows, scales.AROUND_1, (0.0, 2.0), STYLES[0])
    assert float(svg.split('viewBox="0 0 316.8 ')[1].split('"')[0]) > 400
    assert "backbone.st…" in texts(svg)


def test_bands_draw_two_bands_a_median_and_where_the_sigmoid_is_flat():
    quantiles = [[-5.0, -1.0, 0.0, 1.0, 6.0], [-5.0, -2.0, 0.5, 2.0, INF]]
    svg = charts.bands("b", LABELS, [0, 1], quantiles, frame((0, 1), (-6.0, 7.0)), STYLES[3])
    assert "fill-opacity:0.16" in svg
    assert "fill-opacity:0.3" in svg
    assert len(paths(svg, "var(--muted)")) == 2
    narrow = charts.bands("b", LABELS, [0, 1], quantiles, frame((0, 1), (-3.0, 3.0)), STYLES[3])
    assert paths(narrow, "var(--muted)") == []


def test_a_band_of_one_epoch_is_as_wide_as_to_be_seen():
    quantiles = [[-2.0, -1.0, 0.0, 1.0, 2.0]]
    svg = charts.bands("b", LABELS, [0], quantiles, frame((0, 1), (-3.0, 3.0)), STYLES[0])
    root = ElementTree.fromstring(svg)
    areas = [path.get("d") for path in root.iter("path") if (path.get("id") or "").startswith("m")]
    widths = [
        max(xs) - min(xs)
        for d in areas
        if len(xs := [float(x) for x in re.findall(r"[ML] (\S+) ", d)]) > 4
    ]
    assert len(widths) == 2
    assert all(width > 5 for width in widths)


@pytest.mark.parametrize(
    ("values", "ceiling", "expected"),
    [
        ([0.0, 1.0], INF, (-0.06, 1.06)),
        ([0.0, 1.0], 1.0, (-0.06, 1.0)),
        ([0.2, NAN, 0.2], 1.0, (0.188, 0.212)),
        ([0.0], INF, (-0.5, 0.5)),
        ([NAN, INF], INF, (-0.06, 1.06)),
        ([0.5, 1.5], 1.0, (0.44, 1.5)),
    ],
)
def test_limits_show_every_finite_value(values, ceiling, expected):
    assert scales.limits(values, ceiling) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("first", "last", "ticks"),
    [
        (1, 10, [2, 4, 6, 8, 10]),
        (0, 3, [0, 1, 2, 3]),
        (7, 7, [7]),
        (3, 3, [3]),
        (11, 12, [11, 12]),
        (0, 100, [0, 20, 40, 60, 80, 100]),
    ],
)
def test_epoch_ticks_are_whole_and_few(first, last, ticks):
    assert scales.epoch_ticks(first, last) == ticks


@pytest.mark.parametrize(
    ("low", "high", "written"),
    [
        (0.4, 2.6, ["0.5", "1", "1.5", "2", "2.5"]),
        (0.78, 1.47, ["0.8", "1", "1.2", "1.4"]),
        (0.5, 6.0, ["0.5", "1", "2", "5"]),
        (0.01, 100.0, ["0.01", "0.1", "1", "10", "100"]),
        (1e-9, 1e9, ["1e−09", "1e−06", "0.001", "1", "1000", "1e+06", "1e+09"]),
    ],
)
def test_ratio_ticks_are_round_numbers(low, high, written):
    ticks = scales.ratio_ticks((math.log10(low), math.log10(high)))
    assert [scales.ratio_tick(place) for place in ticks] == written


def test_ratios_that_hardly_differ_have_ticks_too():
    ticks = scales.ratio_ticks((math.log10(1.02), math.log10(1.08)))
    assert len(ticks) >= 3


@pytest.mark.parametrize(
    ("text", "fitted"),
    [
        ("conv1", "conv1"),
        ("123456789012", "123456789012"),
        ("1234567890123", "12345678901…"),
        ("批量规范化层", "批量规范化层"),
        ("批量规范化层一", "批量规范化…"),
    ],
)
def test_labels_are_fitted_by_the_columns_they_take(text, fitted):
    assert drawing.fit(text) == fitted
    assert drawing.columns(fitted) <= 12


def test_embedding_keeps_what_draws_and_drops_the_rest():
    file = """<?xml version="1.0"?>
    <svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
      width="10pt" viewBox="0 0 10 10"><metadata>made by</metadata>
      <defs><style>* {stroke: red}</style></defs>
      <g id="figure_1"><g id="a"><path d="M 0 0 L 9 9" style="fill: none"/>
        <path d="M 1.2345 2  L 3 4" style="stroke: #0a0b01"/></g></g>
      <g clip-path="url(#p)"><use xlink:href="#m" style="fill: #0a0b01"/>
        <use xlink:href="#m" style="fill: #0a0b01"/></g>
      <text style="font: 700 12.5px 'DejaVu Sans'; font-family: x" transform="rotate(-0 1 2)"
        >a &lt;b&gt;</text></svg>"""
    svg = embed(file, 'say "it"', {"#0a0b01": "var(--ink)"})
    assert svg.split("\n") == [
        '<svg class="chart" viewBox="0 0 10 10" role="img" aria-label="say &quot;it&quot;">',
        '<path d="M 1.2 2 L 3 4" style="stroke:var(--ink)" />',
        '<g clip-path="url(#p)" style="fill:var(--ink)">',
        '<use href="#m" />',
        '<use href="#m" />',
        "</g>",
        '<text style="font-size:12.5px">a &lt;b&gt;</text>',
        "</svg>",
    ]
