"""Captures other than ``torch.export``: ``torch.fx``, TorchScript, traces, operation counters."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys
import warnings
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.testing import assert_close

import batchnorm
from real_networks import import_torchvision

pytestmark = [
    pytest.mark.untyped,
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
]
SHAPES = {1: (6, 3, 4), 2: (4, 3, 5, 2), 3: (2, 3, 4, 2, 3)}
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def images(rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPES[rank], generator=generator) * 2 + 1


def layer(rank=2, library=batchnorm, **options):
    """A layer whose state is not at its defaults."""
    made = getattr(library, f"BatchNorm{rank}d")(3, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in made.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2, generator=generator)
    return made


class Block(nn.Module):
    """A layer with all that it takes: a residual by position and by name, and an activation."""

    def __init__(self, **options):
        super().__init__()
        self.norm = layer(**options)
        self.last = layer(activation="relu", **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x, x), residual=x)


def equal_steps(captured, model, x, count=3):
    """The same outputs and states, batch after batch."""
    for seed in range(count):
        batch = x + seed
        assert_close(captured(batch), model(batch), rtol=1e-4, atol=1e-5)
        assert_close(dict(captured.state_dict()), dict(model.state_dict()), rtol=1e-4, atol=1e-5)


# torch.fx


@each_mode
@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "relu"}, {"affine": False}, {"momentum": None}],
    ids=["default", "activation", "no parameters", "cumulative"],
)
def test_fx_records_a_layer_as_one_node(rank, options, training):
    model = nn.Sequential(nn.Identity(), layer(rank, **options)).train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert [node.op for node in traced.graph.nodes] == [
        "placeholder",
        "call_module",
        "call_module",
        "output",
    ]
    equal_steps(traced, model, images(rank))


def test_fx_records_a_residual():
    model = Block().eval()
    traced = torch.fx.symbolic_trace(model)
    assert Counter(node.op for node in traced.graph.nodes)["call_module"] == 2
    assert_close(traced(images()), model(images()))


def test_fx_records_a_call_on_a_constant_and_lazy_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.lazy = layer().eval(), batchnorm.LazyBatchNorm2d(activation="relu")
            self.register_buffer("constant", images())

        def forward(self, x):
            return self.norm(self.constant) + self.lazy(x)

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    assert Counter(node.op for node in traced.graph.nodes)["call_module"] == 2
    assert_close(traced(images()), copy.deepcopy(model)(images()))


def test_fx_calls_hooks_when_the_graph_runs_and_not_before():
    model, seen = nn.Sequential(layer()), []
    model[0].register_forward_hook(lambda _, inputs, y: seen.append(type(y)))
    traced = torch.fx.symbolic_trace(model)
    assert seen == []
    traced(images())
    assert seen == [Tensor]


class Scaled(batchnorm.BatchNorm2d):
    """A user's subclass."""

    def forward(self, x):
        return 3 * super().forward(x)


def test_fx_records_a_subclass_as_one_node():
    model = nn.Sequential(Scaled(3)).eval()
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert_close(traced(images()), model(images()))


def test_fx_records_the_function_as_one_node():
    def call(x, mean, var, weight):
        return batchnorm.batch_norm(x, mean, var, weight, residual=x, activation="relu")

    traced = torch.fx.symbolic_trace(call)
    calls = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [batchnorm.batch_norm]
    arguments = (images(), torch.zeros(3), torch.ones(3), torch.full((3,), 2.0))
    for again in (traced, pickle.loads(pickle.dumps(traced))):
        assert_close(again(*arguments), call(*arguments))


def test_fx_records_the_function_with_parameters_of_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((3,), 2.0))

        def forward(self, x):
            return batchnorm.batch_norm(x, None, None, self.weight, training=True)

    model = Model()
    assert_close(torch.fx.symbolic_trace(model)(images()), model(images()))


@pytest.mark.parametrize("how", ["whole model", "tracer without leaves"])
def test_fx_cannot_look_into_a_layer(how):
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, path):
            return False

    trace, model = torch.fx.symbolic_trace, layer()
    if how != "whole model":
        trace, model = Tracer().trace, nn.Sequential(layer())
    message = (
        r"^torch\.fx can record a BatchNorm2d only as one node; trace a model that holds it, such "
        r"as torch\.nn\.Sequential\(layer\), with a tracer whose is_leaf_module is true for it\.$"
    )
    with pytest.raises(TypeError, match=message):
        trace(model)


def test_features_of_torchvision():
    models = import_torchvision().models
    from torchvision.models.feature_extraction import create_feature_extractor

    model = models.resnet18(norm_layer=batchnorm.BatchNorm2d).eval()
    seen = {}
    model.layer1[0].bn1.register_forward_hook(lambda *call: seen.update(bn1=call[2]))
    nodes = {"layer1.0.bn1": "bn1", "layer2": "layer2"}
    features = create_feature_extractor(model, nodes)(torch.randn(2, 3, 32, 32))
    assert_close(features["bn1"], seen["bn1"])
    assert features["layer2"].shape == (2, 128, 4, 4)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_fx_fuses_nothing_away(activation):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer(activation=activation)).eval()
    assert_close(fuse(model)(images()), model(images()))


def test_quantization_by_fx():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer(activation="relu")).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Deprecated, and says so many times.
        prepared = prepare_fx(model, get_default_qconfig_mapping(), (images(),))
        assert_close(prepared(images()), model(images()))
        assert_close(convert_fx(prepared)(images()), model(images()), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["pickle", "deepcopy", "old pickle"])
def test_an_object_of_ours_is_pickled_by_its_class(name):
    made = layer(activation="relu")
    assert type(made).__module__ == "batchnorm.nn.layers"
    if name == "old pickle":
        del vars(made)["__module__"]  # Earlier versions had no such attribute.
    copied = copy.deepcopy(made) if name == "deepcopy" else pickle.loads(pickle.dumps(made))
    assert type(copied) is batchnorm.BatchNorm2d
    assert torch.fx.symbolic_trace(nn.Sequential(copied)).graph
    assert list(copied.state_dict()) == list(nn.BatchNorm2d(3).state_dict())


# TorchScript


@each_mode
@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "relu"},
        {"momentum": None, "activation": "relu"},
        {"affine": False, "eps": 0.5},
        {"track_running_stats": False},
        {"bias": False},
    ],
    ids=["default", "activation", "cumulative", "no parameters", "tracks not", "no bias"],
)
def test_script(rank, options, training, tmp_path):
    model = nn.Sequential(layer(rank, **options)).train(training)
    scripted = torch.jit.script(copy.deepcopy(model))
    torch.jit.save(scripted, tmp_path / "model.pt")
    equal_steps(torch.jit.load(tmp_path / "model.pt"), copy.deepcopy(model), images(rank))
    equal_steps(scripted, model, images(rank))


@each_mode
def test_script_with_a_residual(training):
    model = Block().train(training)
    equal_steps(torch.jit.script(copy.deepcopy(model)), model, images())


def test_script_leaves_the_model_as_it_was():
    model = nn.Sequential(layer(activation="relu"))
    before = model[0]
    torch.jit.script(model)
    assert model[0] is before
    assert type(before) is batchnorm.BatchNorm2d


@pytest.mark.parametrize(
    ("kind", "x", "residual", "message"),
    [
        ("gelu", (2, 3, 4, 4), None, "activation must be None or 'relu', got 'gelu'"),
        (None, (2, 3, 4, 4), (2, 3, 1, 1), "residual must have the input's shape"),
        (None, (3, 4), None, "expects an input of rank"),
        (None, (1, 3, 1, 1), None, "Expected more than 1 value per channel"),
    ],
)
def test_a_script_refuses_what_eager_refuses_and_counts_nothing(kind, x, residual, message):
    made = layer()
    made.activation = kind
    scripted = torch.jit.script(made)
    operands = [torch.ones(shape) for shape in (x, residual) if shape is not None]
    with pytest.raises((torch.jit.Error, ValueError, RuntimeError), match=message):
        scripted(*operands)
    assert scripted.num_batches_tracked == 0


def test_script_of_the_function():
    def call(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor) -> Tensor:
        return batchnorm.batch_norm(x, mean, var, weight, residual=x, activation="relu")

    arguments = (images(), torch.zeros(3), torch.ones(3), torch.full((3,), 2.0))
    assert_close(torch.jit.script(call)(*arguments), call(*arguments))
    assert_close(torch.jit.script(batchnorm.batch_norm)(*arguments[:3], None), images() / 1.000005)


def test_script_refuses_a_wrong_rank():
    scripted = torch.jit.script(layer(2))
    with pytest.raises(torch.jit.Error, match=r"expects an input of rank \(4,\), got 3\."):
        scripted(images(1))


def test_script_of_a_lazy_layer_asks_for_a_first_batch():
    lazy = nn.Sequential(batchnorm.LazyBatchNorm2d(activation="relu"))
    with pytest.raises(RuntimeError, match=r"uninitialized parameters weight\. Did you forget to"):
        torch.jit.script(lazy)
    lazy(images())
    equal_steps(torch.jit.script(copy.deepcopy(lazy)), lazy, images())


def test_scripted_and_frozen_for_inference():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer(activation="relu")).eval()
    frozen = torch.jit.freeze(torch.jit.script(copy.deepcopy(model)))
    assert "aten::batch_norm" not in str(frozen.inlined_graph)  # folded into the convolution
    assert_close(frozen(images()), model(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tool", ["guard", "count_recomputation_once"])
def test_script_of_a_model_under_a_tool_says_what_to_do(tool):
    model = nn.Sequential(layer())
    handle = getattr(batchnorm, tool)(model)
    message = (
        r"^torch\.jit\.script cannot compile BatchNorm2d\.forward while a tool of batchnorm has "
        r"replaced it; end the tool first, with remove\(\) or by leaving its with block\.$"
    )
    with pytest.raises(AttributeError, match=message):
        torch.jit.script(model)
    handle.remove()
    equal_steps(torch.jit.script(copy.deepcopy(model)), model, images())


# torch.jit.trace


def traced(model, x, grad=True):
    with torch.set_grad_enabled(grad), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        graph = torch.jit.trace(model, x)
    tracer = [w for w in told if w.category is torch.jit.TracerWarning]
    return graph, tracer


def operators(trace):
    return Counter(n.kind() for n in trace.inlined_graph.nodes() if n.kind().startswith("aten"))


@each_mode
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_trace_holds_torchs_operator(rank, activation, grad, training):
    model = nn.Sequential(layer(rank, activation=activation)).train(training)
    trace, told = traced(copy.deepcopy(model), images(rank), grad)
    expected, told_of_torch = traced(
        nn.Sequential(layer(rank, nn)).train(training), images(rank), grad
    )
    relu = {"aten::relu": 1} if activation else {}
    assert operators(trace) == operators(expected) + Counter(relu)
    assert len(told) == len(told_of_torch)
    trace.load_state_dict(model.state_dict())  # Tracing runs a training batch, also torch's.
    equal_steps(trace, model, images(rank))


def test_a_trace_of_a_residual():
    model = Block().eval()
    trace, told = traced(model, images())
    assert not told
    assert operators(trace) == {"aten::batch_norm": 2, "aten::add": 2, "aten::relu": 1}
    assert_close(trace(images()), model(images()))


def test_a_trace_of_the_cumulative_average():
    """torch's layer writes the counter into the graph as a constant, and the check fails."""
    model = nn.Sequential(layer(momentum=None))
    trace, _ = traced(copy.deepcopy(model), images())
    assert operators(trace)["aten::batch_norm"] == 1
    trace.load_state_dict(model.state_dict())
    equal_steps(trace, model, images())


@pytest.mark.parametrize(
    "dtypes",
    list(itertools.product((torch.bfloat16, torch.float32, torch.float64), repeat=2)),
    ids=str,
)
def test_a_trace_of_mixed_dtypes_is_right(dtypes):
    model, x = layer().eval().to(dtypes[0]), images().to(dtypes[1])
    trace, _ = traced(model, x)
    short = torch.bfloat16 in dtypes
    assert_close(trace(x), model(x), rtol=2e-2 if short else 1e-4, atol=2e-2 if short else 1e-5)
    torchs = dtypes[0] == dtypes[1] or dtypes == (torch.float32, torch.bfloat16)
    assert operators(trace)["aten::batch_norm"] == torchs


def test_a_named_backend_stays_our_operator_in_a_trace():
    def call(x):
        return batchnorm.batch_norm(x, None, None, training=True, backend="reference")

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        trace = torch.jit.trace(call, images())
    assert "batchnorm::forward" in str(trace.graph)


@each_mode
def test_a_saved_trace_runs_without_this_library(training, tmp_path):
    model = Block().train(training)
    trace, _ = traced(copy.deepcopy(model), images())
    trace.load_state_dict(model.state_dict())
    torch.jit.save(trace, tmp_path / "trace.pt")
    torch.save((images(), model(images()).detach()), tmp_path / "values.pt")
    code = (
        "import sys, torch, warnings; warnings.simplefilter('ignore')\n"
        "sys.modules['batchnorm'] = None\n"
        f"x, y = torch.load({str(tmp_path / 'values.pt')!r}, weights_only=True)\n"
        f"found = torch.jit.load({str(tmp_path / 'trace.pt')!r})(x)\n"
        "torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-5)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (1, 3, 1, 1)], ids=["empty", "one value"])
def test_a_trace_of_unusual_batches(shape):
    model = nn.Sequential(layer(activation="relu")).eval()
    trace, _ = traced(model, torch.ones(shape))
    assert_close(trace(torch.ones(shape)), model(torch.ones(shape)))


def test_a_trace_refuses_what_torch_refuses():
    with pytest.raises(RuntimeError, match="running_mean should contain 6 elements, one a channel"):
        torch.jit.trace(layer().eval(), torch.ones(2, 6, 5, 3))


class WithResidual(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.layer, self.residual = layer(), torch.ones(shape)

    def forward(self, x):
        return self.layer(x, self.residual)


@pytest.mark.parametrize("shape", [(1,), (5, 3, 4, 4), (3, 1, 1)])
def test_a_trace_refuses_another_residual_and_changes_nothing(shape):
    model = WithResidual(shape)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"residual must have the input's shape \(2, 3, 4, 4\)"):
        torch.jit.trace(model, torch.ones(2, 3, 4, 4), check_trace=False)
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_a_trace_refuses_an_unknown_activation_and_one_statistic():
    model = nn.Sequential(layer())
    model[0].activation = "gelu"
    with pytest.raises(ValueError, match=r"activation must be None or 'relu', got 'gelu'"):
        torch.jit.trace(model, images(), check_trace=False)
    with pytest.raises(ValueError, match="must either both be None or neither"):
        torch.jit.trace(
            lambda x: batchnorm.batch_norm(x, torch.zeros(3), None, training=True), images()
        )


@each_mode
def test_make_fx_holds_torchs_batch_norm(training):
    from torch.fx.experimental.proxy_tensor import make_fx

    made = layer().train(training)
    found = {str(node.target) for node in make_fx(made)(images()).graph.nodes}
    assert not any("batchnorm" in name for name in found)
    assert any("batch_norm" in name for name in found)


def test_onnx_by_trace():
    pytest.importorskip("onnx", reason="the exporter by trace needs onnx")
    file = io.BytesIO()
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer(activation="relu")).eval()
    torch.onnx.export(model, (images(),), file, dynamo=False)
    assert b"Relu" in file.getvalue()


# Counters of operations


def test_fvcore_counts_what_it_counts_for_torchs_layer():
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    counts = []
    for library in (batchnorm, nn):
        model = nn.Sequential(nn.Conv2d(3, 3, 3), layer(2, library)).eval()
        counts.append(fvcore.FlopCountAnalysis(model, torch.ones(1, 3, 16, 16)))
    assert counts[0].total() == counts[1].total()
    assert counts[0].by_operator() == counts[1].by_operator()
    assert not counts[0].unsupported_ops()


# Profilers


@each_mode
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_profiler_sees_our_name(activation, grad, training):
    made = layer(activation=activation).train(training)
    with torch.set_grad_enabled(grad), torch.profiler.profile() as profile:
        made(images())
    assert Counter(event.key for event in profile.events())["batchnorm::forward"] == 1


def test_a_profiler_sees_our_name_on_other_routes():
    made = layer()
    with torch.profiler.profile() as profile:
        batchnorm.batch_norm(images(), None, None, training=True)
        made(images().as_subclass(type("Subclass", (Tensor,), {})))
    assert Counter(event.key for event in profile.events())["batchnorm::forward"] == 2
    assert not torch.autograd.profiler._is_profiler_enabled


def test_no_event_is_made_without_a_profiler(monkeypatch):
    from batchnorm.nn import functional

    monkeypatch.setattr(functional, "record_function", None)
    layer()(images())
