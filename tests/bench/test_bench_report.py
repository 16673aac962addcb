"""A benchmark for people: tables of 80 columns, and a chart that stands alone."""

import io
import re
from xml.etree import ElementTree

import pytest
from rich.cells import cell_len
from rich.console import Console

from batchnorm.bench import chart as bench_chart
from batchnorm.bench import table as bench_table
from batchnorm.bench import titles as bench_titles
from bench_results import memory, results, row, step

SVG = "{http://www.w3.org/2000/svg}"


def printed(measured, warning=None):
    console = Console(width=80, file=io.StringIO())
    console.print(bench_table.tables(measured, warning))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def line_with(text, words):
    (line,) = [line for line in text.splitlines() if words in line]
    return line.split()


def test_a_row_has_times_ratio_bandwidth_and_share_of_the_copy():
    text = printed(results([row()]))
    assert line_with(text, "32×64×112×112") == (
        ["32×64×112×112", "12.3", "10%", "30.8", "2.50", "12.3", "82%"]
    )
    assert "ResNet-50, 32 images · float32 NCHW · BN · forward" in text
    assert "geometric mean" not in text


def test_the_mean_of_a_group_stands_below_it():
    rows = [row(), row((32, 64, 56, 56), others={"torch": 0.0123 * 10})]
    text = printed(results(rows))
    assert line_with(text, "geometric mean") == ["geometric", "mean", "5.00", "12.3", "82%"]


def test_every_rival_has_a_column_and_the_widest_table_fits():
    others = {"torch": 0.1234, "compile": 0.2351, "onednn": 0.3456}
    text = printed(results([row(others=others), row((32, 2048, 7, 7), others=others)]))
    header = line_with(text, "oneDNN")
    assert header[:6] == ["input", "ours", "±", "torch", "compile", "oneDNN"]
    assert line_with(text, "32×64×112×112")[3:6] == ["123", "235", "346"]
    assert "×19.1" in line_with(text, "geometric mean")
    assert max(map(cell_len, text.splitlines())) <= 80
    assert "…" not in text


def test_a_rival_that_cannot_compute_a_shape_leaves_a_dash():
    rows = [
        row((256, 6, 24, 24), group="lenet", others={"onednn": 0.01}),
        row((256, 84), group="lenet"),
    ]
    text = printed(results(rows))
    assert line_with(text, "256×84")[4] == "—"


def test_ranks_share_a_table_without_a_mean():
    rows = [row((4096, 512), group="nc"), row((64, 256, 1000), group="1d")]
    text = printed(results(rows))
    assert text.count("Other ranks · float32 NCHW · BN · forward") == 1
    assert "geometric mean" not in text


def test_steps_show_what_the_norm_costs():
    text = printed(results(steps=[step(), step("resnet18", share=0.5)]))
    assert line_with(text, "LeNet, 256 of 1×28×28")[4:] == ["8.80", "9.90", "12.1", "1.22", "31%"]
    assert line_with(text, "ResNet-18, 256 of 3×224×224")[-1] == "50%"


def test_kept_memory_is_per_byte_of_x():
    memories = [memory("relu", ours=128, torch=4096), memory("relu", ours=128, torch=4096)]
    text = printed(results(memories=memories))
    assert line_with(text, "BN + ReLU, float32 NCHW")[-2:] == ["0.0312", "1.0000"]


def test_rows_that_lost_are_listed_worst_first_and_counted():
    assert "No row is slower than torch's by more than 5 %." in printed(results([row()]))
    rows = [row((2, channels), others={"torch": 0.0123 / channels}) for channels in range(2, 17)]
    text = printed(results(rows))
    assert "Slower than torch's by more than 5 %, 15 rows:" in text
    listed = re.findall(r"^  ×(\S+)  2×\d+ float32 NCHW BN forward", text, re.MULTILINE)
    assert [float(ratio) for ratio in listed] == sorted(map(float, listed))
    assert len(listed) == bench_table.LISTED
    assert "and 3 more, all in --json" in text


def test_the_machine_stands_on_top_and_a_warning_below_it():
    measured = results([row()])
    lines = printed(measured, "The load was high.").splitlines()
    assert lines[0].startswith("Test CPU 9000 (AVX512), 2 of 4 cores; torch 2.13.0, numba 0.68.1")
    assert "The load was high." in lines
    measured["machine"] |= {"numba": None, "wait_policy": "passive"}
    line = bench_table.machine_line(measured["machine"])
    assert "2 of 4 cores (passive); torch 2.13.0, no numba" in line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0000123, "0.0123"), (0.00123, "1.23"), (0.0996, "99.6"), (0.09996, "100"), (1.5, "1500")],
)
def test_times_have_three_digits(seconds, text):
    assert bench_titles.milliseconds(seconds) == text


def test_ratios_have_two_or_three_digits():
    assert [bench_titles.ratio(value) for value in (0.917, 2.308, 9.996, 14.52)] == [
        "0.92",
        "2.31",
        "10.0",
        "14.5",
    ]


def test_short_titles_leave_out_what_goes_without_saying():
    titles = [
        bench_titles.short_title(row(**changes))
        for changes in (
            {},
            {"variant": "add-relu", "pass": "both"},
            {"layout": "channels_last", "dtype": "bfloat16"},
            {"group": "lenet"},
            {"group": "nc"},
        )
    ]
    assert titles == [
        "BN, forward",
        "BN + add + ReLU, fwd + bwd",
        "BN, forward, channels_last, bfloat16",
        "LeNet, BN, forward",
        "(N, C), BN, forward",
    ]


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_chart_is_a_file_of_its_own():
    svg = bench_chart.chart(results([row()], [step()]))
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert float(root.get("width")) > 400
    assert "ResNet" not in root.get("aria-label")
    assert "BN, forward: 2.50; LeNet, training step: 1.22." in root.get("aria-label")
    style = root.find(f"{SVG}style").text
    used = set(re.findall(r"var\((--[\w-]+)\)", svg))
    defined = set(re.findall(r"(--[\w-]+):#", style))
    assert used <= defined
    assert "prefers-color-scheme:dark" in style
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", svg)


def test_bars_are_in_torchs_speed():
    others = {"torch": 0.0246, "compile": 0.0123, "onednn": 0.0492}
    written = texts(bench_chart.chart(results([row(others=others)], [step()])))
    assert {"2.00×", "1.22×", "0.50×"} <= set(written)
    assert "■ torch.compile" in written
    assert "■ oneDNN" in written
    assert "times as fast as torch.nn" in written


def test_the_longest_bar_is_the_fastest():
    others = {"torch": 0.0123 * 4, "onednn": 0.0123 * 2}
    svg = bench_chart.chart(results([row(others=others)]))
    lengths = [
        max(map(float, re.findall(r"[ML] (\S+) ", path.get("d"))))
        - min(map(float, re.findall(r"[ML] (\S+) ", path.get("d"))))
        for path in ElementTree.fromstring(svg).iter(f"{SVG}path")
        if "fill:var(--line" in path.get("style", "")
    ]
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=0.01)


def test_other_groups_are_drawn_when_resnet_was_not_measured():
    assert "(N, C), BN, forward" in texts(bench_chart.chart(results([row(group="nc")])))


def test_nothing_measured_is_no_chart():
    with pytest.raises(ValueError, match="a chart needs at least one measured row, got none"):
        bench_chart.chart(results())
