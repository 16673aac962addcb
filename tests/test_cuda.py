"""The layers and every tool once more on a GPU, against the same in float64 on the CPU."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils import checkpoint as torchs

import batchnorm
import model_nets as nets
from calls import ours, results
from cases import CASES, arguments_of
from layer_kinds import everything, layers_of, statistics
from model_cases import EXACT, relus_and_additions
from recalibration_cases import layer_by_layer, net, normal
from scales import assert_close_for, scales

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
FINE = {"rtol": 1e-9, "atol": 1e-9}

both = [nn.BatchNorm2d, batchnorm.BatchNorm2d]
kinds = pytest.mark.parametrize("kind", both, ids=["torch's", "ours"])


@contextmanager
def waiting_is(mode: str):
    """What happens when something waits for the device: an "error", or a warning ("warn")."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def images(count: int = 6, seed: int = 0, **options) -> torch.Tensor:
    return normal(count, 3, 8, 8, seed=seed, **options).to(DEVICE)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def grads(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


# The function and the layers.


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_on_the_cpu_in_float64_up_to_rounding(case, training):
    if not (training or case.statistics):
        pytest.skip("inference needs statistics")
    arguments = arguments_of(case)
    sizes = scales(arguments, training)
    there = arguments.on(DEVICE, case.layout)
    exact = results(ours, arguments.widened(), case, training)
    got = results(ours, there, case, training)
    assert got["y"].stride() == torch.empty_like(there.x).stride()
    for name in exact:
        assert_close_for(sizes[name], got[name].cpu(), exact[name], name)


def test_who_computes():
    assert batchnorm.which_backend(images()) == (
        "The reference computes this input, in eager torch and float64. The Numba kernels cannot: "
        "it is on cuda:0, and these kernels are for the CPU. torch calls it through the operator "
        "torch.ops.batchnorm.forward."
    )


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layers_train_as_on_the_cpu_and_never_wait(dtype, memory_format, momentum):
    ours = batchnorm.BatchNorm2d(3, momentum=momentum, activation="relu").to(DEVICE)
    exact = batchnorm.BatchNorm2d(3, momentum=momentum, activation="relu").double()
    for seed in range(3):
        x = images(seed=seed, mean=3.0).to(dtype, memory_format=memory_format).requires_grad_()
        wide = x.detach().cpu().double().requires_grad_()
        for training in (True, False):
            with waiting_is("error"):
                y = ours.train(training)(x, x)
                y.sum().backward()
            expected = exact.train(training)(wide, wide)
            expected.sum().backward()
            assert y.is_contiguous(memory_format=memory_format)
            eps = torch.finfo(dtype).eps
            assert_close(y.cpu().double(), expected, rtol=eps, atol=8 * eps)
    assert_close(x.grad.cpu().double(), wide.grad, rtol=2 * eps, atol=8 * eps)
    for name, tensor in state(exact).items():
        assert_close(state(ours)[name].cpu().to(tensor.dtype), tensor, rtol=1e-6, atol=1e-6)


def test_errors_change_nothing():
    layer = batchnorm.BatchNorm2d(3)
    with pytest.raises(RuntimeError, match="running_mean must be on the input's device cuda:0, g"):
        layer(images())
    layer.to(DEVICE)
    before = everything(layer)
    with pytest.raises(RuntimeError, match="running_mean must be on the input's device cpu, got"):
        layer(images().cpu())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when tr"):
        layer(images(1)[:, :, :1, :1])
    assert everything(layer) == before


@pytest.mark.parametrize("training", [True, False])
def test_first_and_second_derivatives(training):
    layer = batchnorm.BatchNorm2d(2, momentum=0.0).to(DEVICE, torch.float64).train(training)
    inputs = [images(3, seed)[:, :2, :2, :2].double().requires_grad_() for seed in (1, 2)]
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


@pytest.mark.parametrize("training", [True, False])
def test_layers_in_a_captured_graph(training):
    layer = batchnorm.BatchNorm2d(3, activation="relu").to(DEVICE).train(training)
    eager = copy.deepcopy(layer)
    place, graph = images(), torch.cuda.CUDAGraph()
    copy.deepcopy(layer)(place)  # whatever is set up by a first call
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(place)
    for seed in (1, 2):
        place.copy_(images(seed=seed, mean=5.0))
        graph.replay()
        assert_close(y, eager(images(seed=seed, mean=5.0)), **EXACT)
    assert_close(state(layer), state(eager), **EXACT)


# The tools.


@kinds
def test_recalibrate_gives_the_moments_of_all_data(kind):
    x = images(50, mean=1e4)
    parts = x.split([20, 1, 8, 21])
    layer = kind(3).to(DEVICE)
    report = batchnorm.recalibrate(layer, parts)
    assert_close(layer.running_mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    assert_close(layer.running_var.double(), x.double().var((0, 2, 3)), rtol=1e-6, atol=0)
    assert (report.samples, layer.num_batches_tracked.item()) == (50, 4)

    model = net(kind).to(DEVICE, torch.float64)
    expected = layer_by_layer(model, x)
    batchnorm.recalibrate(model, [part.double() for part in parts], sequential=True)
    for name, (mean, var) in expected.items():
        assert_close(model.get_submodule(name).running_mean, mean, **FINE)
        assert_close(model.get_submodule(name).running_var, var, **FINE)


@kinds
def test_recalibrate_stops_when_it_knows_enough_and_fails_without_a_trace(kind):
    model = net(kind).to(DEVICE)
    before = everything(model)
    with pytest.raises(ValueError, match=r"got values that are not finite; the model is as it was"):
        batchnorm.recalibrate(model, [images(), images(mean=math.nan)])
    assert everything(model) == before
    batches = [images(seed=seed) for seed in range(40)]
    assert batchnorm.recalibrate(model, batches, tolerance=0.5).batches == 8


@kinds
def test_frozen_on_the_cpu_and_moved(kind):
    model = net(kind).train()
    frozen, flags = statistics(model), [p.requires_grad for p in model.parameters()]
    batchnorm.freeze(model)
    model.to(DEVICE).train()
    model(images()).sum().backward()
    assert statistics(model) == frozen
    assert all(layer.weight.grad is None for layer in layers_of(model))
    batchnorm.unfreeze(model)
    assert [p.requires_grad for p in model.parameters()] == flags
    model(images())
    assert model[1].num_batches_tracked == 12


@kinds
def test_forwards_without_an_update(kind):
    model = net(kind).to(DEVICE)
    x, before = images(), statistics(model)
    expected = copy.deepcopy(model)(x)
    with waiting_is("error"), batchnorm.no_stats_update(model):
        y = model(x)
    assert_close(y, expected)
    assert statistics(model) == before
    model(x)
    assert statistics(model) != before


@kinds
def test_a_step_that_the_scaler_skips_is_rolled_back(kind):
    model = net(kind).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    for mean, is_kept in ((0.0, True), (1e6, False), (1.0, True)):
        before = everything(model)["tensors"]
        optimizer.zero_grad(set_to_none=True)
        with batchnorm.transaction(model) as step:
            with torch.autocast("cuda", torch.float16):
                loss = model(images(mean=mean)).float().square().mean()
            scaler.scale(loss).backward()
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() < scale:
                step.rollback()
        assert (everything(model)["tensors"] != before) == is_kept
    assert model[4].num_batches_tracked == 13
    before = everything(model)
    with pytest.raises(ZeroDivisionError), batchnorm.transaction(model):
        raise ZeroDivisionError(model(images()))
    assert everything(model) == before


@kinds
def test_a_bad_batch_is_kept_out_without_waiting_for_the_device(kind):
    model, twin = net(kind).to(DEVICE), net(kind).to(DEVICE)
    good, bad = images(), images(mean=math.nan)
    for each in (model, twin):
        each(good).sum().backward()
    before = statistics(model)
    with batchnorm.guard(model) as guarding:
        with waiting_is("error"):
            model(bad).sum().backward()
        model[4](normal(6, 5, 4, 4, mean=math.nan).to(DEVICE))
        assert statistics(model) == before
        model(good)
    twin(good)
    assert guarding.skipped == {"1": 1, "4": 2}
    assert str(guarding).endswith("      1  1\n      2  4")
    assert_close(state(model), state(twin), **EXACT)


def test_poisoned_statistics_are_repaired():
    model = net().to(DEVICE)
    clean = copy.deepcopy(model)
    model[4].running_var[2] = torch.inf
    shared = model.state_dict()
    assert [
        found.layer for found in batchnorm.reset_poisoned_statistics(shared, dry_run=True).layers
    ] == ["4"]
    (found,) = batchnorm.reset_poisoned_statistics(shared).layers
    assert (found.channels, found.means, found.vars) == (5, 0, 1)
    clean[4].running_mean[2], clean[4].running_var[2] = 0.0, 1.0
    assert_close(state(model), state(clean), **EXACT)


@kinds
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("own", [True, False], ids=["checkpoint", "count_recomputation_once"])
def test_recomputed_forwards_count_once(kind, use_reentrant, own):
    model, plain = (net(kind).to(DEVICE, torch.float64) for _ in range(2))
    x = images().double().requires_grad_()
    before = everything(model)["modules"]
    if own:
        y = batchnorm.checkpoint(model, x, use_reentrant=use_reentrant)
        y.square().sum().backward()
    else:
        with batchnorm.count_recomputation_once(model):
            y = torchs.checkpoint(model, x, use_reentrant=use_reentrant)
            y.square().sum().backward()
    plain(x).square().sum().backward()
    assert model[1].num_batches_tracked == 12
    assert_close(state(model), state(plain), **FINE)
    assert_close(grads(model), grads(plain), **FINE)
    assert everything(model)["modules"] == before


def mean_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().tanh().mean()


@kinds
@pytest.mark.parametrize(("hears", "times"), [(False, 2), (True, 3)])
def test_watching_waits_for_the_device_once_a_dtype(kind, hears, times):
    model = net(kind).to(DEVICE)
    model[4].train(not hears)
    with batchnorm.watch(model) as watched:
        model(images())
        watched.step()
        mean, var = model[1].running_mean.clone(), model[1].running_var.clone()
        x = images(seed=1)
        with waiting_is("error"):
            model(x)
        with pytest.warns(match="called a synchronizing CUDA op") as found, waiting_is("warn"):
            watched.step()
    assert len(found) == times
    first, second = watched.records[-2:]
    x = model[0](x).double()
    shift = ((x.mean((0, 2, 3)) - mean) / (var + 1e-5).sqrt()).abs().max().item()
    assert first["mean_shift"] == pytest.approx(shift, rel=1e-4)
    assert second["mean_shift"] > 0


@pytest.mark.parametrize("statistics", ["copy", "average", "merge"])
def test_a_target_follows_without_waiting(statistics):
    target, model = net(), net()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(2)
    there = copy.deepcopy(target).to(DEVICE), copy.deepcopy(model).to(DEVICE)
    with waiting_is("error"):
        batchnorm.ema_update(*there, 0.75, statistics)
    across = copy.deepcopy(target)
    batchnorm.ema_update(across, there[1], 0.75, statistics)
    batchnorm.ema_update(target, model, 0.75, statistics)
    for moved in (there[0], across):
        assert_close(state(moved), state(target), check_device=False)


def test_merged_checkpoints_may_lie_on_several_devices():
    models = [net(), net()]
    models[1][1].running_mean.fill_(-3)
    expected = batchnorm.merge_state_dicts([state(model) for model in models], [5, 15])
    for first, second in ((DEVICE, DEVICE), (DEVICE, "cpu"), ("cpu", DEVICE)):
        moved = [models[0].to(first), models[1].to(second)]
        merged = batchnorm.merge_state_dicts([state(model) for model in moved], [5, 15])
        assert {tensor.device for tensor in merged.values()} == {models[0][0].weight.device}
        assert_close(merged, expected, check_device=False)


@kinds
def test_statistics_stay_in_float32(kind):
    model = net(kind)
    batchnorm.keep_statistics_in_float32(model)
    model.to(DEVICE, torch.bfloat16)
    assert model(images().bfloat16()).dtype == torch.bfloat16
    found = {(layer.running_var.dtype, layer.running_var.device) for layer in layers_of(model)}
    assert found == {(torch.float32, DEVICE)}


@kinds
def test_a_model_that_moves_to_the_device_meanwhile(kind):
    model = net(kind)
    with batchnorm.guard(model) as guarding, batchnorm.watch(model) as watched:
        model(images(mean=math.nan).cpu())
        before = statistics(model)
        with batchnorm.transaction(model) as step:
            model.to(DEVICE)
            model(images())
            step.rollback()
        assert statistics(model) == before
        with batchnorm.no_stats_update(model):
            model.cpu().to(DEVICE)(images())
        assert statistics(model) == before
        model(images(mean=math.nan))
        model(images())
        watched.step()
    assert guarding.skipped == {"1": 2, "4": 2}
    assert [record["batches"] for record in watched.records] == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_accelerated_and_restored(dtype):
    torch.manual_seed(0)
    model = nets.ResNet().to(DEVICE, dtype)
    original, before = copy.deepcopy(model), everything(model)
    report = batchnorm.accelerate(model, images().to(dtype))
    assert len(report.replaced) == 8
    assert everything(model)["tensors"] == before["tensors"]
    tolerance = FINE if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    for training in (True, False):
        x = images(seed=1).to(dtype)
        y, expected = (each.train(training)(x) for each in (model, original))
        assert_close(y, expected, **tolerance)
    assert relus_and_additions(model, images().to(dtype)) == (0, 0)
    batchnorm.restore(model)
    assert [type(module) for module in model.modules()] == [type(m) for m in original.modules()]
