"""Measures, then writes the tables of both READMEs and ``docs/bench.svg``; refuses if tests fail.

    python benchmarks/readme_table.py [--seconds S] [--threads N]    about fifteen minutes

In each README the tables are between the lines ``<!-- bench -->`` and ``<!-- /bench -->``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import stamps

from batchnorm.files import write_text

ROOT = Path(__file__).parents[1]
START, END = "<!-- bench -->", "<!-- /bench -->"
TESTS = ("tests/nn/test_functional.py", "tests/nn/test_layers.py")

NET = "resnet50"
KINDS = {
    "training": ("nchw", "float32", "bn", "both"),
    "relu": ("nchw", "float32", "relu", "both"),
    "add-relu": ("nchw", "float32", "add-relu", "both"),
    "channels_last": ("channels_last", "float32", "bn", "both"),
    "bfloat16": ("nchw", "bfloat16", "bn", "both"),
    "evaluation": ("nchw", "float32", "bn", "eval"),
}
"""Layout, dtype, variant and pass of each row about the layer alone."""

WORDS: dict[str, dict[str, str]] = {
    "README.md": {
        "step header": "| one training step of {net}, {batch} images of {size} | time | "
        "more than without batch norm |",
        "torch": "torch's layers",
        "batchnorm": "the same model after `accelerate(model)`",
        "none": "the same model without batch norm",
        "header": "| the layer alone, in the shapes of ResNet-50 with 32 images | "
        "times as fast as torch.nn |",
        "training": "forward and backward",
        "relu": "with ReLU, forward and backward",
        "add-relu": "with residual and ReLU, forward and backward",
        "channels_last": "`channels_last`, forward and backward",
        "bfloat16": "bfloat16, forward and backward",
        "evaluation": "evaluation",
        "seconds": "{:.2f} s",
        "machine": "{processor}, {threads} threads, torch {torch}, batchnorm {batchnorm}; medians, "
        "and for the layer geometric means. Measure again: `python benchmarks/readme_table.py`.",
    },
    "README.zh.md": {
        "step header": "| {net} 的一个训练步，{batch} 张 {size} 的图像 | 时间 | "
        "比没有批量规范化多 |",
        "torch": "torch 的层",
        "batchnorm": "同一模型，经过 `accelerate(model)`",
        "none": "同一模型，没有批量规范化",
        "header": "| 单独一层，ResNet-50 各层的形状，每批 32 张 | 相对 torch.nn 的速度 |",
        "training": "前向加反向",
        "relu": "带 ReLU，前向加反向",
        "add-relu": "带残差和 ReLU，前向加反向",
        "channels_last": "`channels_last`，前向加反向",
        "bfloat16": "bfloat16，前向加反向",
        "evaluation": "推理",
        "seconds": "{:.2f} 秒",
        "machine": "{processor}，{threads} 线程，torch {torch}，batchnorm {batchnorm}；"
        "表中为中位数，单独一层为几何平均。重新测量：`python benchmarks/readme_table.py`。",
    },
}


def tables(results: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """Writes the tables of one README in Markdown: a training step, then the layer alone."""
    return "\n".join(
        [
            *_step(results["steps"], words),
            "",
            *_layer(results["geometric_means"], words),
            "",
            words["machine"].format(batchnorm=results["batchnorm"], **results["machine"]),
        ]
    )


def _step(steps: list[dict[str, Any]], words: Mapping[str, str]) -> list[str]:
    from batchnorm.bench.titles import NETS, shape

    (step,) = [step for step in steps if step["net"] == NET]
    size = shape(step["image"][1:])
    header = words["step header"].format(net=NETS[NET], batch=step["batch"], size=size)
    lines = [header, "| --- | --: | --: |"]
    without = step["seconds"]["none"]["median"]
    for who in ("torch", "batchnorm", "none"):
        median = step["seconds"][who]["median"]
        more = "" if who == "none" else f"{100 * (median / without - 1):.0f} %"
        lines.append(f"| {words[who]} | {words['seconds'].format(median)} | {more} |")
    return lines


def _layer(means: list[dict[str, Any]], words: Mapping[str, str]) -> list[str]:
    from batchnorm.bench.titles import ratio

    keys = ("layout", "dtype", "variant", "pass")
    speeds = {
        tuple(mean[key] for key in keys): mean["speedup"]["torch"]
        for mean in means
        if mean["group"] == "resnet50"
    }
    rows = [f"| {words[name]} | {ratio(speeds[kind])}× |" for name, kind in KINDS.items()]
    return [words["header"], "| --- | --: |", *rows]


def between_markers(text: str, inserted: str, name: str) -> str:
    """Replaces everything between the markers.

    Raises:
        ValueError: A marker is missing.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{name}: the lines {START} and {END} are missing; add them.")
    return f"{before}{START}\n{inserted}\n{END}{after}"


def measured(seconds: float, threads: int | None) -> dict[str, Any]:
    """Measures ResNet-50's shapes in the usual kinds, and all training steps."""
    from batchnorm.allocation import keep_freed_memory
    from batchnorm.bench import cases, clock
    from batchnorm.bench.measure import measure

    keep_freed_memory()
    plan = cases.Plan(cases.plan("usual", ("resnet50",)).cases, cases.NETS["all"])
    return measure(plan, clock.Effort(seconds, 15), threads=threads, announce=_say)


def main() -> int:
    """Tests, measures, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--threads", type=int, help="CPU threads")
    arguments = parser.parse_args()
    for name in WORDS:
        between_markers((ROOT / name).read_text(), "", name)
    if subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=ROOT).returncode != 0:
        print("the tests are red; no times are written before they are green.", file=sys.stderr)
        return 1

    from batchnorm.bench import chart
    from batchnorm.bench.expected import Disagreement

    try:
        results = measured(arguments.seconds, arguments.threads)
    except Disagreement as disagreement:
        print(disagreement, file=sys.stderr)
        return 1
    # Read only now: somebody may have changed the READMEs during the measurement.
    for name in WORDS:
        text = (ROOT / name).read_text()
        write_text(ROOT / name, between_markers(text, tables(results, WORDS[name]), name))
    stamps.write_svg(ROOT / "docs" / "bench.svg", chart.chart(results))
    return 0


def _say(name: str) -> None:
    print(name, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
