"""Every example runs as it stands, without a warning, and says what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TELLING = {
    "federated_averaging": (
        r"variance of all data: +20\.\d\nmean of variances: +[1-4]\.\d\n"
        r"merge_state_dicts: +(19\.[5-9]|20\.\d)\n"
        r"sum of the counters: +2160\n3 x 4 x 60 batches: +720\n"
    ),
    "half_precision_statistics": (
        r"bfloat16: +running mean 0\.[2-6]\d after 5,000 batches, truly 1\.00\n"
        r"kept in float32: running mean (0\.99|1\.00) after"
    ),
    "taking_a_step_back": (
        r"weights alone: +[1-9]\d* of 150 steps taken back, [1-9]\d+ batches of theirs in the s.*\n"
        r"transaction: +[1-9]\d* of 150 steps taken back, 0 batches of theirs in the statistics\n"
    ),
    "mean_teacher": (
        r"teacher, parameters only +0\.[1-6]\d*\n"
        r"(teacher, statistics='\w+' +0\.9\d+, counter 400\n){3}"
    ),
    "stochastic_weight_averaging": (
        r"last weights: +0\.9\d+\naveraged, statistics of the last: +0\.9\d+\n"
        r"Recalibrated 2 layers on 2,000 samples(.|\n)*averaged, recalibrated: +0\.9[5-9]\d*\n"
    ),
    "watching_statistics": (
        r"Half of layer 4 is dead from step 105\.\n"
        r"Batches unlike the running statistics from step 195\.\n"
    ),
    "activation_checkpointing": (
        r"torch's checkpoint: 6 updates, running_mean \d\.\d\dx.*statistics: False\n"
        r"ours: 3 updates, running_mean 1\.00x.*checkpointing: True, statistics: True\n"
        r"torch's within count_recomputation_once: 3 updates.*checkpointing: True, "
        r"statistics: True\n"
    ),
    "amp_overflow": (
        r"torch alone: 1 step skipped, loss in evaluation nan\nPoisoned: 1 of 1 layer(.|\n)*"
        r"guarded: 1 step skipped, loss in evaluation 0\.\d+\n(.|\n)*"
        r"batches  layer\n      1  1\n(.|\n)*none is poisoned"
    ),
    "fine_tuning_with_frozen_batch_norm": (
        r"eval\(\) and requires_grad_\(False\): running_var moved by up to [1-9]\d*%(.|\n)*"
        r"freeze\(model\): running_var moved by 0%(.|\n)*still frozen: True"
    ),
    "sharpness_aware_minimization": (
        r"both passes: 400 updates in 200 steps, running_var off by [1-9]\d%\n"
        r"no_stats_update: 200 updates in 200 steps, running_var off by \d%"
    ),
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_and_tells(path):
    done = subprocess.run(
        [sys.executable, "-W", "error", path],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(TELLING.get(path.stem, r"\w+"), done.stdout), done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short_and_needs_no_arguments(path):
    text = path.read_text()
    assert text.count("\n") <= 120
    assert text.endswith('if __name__ == "__main__":\n    main()\n')


def test_no_expectation_is_left_over():
    assert {path.stem for path in EXAMPLES} >= TELLING.keys()
