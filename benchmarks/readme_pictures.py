"""Draws the pictures of both READMEs, except the benchmark's, from a run of ``batchnorm train``.

    batchnorm train --threads 1 --out RUN     Fashion-MNIST, with and without batch norm
    python benchmarks/readme_pictures.py RUN  needs Chromium

It writes ``docs/statistics.svg``, ``docs/statistics.zh.svg`` and ``docs/report.png``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import stamps
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from batchnorm.charts import drawing, embedding, scales
from batchnorm.charts.drawing import FONT, HEIGHT, INK, STYLES
from batchnorm.experiment.results import Results

DOCS = Path(__file__).parents[1] / "docs"
REPORT_SIZE = {"width": 1160, "height": 2080}

WORDS = {
    "statistics.svg": {
        "title": "Test accuracy after each epoch, same weights",
        "x": "epoch",
        "population": "population statistics",
        "running": "running statistics",
        "gap": "{points:.1f} points apart",
        "description": "Test accuracy of the same weights by epoch. With population statistics: "
        "{population}. With running statistics: {running}.",
    },
    "statistics.zh.svg": {
        "title": "每个迭代周期之后的测试精度，同一组权重",
        "x": "迭代周期",
        "population": "总体统计量",
        "running": "移动平均统计量",
        "gap": "相差 {points:.1f} 个百分点",
        "description": "同一组权重在各个迭代周期之后的测试精度。用总体统计量：{population}。"
        "用移动平均统计量：{running}。",
    },
}


def statistics_chart(epochs: Sequence[Mapping[str, Any]], words: Mapping[str, str]) -> str:
    """Draws the test accuracy of the same weights with running and with population statistics.

    Args:
        epochs: The records of a run with batch norm.
        words: The texts of one language.

    Returns:
        An SVG file, light or dark as its reader prefers.
    """
    numbers = [record["epoch"] for record in epochs]
    values = {
        kind: [record[f"test_accuracy_{kind}"] for record in epochs]
        for kind in ("population", "running")
    }

    def paint(axes: Axes) -> None:
        axes.fill_between(numbers, *values.values(), color=STYLES[0].color, alpha=0.13, linewidth=0)
        for (kind, accuracies), style in zip(values.items(), STYLES, strict=False):
            axes.plot(
                numbers,
                accuracies,
                color=style.color,
                linestyle=style.linestyle,
                marker=style.marker,
                markersize=4.6,
                linewidth=1.8,
                label=words[kind],
            )
        _name_gap(axes, numbers, values, words["gap"])
        _set_axes(axes, words)

    shown = {kind: ", ".join(f"{a:.1%}" for a in accuracies) for kind, accuracies in values.items()}
    svg = drawing.draw(paint, "statistics", words["description"].format(**shown), top=48.0)
    return embedding.as_file(svg)


def _name_gap(
    axes: Axes, numbers: Sequence[int], values: Mapping[str, Sequence[float]], text: str
) -> None:
    """Marks the epoch in which the two accuracies differ most."""
    pairs = list(zip(values["population"], values["running"], strict=True))
    widest = max(range(len(pairs)), key=lambda at: abs(pairs[at][0] - pairs[at][1]))
    high, low = max(pairs[widest]), min(pairs[widest])
    axes.annotate(
        text.format(points=100 * (high - low)),
        (numbers[widest], low),
        xytext=(9, -1),
        textcoords="offset points",
        fontsize=FONT,
        color=INK,
        va="center",
    )


def _set_axes(axes: Axes, words: Mapping[str, str]) -> None:
    drawing.label_axes(axes, words["x"], words["title"])
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=scales.ROUND))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scales.percent_tick(value)))
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.margins(0.03, 0.12)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0, 1 - 20 / HEIGHT),
        bbox_transform=axes.get_figure().transFigure,
        ncols=2,
        frameon=False,
        fontsize=FONT,
        labelcolor=INK,
        handlelength=2.4,
        columnspacing=1.6,
        borderpad=0,
        borderaxespad=0,
    )


def report_picture(results: Results) -> bytes:
    """Takes a screenshot of the top of the report, in light colors."""
    from playwright.sync_api import sync_playwright

    from batchnorm.experiment.report import page

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "report.html"
        page.write(results, path)
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab = chromium.new_page(viewport=REPORT_SIZE, color_scheme="light")
        tab.goto(path.as_uri())
        picture = tab.screenshot()
        chromium.close()
    return picture


def main() -> int:
    """Draws and writes all pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run of batchnorm train")
    arguments = parser.parse_args()

    from batchnorm.experiment.run_directory import RunDirectory

    results = RunDirectory(arguments.run).results()
    runs = {run.norm: [epoch.model_dump() for epoch in run.epochs] for run in results.runs}
    if "batchnorm" not in runs:
        print(f"{arguments.run}: there is no run of batchnorm; train one first.", file=sys.stderr)
        return 2
    for name, words in WORDS.items():
        stamps.write_svg(DOCS / name, statistics_chart(runs["batchnorm"], words))
    stamps.write_png(DOCS / "report.png", report_picture(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
