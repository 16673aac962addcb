"""watch: what is recorded, against sums over the data, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import io
import json
import math
import subprocess
import sys
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm
import model_nets as nets
from batchnorm.tools.monitoring import watch
from batchnorm.tools.monitoring.chart import chart
from batchnorm.tools.monitoring.state import states
from everywhere import accelerate
from look_alikes import Own
from model_cases import anatomy, relus_and_additions

KINDS = [nn.BatchNorm1d, batchnorm.BatchNorm1d, nn.SyncBatchNorm]


def batch(count: int = 64, mean: float = 2.0, std: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(count, 4, generator=generator) + mean


def expected_against(mean: Tensor, var: Tensor, x: Tensor, eps: float = 1e-5) -> dict[str, float]:
    shift = (x.mean(0) - mean) / (var + eps).sqrt()
    ratio = (x.var(0) + eps) / (var + eps)
    return {
        "mean_shift": float(shift.abs().max()),
        "mean_shift_rms": float(shift.square().mean().sqrt()),
        "var_ratio_low": float(ratio.min()),
        "var_ratio_high": float(ratio.max()),
        "batch_mean_low": float(x.mean(0).min()),
        "batch_mean_high": float(x.mean(0).max()),
        "batch_var_low": float(x.var(0).min()),
        "batch_var_high": float(x.var(0).max()),
    }


def assert_record(record, expected, rel=1e-5):
    assert {key: record[key] for key in expected} == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_told_by_what_it_did_to_the_running_statistics(kind, momentum):
    layer = kind(4, momentum=momentum)
    with watch(layer) as watched:
        assert not layer._forward_pre_hooks
        for seed in range(3):
            mean, var = layer.running_mean.clone(), layer.running_var.clone()
            x = batch(seed=seed)
            layer(x)
            watched.step()
            record = watched.records[-1]
            assert (record["step"], record["layer"], record["channels"]) == (seed + 1, "", 4)
            assert record["batches"] == 1
            assert_record(record, expected_against(mean, var, x))
            moved = (layer.running_mean - mean) / (var + 1e-5).sqrt()
            factor = (layer.running_var + 1e-5) / (var + 1e-5)
            assert_record(
                record,
                {
                    "mean_drift": float(moved.abs().max()),
                    "var_drift": float(torch.maximum(factor, 1 / factor).max()),
                    "running_mean_low": float(layer.running_mean.min()),
                    "running_var_high": float(layer.running_var.max()),
                    "weight_low": 1.0,
                    "bias_high": 0.0,
                },
            )


@pytest.mark.parametrize("momentum", [0.1, None])
def test_several_batches_since_are_averaged_as_the_momentum_weighs_them(momentum):
    layer = nn.BatchNorm1d(4, momentum=momentum).double()
    watched = watch(layer, every=3)
    parts = [batch(seed=seed, mean=seed).double() for seed in range(3)]
    for part in parts:
        layer(part)
        watched()
    weights = torch.tensor([1 / 3] * 3 if momentum is None else [0.81, 0.9, 1.0])
    weights = (weights / weights.sum()).double()
    mean = sum(w * part.mean(0) for w, part in zip(weights, parts, strict=True))
    (record,) = watched.records
    assert (record["step"], record["batches"]) == (3, 3)
    assert_record(record, {"batch_mean_low": float(mean.min()), "mean_shift": float(mean.max())})


def frozen(layer: nn.Module) -> nn.Module:
    return layer.eval()


def untracked(layer: nn.Module) -> nn.Module:
    layer.track_running_stats = False
    return layer


def without_counter(layer: nn.Module) -> nn.Module:
    layer.num_batches_tracked = None
    return layer


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *((kind, change) for kind in KINDS for change in (frozen, untracked)),
        *((kind, without_counter) for kind in KINDS[:2]),  # torch's third refuses to train so
    ],
)
def test_layers_whose_buffers_do_not_tell_are_listened_to(kind, change):
    layer = change(kind(4))
    with watch(layer) as watched:
        x = batch()
        layer(input=x[:20])
        layer(x[20:])
        watched.step()
        (record,) = watched.records
        assert record["batches"] == 0
        assert_record(record, expected_against(torch.zeros(4), torch.ones(4), x))
        with torch.no_grad():
            layer(1000 * x)
        layer(batch(seed=1))
        watched.step()
        assert watched.records[-1]["batch_mean_high"] < 10
    assert not layer._forward_pre_hooks


def test_layers_without_statistics_have_moments_and_nothing_to_compare_them_with():
    layer = nn.BatchNorm1d(4, affine=False, track_running_stats=False)
    watched = watch(layer)
    x = batch()
    layer(x)
    watched.step()
    (record,) = watched.records
    assert record["batch_var_high"] == pytest.approx(float(x.var(0).max()))
    unknown = ("mean_shift", "var_ratio_low", "mean_drift", "var_drift", "weight_low", "bias_high")
    assert [record[key] for key in unknown] == [None] * 6
    assert (record["channels"], record["dead"]) == (4, 0.0)
    json.dumps(watched.to_dict(), allow_nan=False)
    last = str(watched).splitlines()[2].split()
    assert last == ["the", "model", "itself", *"---", "0%", *"--"]


def test_modes_may_change_meanwhile():
    layer = nn.BatchNorm1d(4)
    watched = watch(layer)
    layer(batch())
    watched.step()
    layer.eval()
    layer(batch())
    watched.step()  # frozen since the last record: not heard yet
    assert watched.records[-1]["mean_shift"] is None
    assert watched.records[-1]["batches"] == 0
    assert len(layer._forward_pre_hooks) == 1
    layer(batch())
    watched.step()
    assert watched.records[-1]["mean_shift"] is not None
    layer.train()
    watched.step()
    assert not layer._forward_pre_hooks
    layer(batch())
    watched.step()
    assert watched.records[-1]["batches"] == 1


def test_listening_is_limited_to_the_steps_that_are_recorded():
    layer = nn.BatchNorm1d(4).eval()
    watched = watch(layer, every=2)
    layer(batch(mean=100.0))
    watched.step()
    layer(batch(mean=1.0))
    watched.step()
    assert len(watched.records) == 1
    assert watched.records[0]["batch_mean_high"] < 3


def test_a_layer_that_is_never_called_shows():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(4), "unused": nn.BatchNorm1d(4)})
    watched = watch(model)
    model["used"](batch())
    watched.step()
    assert {r["layer"]: r["batches"] for r in watched.records} == {"used": 1, "unused": 0}


def test_dead_channels():
    layer = nn.BatchNorm1d(5)
    x = torch.randn(64, 5)
    x[:, 0] = 7.0
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 5e-5, 0.5, -0.5, 1.0]))
        layer.bias.copy_(torch.tensor([0.0, 0.3, -1.6, -1.6, -2.9]))
        layer.running_var[0] = 0.0
    watched = watch(layer)
    layer(x)
    watched.step()
    shares = {"dead_constant": 0.2, "dead_weight": 0.2, "dead_relu": 0.4, "dead": 0.8}
    assert_record(watched.records[-1], shares)


def test_a_constant_input_is_seen_through_the_rounding_of_the_buffers():
    layer = nn.BatchNorm1d(4, momentum=0.1)
    with torch.no_grad():
        layer.running_var.fill_(100.0)
    watched = watch(layer)
    layer(torch.full((8, 4), 3.0))
    watched.step()
    assert watched.records[-1]["dead_constant"] == 1.0


def test_statistics_that_are_not_finite_come_first():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    watched = watch(model)
    model[0](batch())
    model[1](torch.full((8, 4), math.inf))
    model[2](batch(mean=1.0, std=1.0))
    watched.step()
    lines = str(watched).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["1", "0", "2"]
    assert "nan" in lines[2]
    data = watched.to_dict()
    json.dumps(data, allow_nan=False)
    assert data["records"][1]["mean_shift"] is None
    assert not math.isfinite(watched.records[1]["mean_shift"])
    model[1](torch.full((8, 4), -math.inf))
    watched.step()
    assert math.isnan(watched.records[-2]["mean_shift"])


LEGEND = "shift: batch mean - running mean, in running deviations, of the worst channel."


def test_layers_stay_distinguishable_in_the_table():
    names = [f"backbone.layer{n}.0.downsample.1" for n in (1, 2, 3)]
    model = nn.Module()
    model.backbone = nn.Module()
    for n in (1, 2, 3):
        block = nn.Module()
        block.downsample = nn.Sequential(nn.Identity(), nn.BatchNorm1d(4))
        model.backbone.add_module(f"layer{n}", nn.Sequential(block))
    watched = watch(model)
    watched.step()
    assert sorted(record["layer"] for record in watched.records) == names
    shown = [line.split()[0] for line in str(watched).splitlines()[2:5]]
    assert len(set(shown)) == 3
    assert max(map(len, shown)) <= 16
    assert repr(watched) == str(watched)


def test_zero_initialized_layers_are_explained():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    watched = watch(model)
    watched.step()
    assert "zero" not in str(watched)
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[2].weight)
    watched.step()
    assert str(watched).endswith(
        "\n\nAll weights are zero in 0 and 1 more. Many networks initialize the last layer of\n"
        "a residual block so (timm: zero_init_last); training makes it live."
    )
    model[2].weight.data[0] = 1.0
    watched.step()
    assert "All weights are zero in 0. Many" in str(watched)


def test_the_table():
    torch.manual_seed(0)
    model = nets.ResNet()
    model.layer1[0].bn1.weight.data.fill_(-12345.0)
    watched = watch(model)
    assert str(watched) == "Nothing recorded yet."
    model(torch.randn(8, 3, 8, 8) * 1e6)
    watched.step()
    lines = str(watched).splitlines()
    assert lines[0] == "Step 1, 8 layers, worst first."
    assert lines[1].split() == ["layer", "shift", "var", "ratio", "drift", "dead", "weight", "bias"]
    assert lines[10:12] == ["", LEGEND]
    assert len(lines) == 15
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("….0.downsample.1 ") for line in lines)
    assert lines[2].startswith("bn1 ")
    assert "-1e+04..-1e+04" in next(line for line in lines if line.startswith("layer1.0.bn1"))
    one = watch(nn.BatchNorm1d(4))
    one.step()
    assert str(one).startswith("Step 1, 1 layer, worst first.\n")


def test_records_are_plain_and_hold_nothing_of_the_model():
    model = nets.LeNet()
    watched = watch(model, ["bn1", "bn3"])
    x = torch.randn(4, 3, 8, 8)
    model(x).sum().backward()
    watched.step()
    assert [record["layer"] for record in watched.records] == ["bn1", "bn3"]
    for record in watched.records:
        assert {type(value) for value in record.values()} <= {int, float, str}
    assert watched.to_dict() == {"steps": 1, "every": 1, "records": watched.records}
    json.dumps(watched.to_dict(), allow_nan=False)


def test_no_graph_is_kept():
    layer = nn.BatchNorm1d(4).eval()
    watched = watch(layer)
    x = batch().requires_grad_()
    y = layer(x * 2)
    watched.step()
    alive = [weakref.ref(x), weakref.ref(y)]
    del x, y
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    assert watched.records


def test_the_model_computes_and_learns_as_before():
    torch.manual_seed(0)
    model = nets.ResNet().double()
    model.layer2.eval()
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    before = anatomy(model)
    with watch(model) as watched:
        for each in (model, twin):
            each(x).square().sum().backward()
        watched.step()
    assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=0, atol=0)
    grads = [[p.grad for p in each.parameters()] for each in (model, twin)]
    assert_close(*grads, rtol=0, atol=0)
    assert anatomy(model) == before


def test_fused_blocks_stay_fused():
    model = nets.ResNet().double()
    accelerate(model)
    with watch(model) as watched:
        model(torch.randn(4, 3, 8, 8, dtype=torch.float64))
        watched.step()
        model.eval()
        assert relus_and_additions(model) == (0, 0)


def test_one_transfer_for_all_layers(monkeypatch):
    model = nets.ResNet()
    watched = watch(model)
    model(torch.randn(4, 3, 8, 8))
    sizes = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts: sizes.append(len(parts)) or cat(parts))
    watched.step()
    assert sorted(sizes) == [8, 32]


def test_the_last_steps_are_kept():
    model = nets.LeNet()
    short, all_ = watch(model, keep=2), watch(model, keep=None)
    for _ in range(5):
        for each in (short, all_):
            each.step()
    assert [record["step"] for record in short.records] == [4] * 3 + [5] * 3
    assert [record["layer"] for record in short.records] == ["bn1", "bn2", "bn3"] * 2
    assert (len(all_.records), all_.records[0]["step"]) == (15, 1)
    assert short.to_dict()["steps"] == 5
    default = watch(nn.BatchNorm1d(1))
    for _ in range(1001):
        default.step()
    assert (len(default.records), default.records[0]["step"]) == (1000, 2)
    with pytest.warns(RuntimeWarning, match=r"watch: nothing is done, the model \(ReLU\) has no"):
        nothing = watch(nn.ReLU())
    nothing.step()
    assert nothing.records == []


def test_a_record_is_as_large_as_the_documentation_says():
    layer = nn.BatchNorm1d(4)
    with watch(layer, keep=None) as watched:
        for _ in range(300):
            layer.num_batches_tracked.add_(1)
            watched.step()
        tracemalloc.start()
        for _ in range(200):
            layer.num_batches_tracked.add_(1)
            watched.step()
        size = tracemalloc.get_traced_memory()[0] / 200
        tracemalloc.stop()
    assert 1500 < size < 2500


def test_the_time_of_a_state_is_linear_in_the_layers():
    """Counts how often a name is compared, which was once for every pair of layers."""

    class Name(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other):
            Name.compared += 1
            return str.__eq__(self, other)

    compared = []
    for count in (10, 40):
        layers = {Name(number): nn.BatchNorm1d(2) for number in range(count)}
        Name.compared = 0
        states(layers, {})
        compared.append(Name.compared)
    assert compared[1] <= 4 * compared[0] + 40


def test_an_input_of_another_name():
    class Named(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    layer = Named(4).eval()
    with watch(layer) as watched:
        x = batch()
        layer(x=x)
        watched.step()
        assert_record(watched.records[0], expected_against(torch.zeros(4), torch.ones(4), x))
        message = r"^watch: layer '' \(Named\) is called without a tensor; give it its input\.$"
        with pytest.raises(TypeError, match=message):
            layer(x=3)


def test_a_removed_watch_refuses_to_go_on():
    layer = nn.BatchNorm1d(4).eval()
    watched = watch(layer)
    watched.remove()
    watched.remove()
    assert not layer._forward_pre_hooks
    with pytest.raises(RuntimeError, match="it was removed and records nothing more; make a new"):
        watched.step()
    with pytest.raises(ZeroDivisionError), watch(layer):
        raise ZeroDivisionError
    assert not layer._forward_pre_hooks


def test_bad_arguments():
    with pytest.raises(ValueError, match="watch: every must be at least 1, got 0"):
        watch(nn.BatchNorm1d(4), every=0)
    with pytest.raises(ValueError, match="watch: keep must be at least 1, or None for all, got 0"):
        watch(nn.BatchNorm1d(4), keep=0)
    with pytest.raises(ValueError, match="watch: no batch norm layer fits 'bn'"):
        watch(nets.LeNet(), ["bn"])


# The plot.


def watched_net() -> object:
    torch.manual_seed(0)
    model = nets.ResNet()
    watched = watch(model)
    for step in range(12):
        model(torch.randn(8, 3, 8, 8) * (1 + step))
        watched.step()
    return watched


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_figure_is_drawn_and_saved(tmp_path, suffix):
    figure = watched_net().figure()
    figure.savefig(tmp_path / f"statistics.{suffix}")
    assert (tmp_path / f"statistics.{suffix}").stat().st_size > 5000
    panels = figure.axes
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles == [
        "shift of the batch's mean, in standard deviations",
        "batch's variance over the running one, furthest channel",
        "dead channels",
    ]
    assert panels[-1].get_xlabel() == "step"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) == 5
    assert names[-1] == "4 other layers"


def test_the_figure_names_the_layers_that_were_worst():
    base = {"var_ratio_low": 1.0, "var_ratio_high": 1.0, "dead": 0.0}
    records = [
        {"step": step, "layer": f"bn_{n}", "mean_shift": shift, **base}
        for step in (1, 2)
        for n, shift in enumerate([0.1, 0.5, 0.2, 9.0, 0.3, math.nan])
    ]
    records.append(
        {"step": 3, "layer": "bn_2", "mean_shift": None, **base, "var_ratio_high": math.inf}
    )
    records.append({**records[-1], "layer": "bn_0", "var_ratio_low": 1e-4, "var_ratio_high": 2.0})
    figure = chart(records)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["bn_3", "bn_0", "bn_1", "bn_4", "2 other layers"]
    ratio = figure.axes[1]
    ends = [line.get_ydata()[-1] for line in ratio.lines if len(line.get_ydata()) == 3]
    assert sorted(ends, key=math.isnan) == [-4.0, pytest.approx(math.nan, nan_ok=True)]
    figure.savefig(io.BytesIO(), format="svg")


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="a chart needs at least one record, got none"):
        watch(nn.BatchNorm1d(4)).figure()


def test_matplotlib_is_needed_for_the_figure_only():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch\n"
        "from batchnorm.tools.monitoring import watch\n"
        "watched = watch(torch.nn.BatchNorm1d(2))\n"
        "watched.step(); print(watched)\n"
        "try: watched.figure()\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines()[-1] == (
        "watch: the plot needs matplotlib, which is not installed; pip install 'batchnorm[cli]'."
    )


# Settings that are no Python numbers.

SETTINGS = {
    "tensors": (torch.tensor(1e-3), torch.tensor(0.5)),
    "tensors of shape (1,)": (torch.tensor([1e-3]), torch.tensor([0.5])),
    "numbers of NumPy": (np.float32(1e-3), np.float64(0.5)),
}


CASES = [(kind, name) for kind in (nn.BatchNorm1d, Own) for name in SETTINGS]
CASES.remove((nn.BatchNorm1d, "tensors of shape (1,)"))  # torch takes no such momentum.


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_settings_may_be_tensors(kind, name):
    layer, numbers = kind(4), kind(4)
    layer.eps, layer.momentum = SETTINGS[name]
    numbers.eps, numbers.momentum = 1e-3, 0.5
    records = []
    for each in (layer, numbers):
        with watch(each) as watched:
            each(batch())
            watched.step()
        records.append(watched.to_dict())
    json.dumps(records[0])
    assert records[0]["records"][0] == pytest.approx(records[1]["records"][0])


@pytest.mark.parametrize("eps", [None, "1e-5", torch.zeros(4), torch.zeros((), device="meta")])
def test_an_eps_that_is_no_number_is_taken_for_the_default(eps):
    class WithoutEps(Own):
        def forward(self, x):
            return (x - self.running_mean) / (self.running_var + 1e-5).sqrt()

    layer, other = WithoutEps(4), WithoutEps(4)
    layer.eps = eps
    layer.momentum = None
    with watch(layer) as watched, watch(other) as expected:
        for each in (layer, other):
            each(batch())
        watched.step()
        expected.step()
    assert watched.records == expected.records


def test_an_eps_that_is_a_buffer_is_read():
    class WithBuffer(Own):
        def __init__(self, channels):
            super().__init__(channels)
            self.register_buffer("eps", torch.tensor(0.5))

    layer = WithBuffer(4)
    result = batchnorm.recalibrate(layer, [batch()])
    expected = float(((batch().var(0) + 0.5) / 1.5).max())
    assert result.layers[0].var_ratio_max == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, Own])
def test_integer_statistics_are_recorded(kind, dtype):
    layer = kind(4).eval()
    layer.running_mean, layer.running_var = (
        tensor.to(dtype) for tensor in (layer.running_mean, layer.running_var)
    )
    with watch(layer) as watched:
        watched.step()
        watched.step()
    last = watched.records[-1]
    assert (last["running_mean_low"], last["running_var_high"], last["mean_drift"]) == (0, 1, 0)
    json.dumps(watched.to_dict())
