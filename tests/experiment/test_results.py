"""Results of a run, checked when they are read; numbers as text."""

import copy
import json
import math

import pytest
from pydantic import ValidationError

from batchnorm.charts import numerals
from batchnorm.experiment.results import Results, first_fault
from report_results import results

NAN, INF = math.nan, math.inf


def changed(change):
    """Results with one thing wrong."""
    raw = results()
    change(raw)
    return raw


def test_everything_comes_through():
    raw = results()
    read_back = Results.model_validate(json.loads(json.dumps(raw)))
    assert read_back.data.name == "Fashion-MNIST"
    assert read_back.settings.population_examples == 2560
    normed, plain = read_back.runs
    assert (normed.norm, plain.norm) == ("batchnorm", "none")
    assert normed.normalized
    assert not plain.normalized
    assert plain.norm_layers == []
    assert read_back.baseline is plain
    assert normed.series("loss") == [e["loss"] for e in raw["runs"][0]["epochs"]]
    assert [band.layer for band in normed.pre_activations] == ["conv1", "conv2", "fc1", "fc2"]
    assert normed.pre_activations[0].epochs == list(range(11))
    assert normed.norm_layers[1].gamma == raw["runs"][0]["norm_layers"][1]["gamma"]


def test_checking_leaves_the_input_alone():
    raw = results()
    before = copy.deepcopy(raw)
    Results.model_validate(raw)
    assert raw == before


def test_there_is_no_baseline_among_two_plain_runs():
    assert Results.model_validate(results(("none", "none"))).baseline is None
    assert Results.model_validate(results(("torch",))).baseline is None


def test_null_and_infinity_are_not_finite_and_tell_when_a_run_diverged():
    raw = results()
    raw["runs"][0]["epochs"][2]["loss"] = None
    raw["runs"][0]["epochs"][3]["loss"] = INF
    raw["runs"][1]["epochs"][5]["test_accuracy_running"] = None
    normed, plain = Results.model_validate(raw).runs
    assert math.isnan(normed.epochs[2].loss)
    assert normed.epochs[3].loss == INF
    assert normed.diverged_in == 3
    assert plain.diverged_in is None


def test_names_lose_what_cannot_be_printed_and_keep_the_rest():
    raw = results()
    raw["runs"][0]["norm_layers"][0]["layer"] = "a\x00b\n<i>卷积\ud800"
    raw["data"]["source"] = "x\x1b[31m"
    read_back = Results.model_validate(raw)
    assert read_back.runs[0].norm_layers[0].layer == "a�b�<i>卷积�"
    assert read_back.data.source == "x�[31m"


def test_mean_shift_and_var_ratio():
    raw = results(layers={"conv1": 3})
    raw["runs"][0]["norm_layers"][0].update(
        running_mean=[3.0, 1.0, 0.0],
        population_mean=[1.0, 1.0, 0.0],
        running_var=[1.0, 3.0, 2.0],
        population_var=[4.0, 1.0, 0.0],
    )
    layer = Results.model_validate(raw).runs[0].norm_layers[0]
    assert layer.mean_shift[:2] == [1.0, 0.0]
    assert layer.var_ratio[:2] == [0.25, 3.0]
    assert math.isnan(layer.mean_shift[2])
    assert math.isnan(layer.var_ratio[2])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r.update(schema=2), "expected schema to be 1, got 2"),
        (lambda r: r.clear(), "expected a field schema, but it is missing"),
        (lambda r: r.pop("data"), "expected a field data, but it is missing"),
        (lambda r: r.update(runs=[]), "expected runs to have at least 1 items, got 0"),
        (lambda r: r.update(runs=r["runs"] * 3), "expected runs to have at most 4 items, got 6"),
        (lambda r: r.update(runs="none"), "expected runs to be a list, got 'none'"),
        (
            lambda r: r["settings"].update(epochs="ten"),
            "expected settings.epochs to be an integer, got 'ten'",
        ),
        (
            lambda r: r["runs"][1].update(norm="layer"),
            "expected runs[1].norm to be 'batchnorm', 'scratch', 'torch' or 'none', got 'layer'",
        ),
        (
            lambda r: r["runs"][0]["epochs"][4].pop("loss"),
            "expected a field runs[0].epochs[4].loss, but it is missing",
        ),
        (
            lambda r: r["runs"][0]["epochs"][4].update(loss="low"),
            "expected runs[0].epochs[4].loss to be a number, got 'low'",
        ),
        (
            lambda r: r["runs"][0]["epochs"][4].update(loss=True),
            "expected runs[0].epochs[4].loss to be a number, got True",
        ),
        (
            lambda r: r["runs"][0].update(complete=1),
            "expected runs[0].complete to be true or false, got 1",
        ),
        (
            lambda r: r["data"].update(name=["a"]),
            "expected data.name to be text, got ['a']",
        ),
        (
            lambda r: r["runs"][0]["pre_activations"][0]["points"][1].update(quantiles=[1.0]),
            "expected runs[0].pre_activations[0].points[1].quantiles to have at least 5 items, "
            "got 1",
        ),
        (
            lambda r: r["runs"][0]["norm_layers"][1].update(running_var=[1.0, 2.0]),
            "expected runs[0].norm_layers[1].running_var to have 16 channels like gamma, got 2",
        ),
        (
            lambda r: r["runs"].__setitem__(0, "run"),
            "expected runs[0] to be an object, got 'run'",
        ),
    ],
)
def test_results_that_break_the_schema_are_refused_in_our_words(change, sentence):
    with pytest.raises(ValidationError) as caught:
        Results.model_validate(changed(change))
    assert first_fault(caught.value) == sentence


def test_every_kind_of_fault_has_words():
    """A fault without words of ours would show pydantic's name of it."""
    with pytest.raises(ValidationError) as caught:
        Results.model_validate([])
    assert first_fault(caught.value) == "expected everything to be an object, got []"


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (numerals.decimal(0.29949), "0.299"),
        (numerals.decimal(-0.5, 1), "−0.5"),
        (numerals.decimal(123456789.0), "1.23e+08"),
        (numerals.decimal(NAN), "NaN"),
        (numerals.decimal(INF), "∞"),
        (numerals.decimal(-INF), "−∞"),
        (numerals.percent(0.742), "74.2%"),
        (numerals.percent(NAN), "NaN"),
        (numerals.count(60000.0), "60,000"),
        (numerals.count(INF), "∞"),
        (numerals.short(0.5), "0.5"),
        (numerals.short(-2.0), "−2"),
        (numerals.short(NAN), "NaN"),
        (numerals.significant(0.00012345), "0.0001234"),
        (numerals.significant(-1234.5678), "−1235"),
        (numerals.significant(3.86), "3.860"),
        (numerals.significant(NAN), "NaN"),
        (numerals.span([0.695, NAN, 0.875]), "69.5–87.5%"),
        (numerals.span([0.875]), "87.5%"),
        (numerals.span([NAN]), "NaN"),
    ],
)
def test_numbers_as_text(written, text):
    assert written == text


@pytest.mark.parametrize("field", ["epochs", "batch_size", "threads", "population_examples"])
def test_counts_are_at_least_one(field):
    with pytest.raises(ValidationError) as caught:
        Results.model_validate(changed(lambda r: r["settings"].update({field: 0})))
    assert first_fault(caught.value) == f"expected settings.{field} to be at least 1, got 0"
