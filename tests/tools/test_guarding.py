"""guard and repair: poison that does not get in, and poison that is found and taken out."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils import checkpoint as torchs
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm
from batchnorm.tools.guarding import (
    PoisonedLayer,
    StatisticsReset,
    guard,
    reset_poisoned_statistics,
)
from batchnorm.tools.patching.methods import ReplacedMethod
from batchnorm.tools.statistics_updates import transaction
from layer_kinds import KINDS, Stop, built, everything, layers_of, statistics
from model_cases import EXACT

kinds = pytest.mark.parametrize("kind", KINDS)
poisons = pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])


def poisoned(batch, poison=torch.inf):
    bad = batch.clone()
    bad.view(-1)[0] = poison
    return bad


def is_finite(model):
    return all(buffer.isfinite().all() for buffer in model.buffers())


# What torch does.


@pytest.mark.parametrize("layer_class", [nn.BatchNorm1d, batchnorm.BatchNorm1d])
@pytest.mark.parametrize("poison", [torch.inf, torch.nan, 1e30])
@pytest.mark.filterwarnings("ignore:.*float32:RuntimeWarning")
def test_one_bad_value_poisons_for_ever(layer_class, poison):
    torch.manual_seed(0)
    layer = layer_class(4)
    layer(poisoned(torch.randn(16, 4), poison))
    for _ in range(200):
        layer(torch.randn(16, 4))
    assert not layer.running_var[0].isfinite()
    assert layer.running_var[1:].isfinite().all()


def amp(model, batches):
    """Trains with a GradScaler; says after each step whether it was skipped."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    skipped = []
    for batch in batches:
        optimizer.zero_grad()
        scale = scaler.get_scale()
        scaler.scale(model(batch).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(scaler.get_scale() < scale)
    return skipped


@kinds
def test_grad_scaler_skips_the_step_and_guard_the_statistics(kind):
    model, batches = built(kind)
    batches[1] = poisoned(batches[1])
    alone, clean = copy.deepcopy(model), copy.deepcopy(model)
    assert amp(alone, batches) == [False, True, False]
    assert all(p.isfinite().all() for p in alone.parameters())
    assert not is_finite(alone)

    with guard(model) as guarding:
        assert amp(model, batches) == [False, True, False]
    assert amp(clean, [batches[0], batches[2]]) == [False, False]
    assert is_finite(model)
    exact = {} if kind == "accelerated" else EXACT  # a guarded block is not fused
    assert_close(dict(model.state_dict()), dict(clean.state_dict()), **exact)
    assert set(guarding.skipped.values()) == {1}
    names = dict(model.named_modules())
    assert [names[name] for name in guarding.skipped] == layers_of(model)


class Overflowing(nn.Module):
    """Two layers, and a value too large for anything between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x, factor):
        return self.second(self.first(x) * factor)


@pytest.mark.parametrize("all_or_nothing", [True, False])
def test_layers_before_an_overflow_move_unless_a_transaction_takes_the_step_back(all_or_nothing):
    torch.manual_seed(0)
    model = Overflowing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with guard(model) as guarding:
        for factor, skips in ((1.0, False), (torch.inf, True)):
            weights = [p.detach().clone() for p in model.parameters()]
            buffers = statistics(model)
            optimizer.zero_grad()
            with transaction(model) as step:
                scaler.scale(model(torch.randn(8, 4), factor).pow(4).sum()).backward()
                before = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                assert (scaler.get_scale() < before) is skips
                if skips and all_or_nothing:
                    step.rollback()
    moved = {name for name, data in statistics(model).items() if data != buffers[name]}
    assert_close(list(model.parameters()), weights, **EXACT)
    first = {f"first.{name}" for name, _ in model.first.named_buffers()}
    assert moved == (set() if all_or_nothing else first)
    assert guarding.skipped == {"second": 1}


def test_a_second_thread_with_bad_batches_and_errors_leaves_nothing():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    twin = copy.deepcopy(model)
    good, seen = torch.randn(8, 4), []

    def bad():
        for _ in range(20):
            model[1](poisoned(good))
            try:
                model[1](torch.randn(1, 4))
            except ValueError as error:
                seen.append(str(error)[:30])

    with guard(model) as guarding:
        thread = threading.Thread(target=bad)
        thread.start()
        for _ in range(20):
            model[0](good)
            twin[0](good)
        thread.join()
    assert statistics(model) == statistics(twin)
    assert guarding.skipped == {"1": 20}
    assert seen == ["Expected more than 1 value per"] * 20
    assert "forward" not in vars(model[1])


# guard.


@kinds
@poisons
def test_a_bad_batch_does_not_enter(kind, poison):
    model, (batch, *_) = built(kind)
    expected = copy.deepcopy(model)(poisoned(batch, poison))
    before = everything(model)
    with guard(model) as guarding:
        y = model(poisoned(batch, poison))
        torch.autograd.grad(y.sum(), list(model.parameters()))
    assert_close(y, expected, equal_nan=True, **EXACT)
    assert everything(model) == before
    assert sum(guarding.skipped.values()) == len(layers_of(model))


@kinds
def test_good_batches_enter_as_always(kind):
    model, batches = built(kind)
    twin = copy.deepcopy(model)
    with guard(model) as guarding:
        for batch in batches:
            for each in (model, twin):
                each.zero_grad()
                each(batch).square().sum().backward()
            model.eval()
            model(poisoned(batch))
            model.train()
    assert statistics(model) == statistics(twin)
    assert_close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    assert guarding.skipped == {}


def test_finite_values_whose_variance_is_not():
    layer = nn.BatchNorm1d(4)
    before = statistics(layer)
    with guard(layer) as guarding:
        layer(poisoned(torch.randn(16, 4), 1e30))
    assert statistics(layer) == before
    assert guarding.skipped == {"": 1}


@pytest.mark.parametrize("momentum", [0.0, 1.0, None])
def test_any_momentum(momentum):
    layer = nn.BatchNorm1d(4, momentum=momentum)
    layer(torch.randn(16, 4))
    before = statistics(layer)
    with guard(layer) as guarding:
        layer(poisoned(torch.randn(16, 4)))
        layer(poisoned(torch.randn(16, 4)))
        assert statistics(layer) == before
        layer(torch.randn(16, 4))
    assert guarding.skipped == {"": 2}
    assert layer.num_batches_tracked == 2


def test_a_batch_that_torch_refuses_is_not_counted():
    layer = nn.BatchNorm1d(4)
    with guard(layer) as guarding:
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            layer(torch.randn(1, 4))
        assert layer.num_batches_tracked == 0
    assert guarding.skipped == {}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
def test_an_error_inside_of_the_layer_leaves_nothing(error):
    class Failing(nn.BatchNorm1d):
        def forward(self, x):
            super().forward(x)
            raise error("inside")

    layer = Failing(4)
    before = everything(layer)
    guarding = guard(layer)
    with pytest.raises(error, match="inside"):
        layer(torch.randn(8, 4))
    guarding.remove()
    assert everything(layer) == before


def test_buffers_that_are_replaced_meanwhile():
    model, batches = built("torch 1d")
    other, _ = built("ours")
    with guard(model) as guarding:
        model.load_state_dict(other.state_dict(), assign=True)
        model(poisoned(batches[0]))
        assert statistics(model) == statistics(other)
        model.double()
        before = statistics(model)
        model(poisoned(batches[0].double()))
        assert statistics(model) == before
        model.load_state_dict({n: v * 2 for n, v in model.state_dict().items()})
        before = statistics(model)
        model(poisoned(batches[0].double()))
        assert statistics(model) == before
        model(batches[0].double())
        assert statistics(model) != before
    assert guarding.skipped == {"1": 3}


CHECKPOINTS = {"torch's": torchs.checkpoint, "ours": batchnorm.checkpoint}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_batch_that_is_recomputed_counts_once(checkpoint, use_reentrant):
    layer = nn.BatchNorm1d(4)
    before = statistics(layer)
    x = poisoned(torch.randn(8, 4)).requires_grad_()
    with guard(layer) as guarding:
        y = checkpoint(lambda x: layer(x).exp(), x, use_reentrant=use_reentrant)
        y.sum().backward()
    assert guarding.skipped == {"": 1}
    assert statistics(layer) == before


def test_a_batch_that_is_recomputed_without_a_backward_counts_once():
    layer = nn.BatchNorm1d(4)
    x = poisoned(torch.randn(8, 4)).requires_grad_()
    with guard(layer) as guarding:
        y = batchnorm.checkpoint(lambda x: layer(x).exp(), x)
        assert y.grad_fn._saved_result.shape == (8, 4)
    assert guarding.skipped == {"": 1}


class Reassigning(nn.BatchNorm1d):
    """Makes new buffers instead of writing into the old ones."""

    def forward(self, x):
        self.running_mean = 0.9 * self.running_mean + 0.1 * x.mean(0).detach()
        return x


def test_a_layer_that_makes_new_buffers():
    layer = Reassigning(4)
    with guard(layer) as guarding:
        layer(poisoned(torch.randn(8, 4)))
        assert torch.equal(layer.running_mean, torch.zeros(4))
        layer(torch.ones(8, 4))
    assert_close(layer.running_mean, torch.full((4,), 0.1))
    assert guarding.skipped == {"": 1}


def test_poison_loaded_later_does_not_keep_out_the_healthy_channels():
    layer = nn.BatchNorm1d(4)
    with guard(layer) as guarding:
        layer.running_mean[0] = torch.nan
        layer(torch.randn(8, 4) + 5)
        assert layer.running_mean[1:].min() > 0.1
        layer(poisoned(torch.randn(8, 4)))
        assert layer.num_batches_tracked == 1
        layer(torch.full((8, 4), torch.inf))
        assert layer.num_batches_tracked == 1
    assert guarding.skipped == {"": 2}
    assert layer.running_mean[1:].isfinite().all()


def test_only_chosen_layers_and_those_with_statistics():
    model = nn.Sequential(
        nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False)
    )
    with guard(model, ["1", "2"]) as guarding:
        model(poisoned(torch.randn(8, 4)))
    assert model[0].running_var.isnan().any()
    assert model[1].running_var.isfinite().all()
    assert guarding.skipped == {"1": 1}
    assert str(guarding).startswith("Guarded 1 batch norm layer;")


def test_what_a_guard_says():
    model, (batch, *_) = built("accelerated")
    guarding = guard(model)
    assert str(guarding) == "Guarded 8 batch norm layers: no batch had to be skipped."
    with torch.no_grad():
        model(poisoned(batch))
        model.layer2[0].downsample[1](poisoned(torch.randn(2, 6, 3, 3)))
    guarding.remove()
    guarding.remove()
    lines = str(guarding).splitlines()
    assert lines[0] == "Guarded 8 batch norm layers; skipped batches, as not finite:"
    assert "      1  bn1" in lines
    assert "      2  layer2.0.downsample.1" in lines
    assert max(map(len, lines)) <= 80
    layer = nn.BatchNorm1d(4)
    guarding = guard(layer)
    layer(poisoned(torch.randn(8, 4)))
    assert str(guarding).endswith("\n      1  the model itself")


class Refusing(TorchDispatchMode):
    """Refuses to bring a value to the host, for which a device would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is read")
        return func(*args, **(kwargs or {}))


def test_no_value_is_read_while_it_runs():
    layer = nn.BatchNorm1d(4)
    guarding = guard(layer)
    with Refusing():
        layer(poisoned(torch.randn(8, 4)))
        with pytest.raises(RuntimeError, match="a value is read"):
            guarding.skipped  # noqa: B018
    assert guarding.skipped == {"": 1}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["torch 1d", "ours"])
@pytest.mark.untyped
def test_compiled(kind):
    model, (batch, *_) = built(kind)
    guarding = guard(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = statistics(model)
    compiled(poisoned(batch)).sum().backward()
    assert statistics(model) == before
    assert guarding.skipped == {"1": 1}
    compiled(batch).sum().backward()
    assert statistics(model) != before
    assert guarding.skipped == {"1": 1}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_guarded_with_counts_of_their_own(duplicate):
    model, (batch, *_) = built("ours")
    guarding = guard(model)
    twin = duplicate(model)
    guarding.remove()
    twin(poisoned(batch))
    assert is_finite(twin)
    assert isinstance(vars(twin[1])["forward"], ReplacedMethod)
    assert guarding.skipped == {}
    assert "forward" not in vars(model[1])


def test_a_poisoned_layer_is_refused():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[1].running_var[2:] = torch.nan
    before = everything(model)
    message = (
        r"guard: layer '1' \(BatchNorm1d\) is poisoned already, in 2 of 4 channels; call "
        r"reset_poisoned_statistics\(model\) first and recalibrate\."
    )
    with pytest.raises(ValueError, match=message):
        guard(model)
    assert everything(model) == before
    reset_poisoned_statistics(model)
    guard(model).remove()


@pytest.mark.untyped
def test_wrong_arguments_of_guard():
    with pytest.raises(TypeError, match=r"guard: model must be a torch\.nn\.Module, got str"):
        guard("model")
    with pytest.raises(ValueError, match="guard: no batch norm layer fits 'bn'; the model has no"):
        guard(nn.Linear(2, 2), ["bn"])


# repair.


def sick():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), batchnorm.BatchNorm1d(4))
    for _ in range(3):
        model(torch.randn(8, 4) + 2)
    model[1].running_mean[0] = torch.nan
    model[1].running_var[0] = torch.inf
    model[1].running_var[3] = -1e-3
    model[1].weight.data[2] = torch.nan
    return model


FOUND = (PoisonedLayer("1", channels=4, means=1, vars=2, poisoned=2),)


def held(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("of", [lambda m: m, lambda m: m.state_dict()], ids=["model", "state_dict"])
def test_poisoned_channels_are_found_and_start_anew(of):
    model = sick()
    before, objects = held(model), everything(model)["modules"]

    dry = reset_poisoned_statistics(of(model), dry_run=True)
    assert dry == StatisticsReset(FOUND, checked=2, dry_run=True)
    assert_close(held(model), before, equal_nan=True, **EXACT)
    done = reset_poisoned_statistics(of(model))
    assert done == StatisticsReset(FOUND, checked=2, dry_run=False)

    before["1.running_mean"][[0, 3]] = 0
    before["1.running_var"][[0, 3]] = 1
    assert_close(held(model), before, equal_nan=True, **EXACT)
    assert everything(model)["modules"] == objects
    assert reset_poisoned_statistics(of(model)) == StatisticsReset((), checked=2, dry_run=False)


def test_a_file():
    file = io.BytesIO()
    torch.save(sick().state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert reset_poisoned_statistics(state).layers == FOUND
    model = sick()
    model.load_state_dict(state)
    assert is_finite(model)


def test_any_key_and_half_a_pair():
    state = {
        "running_mean": torch.tensor([0.0, torch.nan]),
        "module.bn.running_var": torch.tensor([-1.0, 0.0, 2.0]),
        "not_running_mean": torch.tensor([torch.nan]),
        "bn.running_mean.copy": torch.tensor([torch.nan]),
        "epoch": 3,
    }
    found = reset_poisoned_statistics(state)
    assert [(f.layer, f.means, f.vars, f.poisoned) for f in found.layers] == [
        ("", 1, 0, 1),
        ("module.bn", 0, 1, 1),
    ]
    assert state["running_mean"].tolist() == [0, 0]
    assert state["module.bn.running_var"].tolist() == [1, 0, 2]
    assert state["not_running_mean"].isnan().all()
    assert state["bn.running_mean.copy"].isnan().all()


def test_layers_without_statistics_and_no_layers():
    model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.Linear(2, 2))
    with pytest.warns(RuntimeWarning, match="nothing is checked, no batch norm layer keeps"):
        assert reset_poisoned_statistics(model).checked == 0
    with pytest.warns(RuntimeWarning, match="nothing is checked, the mapping has no running stat"):
        assert str(reset_poisoned_statistics({})) == (
            "Checked nothing: there are no running statistics."
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    layer = nn.BatchNorm1d(2, dtype=dtype)
    layer.running_mean[1] = torch.inf
    assert reset_poisoned_statistics(layer).layers == (PoisonedLayer("", 2, 1, 0, 1),)
    assert layer.running_mean.dtype == dtype
    assert is_finite(layer)


def test_what_a_repair_says():
    model = sick()
    assert str(reset_poisoned_statistics(model, dry_run=True)).splitlines() == [
        "Poisoned: 1 of 2 layers with running statistics.",
        "",
        "  channels  bad mean   bad var  layer",
        "       2/4         1         2  1",
        "",
        "Nothing was changed (dry run).",
    ]
    assert str(reset_poisoned_statistics(model)).splitlines()[-2:] == [
        "These channels have mean 0 and variance 1 now, as if they were new.",
        "Recalibrate the model on training data before it is evaluated.",
    ]
    layer = nn.BatchNorm1d(2)
    layer.running_mean[0] = torch.nan
    found = reset_poisoned_statistics(layer, dry_run=True)
    assert "       1/2         1         0  the model itself" in str(found).splitlines()
    assert json.loads(json.dumps(found.to_dict())) == {
        "layers": [{"layer": "", "channels": 2, "means": 1, "vars": 0, "poisoned": 1}],
        "checked": 1,
        "dry_run": True,
    }


@pytest.mark.untyped
def test_wrong_arguments_of_repair():
    message = (
        r"reset_poisoned_statistics: expects a torch\.nn\.Module or a state_dict, got str; "
        r"load a file by "
        r"torch\.load\(path, weights_only=True\)\."
    )
    with pytest.raises(TypeError, match=message):
        reset_poisoned_statistics("model.pt")
    message = (
        "reset_poisoned_statistics: the mapping has no running statistics itself, but holds the "
        "mappings 'model', "
        "'optimizer'; pass the state_dict among them"
    )
    with pytest.raises(ValueError, match=message):
        reset_poisoned_statistics({"model": sick().state_dict(), "optimizer": {}, "epoch": 1})
    with pytest.raises(
        ValueError, match=r"reset_poisoned_statistics: layer '' \(LazyBatchNorm1d\) is lazy"
    ):
        reset_poisoned_statistics(nn.LazyBatchNorm1d())


@pytest.mark.parametrize(
    ("mean", "var"), [((3, 2), (3,)), ((3,), (2,)), ((1, 3), (3,)), ((3,), ()), ((2, 2), (4,))]
)
@pytest.mark.parametrize("names", [("running_mean", "running_var"), ("moving_mean", "moving_var")])
@pytest.mark.parametrize("dry_run", [True, False])
def test_statistics_of_unequal_shapes_are_refused(mean, var, names, dry_run):
    state = dict(zip(names, (torch.zeros(mean), torch.ones(var)), strict=True))
    state = {f"a.{name}": tensor for name, tensor in state.items()}
    state["0.running_mean"] = torch.full((2,), torch.nan)
    described = f"{names[0]} of shape {mean} and {names[1]} of shape {var}"
    message = (
        "reset_poisoned_statistics: the statistics of a layer must have one shape, and layer 'a' "
        f"has {described}; take it out of the mapping."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        reset_poisoned_statistics(state, dry_run=dry_run)
    assert state["0.running_mean"].isnan().all()
