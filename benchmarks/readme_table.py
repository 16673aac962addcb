"""Measures, then writes the table of both READMEs and ``docs/bench.svg``; refuses if a test fails.

    python benchmarks/readme_table.py [--seconds S] [--threads N]

In each README the table stands between the lines ``<!-- bench -->`` and ``<!-- /bench -->``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchnorm.files import write_text

ROOT = Path(__file__).parents[1]
START, END = "<!-- bench -->", "<!-- /bench -->"

WORDS: dict[str, dict[str, str]] = {
    "README.md": {
        "header": "| ResNet-50's shapes, 32 images | times as fast as torch.nn | as oneDNN | "
        "useful GB/s | of a copy's speed |",
        "step header": "| training step | without norm | ours | torch.nn | times as fast |",
        "forward": "forward",
        "backward": "backward",
        "both": "forward and backward",
        "eval": "evaluation",
        "images": "{net}, {batch} images of {size}",
        "machine": "Geometric means on {processor}, {threads} threads, torch {torch}; "
        "`python benchmarks/readme_table.py` measures them again.",
        "ms": "ms",
    },
    "README.zh.md": {
        "header": "| ResNet-50 各层的形状，每批 32 张 | 相对 torch.nn 的速度 | 相对 oneDNN | "
        "有效带宽 GB/s | 占拷贝速度 |",
        "step header": "| 一步训练 | 无批量规范化 | 本库 | torch.nn | 速度之比 |",
        "forward": "前向",
        "backward": "反向",
        "both": "前向加反向",
        "eval": "推理",
        "images": "{net}，{batch} 张 {size} 的图像",
        "machine": "{processor}，{threads} 线程，torch {torch}，几何平均；"
        "重新测量：`python benchmarks/readme_table.py`。",
        "ms": "毫秒",
    },
}


def table(results: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """The table of one README, in Markdown."""
    from batchnorm.bench.titles import LAYOUTS, NETS, VARIANTS, milliseconds, ratio, shape

    lines = [words["header"], "| --- | --: | --: | --: | --: |"]
    for mean in results["geometric_means"]:
        name = f"{VARIANTS[mean['variant']]}, {words[mean['pass']]}"
        unusual = [LAYOUTS[mean["layout"]]] * (mean["layout"] != "nchw")
        unusual += [mean["dtype"]] * (mean["dtype"] != "float32")
        speedup = mean["speedup"]
        onednn = f"{ratio(speedup['onednn'])}×" if "onednn" in speedup else ""
        useful, share = mean["bytes_per_second"] / 1e9, 100 * mean["of_copy_speed"]
        lines.append(
            f"| {', '.join([name, *unusual])} | {ratio(speedup['torch'])}× | {onednn} | "
            f"{useful:.1f} | {share:.0f} % |"
        )
    lines += ["", words["step header"], "| --- | --: | --: | --: | --: |"]
    for step in results["steps"]:
        name = words["images"].format(
            net=NETS[step["net"]], batch=step["batch"], size=shape(step["image"])
        )
        times = (
            f"{milliseconds(step['seconds'][who]['median'])} {words['ms']}"
            if who in step["seconds"]
            else ""
            for who in ("none", "batchnorm", "torch")
        )
        lines.append(f"| {name} | {' | '.join(times)} | {ratio(step['speedup'])}× |")
    return "\n".join([*lines, "", words["machine"].format(**results["machine"])])


def between_markers(text: str, inserted: str, name: str) -> str:
    """The text with everything between the markers replaced.

    Raises:
        ValueError: A marker is missing.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{name}: the lines {START} and {END} are missing; add them.")
    return f"{before}{START}\n{inserted}\n{END}{after}"


def measured(seconds: float, threads: int | None) -> dict[str, Any]:
    """ResNet-50's shapes as `batchnorm bench` takes them, and the training steps."""
    from batchnorm.allocation import keep_freed_memory
    from batchnorm.bench import cases, clock
    from batchnorm.bench.measure import measure

    keep_freed_memory()
    plan = cases.plan(cases.Selection(only=("resnet50", "steps")))
    return measure(plan, clock.Effort(seconds, 15), threads=threads, announce=_say)


def main() -> int:
    """Tests, measures, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--threads", type=int, help="CPU threads")
    arguments = parser.parse_args()
    for name in WORDS:
        between_markers((ROOT / name).read_text(), "", name)
    tests = [sys.executable, "-m", "pytest", "-q", "tests/test_functional.py"]
    if subprocess.run(tests, cwd=ROOT).returncode != 0:
        print("the tests are red; no times are written before they are green.", file=sys.stderr)
        return 1

    from batchnorm.bench.truth import Disagreement

    from batchnorm.bench import chart as bench_chart

    try:
        results = measured(arguments.seconds, arguments.threads)
    except Disagreement as disagreement:
        print(disagreement, file=sys.stderr)
        return 1
    # Read now and not before measuring: somebody may have written meanwhile.
    for name in WORDS:
        text = (ROOT / name).read_text()
        write_text(ROOT / name, between_markers(text, table(results, WORDS[name]), name))
    write_text(ROOT / "docs" / "bench.svg", bench_chart.chart(results))
    return 0


def _say(name: str) -> None:
    print(name, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
