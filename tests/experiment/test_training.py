import dataclasses
import json
import math
import time

import pytest
import torch
from torch import nn

from batchnorm.experiment import norm_layers, population, training
from batchnorm.experiment.data import DIGITS, FASHION_MNIST, Dataset
from batchnorm.experiment.defaults import D2L, FOR_DIGITS, Defaults, defaults_for
from batchnorm.experiment.evaluation import Evaluation
from batchnorm.experiment.images import Images
from batchnorm.experiment.results import Settings
from batchnorm.experiment.run_directory import RunDirectory, RunError
from batchnorm.experiment.training import Comparison
from batchnorm.kernels import reference
from batchnorm.moments import unbiased_var
from batchnorm.nets.lenet import NORMS, lenet
from training_cases import EPOCH_FIELDS, pattern


class Quiet:
    """A listener that stops training after some epochs, as Ctrl-C would."""

    def __init__(self, stop_in=None):
        self.stop_in = stop_in
        self.seen = []

    def start(self, norm, done):
        self.seen.append((norm, done))

    def step(self, examples):
        if self.stop_in == (self.seen[-1][0], len(self.seen)):
            raise KeyboardInterrupt

    def epoch(self, norm, record):
        self.seen.append((norm, record.epoch))


@pytest.fixture(scope="module")
def small_data():
    train, test = pattern(300, 0), pattern(60, 1)
    return Dataset("patterns", "this test", *train, *test, tuple("0123456789"))


def settings(**chosen):
    return Settings(
        **{
            "norms": ["batchnorm", "none"],
            "epochs": 2,
            "batch_size": 64,
            "seed": 0,
            "threads": 1,
            "device": "cpu",
            "population_examples": 130,
            **chosen,
        }
    )


def compare(path, data, listener=None, **chosen):
    directory = RunDirectory(path)
    comparison = Comparison(settings(**chosen), data, directory)
    if not (path / "config.json").exists():
        directory.create(comparison.results)
    comparison.train(listener or Quiet())
    return comparison.results


def without_speed(results):
    return [
        epoch.model_copy(update={"examples_per_second": 0.0})
        for run in results.runs
        for epoch in run.epochs
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_all_batch_norms_train_to_the_same_curve(tmp_path, small_data, seed):
    norms = ["batchnorm", "scratch", "torch"]
    results = compare(tmp_path, small_data, norms=norms, seed=seed, epochs=3)
    ours, scratch, torchs = (run.series("loss") for run in results.runs)
    assert ours == pytest.approx(torchs, rel=1e-4)
    assert scratch == pytest.approx(torchs, rel=1e-4)
    assert ours[-1] < 0.8 * ours[0]
    other = compare(tmp_path / "other", small_data, norms=["torch"], seed=seed + 2, epochs=3)
    assert torchs != pytest.approx(other.runs[0].series("loss"), rel=1e-4)


def test_same_seed_same_bits(tmp_path, small_data):
    first = compare(tmp_path / "a", small_data, epochs=1)
    second = compare(tmp_path / "b", small_data, epochs=1)
    assert without_speed(first) == without_speed(second)
    assert first.runs[0].norm_layers == second.runs[0].norm_layers


@pytest.mark.parametrize("stop_in", [("batchnorm", 1), ("batchnorm", 2), ("none", 5)])
def test_resumed_run_ends_with_the_same_numbers(tmp_path, small_data, stop_in):
    whole = compare(tmp_path / "whole", small_data)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "cut", small_data, listener=Quiet(stop_in))
    resumed = compare(tmp_path / "cut", small_data)
    assert without_speed(resumed) == without_speed(whole)
    for run, other in zip(whole.runs, resumed.runs, strict=True):
        assert run.pre_activations == other.pre_activations
        assert run.norm_layers == other.norm_layers
        assert run.complete
        assert other.complete


def test_resuming_a_finished_run_changes_nothing(tmp_path, small_data):
    first = compare(tmp_path, small_data, epochs=1)
    listener = Quiet()
    assert compare(tmp_path, small_data, listener=listener, epochs=1) == first
    assert listener.seen == [("batchnorm", 1), ("none", 1)]


def test_results_and_files(tmp_path, small_data):
    results = compare(tmp_path, small_data, norms=["batchnorm", "none"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["norm"], line["epoch"]) for line in lines] == [
        ("batchnorm", 1),
        ("batchnorm", 2),
        ("none", 1),
        ("none", 2),
    ]
    for run in results.runs:
        assert [list(epoch.model_dump()) for epoch in run.epochs] == [EPOCH_FIELDS] * 2
        assert run.pre_activations[0].epochs == [0, 1, 2]
        assert [layer.layer for layer in run.pre_activations] == ["conv1", "conv2", "fc1", "fc2"]
    ours, none = results.runs
    assert [len(layer.gamma) for layer in ours.norm_layers] == [6, 16, 120, 84]
    assert none.norm_layers == []
    assert [ours.learning_rate, none.learning_rate] == [1.0, 0.9]
    for epoch in none.epochs:
        assert epoch.test_accuracy_running == epoch.test_accuracy_population
    assert RunDirectory(tmp_path).results() == results
    checkpoints = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert checkpoints == [f"{n}-epoch-0{e}.pt" for n in ("batchnorm", "none") for e in (1, 2)]
    state = torch.load(tmp_path / "checkpoints" / "none-epoch-02.pt", weights_only=True)
    lenet("none").load_state_dict(state["model"])
    assert not [path for path in tmp_path.rglob(".*")]


def test_diverged_training_is_written_as_null(tmp_path, small_data):
    results = compare(tmp_path, small_data, norms=["none"], learning_rate=1e38, epochs=1)
    assert not math.isfinite(results.runs[0].epochs[0].loss)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_last_batch_of_one_is_refused(tmp_path, small_data):
    with pytest.raises(ValueError, match=r"would hold one image \(300 images in batches of 13\)"):
        Comparison(settings(batch_size=13), small_data, RunDirectory(tmp_path))


@pytest.mark.parametrize("norm", NORMS)
def test_population_statistics_are_those_of_all_inputs_together(norm):
    torch.manual_seed(0)
    model = lenet(norm)
    images = torch.rand(70, 1, 28, 28)
    population.use_population(model, images.split([40, 23, 7]))
    layers = norm_layers.modules(model)
    assert list(layers) == ([] if norm == "none" else ["conv1", "conv2", "fc1", "fc2"])
    if norm != "none":
        whole = reference.moments(model.get_submodule("conv1")(images).detach())
        first = norm_layers.view(layers["conv1"])
        var = whole.var if norm == "scratch" else unbiased_var(whole)
        for own, expected in ((first.running_mean, whole.mean), (first.running_var, var)):
            torch.testing.assert_close(own.flatten().double(), expected, rtol=1e-5, atol=1e-6)
    assert model.training


@pytest.mark.parametrize("norm", ["scratch", "torch"])
def test_population_statistics_leave_the_model_alone_when_the_loader_fails(norm):
    model = lenet(norm).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def broken():
        yield torch.rand(8, 1, 28, 28)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        population.use_population(model, broken())
    assert not model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("norm", ["scratch", "batchnorm", "torch"])
def test_population_statistics_normalize_in_evaluation(norm):
    torch.manual_seed(0)
    model = lenet(norm)
    images = torch.rand(64, 1, 28, 28)
    population.use_population(model, [images])
    with torch.no_grad():
        evaluated = model.eval()(images)
        trained = model.train()(images)
    # Torch's buffers and ours hold the unbiased variance, 64 / 63 of what training divides by.
    unbiased = {} if norm == "scratch" else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(evaluated, trained, **({"rtol": 1e-4, "atol": 1e-4} | unbiased))


def test_view_names_the_vectors_of_every_layer():
    for module in norm_layers.modules(lenet("scratch")).values():
        layer = norm_layers.view(module)
        assert layer.running_var.shape == layer.gamma.shape
    assert list(norm_layers.modules(nn.Sequential(nn.BatchNorm1d(3)))) == ["0"]


@pytest.mark.parametrize("state", [{}, {"model": {"weight": torch.zeros(1)}}])
def test_checkpoint_of_something_else_is_named(tmp_path, small_data, state):
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / "none-epoch-01.pt")
    with pytest.raises(RunError, match="the last checkpoint of none does not fit this network"):
        compare(tmp_path, small_data, norms=["none"])


def test_warming_up_changes_neither_the_network_nor_the_random_numbers(monkeypatch):
    torch.manual_seed(0)
    model = lenet("batchnorm").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    training.warm_up(model)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_kernels_are_warm_before_the_first_clock_starts(tmp_path, small_data, monkeypatch):
    order = []
    clock = time.perf_counter
    monkeypatch.setattr(training, "warm_up", lambda model: order.append("warm"))
    monkeypatch.setattr(time, "perf_counter", lambda: order.append("clock") or clock())
    compare(tmp_path, small_data, norms=["none"], epochs=1)
    assert order[:2] == ["warm", "clock"]
    assert order.count("warm") == 1


def test_digits_have_defaults_of_their_own(tmp_path, small_data):
    digits = dataclasses.replace(small_data, name=DIGITS)
    (run,) = Comparison(settings(norms=["none"]), digits, RunDirectory(tmp_path)).results.runs
    assert run.learning_rate == FOR_DIGITS.rate_without_norm
    assert defaults_for(DIGITS) == FOR_DIGITS
    assert defaults_for(FASHION_MNIST) == D2L == Defaults(10, 256, 1.0, 0.9)


def test_a_diverged_network_with_batch_norm_does_not_end_the_comparison(small_data):
    model = lenet("torch")
    with torch.no_grad():
        model[0].weight[0] = torch.nan
    images = Images(small_data.train_images, small_data.train_labels)
    evaluation = Evaluation(images, images, settings())
    running, population, layers = evaluation.measure(model)
    assert 0 <= running <= 1
    assert math.isnan(population)
    assert len(layers) == 4


def test_a_device_that_torch_does_not_know_is_one_sentence(tmp_path, small_data):
    with pytest.raises(
        ValueError, match=r"^device must be one that torch knows, .* got 'nonsense'\.$"
    ):
        compare(tmp_path / "run", small_data, device="nonsense")
