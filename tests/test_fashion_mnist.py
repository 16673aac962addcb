"""The main job: d2l's LeNet on the real Fashion-MNIST, with the defaults of `batchnorm train`."""

import json
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.images,
    pytest.mark.timeout(1500),
    pytest.mark.xdist_group("training"),
]


@pytest.fixture(scope="module")
def runs(fashion_mnist, tmp_path_factory):
    out = tmp_path_factory.mktemp("main") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "batchnorm", "train", "--threads", "1", "--json", "--out", str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    return {run["norm"]: run["epochs"] for run in json.loads(done.stdout)["runs"]}


def test_batch_norm_learns_as_well_as_the_book_says(runs):
    epochs = runs["batchnorm"]
    assert len(epochs) == 10
    assert epochs[-1]["loss"] <= 0.28
    assert epochs[-1]["train_accuracy"] >= 0.895


def test_population_statistics_do_not_jump(runs):
    last_five = [epoch["test_accuracy_population"] for epoch in runs["batchnorm"][-5:]]
    assert min(last_five) >= 0.84
    assert max(last_five) >= 0.87


def test_without_batch_norm_lenet_learns_less(runs):
    """The book prints a training accuracy of 0.82 after ten epochs without batch norm."""
    last = runs["none"][-1]
    assert last["train_accuracy"] >= 0.79
    assert last["test_accuracy_running"] >= 0.74
    assert last["loss"] > runs["batchnorm"][-1]["loss"] + 0.1
