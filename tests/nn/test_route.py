"""The route of a call: the one place that chooses it, and that each call takes what was chosen."""

import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import batchnorm
from batchnorm import BatchNorm2d, batch_norm, which_backend
from batchnorm.kernels import dispatch, reference
from batchnorm.nn import autograd
from batchnorm.nn.route import Route, choose

SOURCE = Path(batchnorm.__file__).parent


class Subclass(torch.Tensor):
    pass


def ordinary(*shape):
    return torch.randn(*(shape or (4, 3)), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "x",
    [ordinary(), torch.nn.Parameter(ordinary()), ordinary().bfloat16(), None],
    ids=["tensor", "parameter", "bfloat16", "nothing"],
)
def test_ordinary_tensors_are_called_directly(x):
    assert choose(ordinary(), x) is Route.DIRECT


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4, 3, device="meta"),
        ordinary().as_subclass(Subclass),
        torch._neg_view(ordinary()),
    ],
    ids=["device", "subclass", "negative view"],
)
def test_what_torch_has_to_see_goes_through_the_operator(x):
    assert choose(x) is Route.OPERATOR
    assert choose(ordinary(), x) is Route.OPERATOR


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_modes_get_the_operator_and_traces_get_aten():
    seen = []

    def look(x, backend=None):
        seen.append(choose(x, backend=backend))
        return x + 0

    with FakeTensorMode() as mode:
        look(mode.from_tensor(ordinary()))
    assert seen == [Route.OPERATOR]
    torch.jit.trace(look, ordinary(), check_trace=False)
    assert set(seen[1:]) == {Route.ATEN}
    torch.jit.trace(lambda x: look(x, "reference"), ordinary(), check_trace=False)
    assert seen[-1] is Route.OPERATOR


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.vmap(f),
        lambda f: torch.func.jacrev(f),
        lambda f: torch.func.jacfwd(f),
        lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    ],
    ids=["vmap", "jacrev", "jacfwd", "jvp"],
)
def test_transforms_take_the_formula(transform):
    seen = []

    def look(x):
        seen.append(choose(x))
        return x * 2

    transform(look)(ordinary())
    assert set(seen) == {Route.FORMULA}


def test_a_forward_level_takes_the_formula():
    with torch.autograd.forward_ad.dual_level():
        assert choose(ordinary()) is Route.FORMULA
    assert choose(ordinary()) is Route.DIRECT


def test_what_torch_must_differentiate_takes_the_formula():
    assert choose(ordinary(), differentiable=True) is Route.FORMULA


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("training", "backend", "operator"),
    [(True, None, True), (False, None, False), (False, "reference", True)],
)
def test_compiled_code_holds_our_operator_or_aten(training, backend, operator):
    names = []

    def collect(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    running = torch.zeros(3), torch.ones(3)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: batch_norm(x, *running, training=training, backend=backend),
        backend=collect,
        fullgraph=True,
    )
    with torch.no_grad():
        compiled(ordinary())
    assert any("batchnorm.forward" in name for name in names) is operator


@pytest.mark.untyped
@pytest.mark.parametrize("training", [True, False])
def test_exported_programs_hold_aten_only(training):
    model = BatchNorm2d(3).train(training)
    program = torch.export.export(model, (ordinary(2, 3, 4, 4),))
    assert "batchnorm.forward" not in str(program.graph)


def test_every_call_takes_the_route_that_is_chosen(monkeypatch):
    took = []
    for module, name in ((autograd, "by_backend"), (autograd, "by_formula")):
        real = getattr(module, name)

        def spied(*args, real=real, name=name):
            took.append((name, args[0] if name == "by_backend" else None))
            return real(*args)

        monkeypatch.setattr(module, name, spied)
    batch_norm(ordinary(), None, None, training=True)
    batch_norm(ordinary().as_subclass(Subclass), None, None, training=True)
    torch.func.vmap(lambda x: batch_norm(x, None, None, training=True))(ordinary(2, 4, 3))
    assert took == [
        ("by_backend", Route.DIRECT),
        ("by_backend", Route.OPERATOR),
        ("by_formula", None),
    ]


def test_a_gradient_of_a_gradient_takes_the_formula(monkeypatch):
    took = []
    for module, name in ((dispatch, "backward"), (reference, "backward")):
        real = getattr(module, name)

        def spied(*args, real=real, name=module.__name__, **options):
            took.append(name.rpartition(".")[2])
            return real(*args, **options)

        monkeypatch.setattr(module, name, spied)
    x = ordinary().requires_grad_()
    y = batch_norm(x, None, None, training=True).square().sum()
    torch.autograd.grad(y, x, create_graph=True)
    assert took == ["reference"]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_an_ordinary_tensor_passes_through_at_most_seven_files(activation, training, grad):
    """Files of the package in which a Python function holds the input as a local variable."""
    x = ordinary(4, 3, 8, 8).requires_grad_(grad)
    layer = BatchNorm2d(3, activation=activation).train(training)
    layer(x)
    files = set()

    def look(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "return" and path.is_relative_to(SOURCE):
            held = [v for value in frame.f_locals.values() for v in _flat(value)]
            if any(value is x for value in held):
                files.add(str(path.relative_to(SOURCE)))

    sys.setprofile(look)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    assert {"nn/layers.py", "nn/route.py"} < files
    assert len(files) <= 7, sorted(files)


def _flat(value):
    return value if isinstance(value, tuple) else (value,)


def test_which_backend_names_the_route():
    x = ordinary(4, 3, 8, 8)
    direct = which_backend(x)
    assert direct == "The Numba kernels compute this input as planes, on the calling thread."
    assert which_backend(x.as_subclass(Subclass)) == (
        f"{direct} torch calls it through the operator torch.ops.batchnorm.forward."
    )
    told = []

    def look(x):
        told.append(which_backend(x))
        return x * 2

    torch.func.vmap(look)(x)
    assert told == [
        "The reference's formula computes this input, in ordinary torch operations: it is inside a "
        "transform (torch.func, vmap or forward mode)."
    ]


def test_which_backend_refuses_what_a_call_would_refuse():
    x = ordinary(2, 4, 3)
    refused = (
        r"^backend='numba' cannot take this input: it is inside a transform \(torch\.func, vmap or "
        r"forward mode\), and that needs the reference; leave backend out\.$"
    )

    def ask(x):
        which_backend(x, "numba")
        return x

    with pytest.raises(RuntimeError, match=refused):
        torch.func.vmap(ask)(x)
    with pytest.raises(ValueError, match=r"^backend must be None or one of numba, reference, got"):
        which_backend(x, "fastest")


def test_which_backend_in_a_captured_program(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = ordinary()
    assert which_backend(x, training=False) == (
        "torch's own operations compute this input, because it is compiled, exported or traced."
    )
    assert which_backend(x, training=True).endswith("the operator torch.ops.batchnorm.forward.")


def test_the_decision_is_made_in_one_file():
    words = ("is_compiling(", "is_exporting(", "is_transformed(", "is_recorded(")
    found = {
        str(path.relative_to(SOURCE))
        for folder in ("nn", "kernels")
        for path in (SOURCE / folder).rglob("*.py")
        if any(word in path.read_text() for word in words)
    }
    assert found == {"nn/route.py"}
    assert list(Route) == [Route.DIRECT, Route.OPERATOR, Route.FORMULA, Route.ATEN]
    assert inspect.getdoc(choose)


def test_which_backend_on_inputs_that_nothing_computes():
    assert which_backend(torch.zeros(0, 3)) == "Nothing computes this input, because it is empty."
    with pytest.raises(
        IndexError, match=r"expects a tensor of shape \(N, C, \.\.\.\), got shape \(3,"
    ):
        which_backend(torch.zeros(3))
    with pytest.raises(
        NotImplementedError, match=r"expects a floating-point tensor, got torch\.int32"
    ):
        which_backend(torch.zeros(2, 3, dtype=torch.int32))
