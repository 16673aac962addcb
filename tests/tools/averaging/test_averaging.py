"""Averages of models: moving ones, merged checkpoints, and statistics that stay in float32."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import batchnorm
import model_nets as nets
from batchnorm.tools.averaging import ema_update, keep_statistics_in_float32, merge_state_dicts
from everywhere import accelerate

EXACT = {"rtol": 0, "atol": 0}


def net(layer: type[nn.Module] = nn.BatchNorm1d, seed: int = 0) -> nn.Sequential:
    """A layer whose parameters and statistics are all different, and a buffer of another kind."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), layer(4))
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean):
            tensor.normal_()
        model[1].running_var.uniform_(0.5, 2)
        model[1].num_batches_tracked.fill_(10 + seed)
    model.register_buffer("scale", torch.rand(2))
    return model


# ema_update.


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, batchnorm.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize("policy", ["copy", "average", "merge"])
def test_three_policies_against_closed_forms(policy, layer):
    target, model = net(layer, 0), net(layer, 1)
    old, new = copy.deepcopy(target.state_dict()), copy.deepcopy(model.state_dict())

    ema_update(target, model, 0.75, policy)

    moved = target.state_dict()
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert_close(moved[name], 0.75 * old[name] + 0.25 * new[name])
    mean, var = "1.running_mean", "1.running_var"
    if policy == "copy":
        expected = {mean: new[mean], var: new[var]}
    else:
        expected = {key: 0.75 * old[key] + 0.25 * new[key] for key in (mean, var)}
    if policy == "merge":
        expected[var] += 0.75 * 0.25 * (new[mean] - old[mean]).square()
    for name, value in expected.items():
        assert_close(moved[name], value)
    assert moved["1.num_batches_tracked"] == 11
    assert moved["1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(moved["scale"], new["scale"])
    assert_close(dict(model.state_dict()), dict(new), **EXACT)


@pytest.mark.parametrize(("decay", "like"), [(0.0, 1), (1.0, 0)])
@pytest.mark.parametrize("policy", ["average", "merge"])
def test_the_ends_of_the_range(decay, like, policy):
    models = [net(seed=0), net(seed=1)]
    expected = copy.deepcopy(models[like].state_dict())
    ema_update(models[0], models[1], decay, policy)
    for name in ("0.weight", "1.running_mean", "1.running_var"):
        assert_close(models[0].state_dict()[name], expected[name])


def test_tensors_stay_the_same_objects_and_get_no_graph():
    target, model = net(seed=0), net(seed=1)
    tensors = [*target.parameters(), *target.buffers()]
    ema_update(target, model, 0.5, "merge")
    now = [*target.parameters(), *target.buffers()]
    assert all(a is b for a, b in zip(tensors, now, strict=True))
    assert all(tensor.grad_fn is None for tensor in now)
    assert all(p.requires_grad for p in target.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("policy", ["copy", "average", "merge"])
def test_half_precision_is_averaged_in_float32(dtype, policy):
    target, model = net(seed=0).to(dtype), net(seed=1).to(dtype)
    exact = copy.deepcopy(target).float()
    ema_update(exact, copy.deepcopy(model).float(), 0.9, policy)
    ema_update(target, model, 0.9, policy)
    assert_close(dict(target.state_dict()), dict(exact.to(dtype).state_dict()), **EXACT)


def test_a_float32_target_follows_a_bfloat16_model():
    model = net().bfloat16()
    target, stuck = copy.deepcopy(model).float(), copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        target[0].weight.fill_(0.5)
        stuck[0].weight.fill_(0.5)
    for _ in range(3000):
        ema_update(target, model, 0.999)
        ema_update(stuck, model, 0.999)
    assert_close(target[0].weight, torch.full((4, 3), 1 - 0.5 * 0.999**3000), rtol=1e-4, atol=0)
    assert torch.equal(stuck[0].weight, torch.full((4, 3), 0.5).bfloat16())


def test_policies_on_data_whose_mean_drifts():
    """Merging is exact for the mixture of two parts; averaging loses the variance between them."""
    parts = [torch.randn(1000, 4), torch.randn(1000, 4) + 3]
    models = []
    for part in parts:
        layer = nn.BatchNorm1d(4, momentum=1.0)
        layer(part)
        models.append(layer)
    both = torch.cat(parts)
    averaged = copy.deepcopy(models[0])
    ema_update(averaged, models[1], 0.5, "average")
    assert (both.var(0) - averaged.running_var).min() > 2
    ema_update(models[0], models[1], 0.5, "merge")
    assert_close(models[0].running_mean, both.mean(0))
    assert_close(models[0].running_var, both.var(0), rtol=2e-3, atol=0)


@pytest.mark.untyped
def test_refusals_change_nothing():
    target, model = net(seed=0), net(seed=1)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=r"decay must be between 0 and 1, got 1\.5"):
        ema_update(target, model, 1.5)
    with pytest.raises(ValueError, match="one of copy, average, merge, got 'ema'"):
        ema_update(target, model, 0.5, "ema")
    with pytest.raises(ValueError, match=r"0\.weight is missing in the model"):
        ema_update(target, nn.Sequential(nn.Identity(), nn.BatchNorm1d(4)), 0.5)
    model.register_buffer("more", torch.ones(1))
    with pytest.raises(ValueError, match="more is missing in the target; give two equal models"):
        ema_update(target, model, 0.5)
    del model.more
    model[0].weight = nn.Parameter(torch.ones(4, 5))
    message = r"0\.weight has the shape \(4, 3\) in the target and \(4, 5\) in the model"
    with pytest.raises(ValueError, match=message):
        ema_update(target, model, 0.5)
    assert_close(dict(target.state_dict()), dict(before), **EXACT)


def test_layers_without_statistics_or_parameters():
    def make(seed):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(3, 4),
            nn.BatchNorm1d(4, affine=False),
            nn.BatchNorm1d(4, track_running_stats=False),
        )

    target, model = make(0), make(1)
    model[1].running_mean.fill_(2.0)
    ema_update(target, model, 0.5, "average")
    assert torch.equal(target[1].running_mean, torch.ones(4))


# merge_state_dicts.


def client(data: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a client sends whose statistics are exactly those of its data."""
    state = net(seed=seed).state_dict()
    state["1.running_mean"], state["1.running_var"] = data.mean(0), data.var(0)
    return state


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=5),
    mean=st.sampled_from([0.0, 1.0, 1e4]),
    spread=st.sampled_from([0.0, 0.1, 30.0]),
)
def test_merged_statistics_are_those_of_the_union(sizes, mean, spread):
    generator = torch.Generator().manual_seed(sum(sizes))
    parts = [
        torch.randn(size, 4, generator=generator, dtype=torch.float64) + mean + spread * number
        for number, size in enumerate(sizes)
    ]
    states = [client(part, number) for number, part in enumerate(parts)]
    merged = merge_state_dicts(states, sizes)
    union = torch.cat(parts)
    assert_close(merged["1.running_mean"], union.mean(0), rtol=1e-12, atol=1e-12)
    assert_close(merged["1.running_var"], union.var(0), rtol=1e-9, atol=1e-12)


def test_everything_else():
    states = [client(torch.randn(5, 4), 0), client(torch.randn(15, 4), 1)]
    for state in states:
        state["half"] = torch.rand(3).bfloat16()
        state["ids"] = torch.arange(4)
        state["mask"] = torch.tensor([True, False])
    before = copy.deepcopy(states)
    merged = merge_state_dicts(states, [5, 15])
    assert list(merged) == list(states[0])
    assert merged["1.num_batches_tracked"] == 21
    for name, tensor in merged.items():
        assert (tensor.dtype, tensor.shape) == (states[0][name].dtype, states[0][name].shape)
        assert tensor.data_ptr() not in [state[name].data_ptr() for state in states]
    for name in ("0.weight", "1.bias", "scale", "half"):
        a, b = (state[name].double() for state in states)
        assert torch.equal(merged[name], (0.25 * a + 0.75 * b).to(states[0][name].dtype))
    assert torch.equal(merged["ids"], torch.arange(4))
    assert torch.equal(merged["mask"], torch.tensor([True, False]))
    assert_close(states, before, **EXACT)
    net().load_state_dict({k: v for k, v in merged.items() if k not in ("half", "ids", "mask")})


def test_what_a_plain_average_does_to_variances_and_counters():
    """Before and after: clients that differ only in their means."""
    parts = [torch.randn(500, 4) - 3, torch.randn(500, 4) + 3]
    states = [client(part) for part in parts]
    states[1]["1.num_batches_tracked"].fill_(7)
    plain = {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(states[0][name])
        for name in states[0]
    }
    true = torch.cat(parts).var(0)
    assert_close(plain["1.running_var"], torch.ones(4), rtol=0.2, atol=0)
    assert true.min() > 9
    assert plain["1.num_batches_tracked"] == 8  # of 10 and 7: half a batch is lost
    merged = merge_state_dicts(states, [500, 500])
    assert_close(merged["1.running_var"], true)
    assert merged["1.num_batches_tracked"] == 17


def test_torchs_averaged_model_averages_variances_without_the_means():
    models = []
    for shift in (-3, 3):
        layer = nn.BatchNorm1d(4, momentum=1.0)
        layer(torch.randn(500, 4) + shift)
        models.append(layer)
    averaged = AveragedModel(models[0], use_buffers=True)
    for layer in models:
        averaged.update_parameters(layer)
    assert averaged.module.running_var.max() < 1.5
    merged = merge_state_dicts([layer.state_dict() for layer in models], [500, 500])
    assert merged["running_var"].min() > 9


def test_a_soup_of_equal_models_is_that_model():
    state = net().state_dict()
    merged = merge_state_dicts([state] * 3, [50_000] * 3)
    counter = merged.pop("1.num_batches_tracked")
    assert counter == 30
    for name, tensor in merged.items():
        assert_close(tensor, state[name], rtol=1e-4, atol=0)


COUNTER = "1.num_batches_tracked"


def rounds(server, count, *, with_base):
    """Federated rounds of ten clients, which count one batch each."""
    for _ in range(count):
        clients = [copy.deepcopy(server) for _ in range(10)]
        for client_ in clients:
            client_[COUNTER] += 1
        server = merge_state_dicts(clients, [5] * 10, base=server if with_base else None)
    return server


def test_federated_rounds_count_each_batch_once():
    server = net().state_dict()
    server[COUNTER].zero_()
    assert rounds(server, 9, with_base=False)[COUNTER] == 1_111_111_110
    assert rounds(server, 40, with_base=True)[COUNTER] == 400
    message = (
        r"1\.num_batches_tracked would be 1\.11111e\+19, more than torch\.int64 holds; give base, "
        "the checkpoint from which all of them went on"
    )
    with pytest.raises(ValueError, match=message):
        rounds(server, 19, with_base=False)


def test_a_soup_of_models_fine_tuned_from_one_checkpoint():
    base = net().state_dict()
    tuned = [copy.deepcopy(base) for _ in range(3)]
    for number, state in enumerate(tuned):
        state[COUNTER] += 100 + number
    assert merge_state_dicts(tuned, [50] * 3, base=base)[COUNTER] == 10 + 303
    assert base[COUNTER] == 10
    for name, tensor in merge_state_dicts(tuned, [50] * 3).items():
        if name != COUNTER:
            assert torch.equal(tensor, merge_state_dicts(tuned, [50] * 3, base=base)[name])


def test_names_that_only_look_like_statistics_are_averaged():
    states = [{"running_mean": torch.full((2,), float(n))} for n in (1, 3)]
    assert torch.equal(merge_state_dicts(states, [2, 2])["running_mean"], torch.full((2,), 2.0))


@pytest.mark.untyped
def test_refused_checkpoints():
    state = net().state_dict()
    with pytest.raises(ValueError, match="at least one state_dict, got none"):
        merge_state_dicts([], [])
    with pytest.raises(ValueError, match="one count for each state_dict, got 1 for 2"):
        merge_state_dicts([state, state], [3])
    for count in (1, 0.5, -2, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"at least two each, got .* for checkpoint 1; for eq"):
            merge_state_dicts([state, state], [3, count])
    less = {name: tensor for name, tensor in state.items() if name != "1.bias"}
    with pytest.raises(ValueError, match=r"1\.bias is missing in checkpoint 1"):
        merge_state_dicts([state, less], [3, 3])
    with pytest.raises(ValueError, match=r"1\.bias is missing in checkpoint 0"):
        merge_state_dicts([less, state], [3, 3])
    other = {**state, "1.bias": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"1\.bias is torch.float32 of shape \(4,\) in checkpoint"):
        merge_state_dicts([state, other], [3, 3])
    other = {**state, "1.bias": state["1.bias"].double()}
    with pytest.raises(ValueError, match=r"and torch.float64 of shape \(4,\) in checkpoint 1"):
        merge_state_dicts([state, other], [3, 3])
    later = {**state, COUNTER: torch.tensor(11)}
    message = r"1\.num_batches_tracked is 10 in checkpoint 1 and 11 in base, which must have come"
    with pytest.raises(ValueError, match=message):
        merge_state_dicts([later, state], [3, 3], base=later)
    with pytest.raises(ValueError, match=r"1\.num_batches_tracked is missing in base"):
        merge_state_dicts([state], [3], base={})
    ids = [{"ids": torch.tensor([1])}, {"ids": torch.tensor([2])}]
    with pytest.raises(ValueError, match=r"ids is torch.int64 and cannot be averaged, but it diff"):
        merge_state_dicts(ids, [3, 3])
    with pytest.raises(TypeError, match="_extra_state is a dict, not a tensor; take it out"):
        merge_state_dicts([{**state, "_extra_state": {}}] * 2, [3, 3])


# keep_statistics_in_float32.


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def dtypes(model: nn.Module) -> set[torch.dtype]:
    return {t.dtype for m in layers_of(model) for t in m.state_dict().values() if t.dim()}


CASTS = [
    lambda model: model.half(),
    lambda model: model.bfloat16(),
    lambda model: model.to(torch.bfloat16),
    lambda model: model.to("cpu", torch.float16),
    lambda model: model.to(torch.zeros(1).bfloat16()),
    lambda model: model.type(torch.bfloat16),
    lambda model: model.double().half(),
]


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("ours", [True, False])
def test_layers_stay_in_float32_and_compute_with_half_precision(cast, ours):
    torch.manual_seed(0)
    model = nets.ResNet()
    if ours:
        accelerate(model)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.running_mean.normal_()
            layer.weight.normal_()
    before = copy.deepcopy(model.state_dict())
    keep_statistics_in_float32(model)
    cast(model)
    assert dtypes(model) == {torch.float32}
    dtype = model.conv1.weight.dtype
    assert dtype in (torch.float16, torch.bfloat16)
    for name, tensor in model.state_dict().items():
        if "bn" in name or "downsample.1" in name:
            assert torch.equal(tensor, before[name]), name
    x = torch.randn(4, 3, 8, 8, dtype=dtype)
    for training in (True, False):
        y = model.train(training)(x)
        assert y.dtype == dtype
        assert y.isfinite().all()
        y.float().sum().backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    model.half()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    assert all(layer.weight.grad.dtype == torch.float32 for layer in layers_of(model))


def test_wider_dtypes_are_followed():
    model = nets.LeNet()
    keep_statistics_in_float32(model)
    model.double()
    assert dtypes(model) == {torch.float64}
    model(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    assert dtypes(model.float()) == {torch.float32}
    assert dtypes(model.to("meta").to_empty(device="cpu").half()) == {torch.float32}


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_keep_it_too(duplicate):
    model = nets.LeNet()
    handle = keep_statistics_in_float32(model)
    twin = duplicate(model)
    twin.half()
    assert dtypes(twin) == {torch.float32}
    assert twin.conv1.weight.dtype == torch.float16
    assert model.conv1.weight.dtype == torch.float32
    handle.remove()
    assert dtypes(model.half()) == {torch.float16}
    assert dtypes(twin.bfloat16()) == {torch.float32}
    keep_statistics_in_float32(twin).remove()
    assert dtypes(twin.bfloat16()) == {torch.bfloat16}
    assert all("_apply" not in vars(module) for module in twin.modules())


def test_state_dicts_both_ways():
    model = nets.LeNet()
    keep_statistics_in_float32(model)
    plain = nets.LeNet()
    assert list(model.state_dict()) == list(plain.state_dict())
    model.bfloat16()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    model.load_state_dict(plain.bfloat16().state_dict())
    assert dtypes(model) == {torch.float32}


def test_it_is_undone_without_a_trace():
    model = nets.LeNet()
    before = [set(vars(module)) for module in model.modules()]
    kinds = [type(module) for module in model.modules()]
    first = keep_statistics_in_float32(model)
    with keep_statistics_in_float32(model):
        assert [type(module) for module in model.modules()] == kinds
        assert dtypes(model.half()) == {torch.float32}
    first.remove()
    assert [set(vars(module)) for module in model.modules()] == before
    assert dtypes(model.half()) == {torch.float16}


def test_an_apply_of_the_layers_own_still_runs_and_comes_back():
    layer, calls = nn.BatchNorm1d(2), []

    def own(fn, recurse=True):
        calls.append(recurse)
        return type(layer)._apply(layer, fn, recurse)

    layer._apply = own
    with keep_statistics_in_float32(layer):
        assert layer.half().running_mean.dtype == torch.float32
    assert calls == [False, False]
    assert layer._apply is own
    assert layer.half().running_mean.dtype == torch.float16


def test_a_choice_of_layers_and_a_model_that_is_half_already():
    model = nets.LeNet().half()
    keep_statistics_in_float32(model, ["bn1", "bn3"])
    assert [layer.running_var.dtype for layer in layers_of(model)] == [
        torch.float32,
        torch.float16,
        torch.float32,
    ]
    keep_statistics_in_float32(model, ["bn1"]).remove()
    model.bfloat16()
    assert model.bn1.running_var.dtype == torch.bfloat16
    assert model.bn3.running_var.dtype == torch.float32
    with pytest.raises(ValueError, match="keep_statistics_in_float32: no batch norm layer fits"):
        keep_statistics_in_float32(model, ["conv1"])


def test_activations_inside_a_layer_are_cast_as_usual():
    model = nets.ConvNormAct(nets.BatchNormAct2d(4, nn.PReLU()))
    keep_statistics_in_float32(model)
    model.bfloat16()
    assert model.bn.running_mean.dtype == model.bn.weight.dtype == torch.float32
    assert model.bn.act.weight.dtype == torch.bfloat16


def test_bfloat16_statistics_stall_and_kept_ones_do_not():
    """Before and after: momentum 0.001, true mean 1, 6 000 batches."""
    torch.manual_seed(0)
    stalled, kept = (nn.Sequential(nn.BatchNorm1d(2, momentum=0.001)) for _ in range(2))
    keep_statistics_in_float32(kept)
    stalled.bfloat16()
    kept.bfloat16()
    for _ in range(6000):
        x = (torch.randn(64, 2) + 1).bfloat16()
        stalled(x)
        kept(x)
    assert_close(stalled[0].running_mean.float(), torch.full((2,), 0.5), rtol=0.02, atol=0)
    assert_close(kept[0].running_mean, torch.ones(2), rtol=0.02, atol=0)
    assert_close(kept[0].running_var, torch.ones(2), rtol=0.02, atol=0)


def test_an_error_halfway_replaces_no_method():
    class Failing(nn.BatchNorm1d):
        def _apply(self, fn, recurse=True):
            raise RuntimeError("cannot be cast")

    model = nn.Sequential(nn.BatchNorm1d(2), Failing(2))
    with pytest.raises(RuntimeError, match="cannot be cast"):
        batchnorm.keep_statistics_in_float32(model)
    assert not any("_apply" in vars(module) for module in model.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("halfway", [True, False])
def test_an_error_halfway_casts_nothing(error, dtype, halfway):
    class Failing(nn.BatchNorm1d):
        def _apply(self, fn, recurse=True):
            if halfway:
                super()._apply(fn)
            raise error("cannot be cast")

    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False), Failing(2))
    for layer in model:
        for tensors in (layer._parameters, layer._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
    model[0].weight.grad = gradient = torch.ones(2, dtype=dtype)
    before = [(id(t), t.dtype, t.data_ptr()) for t in (*model.parameters(), *model.buffers())]
    with pytest.raises(error, match="cannot be cast"):
        keep_statistics_in_float32(model)
    after = [(id(t), t.dtype, t.data_ptr()) for t in (*model.parameters(), *model.buffers())]
    assert after == before
    assert model[0].weight.grad is gradient
    assert gradient.dtype == dtype
    assert not any("_apply" in vars(module) for module in model.modules())
    model[0](torch.ones(2, 2, dtype=dtype)).sum().backward()
