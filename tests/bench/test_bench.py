"""What the benchmark measures, that it checks first, and that its clock and its sums are right."""

import dataclasses
import gc
import math
import time
from collections import Counter
from itertools import pairwise, permutations

import pytest
import torch
from torch import nn

from batchnorm.bench import cases, clock, expected, measure, rivals, summary
from batchnorm.bench.cases import Case, Plan
from batchnorm.bench.clock import Effort, Timed
from batchnorm.bench.expected import Disagreement

ONCE = Effort(0.0, 1)
SMALL = [
    Case("resnet50", (4, 6, 5, 5), layout, precision, variant)
    for layout in cases.LAYOUTS
    for precision in cases.PRECISIONS
    for variant in cases.VARIANTS
] + [
    Case("nc", (12, 5)),
    Case("1d", (4, 5, 7), variant="add-relu"),
    Case("3d", (2, 3, 4, 5, 5), "channels_last", "float32", "relu"),
]


def kinds(plan):
    return {(c.layout, c.precision, c.variant, c.passes) for c in plan.cases}


def test_usual_rows_are_every_shape_in_the_usual_kinds():
    plan = cases.plan()
    assert {c.shape for c in plan.cases} == {s for shapes in cases.SHAPES.values() for s in shapes}
    of_resnet = [c for c in plan.cases if c.group == "resnet50"]
    assert len(of_resnet) == 5 * 12
    assert ("channels_last", "float32", "bn", ("both",)) in kinds(plan)
    assert ("nchw", "bfloat16", "bn", ("both",)) in kinds(plan)
    assert all(c.variant == "bn" for c in plan.cases if c.group != "resnet50")
    assert plan.nets == ("lenet", "resnet18")


def test_words_of_one_sort_are_alternatives_and_of_different_sorts_apply_together():
    plan = cases.plan("usual", ("relu", "add-relu"))
    assert plan.nets == ()
    assert kinds(plan) == {
        ("nchw", "float32", "relu", ("both",)),
        ("nchw", "float32", "add-relu", ("both",)),
    }
    plan = cases.plan("all", ("relu", "eval", "nc", "3d"))
    assert {(c.group, c.variant, c.passes) for c in plan.cases} == {
        ("nc", "relu", ("eval",)),
        ("3d", "relu", ("eval",)),
    }
    assert {c.layout for c in plan.cases if c.group == "3d"} == set(cases.LAYOUTS)
    assert {c.passes for c in cases.plan("usual", ("forward", "eval")).cases} == {
        ("forward", "eval")
    }


@pytest.mark.parametrize("only", [("nc", "channels_last"), ("steps", "relu"), ("1d", "relu")])
def test_words_that_no_row_has_together_are_refused(only):
    with pytest.raises(ValueError, match=f"no row fits {', '.join(only)}; leave out a word, or"):
        cases.plan("usual", only)


def test_steps_are_measured_when_named_and_alone_when_alone():
    alone = cases.plan("usual", ("steps",))
    assert (alone.cases, alone.nets) == ((), ("lenet", "resnet18"))
    both = cases.plan("all", ("nc", "steps", "relu"))
    assert {c.group for c in both.cases} == {"nc"}
    assert both.nets == ("lenet", "resnet18", "resnet50")


def test_all_is_every_combination_that_exists():
    plan = cases.plan("all")
    assert len([c for c in plan.cases if c.group == "resnet50"]) == 12 * 2 * 2 * 3
    assert all(len(c.shape) in (4, 5) for c in plan.cases if c.layout == "channels_last")
    assert all(c.passes == cases.PASSES for c in plan.cases)


def test_quick_is_a_part():
    plan = cases.plan("quick")
    assert len({c.shape for c in plan.cases if c.group == "resnet50"}) == 3
    assert plan.nets == ("lenet",)


@pytest.mark.parametrize(
    ("variant", "tensors"),
    [
        ("bn", {"forward": 2, "backward": 3, "both": 5, "eval": 2}),
        ("relu", {"forward": 2, "backward": 3, "both": 5, "eval": 2}),
        ("add-relu", {"forward": 3, "backward": 4, "both": 7, "eval": 3}),
    ],
)
def test_least_bytes_count_each_tensor_once(variant, tensors):
    for precision, size in (("float32", 4), ("bfloat16", 2)):
        case = Case("nc", (3, 5), precision=precision, variant=variant)
        assert {p: cases.least_bytes(case, p) for p in cases.PASSES} == {
            measured: 15 * size * count for measured, count in tensors.items()
        }


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_everyone_agrees_with_float64(case):
    operands, answers = expected.problem(case)
    got = {n: r.answers(case) for n, r in rivals.rivals_of(case, operands).items()}
    assert {"batchnorm", "torch"} <= set(got)
    assert ("onednn" in got) == (
        (case.layout, case.precision, case.variant, len(case.shape)) == ("nchw", "float32", "bn", 4)
    )
    expected.check(case, got, answers)
    names = {"output", "output in evaluation", "gradient of x", "running variance"}
    assert names <= set(answers)
    assert ("gradient of residual" in answers) == (case.variant == "add-relu")


def test_expected_answers_follow_the_formula():
    case = Case("nc", (7, 3), variant="add-relu")
    operands, answers = expected.problem(case)
    x = operands.x.double()
    x_hat = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    y = (x_hat * operands.weight + operands.bias + operands.residual).relu()
    torch.testing.assert_close(answers["output"], y)
    behind_relu = operands.grad_output * (y > 0)
    torch.testing.assert_close(answers["gradient of residual"], behind_relu.double())
    torch.testing.assert_close(answers["gradient of weight"], (behind_relu * x_hat).sum(0))


def test_no_gradient_depends_on_a_rounded_sign():
    case = Case("nc", (2000, 4), precision="bfloat16", variant="add-relu")
    operands, answers = expected.problem(case)
    close = (answers["output"] < 1e-3) & (answers["output"] > 0)
    assert close.any()
    assert operands.grad_output[close].abs().max() == 0
    assert operands.grad_output.count_nonzero() > 0.8 * operands.grad_output.numel()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda t: t.mul_(1.01), "torch's gradient of x is off by 1.0e-02 of the largest value"),
        (lambda t: t[0, 0].fill_(math.nan), "torch's gradient of x is off by nan"),
    ],
)
def test_one_wrong_tensor_is_named(spoil, sentence):
    case = Case("nc", (12, 5))
    operands, answers = expected.problem(case)
    got = {n: r.answers(case) for n, r in rivals.rivals_of(case, operands).items()}
    spoil(got["torch"]["gradient of x"])
    with pytest.raises(Disagreement, match=r"nc 12x5 float32 nchw bn: ") as raised:
        expected.check(case, got, answers)
    (only,) = raised.value.sentences
    assert sentence in only
    assert only.endswith("1e-04 is allowed.")


def test_only_the_answers_that_are_measured_are_asked_for():
    case = Case("nc", (12, 5), passes=("eval",))
    operands, answers = expected.problem(case)
    assert list(answers) == ["output in evaluation"]
    ours = rivals.rivals_of(case, operands)["batchnorm"]
    assert list(ours.answers(case)) == ["output in evaluation"]


def test_the_torch_user_normalizes_adds_and_clips_in_place():
    case = Case("resnet50", (2, 3, 4, 4), variant="add-relu")
    layer = rivals.TorchLayer(case)
    x, residual = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    plain = nn.BatchNorm2d(3)(x)
    torch.testing.assert_close(layer(x, residual), (plain + residual).relu())
    assert rivals.our_layer(case).activation == "relu"
    assert rivals.our_layer(Case("nc", (2, 3))).activation is None


def test_saved_memory_counts_each_storage_once():
    case = Case("resnet50", (4, 6, 5, 5), variant="relu")
    operands, _ = expected.problem(case)
    tensor = operands.x.numel() * 4
    torchs = rivals.rivals_of(case, operands)["torch"].saved_bytes()
    assert 2 * tensor < torchs <= 2 * tensor + 6 * 6 * 4  # x, ReLU's output, six vectors at most
    plain, _ = expected.problem(dataclasses.replace(case, variant="bn"))
    kept = rivals.rivals_of(dataclasses.replace(case, variant="bn"), plain)["torch"]
    assert tensor < kept.saved_bytes() <= tensor + 6 * 6 * 4


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcd", "abcde"])
def test_everyone_follows_everyone_else_equally_often(names):
    orders = clock.orders(names)
    assert all(sorted(order) == list(names) for order in orders)
    pairs = Counter(pair for order in orders for pair in pairwise(order))
    assert set(pairs) == set(permutations(names, 2))
    assert len(set(pairs.values())) <= 1


def test_every_round_has_a_sample_of_everyone():
    calls = []
    timed = {
        name: Timed(lambda _, name=name: (calls.append(name), time.sleep(0.0005))) for name in "abc"
    }
    samples = clock.interleaved(timed, Effort(0.0, 3))
    orders = ["".join(order) for order in clock.orders("abc")]
    assert "".join(calls[3 * clock.WARM_UP :]) == "".join(orders[:3])
    assert all(len(values) == 3 and min(values) >= 0.0005 for values in samples.values())


def test_quick_calls_are_repeated_and_preparation_is_not_timed():
    prepared, called = [], []

    def prepare():
        prepared.append(None)
        time.sleep(0.001)
        return len(prepared)

    samples = clock.interleaved({"a": Timed(called.append, prepare)}, Effort(0.0, 2))
    assert called == list(range(1, len(prepared) + 1))
    assert len(called) > 2 + clock.WARM_UP
    assert max(samples["a"]) < 0.001


def test_rounds_go_on_until_the_time_is_up():
    nap = {"a": Timed(lambda _: time.sleep(0.002))}
    assert len(clock.interleaved(nap, Effort(0.05, 1))["a"]) > 5


def test_garbage_is_collected_outside_of_the_clock_only():
    states = []
    clock.interleaved({"a": Timed(lambda _: states.append(gc.isenabled()))}, ONCE)
    assert states[-1] is False
    assert gc.isenabled()


def test_a_summary_is_a_median_between_quartiles():
    assert clock.summary([4.0, 1.0, 2.0, 3.0, 100.0]) == {
        "median": 3.0,
        "low": 2.0,
        "high": 4.0,
        "rounds": 5,
    }
    assert clock.summary([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0, "rounds": 1}


def row(speedup, shape=(2, 2), **changes):
    kind = {"group": "nc", "layout": "nchw", "dtype": "float32", "variant": "bn", "pass": "both"}
    sums = {"bytes_per_second": 1e9, "of_copy_speed": 0.5, "to_copy_time": 2.0}
    return {**kind, "shape": list(shape), "speedup": speedup, **sums, **changes}


def test_geometric_means_stand_for_one_kind_each():
    rows = [
        row({"torch": 1.0, "compile": 2.0}, to_copy_time=1.0),
        row({"torch": 8.0}, variant="relu"),
        row({"torch": 4.0}, to_copy_time=4.0),
    ]
    plain, relu = summary.geometric_means(rows)
    assert (plain["variant"], relu["variant"]) == ("bn", "relu")
    assert (plain["shapes"], relu["shapes"]) == (2, 1)
    assert plain["speedup"] == {"torch": pytest.approx(2.0)}
    assert plain["to_copy_time"] == pytest.approx(2.0)
    assert plain["bytes_per_second"] == pytest.approx(1e9)
    assert summary.geometric_means([]) == []


def test_rows_that_lost_clearly_are_listed():
    rows = [row({"torch": speedup}, (n, 2)) for n, speedup in enumerate((0.90, 0.96, 1.2))]
    (lost,) = summary.slower(rows)
    assert (lost["shape"], lost["speedup"]) == ([0, 2], 0.90)


def test_share_of_cost_is_of_what_the_norm_adds():
    seconds = {
        name: {"median": value} for name, value in zip("abc", (14.0, 20.0, 10.0), strict=True)
    }
    named = {"batchnorm": seconds["a"], "torch": seconds["b"], "none": seconds["c"]}
    assert summary.share_of_cost(named) == pytest.approx(0.4)
    named["torch"] = {"median": 9.0}
    assert math.isnan(summary.share_of_cost(named))


def test_measure_gives_plain_results_and_restores_the_threads():
    before = torch.get_num_threads()
    told = []
    plan = Plan((Case("resnet50", (4, 6, 5, 5)), Case("nc", (12, 5), passes=("eval",))), ())
    results = measure.measure(plan, ONCE, threads=1, announce=told.append)
    assert torch.get_num_threads() == before
    assert results["machine"]["threads"] == 1
    assert told == ["resnet50 4x6x5x5 float32 nchw bn", "nc 12x5 float32 nchw bn"]
    assert [r["pass"] for r in results["rows"]] == ["forward", "backward", "both", "eval", "eval"]
    first = results["rows"][0]
    assert set(first["seconds"]) == {"batchnorm", "torch", "onednn", "copy"}
    ours, theirs, copy = (first["seconds"][n]["median"] for n in ("batchnorm", "torch", "copy"))
    assert first["speedup"]["torch"] == theirs / ours
    assert first["least_bytes"] == 2 * 600 * 4
    assert first["bytes_per_second"] == pytest.approx(first["least_bytes"] / ours)
    assert first["of_copy_speed"] == pytest.approx(copy / ours)
    assert first["to_copy_time"] == pytest.approx(ours / copy)
    (memory,) = results["memory"]
    assert memory["tensor_bytes"] == 600 * 4
    assert set(memory["saved_bytes"]) == {"batchnorm", "torch"}
    assert len(results["geometric_means"]) == 5


def test_nothing_is_timed_when_somebody_disagrees(monkeypatch):
    monkeypatch.setitem(expected.TOLERANCE, "float32", 1e-12)
    monkeypatch.setattr(measure, "interleaved", lambda *_: pytest.fail("the clock ran"))
    with pytest.raises(Disagreement, match=r"is off by .* of the largest value, 1e-12 is allowed"):
        measure.measure(Plan((Case("nc", (12, 5)),), ()), ONCE)


def test_a_compiler_that_fails_is_named(monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("InductorError: no headers\nlong story")

    def compiled(module, **options):
        module.forward = fail.__get__(module)

    monkeypatch.setattr(rivals.TorchLayer, "compile", compiled)
    plan = Plan((Case("nc", (12, 5)),), ())
    with pytest.raises(
        rivals.CompilerFailed,
        match=r"torch.compile failed on nc .* \(InductorError: no headers\); leave out --compile.",
    ):
        measure.measure(plan, ONCE, compiled=True)
