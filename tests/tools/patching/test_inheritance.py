"""Layers that somebody rebuilds keep what tools have attached, or a warning says they do not."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint as torchs_checkpoint

import batchnorm
from batchnorm import (
    count_recomputation_once,
    freeze,
    guard,
    is_frozen,
    keep_statistics_in_float32,
    no_stats_update,
    transaction,
    unfreeze,
    watch,
)
from batchnorm.tools.patching import ReplacedMethod, inheritance
from look_alikes import Own, frozen_of_torchvision
from real_networks import import_torchvision

pytestmark = pytest.mark.untyped


def net(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 4, 1), norm(4))
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), block)


def images():
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def poisoned():
    x = images()
    x[0] = float("inf")
    return x


# Converters.


def of_torch(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def of_timm(model):
    import_torchvision()
    return importlib.import_module("timm.layers").convert_sync_batchnorm(model)


def of_lightning(model):
    import_torchvision()  # Lightning does so, too.
    pytest.importorskip("lightning", reason="Lightning's plugin converts")
    plugins = importlib.import_module("lightning.pytorch.plugins.layer_sync")
    return plugins.TorchSyncBatchNorm().apply(model)


def of_apex(module):
    """apex: shares statistics, and clones weight and bias into parameters of its own."""
    rebuilt = module
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        rebuilt = nn.SyncBatchNorm(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
        )
        rebuilt.running_mean = module.running_mean
        rebuilt.running_var = module.running_var
        rebuilt.num_batches_tracked = module.num_batches_tracked
        if module.affine:
            rebuilt.weight.data = module.weight.data.clone().detach()
            rebuilt.bias.data = module.bias.data.clone().detach()
    for name, child in module.named_children():
        rebuilt.add_module(name, of_apex(child))
    return rebuilt


def by_hand(module):
    """Clones everything, and makes the parameters last; the parent gets it by ``setattr``."""
    for name, child in list(module.named_children()):
        if not isinstance(child, nn.modules.batchnorm._BatchNorm):
            by_hand(child)
            continue
        rebuilt = batchnorm.BatchNorm2d(child.num_features)
        rebuilt.running_mean = child.running_mean.clone()
        rebuilt.running_var = child.running_var.clone()
        rebuilt.weight = nn.Parameter(child.weight.detach().clone())
        rebuilt.bias = nn.Parameter(child.bias.detach().clone())
        setattr(module, name, rebuilt)
    return module


def back_and_forth(model):
    """As mmcv's revert: to synchronized layers, and to torch's again, by a state_dict."""

    def revert(module):
        rebuilt = module
        if isinstance(module, nn.SyncBatchNorm):
            rebuilt = nn.BatchNorm2d(module.num_features, module.eps, module.momentum)
            rebuilt.weight, rebuilt.bias = module.weight, module.bias
            rebuilt.running_mean, rebuilt.running_var = module.running_mean, module.running_var
            rebuilt.training = module.training
        for name, child in module.named_children():
            rebuilt.add_module(name, revert(child))
        return rebuilt

    return revert(of_torch(model))


CONVERTERS = [of_torch, of_timm, of_lightning, of_apex, by_hand, back_and_forth]
converters = pytest.mark.parametrize("convert", CONVERTERS)
copies = pytest.mark.parametrize(
    "duplicate",
    [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m[:4]],
    ids=["itself", "deepcopy", "pickle", "slice"],
)


def statistics(model):
    return {n: b.clone() for n, b in model.named_buffers()}


def are_equal(before, after):
    return all(torch.equal(before[name], after[name]) for name in before)


@converters
@copies
def test_frozen_layers_stay_frozen(convert, duplicate):
    model = net()
    before = model[1]
    freeze(model)
    model = convert(duplicate(model))
    assert model[1] is not before
    assert is_frozen(model)
    was = statistics(model)
    model.train()(images()).sum().backward()
    assert are_equal(was, statistics(model))
    for layer in (model[1], model[3][1]):
        assert not layer.training
        assert [p.requires_grad for p in layer.parameters()] == [False, False]
    assert unfreeze(model).layers == ("1", "3.1")
    assert model[1].training
    assert [p.requires_grad for p in model[1].parameters()] == [True, True]


def test_weight_and_bias_go_on_training_where_they_did():
    model = net()
    freeze(model, affine=False)
    model = of_torch(model).train()
    assert not model[1].training
    assert model[1].weight.requires_grad


def test_the_layer_before_stays_frozen_too():
    whole = net()
    freeze(whole)
    part = of_torch(nn.Sequential(*list(whole.children())[:2]))
    assert is_frozen(part.train())
    assert is_frozen(whole.train())
    unfreeze(part)
    assert is_frozen(whole)
    assert not whole.train()[1].training


@pytest.mark.parametrize("convert", [of_torch, of_timm, of_apex])
def test_a_layer_without_a_model_around_it(convert):
    layer = nn.BatchNorm2d(3)
    freeze(layer)
    layer = convert(layer)
    assert not layer.train().training
    layer = nn.BatchNorm2d(3)
    guarded = guard(layer)
    convert(layer)(poisoned())
    assert guarded.skipped == {"": 1}


@converters
@copies
def test_guarded_layers_stay_guarded(convert, duplicate):
    model = net()
    guarded = guard(model)
    model(poisoned())
    ours = duplicate(model)
    model = convert(ours)
    before = statistics(model)
    model(poisoned())
    assert are_equal(before, statistics(model))
    if duplicate(model) is model and ours is model:
        assert guarded.skipped == {"1": 2, "3.1": 2}


@converters
def test_the_end_of_a_handle_reaches_rebuilt_layers(convert):
    model = net()
    handles = [guard(model), count_recomputation_once(model), keep_statistics_in_float32(model)]
    model = convert(model)
    assert {"forward", "_apply"} <= vars(model[1]).keys()
    for handle in handles:
        handle.remove()
    assert not {"forward", "_apply", "train"} & vars(model[1]).keys()


@converters
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_counts_once(convert, reentrant):
    model = net()
    with count_recomputation_once(model):
        model = convert(model)
        x = images().requires_grad_()
        torchs_checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        assert model[1].num_batches_tracked == 1
        assert model[3][1].num_batches_tracked == 1


@converters
@copies
def test_statistics_stay_in_float32(convert, duplicate):
    model = net()
    keep_statistics_in_float32(model)
    model = convert(duplicate(model)).half()
    assert model[0].weight.dtype == torch.float16
    assert {t.dtype for t in (*model[1].parameters(), model[1].running_mean)} == {torch.float32}


@converters
@pytest.mark.parametrize("frozen", [True, False])
def test_watched_layers_stay_watched(convert, frozen):
    model = net()
    if frozen:
        freeze(model)
    with watch(model) as watched:
        model(images())
        watched.step()
        model = convert(model)
        for _ in range(2):
            model(images())
            watched.step()
    first, last = watched.records[0], watched.records[-2]
    assert (last["step"], last["layer"], last["batches"]) == (3, "1", int(not frozen))
    assert last["batch_mean_low"] == pytest.approx(first["batch_mean_low"], abs=1e-5)
    assert not model[1]._forward_pre_hooks


@converters
def test_no_update_of_rebuilt_layers(convert):
    model = net()
    before = statistics(model)
    outer = no_stats_update(model)
    with no_stats_update(model):
        model = convert(model)
        model(images())
        assert are_equal(before, statistics(model))
    model(images())
    assert are_equal(before, statistics(model))
    outer.remove()
    assert model[1].track_running_stats is True
    model(images())
    assert not are_equal(before, statistics(model))


@pytest.mark.parametrize("convert", [of_torch, of_timm, of_apex, back_and_forth])
@pytest.mark.parametrize("keep", [True, False])
def test_a_transaction_decides_about_rebuilt_layers(convert, keep):
    model = net()
    before = statistics(model)
    with transaction(model) as step:
        model(images())
        model = convert(model)
        model(images())
        if not keep:
            step.rollback()
    assert are_equal(before, statistics(model)) is not keep
    if keep:
        twice = net()
        twice(images())
        twice(images())
        assert_close(statistics(model)["1.running_mean"], statistics(twice)["1.running_mean"])


# Other ways of changing a layer.


def test_a_layer_that_looks_like_batch_norm_inherits():
    model = nn.Sequential(Own(3))
    freeze(model)
    rebuilt = Own(3)
    rebuilt.running_mean, rebuilt.running_var = model[0].running_mean, model[0].running_var
    model[0] = rebuilt
    assert is_frozen(model.train())
    assert not rebuilt.training


def test_a_frozen_class_in_the_place_of_a_frozen_layer():
    model = net()
    model(images())
    freeze(model)
    frozen = frozen_of_torchvision(4)
    frozen.load_state_dict(model[1].state_dict())
    model[1] = frozen
    assert is_frozen(model.train())


FRESH = {
    "of the same class": lambda: nn.BatchNorm2d(4),
    "of ours": lambda: batchnorm.BatchNorm2d(4),
    "that looks like it": lambda: Own(4),
    "in a block": lambda: nn.Sequential(nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("fresh", FRESH)
@pytest.mark.parametrize("tool", [freeze, guard, watch, keep_statistics_in_float32])
def test_a_new_layer_in_the_place_of_a_new_one_does_not_inherit_and_that_is_said(tool, fresh):
    model = net()
    handle = tool(model)
    message = rf"{tool.__name__}: layer '1' \(BatchNorm2d\) was replaced by a \w+ with other stat"
    with pytest.warns(RuntimeWarning, match=message):
        model[1] = FRESH[fresh]()
    assert not is_frozen(model[1])
    assert not {"forward", "train", "_apply"} & vars(model[1]).keys()
    assert handle is not None


def test_a_new_layer_with_the_memory_of_a_new_one_inherits():
    model = net()
    freeze(model)
    rebuilt = batchnorm.BatchNorm2d(4)
    rebuilt.running_mean.data = model[1].running_mean.data
    model[1] = rebuilt
    assert is_frozen(model)


def test_scripted_layers_are_built_while_a_tool_is_attached():
    model = net()
    with guard(model):
        scripted = torch.jit.script(nn.BatchNorm2d(4))
        scripted.running_mean = torch.ones(4)
    assert scripted(torch.ones(2, 4, 3, 3)).shape == (2, 4, 3, 3)


@pytest.mark.parametrize("tool", [freeze, guard, watch, keep_statistics_in_float32])
def test_another_layer_with_other_statistics_does_not_inherit_and_that_is_said(tool):
    model = net()
    model(images())
    handle = tool(model)
    name = "keep_statistics_in_float32" if tool is keep_statistics_in_float32 else tool.__name__
    message = (
        rf"{name}: layer '1' \(BatchNorm2d\) was replaced by a BatchNorm2d with other statistics, "
        r"to which this does not apply; call the tool again for the new layer\."
    )
    with pytest.warns(RuntimeWarning, match=message) as caught:
        model[1] = nn.BatchNorm2d(4)
    assert [warning.filename for warning in caught] == [__file__]
    assert not {"forward", "train", "_apply"} & vars(model[1]).keys()
    assert handle is not None


@pytest.mark.parametrize(
    "other", [nn.Identity, lambda: nn.GroupNorm(2, 4), lambda: nn.Conv2d(4, 4, 1)]
)
def test_what_is_no_batch_norm_takes_the_place_without_a_word(other):
    model = net()
    freeze(model)
    guard(model)
    model[1] = other()
    model(images())


def test_a_wrapper_around_the_layer_changes_nothing():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model = net()
    freeze(model)
    model[1] = Wrapper(model[1])
    model[3] = torch.compile(model[3], backend="eager")
    assert is_frozen(model.train())
    assert is_frozen(of_torch(model).train())


@pytest.mark.parametrize("freeze_first", [True, False])
@pytest.mark.parametrize(
    "parametrize",
    [
        lambda m: parametrizations.weight_norm(m, "weight", dim=None),
        lambda m: nn.utils.parametrize.register_parametrization(m, "weight", nn.Softplus()),
        lambda m: nn.utils.parametrize.register_parametrization(m, "bias", nn.Tanh()),
    ],
    ids=["weight_norm", "softplus", "bias"],
)
def test_a_parametrized_layer(parametrize, freeze_first):
    model = net()
    if not freeze_first:
        parametrize(model[1])
    freeze(model)
    guarded = guard(model)
    if freeze_first:
        parametrize(model[1])
    assert is_frozen(model.train())
    assert not any(p.requires_grad for p in model[1].parameters())
    unfreeze(model)
    assert all(p.requires_grad for p in model[1].parameters())
    assert model[1].training
    model(poisoned())
    assert guarded.skipped["1"] == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_before_and_after():
    torch.compiler.reset()
    model = net(batchnorm.BatchNorm2d)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(images())
    guarded = guard(model)
    before = statistics(model)
    compiled(poisoned())
    assert are_equal(before, statistics(model))
    assert guarded.skipped == {"1": 1, "3.1": 1}
    model[1] = by_hand(nn.Sequential(model[1]))[0]
    compiled(poisoned())
    assert guarded.skipped == {"1": 2, "3.1": 2}
    freeze(model)
    before = statistics(model)
    compiled(images())
    assert are_equal(before, statistics(model))


def test_export_and_fx_attach_nothing():
    model = net().eval()
    freeze(model)
    traced = torch.fx.symbolic_trace(model)
    exported = torch.export.export(model, (images(),)).module()
    for module in (*traced.modules(), *exported.modules()):
        if not isinstance(module, nn.BatchNorm2d):
            assert not any(isinstance(v, ReplacedMethod) for v in vars(module).values())
    assert_close(exported(images()), model(images()))


# What it costs.


def test_nothing_is_hooked_before_a_tool_attaches_something():
    code = """
from torch.nn.modules import module
from torch import nn
import batchnorm
from batchnorm import freeze, guard, watch, recalibrate
hooks = [module._global_buffer_registration_hooks, module._global_module_registration_hooks]
model = nn.Sequential(nn.BatchNorm1d(3))
print(*map(len, hooks))
for tool in (freeze, guard, watch):
    tool(model)
print(*map(len, hooks))
"""
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert out.split() == ["0", "0", "1", "1"]


def test_a_pickle_hooks_the_process_that_loads_it():
    model = net()
    freeze(model)
    code = """
import pickle, sys
from torch import nn
model = pickle.load(sys.stdin.buffer)
model = nn.SyncBatchNorm.convert_sync_batchnorm(model).train()
print(model[1].training, type(model[1]).__name__)
"""
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, input=pickle.dumps(model), capture_output=True, check=True).stdout
    assert out.split() == [b"False", b"SyncBatchNorm"]


def test_models_are_collected():
    model = net()
    freeze(model)
    handles = [guard(model), watch(model), no_stats_update(model)]
    old = [weakref.ref(model[1]), weakref.ref(model[3][1])]
    model = of_torch(model)
    new = [weakref.ref(model[1]), weakref.ref(model[3][1])]
    assert all(layer() in inheritance._attached for layer in old + new)
    for handle in handles:
        handle.remove()
    del handles, handle
    gc.collect()
    assert [layer() for layer in old] == [None, None]
    del model
    gc.collect()
    assert [layer() for layer in new] == [None, None]
