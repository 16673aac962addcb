"""recalibrate: exact statistics of the data, whatever the batches; nothing else moves."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close

import batchnorm
import model_nets as nets
from batchnorm.tools.recalibration import recalibrate
from everywhere import accelerate
from recalibration_cases import KINDS, bits, net, normal

RAGGED = [torch.zeros(32, 1)] * 9 + [torch.full((2, 1), 10.0)]
DRIFTING = [torch.full((8, 1), float(step)) for step in range(10)]


# Before and after: torch's own tool, and ours.


def test_the_spread_between_batches_counts():
    theirs, ours = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    update_bn(DRIFTING, theirs)
    recalibrate(ours, DRIFTING)
    assert theirs.running_var.item() == 0.0
    assert ours.running_var.item() == pytest.approx(8.354, abs=1e-3)
    assert_close(ours.running_var, torch.cat(DRIFTING).var(0))
    assert_close(ours.running_mean, torch.cat(DRIFTING).mean(0))


def test_a_short_last_batch_weighs_what_it_holds():
    theirs, ours = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    update_bn(RAGGED, theirs)
    recalibrate(ours, RAGGED)
    assert theirs.running_mean.item() == pytest.approx(1.0)
    assert ours.running_mean.item() == pytest.approx(20 / 290)


def test_a_frozen_layer_stays():
    theirs, ours = (nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1)) for _ in range(2))
    theirs[0].eval()
    ours[0].eval()
    update_bn(DRIFTING, theirs)
    before = bits(ours[0])
    result = recalibrate(ours, DRIFTING)
    assert theirs[0].running_mean.item() == 4.5
    assert bits(ours[0]) == before
    assert ours[1].running_mean.item() == pytest.approx(4.5, abs=1e-4)  # x / sqrt(1 + eps)
    assert result.left == {
        "0": "it is frozen: in evaluation mode inside a model in training mode",
    }
    assert [change.name for change in result.layers] == ["1"]


def test_a_loader_that_fails_costs_torch_the_momentum_and_us_nothing():
    def broken():
        yield normal(4, 1)
        raise OSError("loader died")

    theirs, ours = nn.BatchNorm1d(1, momentum=0.3), nn.BatchNorm1d(1, momentum=0.3)
    before = bits(ours)
    with pytest.raises(OSError, match="loader died"):
        update_bn(broken(), theirs)
    with pytest.raises(OSError, match="loader died"):
        recalibrate(ours, broken())
    assert theirs.momentum is None
    assert bits(ours) == before


# What is computed.


@pytest.mark.untyped
@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12).filter(lambda s: sum(s) > 2),
    mean=st.sampled_from([0.0, -3.0, 1e4]),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
)
def test_any_split_gives_the_moments_of_all_data_together(sizes, mean, seed, kind):
    x = normal(sum(sizes), 3, 2, 2, seed=seed, mean=mean)
    layer = kind(3)
    result = recalibrate(layer, x.split(sizes))
    whole = x.double()
    assert_close(layer.running_mean.double(), whole.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    assert_close(layer.running_var.double(), whole.var((0, 2, 3)), rtol=1e-6, atol=0)
    assert layer.num_batches_tracked == len(sizes)
    assert (result.samples, result.batches) == (sum(sizes), len(sizes))
    assert result.layers[0].values == 4 * sum(sizes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_deeper_layers_get_what_training_feeds_them(kind, training):
    model = net(kind).train(training)
    batches = [normal(6, 3, 8, 8, seed=seed) for seed in range(3)]
    recalibrate(model, batches)

    reference = net()
    for layer in (reference[1], reference[4]):
        layer.track_running_stats = False
    inputs = []
    reference[4].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    for batch in batches:
        reference(batch)
    seen = torch.cat(inputs).double()
    assert_close(model[4].running_mean.double(), seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert_close(model[4].running_var.double(), seen.var((0, 2, 3)), rtol=1e-4, atol=1e-6)
    assert all(module.training is training for module in model.modules())


def test_old_statistics_do_not_matter():
    batches = [normal(6, 3, 8, 8)]
    first, second = net(), net()
    with torch.no_grad():
        second[1].running_mean.fill_(torch.nan)
        second[4].running_var.fill_(torch.inf)
    recalibrate(first, batches)
    result = recalibrate(second, batches)
    assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)
    assert json.loads(json.dumps(result.to_dict()))["layers"][1]["var_ratio_max"] == 0.0


def test_one_value_a_channel_counts_and_normalizes_by_all_so_far():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    rows = torch.tensor([[1.0, 2.0], [3.0, -2.0], [8.0, 6.0]])
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        update_bn(rows.split(1), copy.deepcopy(model))
    recalibrate(model, rows.split(1))
    assert_close(model[0].running_mean, rows.mean(0))
    assert_close(model[0].running_var, rows.var(0))
    normalized = []
    for count in (1, 2, 3):
        var, mean = torch.var_mean(rows[:count], 0, correction=0)
        normalized.append((rows[count - 1] - mean) / (var + 1e-5).sqrt())
    assert_close(model[1].running_mean, torch.stack(normalized).mean(0))
    assert_close(model[1].running_var, torch.stack(normalized).var(0))


def test_a_layer_that_is_used_several_times_pools_all_its_calls():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(x) + self.norm(input=10 + 2 * x)

    model, batches = Twins(), [normal(5, 2), normal(3, 2, seed=1)]
    result = recalibrate(model, batches)
    x = torch.cat(batches)
    both = torch.cat([x, 10 + 2 * x])
    assert_close(model.norm.running_mean, both.mean(0))
    assert_close(model.norm.running_var, both.var(0))
    assert (result.layers[0].calls, result.layers[0].values) == (4, 16)
    assert model.norm.num_batches_tracked == 4


def test_layers_out_of_reach_or_without_statistics_are_left_and_reported():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
            self.bare = nn.BatchNorm1d(2, track_running_stats=False)
            self.held = batchnorm.BatchNorm1d(2)
            self.held._batchnorm_frozen = True

        def forward(self, x):
            return self.held(self.bare(self.used(x)))

    model = Branching()
    before = bits(model)["tensors"]
    result = recalibrate(model, [normal(5, 2)])
    after = bits(model)["tensors"]
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {
        "used.running_mean",
        "used.running_var",
        "used.num_batches_tracked",
    }
    assert result.unreached == ("spare",)
    assert result.left == {"bare": "it keeps no running statistics", "held": "it is frozen"}
    assert "Left alone: spare: no batch reached it." in str(result)
    assert model.held.training


def test_only_the_layers_asked_for_and_the_others_compute_as_in_evaluation():
    model = net()
    seen = []
    model[4].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    before = bits(model[1])
    x = normal(6, 3, 8, 8)
    result = recalibrate(model, [x], layers=["4"])
    assert [change.name for change in result.layers] == ["4"]
    assert bits(model[1]) == before
    evaluated = copy.deepcopy(model).eval()
    assert_close(seen[0], evaluated[:4](x).detach())
    assert_close(model[4].running_mean, seen[0].mean((0, 2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_stays_as_it_is(training):
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2)).train(training)
    torch.manual_seed(0)
    recalibrate(model, [torch.ones(4000, 2)])
    if training:
        assert_close(model[1].running_var, torch.ones(2), rtol=0.05, atol=0)
    else:
        assert model[1].running_var.tolist() == [0.0, 0.0]


def test_momentum_none_goes_on_as_one_average():
    batches = [normal(8, 2, seed=seed, mean=seed) for seed in range(4)]
    layer = nn.BatchNorm1d(2, momentum=None)
    recalibrate(layer, batches[:3])
    layer(batches[3])
    assert_close(layer.running_mean, torch.cat(batches).mean(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_rounded_once(dtype):
    layer = batchnorm.BatchNorm1d(2).to(dtype)
    x = normal(50, 2, mean=3).to(dtype)
    recalibrate(layer, x.split(7))
    assert layer.running_mean.dtype == dtype
    whole = x.double()
    assert_close(layer.running_mean, whole.mean(0).to(dtype), rtol=1e-13, atol=0)
    assert_close(layer.running_var, whole.var(0).to(dtype), rtol=1e-13, atol=0)


def test_empty_batches_count_for_nothing():
    layer = nn.BatchNorm1d(2)
    x = normal(5, 2)
    recalibrate(layer, [x[:0], x, x[:0]])
    assert_close(layer.running_var, x.var(0))
    assert layer.num_batches_tracked == 1


# Which models.


def test_an_accelerated_model_collects_in_its_fused_blocks():
    torch.manual_seed(0)
    plain = nets.ResNet()
    ours = copy.deepcopy(plain)
    accelerate(ours)
    batches = [normal(4, 3, 8, 8, seed=seed) for seed in range(3)]
    recalibrate(plain, batches)
    result = recalibrate(ours, batches)
    assert result.unreached == ()
    assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


def test_subclasses_that_always_write_do_not_write():
    torch.manual_seed(0)
    model = nn.Sequential(nets.conv(3, 4), nets.BatchNormAct2d(4), nets.BatchNormAct2d(4))
    frozen = model[2].eval()
    before = bits(frozen)
    x = normal(4, 3, 8, 8)
    recalibrate(model, [x, x])
    got = model[0](x)
    assert_close(model[1].running_mean, got.mean((0, 2, 3)).detach(), rtol=1e-5, atol=1e-6)
    assert model[1].num_batches_tracked == 2
    assert bits(frozen) == before


def test_a_compiled_model_collects_too():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    compiled = torch.compile(model, backend="eager")
    x = normal(9, 2)
    with torch.no_grad():
        compiled(x[:4])  # the very code that would be used again, and knows of no hook
        compiled(x[:1])
    result = recalibrate(compiled, x.split(4))
    assert [change.name for change in result.layers] == ["_orig_mod.1"]
    assert_close(model[1].running_mean, model[0](x).mean(0).detach())


def test_buffers_of_other_modules_are_put_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.register_buffer("steps", torch.zeros(1))
            self.register_buffer("total", torch.zeros(1))
            self.register_buffer("one", torch.ones(1).expand(3))

        def forward(self, x):
            self.steps += 1
            self.total = self.total + 1
            return self.norm(x)

    model = Counting()
    before = bits(model)["tensors"]
    recalibrate(model, [normal(5, 2)])
    after = bits(model)["tensors"]
    assert {name for name in before if before[name] != after[name]} == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }


def test_gradients_are_not_recorded_and_those_of_before_stay():
    model = net()
    model(normal(2, 3, 8, 8)).sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    seen = []
    model[4].register_forward_hook(lambda *call: seen.append(call[2].requires_grad))
    recalibrate(model, [normal(2, 3, 8, 8)])
    assert seen == [False]
    assert_close([parameter.grad for parameter in model.parameters()], grads, rtol=0, atol=0)


def test_without_layers_nothing_runs():
    def never(model, batch):
        raise AssertionError

    with pytest.warns(RuntimeWarning, match=r"recalibrate: nothing is done, the model \(Linear\)"):
        result = recalibrate(nn.Linear(2, 2), [normal(5, 2)], forward=never)
    assert (result.layers, result.samples) == ((), 0)
    assert str(result) == "Nothing was recalibrated."


def test_the_result_reads_as_a_table_and_as_plain_data():
    layer = nn.BatchNorm1d(2, eps=0.0)
    with torch.no_grad():
        layer.running_mean.copy_(torch.tensor([1.0, 2.0]))
        layer.running_var.copy_(torch.tensor([4.0, 1.0]))
    x = torch.tensor([[1.0, 0.0], [3.0, 8.0]])  # means 2 and 4, unbiased variances 2 and 32
    model = nn.ModuleDict({"a_block_of_mine_with_a_very_long_name_of_its_own": layer})
    result = recalibrate(model, [x], forward=lambda m, x: layer(x))
    (change,) = result.to_dict()["layers"]
    assert change == {
        "name": "a_block_of_mine_with_a_very_long_name_of_its_own",
        "mean_shift": 1.25,
        "mean_shift_max": 2.0,
        "var_ratio_min": 0.5,
        "var_ratio_max": 32.0,
        "values": 2,
        "calls": 1,
        "standard_error": None,
    }
    lines, name = str(result).splitlines(), "…with_a_very_long_name_of_its_own"
    assert lines[0].startswith("Recalibrated 1 layer on 2 samples in 1 batch and ")
    assert f"{name:<34}     1.25        2      0.5       32         2" in lines
    assert max(map(len, lines)) <= 80
    assert 0 < result.seconds < 60
