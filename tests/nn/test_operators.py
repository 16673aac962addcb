"""The operators as torch sees them: opcheck, compile, export."""

import os
import shutil

import pytest
import torch
from torch import nn
from torch.library import opcheck

from batchnorm.nn.functional import batch_norm
from cases import laid_out

LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced"]
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["plain", "residual-relu"])
# Dynamo makes an instance of every torch.autograd.Function, and torch warns about that.
TRACED_FUNCTION = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)


def normal(*shape, layout="contiguous", seed=0):
    chance = torch.Generator().manual_seed(seed)
    return laid_out(torch.randn(shape, generator=chance), layout)


def vectors():
    """Weight, bias, mean, var."""
    return [normal(3, seed=1), normal(3, seed=2), normal(3, seed=3), 0.5 + normal(3, seed=4) ** 2]


@FUSED
@MODES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_passes_opcheck(layout, training, fused):
    weight, bias, mean, var = vectors()
    fixed = (None, None) if training else (mean, var)
    residual = normal(4, 3, 5, 2, layout=layout, seed=5) if fused else None
    x = normal(4, 3, 5, 2, layout=layout)
    opcheck(torch.ops.batchnorm.forward, (x, weight, bias, residual, *fixed, 1e-5, fused, None))


# The strides of what backward returns depend on layouts alone, what it computes on options alone.
EVERY_OPTION = [
    ("contiguous", "contiguous", training, relu, masked)
    for training in (True, False)
    for relu, masked in ((False, False), (True, False), (True, True))
]
EVERY_LAYOUT = [
    (layout, grad_layout, True, True, True)
    for layout in LAYOUTS
    for grad_layout in ("contiguous", "channels_last", "sliced")
]


@pytest.mark.parametrize(
    ("layout", "grad_layout", "training", "relu", "masked"),
    dict.fromkeys([*EVERY_OPTION, *EVERY_LAYOUT]),
)
def test_backward_passes_opcheck(layout, grad_layout, training, relu, masked):
    weight, bias, mean, var = vectors()
    x = normal(4, 3, 5, 2, layout=layout)
    _, mean, var, mask = torch.ops.batchnorm.forward(
        x,
        weight,
        bias,
        x if masked else None,
        None if training else mean,
        None if training else var,
        1e-5,
        relu,
        None,
    )
    grad_output = normal(4, 3, 5, 2, layout=grad_layout, seed=5)
    opcheck(
        torch.ops.batchnorm.backward,
        (
            grad_output,
            x,
            weight,
            bias,
            mean,
            var,
            mask if masked else None,
            1e-5,
            relu,
            not training,
            None,
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_of_other_dtypes(dtype):
    x = normal(4, 3, 5).to(dtype)
    weight, bias, _, _ = vectors()
    opcheck(torch.ops.batchnorm.forward, (x, weight, bias, x, None, None, 1e-5, True, None))
    _, *kept = torch.ops.batchnorm.forward(x, weight, bias, x, None, None, 1e-5, True, None)
    opcheck(torch.ops.batchnorm.backward, (x, x, weight, bias, *kept, 1e-5, True, False, None))


@pytest.mark.parametrize(
    "shape", [(0, 3), (2, 0), (0, 3, 4), (2, 3, 0), (0, 0), (2, 0, 5), (0, 3, 2, 2)]
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("relu", "residual"), [(False, False), (True, False), (True, True)])
def test_empty_tensors_pass_opcheck(shape, training, relu, residual):
    x, (weight, bias, mean, var) = torch.ones(shape), torch.ones(4, shape[1])
    mean = 2 * mean
    fixed = (None, None) if training else (mean, var)
    rest = (weight, bias, x if residual else None, *fixed, 1e-5, relu, None)
    opcheck(torch.ops.batchnorm.forward, (x, *rest))
    y, *kept, mask = torch.ops.batchnorm.forward(x, *rest)
    assert y.shape == x.shape
    for statistic, value in zip(kept, (0.0, 0.0) if training else (2.0, 1.0), strict=True):
        assert statistic.tolist() == [value] * shape[1]
        assert statistic.dtype == torch.float64
    mask = mask if residual else None
    rest = (x, x, weight, bias, *kept, mask, 1e-5, relu, not training, None)
    opcheck(torch.ops.batchnorm.backward, rest)
    grad_x, grad_weight, grad_bias, _ = torch.ops.batchnorm.backward(*rest)
    assert grad_x.shape == x.shape
    assert grad_weight.tolist() == grad_bias.tolist() == [0.0] * shape[1]


class Block(nn.Module):
    """Batch normalization of three channels with parameters and statistics."""

    def __init__(self, fused):
        super().__init__()
        weight, bias, mean, var = vectors()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.register_buffer("mean", mean)
        self.register_buffer("var", var)
        self.fused = fused

    def forward(self, x):
        return batch_norm(
            x,
            self.mean,
            self.var,
            self.weight,
            self.bias,
            self.training,
            residual=2 * x if self.fused else None,
            activation="relu" if self.fused else None,
        )


def step(block, run, x):
    """Output, gradients and statistics of one step."""
    x = x.detach().requires_grad_()
    y = run(x)
    y.pow(3).sum().backward()
    return [y.detach(), x.grad, block.weight.grad, block.bias.grad, block.mean, block.var]


def assert_compiles(backend, training, fused, layout, **tolerance):
    torch.compiler.reset()
    x = normal(4, 3, 5, 2, layout=layout)
    eager, compiled = Block(fused).train(training), Block(fused).train(training)
    expected = step(eager, eager, x)
    got = step(compiled, torch.compile(compiled, fullgraph=True, backend=backend), x)
    torch.testing.assert_close(got, expected, **tolerance)
    assert got[0].stride() == expected[0].stride()


@pytest.mark.untyped
@TRACED_FUNCTION
@FUSED
@MODES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_into_one_graph(layout, training, fused):
    assert_compiles("aot_eager", training, fused, layout)


@pytest.mark.untyped
@TRACED_FUNCTION
@pytest.mark.parametrize(("layout", "fused"), [("contiguous", False), ("channels_last", True)])
def test_inductor_trains(layout, fused):
    if shutil.which("g++") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("g++ is not installed; CI must not skip inductor.")
        pytest.skip("g++ is not installed, and inductor compiles with it")
    assert_compiles("inductor", True, fused, layout, rtol=1e-4, atol=1e-4)


@pytest.mark.untyped
@TRACED_FUNCTION
def test_a_dynamic_batch_compiles_once():
    torch.compiler.reset()
    block = Block(fused=False)
    run = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    eager = Block(fused=False)
    with torch.compiler.set_stance("default"):
        torch.testing.assert_close(run(normal(4, 3, 5)), eager(normal(4, 3, 5)))
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(run(normal(9, 3, 5)), eager(normal(9, 3, 5)))
    torch.testing.assert_close(block.var, eager.var)


@pytest.mark.untyped
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@FUSED
@MODES
def test_exports_to_plain_torch(training, fused, strict):
    eager, exported = Block(fused).train(training), Block(fused).train(training)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        exported, (normal(4, 3, 5),), dynamic_shapes=({0: batch},), strict=strict
    )
    operators = {
        str(node.target)
        for graph in program.graph_module.modules()
        if isinstance(graph, torch.fx.GraphModule)
        for node in graph.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    }
    assert operators
    assert all(name.startswith("aten.") for name in operators), operators
    module = program.module()
    for size in (4, 11):
        x = normal(size, 3, 5, seed=size)
        torch.testing.assert_close(module(x), eager(x))
    torch.testing.assert_close(module.mean, eager.mean)
    torch.testing.assert_close(module.var, eager.var)


@pytest.mark.untyped
@FUSED
def test_inference_of_bfloat16_exports_and_compiles_as_eager(fused):
    torch.compiler.reset()
    block, x = Block(fused).eval(), normal(4, 3, 5).bfloat16()
    exported = torch.export.export(block, (x,)).module()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert block(x).dtype == torch.bfloat16
    assert torch.equal(exported(x), block(x))
    assert torch.equal(compiled(x), block(x))


def test_the_options_are_obeyed():
    x = normal(4, 3)
    with pytest.raises(
        ValueError, match=r"^backend must be None or one of numba, reference, got 'x'\.$"
    ):
        torch.ops.batchnorm.forward(x, None, None, None, None, None, 1e-5, False, "x")


def test_fixed_statistics_are_copied():
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    _, kept_mean, kept_var, mask = torch.ops.batchnorm.forward(
        normal(4, 3).double(), None, None, None, mean, var, 1e-5, False, None
    )
    mean.fill_(5)
    var.fill_(5)
    assert kept_mean.tolist() == [0, 0, 0]
    assert kept_var.tolist() == [1, 1, 1]
    assert mask.numel() == 0
