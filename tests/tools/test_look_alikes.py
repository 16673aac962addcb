"""Layers that are no class of torch: a tool does its work on them, or names them and says why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm
from batchnorm import (
    count_recomputation_once,
    ema_update,
    freeze,
    guard,
    is_frozen,
    keep_statistics_in_float32,
    merge_state_dicts,
    no_stats_update,
    recalibrate,
    reset_poisoned_statistics,
    transaction,
    unfreeze,
    watch,
)
from look_alikes import LIKE, MOVING, UNLIKE, Own, Showing, net, statistics

pytestmark = pytest.mark.untyped
moving = pytest.mark.parametrize("kind", MOVING)
OBEYS = [name for name in LIKE if name != "d2l"]


def are_equal(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", OBEYS)
def test_frozen(kind):
    model, batches = net(kind)
    model(batches[0])
    expected = copy.deepcopy(model).eval()(batches[1])
    result = freeze(model)
    assert (result.layers, result.left) == (("1",), {})
    assert is_frozen(model)
    before = statistics(model[1])
    for batch in batches:
        model.train()(batch).sum().backward()
    assert are_equal(before, statistics(model[1]))
    assert_close(model(batches[1]), expected)
    assert all(p.grad is None for p in model[1].parameters())
    assert unfreeze(model).layers == ("1",)
    assert model[1].training
    assert all(p.requires_grad for p in model[1].parameters())


def test_the_class_of_the_book_cannot_be_frozen_and_is_named():
    model, _ = net("d2l")
    reason = "its forward moves the running statistics in evaluation, too"
    message = rf"freeze: passed over layer '1' \(D2l\), because {reason}\."
    with pytest.warns(RuntimeWarning, match=message):
        result = freeze(model)
    assert result.left == {"1": reason}
    assert str(result) == (
        "Nothing was frozen: no batch norm layer is selected that can be.\n"
        f"Left alone: 1: {reason}."
    )
    assert not is_frozen(model)
    with pytest.raises(
        ValueError, match=rf"freeze: cannot take layer '1' \(D2l\), because {reason}; l"
    ):
        freeze(model, ["1"])


@moving
def test_guarded(kind):
    model, batches = net(kind)
    model(batches[0])
    before = statistics(model[1])
    bad = batches[1].clone()
    bad[0] = float("inf")
    with guard(model) as guarded:
        model(bad)
        assert guarded.skipped == {"1": 1}
        assert are_equal(before, statistics(model[1]))
        model(batches[1])
        assert guarded.skipped == {"1": 1}
    assert not are_equal(before, statistics(model[1]))
    model(bad)
    assert not statistics(model[1])[0].isfinite().all()


def test_a_guard_restores_counters_of_any_name():
    model = Own(3)
    with guard(model):
        model(torch.full((4, 3), torch.nan))
    assert int(model.seen) == 0


@pytest.mark.parametrize("kind", LIKE)
def test_reset(kind):
    model, batches = net(kind)
    model(batches[0])
    layer = model[1]
    mean, var = (
        getattr(layer, name)
        for name in (
            "moving_mean moving_var"
            if hasattr(layer, "moving_mean")
            else "running_mean running_var"
        ).split()
    )
    mean.view(-1)[0], var.view(-1)[1] = torch.nan, -1.0
    healthy = float(var.view(-1)[2])
    found = reset_poisoned_statistics(model)
    assert [(f.layer, f.means, f.vars, f.poisoned) for f in found.layers] == [("1", 1, 1, 2)]
    assert (mean.view(-1)[0], var.view(-1)[1]) == (0, 1)
    assert float(var.view(-1)[2]) == healthy
    assert not reset_poisoned_statistics(model).layers


def test_reset_of_a_state_dict_with_the_names_of_the_book():
    state = net("scratch")[0].state_dict()
    state["1.moving_var"][0, 0] = torch.inf
    found = reset_poisoned_statistics(state)
    assert [(f.layer, f.means, f.vars) for f in found.layers] == [("1", 0, 1)]
    assert state["1.moving_var"].flatten().tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", LIKE)
def test_watched(kind):
    model, batches = net(kind)
    with watch(model) as watched:
        for batch in batches:
            model(batch)
            watched.step()
    last = watched.records[-1]
    inputs = model[0](batches[-1]).detach()
    assert last["layer"] == "1"
    assert last["channels"] == 4
    assert last["batch_mean_low"] == pytest.approx(float(inputs.mean((0, 2, 3)).min()), abs=1e-6)
    assert last["batch_var_high"] == pytest.approx(float(inputs.var((0, 2, 3)).max()), rel=1e-5)
    assert last["running_mean_low"] == pytest.approx(float(statistics(model[1])[0].min()))
    assert last["weight_low"] == 1
    assert (last["mean_drift"] > 0) == (kind in MOVING)


@pytest.mark.parametrize("kind", ["own", "fused", "scratch", "d2l"])
def test_recalibrated(kind):
    model, batches = net(kind)
    result = recalibrate(model, batches)
    assert [change.name for change in result.layers] == ["1"]
    inputs = torch.cat([model[0](batch) for batch in batches]).detach()
    mean, var = statistics(model[1])
    assert_close(mean, inputs.mean((0, 2, 3)))
    assert_close(var, inputs.var((0, 2, 3), unbiased=kind in ("own", "fused")))
    assert model[1].training


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("instance", "its forward does not normalize by the batch in training"),
        ("torchvision frozen", "it never moves its running statistics"),
        ("timm frozen", "it never moves its running statistics"),
    ],
)
def test_not_recalibrated_and_named(kind, reason):
    model, batches = net(kind)
    model.append(nn.BatchNorm2d(4))
    before = statistics(model[1])
    with pytest.warns(
        RuntimeWarning, match=rf"recalibrate: passed over layer '1' .*, because {reason}"
    ):
        result = recalibrate(model, batches)
    assert result.left == {"1": reason}
    assert [change.name for change in result.layers] == ["2"]
    assert f"Left alone: 1: {reason}." in str(result)
    assert are_equal(before, statistics(model[1]))
    with pytest.raises(
        ValueError, match=rf"recalibrate: cannot take layer '1' .*, because {reason}; l"
    ):
        recalibrate(model, batches, layers=["1"])


@moving
def test_without_updates(kind):
    model, batches = net(kind)
    expected = copy.deepcopy(model)(batches[0])
    before = statistics(model[1])
    with no_stats_update(model):
        assert_close(model(batches[0]), expected)
    assert are_equal(before, statistics(model[1]))
    model(batches[0])
    assert not are_equal(before, statistics(model[1]))


@moving
def test_in_a_transaction(kind):
    model, batches = net(kind)
    before = statistics(model[1])
    with transaction(model) as step:
        model(batches[0])
        assert not are_equal(before, statistics(model[1]))
        step.rollback()
        assert are_equal(before, statistics(model[1]))
        model(batches[0])
    assert are_equal(before, statistics(model[1]))
    twin = copy.deepcopy(model)
    twin(batches[0])
    with transaction(model):
        model(batches[0])
    assert are_equal(statistics(twin[1]), statistics(model[1]))


@moving
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_counts_once(kind, reentrant):
    if kind == "d2l" and reentrant:
        pytest.skip("its first pass runs without gradients, which the class takes for evaluation")
    model, batches = net(kind)
    twin = copy.deepcopy(model)
    twin(batches[0])
    x = batches[0].requires_grad_()
    for count_once in (
        lambda m: batchnorm.checkpoint(m, x, use_reentrant=reentrant),
        lambda m: torch.utils.checkpoint.checkpoint(m, x, use_reentrant=reentrant),
    ):
        copied = copy.deepcopy(model)
        with count_recomputation_once(copied):
            count_once(copied).sum().backward()
        assert are_equal(statistics(twin[1]), statistics(copied[1]))


@pytest.mark.parametrize("policy", ["copy", "average", "merge"])
@moving
def test_ema(kind, policy):
    model, batches = net(kind)
    teacher = copy.deepcopy(model)
    model(batches[0])
    means = [statistics(m[1])[0] for m in (teacher, model)]
    ema_update(teacher, model, 0.75, policy)
    expected = means[1] if policy == "copy" else 0.75 * means[0] + 0.25 * means[1]
    assert_close(statistics(teacher[1])[0], expected)


def test_merged_checkpoints_of_the_book_have_biased_variances():
    parts = [
        {"bn.moving_mean": torch.full((1, 2), mean), "bn.moving_var": torch.ones(1, 2)}
        for mean in (0.0, 4.0)
    ]
    merged = merge_state_dicts(parts, [10, 10])
    assert merged["bn.moving_mean"].tolist() == [[2, 2]]
    assert merged["bn.moving_var"].tolist() == [[5, 5]]


def test_kept_in_float32():
    model, batches = net("fused")
    handle = keep_statistics_in_float32(model)
    model.bfloat16()
    assert model[1].running_var.dtype == torch.float32
    assert model(batches[0].bfloat16()).dtype == torch.bfloat16
    handle.remove()
    assert model.bfloat16()[1].running_var.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["own", "scratch", "d2l"])
def test_not_kept_in_float32_and_named(kind):
    model, _ = net(kind)
    reason = "it returns torch.float32 for bfloat16 input"
    with pytest.warns(RuntimeWarning, match=f"keep_statistics_in_float32: passed over .*{reason}"):
        keep_statistics_in_float32(model)
    assert "_apply" not in vars(model[1])


@pytest.mark.parametrize("kind", UNLIKE)
@pytest.mark.parametrize("tool", [freeze, guard, watch, no_stats_update, reset_poisoned_statistics])
def test_what_is_not_like_batch_norm_is_named(kind, tool):
    model, _ = net(kind)
    model.append(nn.BatchNorm2d(4))
    reason = UNLIKE[kind][1]
    message = rf"{tool.__name__}: passed over layer '1' \(\w+\), because {reason}"
    with pytest.warns(RuntimeWarning, match=message):
        tool(model)


def test_a_layer_that_shows_another_ones_statistics_is_not_taken():
    model = Showing(4)
    assert freeze(model).layers == ("bn",)


@pytest.mark.parametrize("change", [lambda m: None, lambda m: setattr(m, "momentum", 0.9)])
def test_trying_a_layer_changes_nothing(change):
    model, batches = net("own")
    change(model[1])
    model[1].register_forward_hook(lambda *_: pytest.fail("the copy has no hooks"))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    freeze(model)
    unfreeze(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    del batches


def test_a_layer_that_fails_when_it_is_tried_is_named():
    class OnlyThree(Own):
        def forward(self, x):
            raise KeyError("mask")

    message = r"it could not be tried on the CPU \(KeyError: 'mask'\)"
    with pytest.warns(RuntimeWarning, match=message):
        result = freeze(nn.Sequential(OnlyThree(3), nn.BatchNorm2d(3)))
    assert result.layers == ("1",)


# Nothing found is no success.

WITHOUT = {
    "no layers": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
    "no tracking": lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)),
    "instance norm": lambda: nn.Sequential(nn.InstanceNorm1d(4)),
}
TOOLS = {
    "freeze": freeze,
    "unfreeze": unfreeze,
    "guard": guard,
    "watch": watch,
    "no_stats_update": no_stats_update,
    "transaction": transaction,
    "count_recomputation_once": count_recomputation_once,
    "keep_statistics_in_float32": keep_statistics_in_float32,
    "reset_poisoned_statistics": reset_poisoned_statistics,
    "recalibrate": lambda model: recalibrate(model, [torch.randn(8, 4)]),
    "ema_update": lambda model: ema_update(copy.deepcopy(model), model, 0.9, "merge"),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("kind", ["no layers", "instance norm"])
def test_no_layer_is_said(kind, tool):
    model = WITHOUT[kind]()
    message = rf"^{tool}: nothing is done, the model \(Sequential\) has no batch norm layers\.$"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        TOOLS[tool](model)
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("tool", ["guard", "reset_poisoned_statistics", "recalibrate"])
def test_layers_without_statistics_are_said(tool):
    message = rf"^{tool}: nothing (is guarded|is checked|was recalibrated)[,;] .*keeps? (no )?runn"
    with pytest.warns(RuntimeWarning, match=message):
        TOOLS[tool](WITHOUT["no tracking"]())


def test_a_selection_that_fits_nothing_is_said():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    for layers in ([], lambda name, layer: False):
        message = r"guard: nothing is done, the model \(Sequential\) has '0', '1'; layers fits none"
        with pytest.warns(RuntimeWarning, match=message):
            guard(model, layers)


def test_a_state_dict_without_statistics_is_said():
    message = "reset_poisoned_statistics: nothing is checked, the mapping has no running statistics"
    with pytest.warns(RuntimeWarning, match=message):
        result = reset_poisoned_statistics(nn.Linear(2, 2).state_dict())
    assert str(result) == "Checked nothing: there are no running statistics."


@pytest.mark.filterwarnings("ignore:.*nothing:RuntimeWarning")
def test_results_say_it_too():
    model = WITHOUT["no layers"]()
    texts = [str(TOOLS[tool](model)) for tool in ("freeze", "guard", "recalibrate")]
    assert texts == [
        "Nothing was frozen: no batch norm layer is selected that can be.",
        "Nothing is guarded: no batch norm layer with running statistics is selected.",
        "Nothing was recalibrated.",
    ]


@pytest.mark.filterwarnings("ignore:.*layers fits none:RuntimeWarning")
@pytest.mark.parametrize("layers", [[], lambda name, layer: False, lambda name, layer: name == "2"])
def test_a_selection_of_none_is_not_said_to_be_a_model_of_none(layers):
    model = nn.Sequential(nn.BatchNorm1d(4), Own(4))
    assert str(freeze(model, layers)) == (
        "Nothing was frozen: no batch norm layer is selected that can be."
    )
    assert str(guard(model, layers)) == (
        "Nothing is guarded: no batch norm layer with running statistics is selected."
    )


@pytest.mark.parametrize("kind", ["instance", "torchvision frozen"])
def test_layers_that_cannot_be_recalibrated_are_said_once(kind):
    model, batches = net(kind)
    with pytest.warns(RuntimeWarning) as caught:
        result = recalibrate(model, batches)
    (warning,) = caught
    assert str(warning.message).startswith("recalibrate: passed over layer '1' (")
    assert list(result.left) == ["1"]


def test_what_is_passed_over_and_what_is_left_alone_are_both_said():
    model, batches = net("instance")
    model.append(nn.BatchNorm2d(4).eval())
    with pytest.warns(RuntimeWarning) as caught:
        result = recalibrate(model, batches)
    assert [str(warning.message).partition(";")[0] for warning in caught] == [
        "recalibrate: passed over layer '1' (InstanceNorm2d), because its forward does not "
        "normalize by the batch in training.",
        "recalibrate: nothing was recalibrated",
    ]
    assert "layer '2': it is frozen" in str(caught[1].message)
    assert result.left.keys() == {"1", "2"}


def test_a_batch_norm_that_no_batch_reaches_is_said():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x):
            return x

    message = "recalibrate: nothing was recalibrated; layer 'bn': no batch reached it"
    with pytest.warns(RuntimeWarning, match=message):
        assert not TOOLS["recalibrate"](Unused()).layers


def test_is_frozen_only_asks():
    assert not is_frozen(nn.Linear(2, 2))
    ema_update(nn.Linear(2, 2), nn.Linear(2, 2), 0.9)
