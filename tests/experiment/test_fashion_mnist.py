"""The main job: d2l's LeNet on the real Fashion-MNIST, with the defaults of `batchnorm train`."""

import json
import subprocess
import sys

import pytest

from batchnorm.experiment import data


@pytest.mark.images
@pytest.mark.timeout(1500)
def test_lenet_learns_what_the_book_says(fashion_mnist, tmp_path):
    """One test, so that workers do not train it twice; without batch norm the book has 0.82."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "batchnorm", "train", "--threads", "1", "--json"),
            *("--data", str(data.DEBIAN_FOLDER), "--out", str(tmp_path / "run")),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    runs = {run["norm"]: run["epochs"] for run in json.loads(done.stdout)["runs"]}
    ours, none = runs["batchnorm"], runs["none"]
    assert len(ours) == len(none) == 10
    assert ours[-1]["loss"] <= 0.28
    assert ours[-1]["train_accuracy"] >= 0.895
    population = [epoch["test_accuracy_population"] for epoch in ours[-5:]]
    assert min(population) >= 0.84
    assert max(population) >= 0.87
    assert none[-1]["train_accuracy"] >= 0.79
    assert none[-1]["test_accuracy_running"] >= 0.74
    assert none[-1]["loss"] > ours[-1]["loss"] + 0.1
