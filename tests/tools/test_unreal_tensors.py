"""What passes without values (exports, fake tensors, meta) is recorded by no tool."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import batchnorm
from batchnorm import (
    count_recomputation_once,
    ema_update,
    freeze,
    guard,
    keep_statistics_in_float32,
    merge_state_dicts,
    no_stats_update,
    recalibrate,
    reset_poisoned_statistics,
    transaction,
    watch,
)
from look_alikes import Own

pytestmark = pytest.mark.untyped


def net(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU())


def images():
    return torch.randn(4, 3, 9, 9)


def exported(model):
    torch.export.export(model, (images(),))


def strictly_exported(model):
    torch.export.export(model, (images(),), strict=True)


def faked(model):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        copied = mode.from_tensor(images())
        model(copied)


def on_meta(model):
    twin = copy.deepcopy(model).to("meta")
    twin(images().to("meta"))


def traced(model):
    make_fx(lambda x: model(x), tracing_mode="fake", _allow_non_fake_inputs=True)(images())


def mapped(model):
    torch.func.vmap(lambda x: model(x[None]), randomness="error")(images())


PASSES = {
    "export": exported,
    "strict export": strictly_exported,
    "fake": faked,
    "meta": on_meta,
    "make_fx": traced,
    "vmap": mapped,
}
NORMS = {"torch": nn.BatchNorm2d, "ours": batchnorm.BatchNorm2d, "own": Own}
passes = pytest.mark.parametrize("unreal", PASSES)
norms = pytest.mark.parametrize("norm", NORMS)


@passes
@norms
def test_watched(unreal, norm):
    model = net(NORMS[norm]).eval()
    watched = watch(model)
    PASSES[unreal](model)
    watched.step()
    assert watched.records[-1]["batch_mean_low"] is None
    x = images()
    model(x)
    watched.step()
    expected = float(model[0](x).detach().mean((0, 2, 3)).min())
    assert watched.records[-1]["batch_mean_low"] == pytest.approx(expected, abs=1e-6)
    copy.deepcopy(model)(x)


@pytest.mark.parametrize("unreal", ["export", "meta", "make_fx"])
@norms
def test_guarded_in_training(unreal, norm):
    model = net(NORMS[norm])
    guarded = guard(model)
    before = {n: b.clone() for n, b in model.named_buffers()}
    PASSES[unreal](model)
    if unreal != "make_fx":  # It traces side effects with the real buffers, without a guard too.
        assert all(torch.equal(before[n], b) for n, b in model.named_buffers())
    assert guarded.skipped == {}
    x = images()
    x[0] = torch.nan
    model(x)
    assert guarded.skipped == {"1": 1}
    assert model[1].running_mean.isfinite().all()
    copy.deepcopy(model)(x)


@passes
@norms
def test_with_all_tools_at_once(unreal, norm):
    model = net(NORMS[norm]).eval()
    freeze(model, affine=False)
    tools = [guard, watch, count_recomputation_once, no_stats_update]
    handles = [tool(model) for tool in tools]
    PASSES[unreal](model)
    for handle in reversed(handles):
        handle.remove()
    for tensor in (*model.parameters(), *model.buffers()):
        assert type(tensor) in (torch.Tensor, nn.Parameter)
    copy.deepcopy(model)(images())


def test_a_transaction_around_an_export():
    model = net()
    with transaction(model):
        exported(model)
    assert int(model[1].num_batches_tracked) == 0
    model(images())
    assert int(model[1].num_batches_tracked) == 1


def test_a_model_without_values():
    with torch.device("meta"):
        model = net()
    handles = [guard(model), watch(model), no_stats_update(model)]
    handles.append(keep_statistics_in_float32(model))
    freeze(model)
    model(images().to("meta"))
    handles[1].step()
    assert handles[1].records[-1]["running_mean_low"] is None
    message = "running_mean of layer '1' is on the meta device or fake and has no values; load them"
    with pytest.raises(ValueError, match=f"reset_poisoned_statistics: {message} first"):
        reset_poisoned_statistics(model)
    batchnorm.unfreeze(model)
    with pytest.raises(
        ValueError, match=r"recalibrate: layer '1' \(BatchNorm2d\) is on the meta d"
    ):
        recalibrate(model, [images()])
    model.to_empty(device="cpu")
    model[0].reset_parameters()
    for name, tensor in model[1].state_dict().items():
        tensor.fill_(float(name in ("weight", "running_var")))
    model(images())
    handles[1].step()
    assert handles[1].records[-1]["running_mean_low"] == 0


def test_recalibration_takes_no_fake_batches():
    model = net()
    before = model[1].running_mean.clone()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(images())
    for batch in (fake, (images().to("meta"), 3), {"input": fake}):
        message = "recalibrate: a batch is on the meta device or fake and has no values; give real"
        with pytest.raises(ValueError, match=message):
            recalibrate(model, [images(), batch])
        assert torch.equal(model[1].running_mean, before)


def fake():
    with FakeTensorMode():
        return nn.BatchNorm2d(4)


def meta():
    return nn.BatchNorm2d(4).to("meta")


def fake_statistics():
    layer = nn.BatchNorm2d(4)
    layer.running_mean = fake().running_mean
    return layer


UNREAL = {
    "fake": (fake, "weight"),
    "meta": (meta, "weight"),
    "fake statistics": (fake_statistics, "running_mean"),
}


@pytest.mark.parametrize("policy", ["copy", "average", "merge"])
@pytest.mark.parametrize("place", ["target", "model"])
@pytest.mark.parametrize("kind", UNREAL)
def test_averages_of_models_without_values_are_refused(kind, place, policy):
    models = {"target": nn.BatchNorm2d(4), "model": nn.BatchNorm2d(4)}
    make, name = UNREAL[kind]
    models[place] = make()
    (other,) = models.keys() - {place}
    nn.init.constant_(models[other].weight, 3.0)
    where = "on the meta device" if kind == "meta" else "fake"
    message = f"ema_update: {name} is {where} in the {place} and has no values; load them first"
    with pytest.raises(ValueError, match=message):
        ema_update(models["target"], models["model"], 0.5, policy)
    assert models[other].weight.tolist() == [3] * 4


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("kind", UNREAL)
def test_checkpoints_without_values_are_not_merged(kind, place):
    make, name = UNREAL[kind]
    states = [nn.BatchNorm2d(4).state_dict(), nn.BatchNorm2d(4).state_dict()]
    states[place] = make().state_dict()
    message = f"{name} is on the meta device or fake in checkpoint {place} and has no values; load"
    with pytest.raises(ValueError, match=message):
        merge_state_dicts(states, [8, 8])


def test_a_fake_counter_is_refused():
    states = [{"num_batches_tracked": fake().num_batches_tracked}]
    with pytest.raises(ValueError, match="num_batches_tracked in checkpoint 0 is fake and has no"):
        merge_state_dicts(states, [8])
