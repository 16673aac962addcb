"""Forwards that tracing alone would get wrong are left, or fall back when called."""

from __future__ import annotations

import abc
import copy
import random
import sys
import threading
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import model_nets as nets
from batchnorm.tools.flow import tracing
from everywhere import accelerate
from model_cases import (
    EXACT,
    anatomy,
    assert_same_function,
    images,
    relus_and_additions,
    restored,
    tail,
    varied,
)

FLAG = True


def by_value(self, out, residual):
    return F.relu(out) if out.sum() > 0 else F.relu(-out)


def by_mode(self, out, residual):
    return F.relu(out) if self.training else out


def by_dropout(self, out, residual):
    return F.relu(F.dropout(out, 0.5, self.training))


def by_type(self, out, residual):
    return F.relu(out) if isinstance(out, Tensor) else out


def by_global(self, out, residual):
    return F.relu(out) if FLAG else out


def by_shared_state(self, out, residual):
    return F.relu(out) if torch.is_grad_enabled() else out


def by_setting(self, out, residual):
    return F.relu(out) if torch.backends.cudnn.enabled else out


def by_identity(self, out, residual):
    return F.relu(out) if out is not residual else out


def by_none(self, out, residual):
    out = self.relu(out)
    return out if out is not None else residual


def by_chance(self, out, residual):
    return F.relu(out) if random.random() < 2 else out


def with_noise(self, out, residual):
    return F.relu(out) + torch.rand(1)


def without_grad(self, out, residual):
    with torch.no_grad():
        out = out * 2
    return F.relu(out + residual)


def counts_calls(self, out, residual):
    self.calls = getattr(self, "calls", 0) + 1
    return F.relu(out)


def keeps_lists(self, out, residual):
    self.kept.append(out.shape)
    return F.relu(out)


def reads_objects(self, out, residual):
    return F.relu(out) if self.options.relu else out


def prints(self, out, residual):
    print("called")
    return F.relu(out)


def catches(self, out, residual):
    try:
        return F.relu(out)
    except ValueError:
        return out


def makes_modules(self, out, residual):
    return nn.Identity()(F.relu(out))


@torch.no_grad()
def decorated(self, out, residual):
    return F.relu(out)


UNPROVEN = {
    by_value: "cannot be traced",
    by_mode: "does other things in training than in evaluation",
    by_dropout: "does other things in training than in evaluation",
    by_type: "calls isinstance()",
    by_global: "uses the global FLAG",
    by_shared_state: "calls is_grad_enabled()",
    by_setting: "reads torch.backends",
    by_identity: "compares by identity",
    by_none: "asks whether a value that it computed is None",
    by_chance: "uses the global random",
    with_noise: "calls rand()",
    without_grad: "uses with or try",
    counts_calls: "writes attributes",
    keeps_lists: "reads 'kept', a list",
    reads_objects: "reads 'options', a SimpleNamespace",
    prints: "calls print()",
    catches: "uses with or try",
    makes_modules: "calls torch.nn.modules.",
    decorated: "calls torch.utils._contextlib.",
}


@pytest.mark.parametrize(("function", "reason"), UNPROVEN.items())
def test_forwards_that_cannot_be_proven_are_left(function, reason, capsys):
    model = tail(function)
    model.kept, model.options = [], SimpleNamespace(relu=True)
    original = copy.deepcopy(model)
    drawn = torch.get_rng_state()

    result = accelerate(model)

    assert result.replaced == ("bn",)
    assert (result.relus, result.additions) == ((), ())
    assert result.left[""].startswith("its forward ")
    assert reason in result.left[""]
    assert capsys.readouterr().out == ""
    assert "calls" not in vars(model)
    assert model.kept == []
    assert_close(torch.get_rng_state(), drawn, **EXACT)
    if function is not decorated:
        assert_same_function(model, original)


@pytest.mark.parametrize(("function", "reason"), UNPROVEN.items())
def test_it_does_not_matter_which_function_is_unproven(function, reason):
    model = type("Root", (nets.Tail,), {"forward": function})()
    model.kept, model.options = [], SimpleNamespace(relu=True)
    expected = "is wrapped by a decorator" if function is decorated else reason
    if function is by_type:  # of an argument, the question has an answer: it is a list
        assert accelerate(model).left == {}
    else:
        assert expected in accelerate(model).left[""]
    assert accelerate(model).relus == ()


STRANGER = nn.Identity()
STRANGER.double_it = True


def reads_strangers(self, out, residual):
    return F.relu(out) * (2 if self.stranger.double_it else 1)


def hands_out_objects(self, out, residual):
    return by_option(F.relu(out))


OPTIONS = SimpleNamespace(double_it=True)


def by_option(out, options=OPTIONS):
    return 2 * out if options.double_it else out


def by_method_of_strangers(self, out, residual):
    return self.borrowed(F.relu(out))


def doubled(stranger, out):
    return 2 * out if stranger.double_it else out


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (reads_strangers, "reads 'stranger', a module that is not in it"),
        (hands_out_objects, "calls by_option() with options, a SimpleNamespace"),
        (by_method_of_strangers, "calls doubled() with stranger, a Identity"),
    ],
)
def test_what_could_change_unseen_is_not_taken_for_a_constant(function, reason):
    model = tail(function, stranger=STRANGER, borrowed=MethodType(doubled, STRANGER))
    result = accelerate(model)
    assert (result.replaced, result.relus) == (("bn",), ())
    assert result.left[""] == f"its forward {reason}"


def test_a_default_that_can_change_is_not_taken_for_a_constant():
    options = SimpleNamespace(double_it=True)

    def forward(self, x, options=options):
        out = F.relu(self.bn(self.conv(x)))
        return 2 * out if options.double_it else out

    model = varied(type("Optional", (nets.Tail,), {"forward": forward})())
    original = copy.deepcopy(model)
    left = accelerate(model).left
    reason = "has the default options, a SimpleNamespace, which may change"
    assert left == {"": f"its forward {reason}"}
    options.double_it = False
    assert_same_function(model, original)


def test_other_modules_and_classes_hear_nothing_of_a_trace():
    """Another thread computes with layers of the same classes while a forward is traced."""
    heard, outputs = [], []

    class Registered(nn.ReLU):
        def __init_subclass__(cls):
            heard.append(cls)

    other = nn.Sequential(nn.Conv2d(3, 4, 1), Registered())

    class Probe(nn.Module):
        @property
        def flag(self):
            thread = threading.Thread(target=lambda: outputs.append(other(images().float())))
            thread.start()
            thread.join()
            return True

    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) if self.probe.flag else x

    model = type("Observed", (nets.Tail,), {"forward": forward})()
    model.probe, model.relu = Probe(), Registered()
    kinds = [type(module) for module in model.modules()]
    graph, _ = tracing.trace(model)
    assert [node.op for node in graph.nodes] == [
        "placeholder", "call_module", "call_module", "call_module", "output"
    ]  # fmt: skip
    assert [type(module) for module in model.modules()] == kinds
    assert heard == []
    assert_close(outputs[0], other(images().float()), **EXACT)
    assert "__getattribute__" not in vars(nn.Module)


MADE: list[str] = []


class HearsInit(type):
    def __init__(cls, *args):
        super().__init__(*args)
        MADE.append(cls.__name__)


class HearsNew(type):
    def __new__(mcs, *args, **options):
        MADE.append(args[0])
        return super().__new__(mcs, *args, **options)


class HearsCall(type):
    def __prepare__(name, *args, **options):
        MADE.append(name)
        return {}


class OfHearsCall(nn.ReLU, metaclass=HearsCall):
    """Python calls ``__prepare__`` of a metaclass for a class statement only."""


class Abstract(nn.ReLU, abc.ABC):
    """The metaclass of the standard library has a registry, too."""


@pytest.mark.parametrize(
    "kind",
    [HearsInit("OfInit", (nn.ReLU,), {}), HearsNew("OfNew", (nn.ReLU,), {}), OfHearsCall, Abstract],
)
def test_metaclasses_hear_nothing_of_a_trace(kind):
    MADE.clear()
    model = varied(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), kind()))
    original = copy.deepcopy(model)
    assert accelerate(model).relus == ("1",)
    assert MADE == []
    assert_same_function(model, original)


def scripted(module: nn.Module) -> nn.Module:
    return torch.jit.script(module.double())


def traced(module: nn.Module) -> nn.Module:
    return torch.jit.trace(module.double(), images(), check_trace=False)


class AroundScript(nets.Tail):
    """A block that calls a module of TorchScript among others."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mean() + self.relu(self.bn(self.conv(x)))


SCRIPTS = {
    "a layer": lambda: nn.Conv2d(3, 3, 1),
    "a block": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()),
    "a block with statistics": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
}
AROUND = {
    "beside": lambda inner: nn.Sequential(inner, nn.BatchNorm2d(3), nn.ReLU()),
    "deeper": lambda inner: nn.Sequential(nn.Sequential(inner), nn.BatchNorm2d(3), nn.ReLU()),
    "in a block": AroundScript,
}


@pytest.mark.untyped
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("compile_", [scripted, traced])
@pytest.mark.parametrize("inner", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_modules_of_torchscript_are_called_as_one(compile_, inner, around):
    model = around(compile_(inner())).double()
    graph, conditions = tracing.trace(model)
    calls = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    assert calls == {name for name, _ in model.named_children()}
    assert conditions.are_met(model, (images(),), {})


def test_the_module_itself_may_be_called_while_it_is_traced():
    outputs, expected = [], []

    class Probe(nn.Module):
        @property
        def flag(self):
            if not expected:
                expected.append(True)
                thread = threading.Thread(target=lambda: outputs.append(model(images().float())))
                thread.start()
                thread.join()
            return True

    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) if self.probe.flag else x

    model = type("Observed", (nets.Tail,), {"forward": forward})()
    model.probe, model.relu = Probe(), nn.ReLU()
    before = anatomy(model)
    tracing.trace(model)
    assert anatomy(model) == before
    assert_close(outputs[0].detach(), copy.deepcopy(model).train()(images().float()).detach())


def test_an_interrupted_trace_leaves_the_module_as_it_was(monkeypatch):
    def interrupt(self, module, args, kwargs):
        raise KeyboardInterrupt("now")

    model = varied(nets.BasicBlock())
    before = anatomy(model)
    monkeypatch.setattr(tracing._Tracer, "call", interrupt)
    with pytest.raises(KeyboardInterrupt, match="now"):
        tracing.trace(model)
    assert anatomy(model) == before
    assert sys.getprofile() is None


class Stages(nn.Module):
    def __init__(self):
        super().__init__()
        stage = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
        self.stages = nn.ModuleList([stage])
        self.head = nn.Sequential(nn.Conv2d(3, 3, 1))
        self.norms = nn.ModuleDict({"last": nn.BatchNorm2d(3)})

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for layer in stage:
                x = layer(x)
        for layer in self.head:
            x = layer(x)
        return F.relu(self.norms["last"](x))


@pytest.mark.parametrize("grow", ["stages.0", "stages", "head"])
def test_loops_over_children_follow_their_number(grow):
    model = varied(Stages())
    assert accelerate(model, images()).relus == ("norms.last",)
    assert relus_and_additions(model) == (0, 0)
    more = nn.Conv2d(3, 3, 1).double()
    model.get_submodule(grow).append(nn.ModuleList([more]) if grow == "stages" else more)
    assert_same_function(model, restored(model))


def test_nothing_is_fused_under_a_profiler():
    model = nets.BasicBlock()
    sys.setprofile(lambda *_: None)
    try:
        result = accelerate(model)
    finally:
        sys.setprofile(None)
    assert result.left == {"": "its forward cannot be watched while a profiler runs"}
    assert len(result.replaced) == 2


class Arguments(nets.Tail):
    def forward(self, x: Tensor, scale: float = 1.0, residual: Tensor | None = None) -> Tensor:
        out = self.bn(self.conv(x))
        if residual is not None:
            out = out + residual
        return F.relu(out) * scale


def test_optional_arguments_fall_back():
    model = varied(Arguments())
    original = copy.deepcopy(model)
    assert accelerate(model, images()).relus == ("bn",)
    assert relus_and_additions(model, images()) == (0, 0)
    residual = model.conv(images()).detach()
    assert_same_function(model, original, images(), 3.0)
    assert_same_function(model, original, images(), 3.0, residual)
    assert_close(model.eval()(x=images()), original.eval()(images()))
    assert relus_and_additions(model, images(), 3.0, residual) == (1, 1)


@pytest.mark.parametrize(
    ("signature", "reason"),
    [
        ("self, *args", "takes any number of arguments"),
        ("self, x, **options", "takes any number of arguments"),
        ("self, x, *, y", "takes an argument that must be named"),
    ],
)
def test_open_signatures_are_left(signature, reason):
    scope = {}
    exec(f"def forward({signature}): return None", scope)
    model = type("Open", (nets.Tail,), {"forward": scope["forward"]})()
    assert accelerate(model).left == {"": f"its forward {reason}"}


def test_another_flag_or_child_falls_back():
    model = varied(nets.ResNet())
    block = model.layer1[0]
    accelerate(model)

    model.grad_checkpointing = True
    with pytest.raises(NotImplementedError, match="no checkpointing"):
        model(images())
    model.grad_checkpointing = False

    block.relu = nn.Sigmoid()
    original = restored(model)
    assert_same_function(model, original)

    block.downsample = nn.Conv2d(4, 4, 1).double()
    original = restored(model)
    assert_same_function(model, original)

    block.bn1 = nn.GroupNorm(2, 4).double()
    original = restored(model)
    assert_same_function(model, original)


def test_sequential_slices_and_additions_of_children():
    model = varied(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    accelerate(model)
    original = restored(model)
    assert_same_function(model[:2], original[:2])
    assert_same_function(model[:], original[:])
    model.append(nn.Tanh())
    assert_same_function(model, restored(model))


def test_a_forward_patched_later_on_the_class_is_obeyed(monkeypatch):
    model = varied(nets.BasicBlock())
    accelerate(model)
    monkeypatch.setattr(nets.BasicBlock, "forward", lambda self, x: x * 2)
    assert_close(model(images()), images() * 2, **EXACT)
