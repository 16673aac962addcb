"""Compares networks before and after `accelerate`, and writes the table of docs/acceleration.md.

    python benchmarks/acceleration.py                  all networks, about half an hour
    python benchmarks/acceleration.py timm.dla34 ...   some of them, without writing

Each network is measured in a process of its own, with one thread and with two, in training (forward
and backward) and in evaluation (under ``torch.inference_mode``), with one image and with sixteen.
The original, `accelerate(model)` and `accelerate(model, example)` take turns, and a ratio is the
median over the turns: above 1 the accelerated network is faster. A row that seems slower than 0.98
is measured again, in three times as many turns. It needs timm and torchvision.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from batchnorm import accelerate
from batchnorm.files import write_text

ROOT = Path(__file__).parents[1]
PIXELS = 128
LEAST = 0.98
SECONDS, TURNS = 1.0, range(7, 31)
NETWORKS = (
    *("torchvision.resnet18", "torchvision.resnet50", "torchvision.vgg11_bn"),
    *("torchvision.densenet121", "torchvision.googlenet", "torchvision.mobilenet_v2"),
    *("torchvision.mobilenet_v3_small", "torchvision.efficientnet_b0"),
    *("torchvision.shufflenet_v2_x1_0", "torchvision.mnasnet1_0", "torchvision.regnet_x_400mf"),
    *("timm.mobilenetv3_small_100", "timm.efficientnet_b0", "timm.regnety_004", "timm.dla34"),
    *("timm.ghostnet_100", "timm.lcnet_050", "timm.resnest14d", "timm.rexnet_100", "timm.mixnet_s"),
)
CELLS = [(batch, training) for batch in (1, 16) for training in (True, False)]


def network(name: str) -> nn.Module:
    """Makes a network with random weights."""
    sys.path.insert(0, str(ROOT / "tests"))
    from real_networks import import_torchvision

    torchvision = import_torchvision()  # timm imports it too
    library, _, name = name.partition(".")
    if library == "torchvision":
        options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
        return torchvision.models.get_model(name, **options)
    import timm

    return timm.create_model(name)


def seconds(model: nn.Module, x: Tensor) -> float:
    """Measures one call, in training with its backward pass."""
    start = time.perf_counter()
    if model.training:
        model(x).square().mean().backward()
    else:
        with torch.inference_mode():
            model(x)
    return time.perf_counter() - start


def ratios(models: list[nn.Module], x: Tensor, turns: range) -> list[float]:
    """Medians of how many times as long the first model takes as each of the others."""
    for model in models:
        seconds(model, x)
        seconds(model, x)
    taken: list[list[float]] = []
    start = time.perf_counter()
    while len(taken) < turns.start or (
        len(taken) < turns.stop and time.perf_counter() - start < SECONDS * len(models)
    ):
        # The order changes, because a call finds the caches as the one before left them.
        first = len(taken) % len(models)
        order = [*range(first, len(models)), *range(first)]
        times = {index: seconds(models[index], x) for index in order}
        taken.append([times[index] for index in range(len(models))])
    return [
        statistics.median(row[0] / row[index] for row in taken) for index in range(1, len(models))
    ]


def measure(name: str, threads: int) -> list[list[float]]:
    """Measures one network: for each of `CELLS` the ratios without and with an example."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    original = network(name)
    found = []
    models: list[nn.Module] = []
    for batch, training in CELLS:
        x = torch.randn(batch, 3, PIXELS, PIXELS)
        if training:
            # Copies all: a network in fresh memory can be 1 % faster than its copy.
            models = [copy.deepcopy(original) for _ in range(3)]
            accelerate(models[1])
            accelerate(models[2], x)
        for model in models:
            model.train(training)
        cell = ratios(models, x, TURNS)
        if min(cell) < LEAST:
            cell = ratios(models, x, range(3 * TURNS.start, 3 * TURNS.stop))
        found.append(cell)
    return found


def table(rows: dict[str, list[list[list[float]]]]) -> str:
    """Formats what was measured, with one thread and with two, as Markdown."""
    lines = [
        "| network | 1 image, training | evaluation | 16 images, training | evaluation |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, (one, two) in rows.items():
        cells = [
            ", ".join(f"{value:.2f}" for value in (*single, *double))
            for single, double in zip(one, two, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures each network in two fresh processes."""
    names = sys.argv[1:] or NETWORKS
    rows: dict[str, list[list[list[float]]]] = {}
    for name in names:
        rows[name] = []
        for threads in (1, 2):
            done = subprocess.run(
                [sys.executable, __file__, "--one", name, str(threads)],
                check=True,
                capture_output=True,
                text=True,
            )
            rows[name].append(json.loads(done.stdout.splitlines()[-1]))
        print(table({name: rows[name]}).splitlines()[-1], flush=True)
    slow = [v for row in rows.values() for run in row for cell in run for v in cell if v < LEAST]
    print(f"{len(slow)} of {16 * len(rows)} ratios are below {LEAST}.")
    if not sys.argv[1:]:
        page = ROOT / "docs/acceleration.md"
        before = page.read_text()
        start = before.index("| network |")
        end = before.index("\n\n", start)
        write_text(page, before[:start] + table(rows) + before[end:])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    else:
        main()
