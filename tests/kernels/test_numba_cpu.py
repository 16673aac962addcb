"""The compiled kernels are held against the reference, in every layout, size and dtype."""

import inspect
import os
import signal
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from batchnorm.kernels import reference
from batchnorm.kernels.contract import Backend, ReluGate, Running
from batchnorm.kernels.geometry import geometry_of_shape, unpack
from batchnorm.moments import Moments, merge_moments
from batchnorm.nn.functional import batch_norm
from batchnorm.nn.running_statistics import update_running as updated_by_torch
from cases import CASES, Case, arguments_of, laid_out
from scales import assert_close_for, scales

numba_cpu = pytest.importorskip("batchnorm.kernels.numba_cpu")
from batchnorm.kernels.compiled import planes, plans, tiles  # noqa: E402

EPS = 1e-5
LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def threads():
    """Sets the number of threads; afterwards it is as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody has written holds NaN, or 255 in masks; scratch memory too."""

    def poison(make):
        def made(*args, **options):
            tensor = make(*args, **options)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 255)

        return made

    def borrowed(size, borrow=plans._borrow):
        block = borrow(size)
        block.memory[:] = bytes([255]) * len(block.memory)
        return block

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(plans, "_borrow", borrowed)


def normal(*shape, dtype=torch.float32, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=chance, dtype=torch.float64).to(dtype)


def composites(stages, a, relu, fixed=None):
    """Results of the stages and of the composites, by name."""
    with torch.no_grad():
        batch = stages.moments(a.x)
        y, whole, mask = stages.forward(a.x, a.weight, a.bias, EPS, a.residual, relu=relu)
        moments = whole if fixed is None else fixed
        known = (a.x, moments.mean, moments.var, EPS)
        again, _ = stages.normalize(*known, a.weight, a.bias, a.residual, relu=relu)
        gate = ReluGate(a.bias, mask if fixed is None else None) if relu else None
        if fixed is not None and relu and a.residual is not None:
            gate = ReluGate(
                a.bias, stages.normalize(*known, a.weight, a.bias, a.residual, relu=True)[1]
            )
        known = (a.grad_output, *known, a.weight)
        grads = stages.backward(*known, gate, fixed=fixed is not None)
        sums = stages.grad_sums(*known, gate)
        grad_x, before_relu = stages.grad_input(*known, *(s / batch.count for s in sums), gate)
    assert (grads.residual is None) is (before_relu is None) is (gate is None or gate.mask is None)
    found = {"y": y, "normalized": again, "x": grads.x, "weight": grads.weight, "bias": grads.bias}
    found |= {"sum_grad": sums[0], "sum_grad_x_hat": sums[1], "mean": batch.mean, "var": batch.var}
    found |= {"whole_mean": whole.mean, "whole_var": whole.var}
    if fixed is None:
        found["grad_x"] = grad_x
    if before_relu is not None:
        found |= {"residual": grads.residual, "grad_before_relu": before_relu}
    return found


SCALE_OF = {
    "normalized": "y",
    "sum_grad": "bias",
    "sum_grad_x_hat": "weight",
    "grad_x": "x",
    "grad_before_relu": "residual",
    "whole_mean": "mean",
    "whole_var": "var",
}


def assert_as_reference(a, relu, fixed=None):
    expected = composites(reference, a, relu, fixed)
    got = composites(numba_cpu, a, relu, fixed)
    assert got.keys() == expected.keys()
    sizes = scales(a, training=fixed is None)
    batch_sizes = scales(a, training=True)
    for name in expected:
        scale = (batch_sizes if name == "y" else sizes)[SCALE_OF.get(name, name)]
        exact = expected[name].double()
        low = a.x.dtype not in (torch.float32, torch.float64)
        if name in ("mean", "var", "whole_mean", "whole_var"):
            std = expected["var"].sqrt() + 1e-6 * (1 + expected["mean"].abs())
            allowed = 1e-6 * (std if name.endswith("mean") else std.square())
            assert ((got[name] - exact).abs() <= allowed).all(), name
        elif SCALE_OF.get(name, name) in ("weight", "bias") and a.x.dtype != torch.float64:
            error = (got[name] - exact).abs()
            assert (error <= 2**-20 * scale).all(), name
        else:
            assert_close_for(scale, got[name], exact, name, steps=16 if low else 8)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_stage_is_the_references(case):
    assert_as_reference(arguments_of(case), case.relu)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [case for case in CASES if case.statistics], ids=str)
def test_fixed_statistics_are_the_references(case):
    a = arguments_of(case)
    fixed = Moments(2, a.running_mean.double(), a.running_var.double())
    assert_as_reference(a, case.relu, fixed)


SIZES = [
    (2, 3, planes.PIECE + 5),
    (1, 2, 3 * planes.PIECE),
    (63, 100),
    (1000, 1),
    (100, 3, 3),
    (3, 63, 63),
    (63, 1, 1, 3),
    (5, 100, 8, 8),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["relu", "residual-relu"])
def test_other_sizes(shape, layout, residual):
    case = Case(shape, torch.float32, layout, residual=residual, relu=True)
    assert_as_reference(arguments_of(case), relu=True)


@pytest.mark.parametrize("backend", [numba_cpu, reference], ids=["numba", "reference"])
def test_a_backend_has_the_functions_of_the_contract(backend):
    promised = {name: f for name, f in vars(Backend).items() if inspect.isfunction(f)}
    promised = {name: f for name, f in promised.items() if not name.startswith("_")}
    assert len(promised) == 7
    for name, function in promised.items():
        _, *parameters = inspect.signature(function).parameters.values()
        found = inspect.signature(getattr(backend, name)).parameters.values()
        assert [(p.name, p.kind, p.default) for p in found] == [
            (p.name, p.kind, p.default) for p in parameters
        ], name


@pytest.mark.parametrize("backend", [numba_cpu, reference], ids=["numba", "reference"])
@pytest.mark.parametrize("shape", [(12, 3, 40), (12, 20), (12, 3, 2)], ids=str)
@pytest.mark.parametrize("fused", ["alone", "relu", "residual-relu"])
def test_parts_of_a_pool_get_the_gradients_of_the_whole(backend, shape, fused):
    """As ranks do: moments and sums are merged between the stages, and means are handed back."""
    x, grad, residual = (normal(*shape, dtype=torch.float64, seed=s) for s in (0, 1, 2))
    weight, bias = (normal(shape[1], dtype=torch.float64, seed=s) for s in (3, 4))
    relu, sizes = fused != "alone", (2, 7, 3)

    def backward(*parts):
        pool = merge_moments(*(backend.moments(x) for _, x, _ in parts))
        calls = []
        for grad, x, residual in parts:
            known = x, pool.mean, pool.var, EPS, weight
            more = residual if fused == "residual-relu" else None
            _, mask = backend.normalize(*known, bias, more, relu=relu)
            calls.append(((grad, *known), ReluGate(bias, mask) if relu else None))
        sums = [backend.grad_sums(*known, gate) for known, gate in calls]
        means = [sum(part) / pool.count for part in zip(*sums, strict=True)]
        found = [backend.grad_input(*known, *means, gate) for known, gate in calls]
        return [torch.cat(part) for part in zip(*found, strict=True) if part[0] is not None]

    whole = backward((grad, x, residual))
    parts = backward(*zip(*(tensor.split(sizes) for tensor in (grad, x, residual)), strict=True))
    assert len(whole) == (2 if fused == "residual-relu" else 1)
    torch.testing.assert_close(parts, whole)
    batch = backend.moments(x)
    if fused == "alone":
        composed = backend.backward(grad, x, batch.mean, batch.var, EPS, weight)
        torch.testing.assert_close(whole[0], composed.x)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((4096, 4), "contiguous"),
        ((20, 3, 30, 30), "contiguous"),
        ((20, 3, 30, 30), "channels_last"),
        ((4096, 3, 3), "contiguous"),
        ((20, 3, 30, 30), "sliced"),
    ],
)
def test_the_variance_survives_a_large_mean(shape, layout):
    x = laid_out((1e4 + normal(*shape, dtype=torch.float64)).float(), layout)
    dims = [dim for dim in range(len(shape)) if dim != 1]
    exact = (x.double() - 1e4).var(dims, correction=0)
    got = numba_cpu.moments(x)
    assert ((got.var - exact).abs() / exact).max() < 1e-5
    _, whole, _ = numba_cpu.forward(x, None, None, EPS)
    assert torch.equal(whole.var, got.var)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((8, 3, 64, 64), "contiguous"),
        ((8, 64, 20, 20), "contiguous"),
        ((8, 64, 20, 20), "channels_last"),
        ((4096, 40), "contiguous"),
        ((4096, 10, 3), "contiguous"),
        ((4, 20_011), "contiguous"),
        ((70, 1111), "contiguous"),
        ((2, 9000, 5), "contiguous"),
        ((1, 9000, 4, 2), "channels_last"),
    ],
)
@pytest.mark.parametrize("residual", [False, True], ids=["relu", "residual-relu"])
def test_the_number_of_threads_changes_no_bit(threads, shape, layout, residual):
    case = Case(shape, torch.float32, layout, residual=residual, relu=True)
    a = arguments_of(case)
    assert a.x.numel() * 4 > 256 * 1024
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(composites(numba_cpu, a, relu=True))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    "shape", [(8, 4, 64, 64), (8, 64, 20, 20), (32, 50, 7, 7), (1, 9, 200, 200)]
)
@pytest.mark.parametrize("residual", [False, True], ids=["relu", "residual-relu"])
def test_what_threads_share_changes_no_bit(threads, monkeypatch, shape, residual):
    """Cells in the order of memory, or channels as for tensors that no cache holds."""
    a = arguments_of(Case(shape, torch.float32, residual=residual, relu=True))
    threads(2)
    cells = composites(numba_cpu, a, relu=True)
    monkeypatch.setattr(plans, "MAX_CACHED", 0)
    monkeypatch.setattr(numba_cpu, "plan", plans.plan.__wrapped__)
    assert "whose channels" in numba_cpu.describe(a.x)
    for name, value in composites(numba_cpu, a, relu=True).items():
        assert torch.equal(value, cells[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((6, 3, 50), "contiguous"), ((6, 3), "contiguous"), ((6, 3, 50), "channels_last")],
)
def test_nan_and_infinity_stay_in_their_channel(shape, layout, value):
    x = laid_out(normal(*shape), layout)
    x[2, 1] = value
    y, batch, _ = numba_cpu.forward(x, None, None, EPS, relu=True)
    grads = numba_cpu.backward(
        torch.ones_like(x), x, batch.mean, batch.var, EPS, None, ReluGate(None, None)
    )
    for result in (y, grads.x):
        assert result[:, 1].isnan().all()
        assert result[:, [0, 2]].isfinite().all()
    assert batch.var[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(4, 3000), (40, 1500), (3, 900, 4)], ids=str)
def test_each_channel_of_a_tile_is_computed_for_itself(shape):
    """Values that nothing but float64 can hold do not change the bits of their neighbors."""
    x = normal(*shape)
    calm, wild = numba_cpu.moments(x), torch.arange(0, shape[1], 7)
    x[:, wild] *= (
        torch.tensor([1e30, 0.0, torch.nan, torch.inf, 1e-25])
        .repeat(700)[: len(wild)]
        .reshape(-1, *[1] * (len(shape) - 2))
    )
    got, expected = numba_cpu.moments(x), reference.moments(x)
    others = torch.ones(shape[1], dtype=torch.bool).index_fill(0, wild, value=False)
    for one, other in ((got.mean, calm.mean), (got.var, calm.var)):
        torch.testing.assert_close(one[others], other[others], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got.mean[wild], expected.mean[wild], equal_nan=True)
    torch.testing.assert_close(got.var[wild], expected.var[wild], equal_nan=True)


@pytest.mark.parametrize("shape", [(2, 2048), (5, 4127), (64, 20_000), (1, 900, 9), (128, 4097)])
def test_tiles_are_whole_vectors_of_channels_and_fit_into_the_scratch_memory(shape):
    geometry = geometry_of_shape(torch.Size(shape), channels_last=False)
    assert geometry.tiles > 1
    assert geometry.slabs == geometry.fold == 1
    task = SimpleNamespace(tiles=geometry.tiles, all_channels=geometry.channels)
    bounds = [tiles.first_channel.py_func(task, index) for index in range(geometry.tiles + 1)]
    assert bounds[-1] == geometry.channels
    assert not any(bound % 64 for bound in bounds[:-1])
    widths = [last - first for first, last in pairwise(bounds)]
    assert min(widths) >= 64
    assert max(widths) <= geometry.widest


def test_scratch_memory_does_not_grow_with_the_channels():
    """It is kept from call to call."""
    for channels in (100_000, 1_000_000):
        geometry = geometry_of_shape(torch.Size((4, channels)), channels_last=False)
        *_, size = plans._offsets_in_scratch(geometry, 2)
        assert size < 2**20


@pytest.mark.parametrize("scale", [1e30, 1e-25])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((20, 3, 50), "contiguous"), ((20, 3), "contiguous"), ((20, 3, 50), "channels_last")],
)
def test_float32_holds_neither_these_squares_nor_their_sums(shape, layout, scale):
    x = laid_out((scale * normal(*shape, dtype=torch.float64)).float(), layout)
    got, expected = numba_cpu.moments(x), reference.moments(x)
    torch.testing.assert_close(got.mean / scale, expected.mean / scale)
    torch.testing.assert_close(got.var / scale**2, expected.var / scale**2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(999, 2), (9, 2, 111), (2, 2, 5000)], ids=str)
def test_a_constant_channel_has_no_variance(shape, dtype):
    for value in (0.1, 1000.0, -3.3):
        x = torch.full(shape, value, dtype=dtype)
        assert numba_cpu.moments(x).var.tolist() == [0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_tells_where_relu_let_through(dtype, layout):
    x, residual = (laid_out(normal(5, 3, 6, 7, seed=s).to(dtype), layout) for s in (0, 1))
    residual[0, 0, 0, 0] = torch.nan
    y, _, mask = numba_cpu.forward(x, None, None, EPS, residual, relu=True)
    seen = unpack(mask, x)
    assert torch.equal(seen, (y <= 0).logical_not())
    assert seen[0, 0, 0, 0]
    _, _, expected = reference.forward(x, None, None, EPS, residual, relu=True)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-7, 1e-40], ids=str)
def test_the_gradient_passes_exactly_where_the_output_is_above_zero(dtype, layout, size):
    """Also where the output is so small that its dtype rounds it to zero."""
    x = laid_out(normal(40, 3, 8, 8).to(dtype), layout)
    weight, bias = torch.full((3,), size).to(dtype), torch.zeros(3).to(dtype)
    weight, bias = (v.double() if dtype == torch.float64 else v.float() for v in (weight, bias))
    y, batch, _ = numba_cpu.forward(x, weight, bias, EPS, relu=True)
    grad = torch.ones_like(x)
    known = (grad, x, batch.mean, batch.var, EPS, weight, ReluGate(bias, None))
    assert torch.equal(numba_cpu.grad_sums(*known)[0], (y > 0).sum((0, 2, 3)).double())
    if size == 1:
        grads = numba_cpu.backward(*known, fixed=True)
        assert torch.equal(grads.x != 0, y > 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "expanded"])
def test_gradients_come_in_any_layout(layout, grad_layout):
    x = laid_out(normal(4, 3, 6, 7), layout)
    grad = normal(3, 1, 1).expand(4, 3, 6, 7)
    if grad_layout != "expanded":
        grad = laid_out(normal(4, 3, 6, 7, seed=1), grad_layout)
    batch = numba_cpu.moments(x)
    got = numba_cpu.backward(grad, x, batch.mean, batch.var, EPS, None)
    expected = reference.backward(grad, x, batch.mean, batch.var, EPS, None)
    torch.testing.assert_close(got[:3], expected[:3], rtol=1e-4, atol=1e-4)


def test_results_are_on_the_cpu_whatever_the_default_device():
    x = normal(6, 3)
    with torch.device("meta"):
        y = batch_norm(x, None, None, training=True, backend="numba")
    assert y.device.type == "cpu"
    torch.testing.assert_close(y, reference.forward(x, None, None, EPS)[0])


def moved_by_forward(x, *buffers, counter=None, weight=0.1):
    """What a forward pass says of running statistics that it may move, and the batch's moments."""
    running = Running(*buffers, counter, weight)
    _, batch, _ = numba_cpu.forward(x, None, None, EPS, running=running)
    return running, batch


SHAPES_OF_BUFFERS = [
    (7, 50),
    (3, 50, 40),
    (40, 50, 60, 60),
    (50, 50, 64, 64),
    (5, 30_011),
    (3, 9000, 5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0, -0.5])
@pytest.mark.parametrize("shape", SHAPES_OF_BUFFERS)
@pytest.mark.usefixtures("two_threads")
def test_running_statistics_move_as_in_torch_to_the_bit(dtype, weight, shape):
    channels = shape[1]
    compiled, plain = ([normal(channels, seed=s).to(dtype) for s in (1, 2)] for _ in range(2))
    counter = torch.tensor(6)
    versions = [buffer._version for buffer in (*compiled, counter)]
    running, batch = moved_by_forward(normal(*shape), *compiled, counter=counter, weight=weight)
    assert running.moved
    assert not running.overflowed
    updated_by_torch(*plain, batch, weight)
    for one, other in zip(compiled, plain, strict=True):
        assert torch.equal(one, other)
    assert counter == 7
    for buffer, version in zip((*compiled, counter), versions, strict=True):
        assert buffer._version > version


def test_other_running_statistics_are_left_to_the_caller():
    x, usual = normal(5, 3), torch.zeros(2, 3)
    others = [(buffer, buffer.clone()) for buffer in (usual[0].bfloat16(), torch.zeros(6)[::2])]
    others.append((usual[0], usual[1].double()))
    for buffers in others:
        assert not moved_by_forward(x, *buffers)[0].moved
    assert not moved_by_forward(x, *usual, weight=torch.tensor(0.1))[0].moved
    for counter in (torch.tensor(6.0), torch.tensor([6])):
        assert not moved_by_forward(x, *usual, counter=counter)[0].moved
        assert counter == 6
    with torch.inference_mode():
        made, counter = torch.zeros(3), torch.tensor(6)
    assert not moved_by_forward(x, made, made.clone())[0].moved
    assert not moved_by_forward(x, *usual, counter=counter)[0].moved
    assert not usual.any()


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 40), (5, 3000)])
def test_a_variance_beyond_float32_is_said(shape):
    x = normal(*shape)
    x[:, -1] *= 1e25
    assert moved_by_forward(x, *torch.zeros(2, shape[1]))[0].overflowed
    assert not moved_by_forward(x, *torch.zeros(2, shape[1]).double())[0].overflowed
    assert moved_by_forward(-1e30 * x.double(), *torch.zeros(2, shape[1]))[0].overflowed
    x[:, -1] = torch.nan
    assert not moved_by_forward(x, *torch.zeros(2, shape[1]))[0].overflowed


SMALL = """
import numpy, sys, torch
sys.path.insert(0, sys.argv[1])
from cases import Case
from kernels.test_numba_cpu import arguments_of, assert_as_reference, moved_by_forward
from kernels.test_numba_cpu import numba_cpu, updated_by_torch
from batchnorm.kernels import parallel
from batchnorm.moments import Moments
torch.set_num_threads(1)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for shape, layout in (((2, 3, 33), "contiguous"), ((3, 2, 2, 3), "channels_last")):
        for residual in (False, True):
            a = arguments_of(Case(shape, dtype, layout, residual=residual, relu=True))
            assert_as_reference(a, True)
            fixed = Moments(2, a.running_mean.double(), a.running_var.double())
            assert_as_reference(a, residual, fixed)
assert_as_reference(arguments_of(Case((2, 2090), torch.float32, residual=True, relu=True)), True)
assert numba_cpu.moments(torch.full((5, 2, 40), 1e-25)).var.tolist() == [0, 0]
assert numba_cpu.moments(torch.full((5, 2), 1e-25)).var.tolist() == [0, 0]
for dtype in (torch.float32, torch.float64):
    moved, expected = torch.zeros(2, 2, dtype=dtype), torch.zeros(2, 2, dtype=dtype)
    counter = torch.tensor(6)
    running, batch = moved_by_forward(torch.rand(4, 2), *moved, counter=counter)
    assert running.moved and counter == 7
    updated_by_torch(*expected, batch, 0.1)
    assert torch.equal(moved, expected)
with numpy.errstate(over="ignore", invalid="ignore"):
    running, _ = moved_by_forward(torch.randn(4, 2) * 1e25, *torch.zeros(2, 2))
assert running.overflowed
parallel.SERIAL_BELOW = 0
torch.set_num_threads(2)
assert_as_reference(arguments_of(Case((7, 2, 2, 50), torch.float32)), False)
print("same")
"""


def run_small(**environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SMALL, os.path.dirname(os.path.dirname(__file__))],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same\n"


def test_the_loops_are_plain_python_when_nothing_is_compiled():
    run_small(NUMBA_DISABLE_JIT="1")


def test_without_a_folder_for_the_cache_kernels_are_compiled_anew(tmp_path):
    (tmp_path / "file").touch()
    code = (
        "import torch, batchnorm\n"
        "layer = batchnorm.BatchNorm1d(3)\n"
        "print(layer(torch.randn(4, 3)).shape)\n"
        "assert batchnorm.which_backend(torch.randn(4, 3)).startswith('The Numba')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "file" / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([4, 3])\n"


@pytest.mark.parametrize("shape", [(1024, 64, 64), (256, 64, 49), (64, 32, 2000), (100_000, 64)])
def test_equal_values_add_up_without_a_drift(shape):
    """Rounding errors of the same sign every time are the worst case of a sum."""
    x = normal(*shape)
    channel = torch.full((shape[1],), 1 / 3).view(1, -1, *[1] * (len(shape) - 2))
    grad = (torch.ones_like(x) * channel).contiguous()
    batch = numba_cpu.moments(x)
    sum_grad, _ = numba_cpu.grad_sums(grad, x, batch.mean, batch.var, EPS, None)
    exact = grad.double().sum([0, *range(2, x.dim())])
    assert ((sum_grad - exact).abs() / exact).max() < 4e-6
    two = torch.where(x > 0, 1.3, -1.3)
    var = numba_cpu.moments(two).var
    assert (var / two.double().var([0, *range(2, x.dim())], correction=0) - 1).abs().max() < 4e-6


# At least 4 MiB in two bytes an element, so that stores are streamed where rows are whole lines.
LARGE = [
    ((33, 16, 4096), "contiguous"),
    ((8, 32, 96, 96), "contiguous"),
    ((33, 20, 3200), "contiguous"),
    ((3, 2, 400_000), "contiguous"),
    ((40, 64, 832), "channels_last"),
    ((8, 96, 2800), "channels_last"),
    ((33, 70, 920), "channels_last"),
    ((3, 2, 400_000), "channels_last"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), LARGE, ids=str)
def test_large_tensors_are_the_references_on_any_team(threads, dtype, shape, layout):
    """Streaming stores, full blocks, tiny last pieces."""
    assert_large_as_reference(threads, laid_out(normal(*shape, dtype=dtype), layout))


def test_tensors_that_no_cache_holds_are_the_references_on_any_team(threads):
    x = normal(40, 64, 4096)
    threads(2)
    assert "whose channels" in numba_cpu.describe(x)
    assert_large_as_reference(threads, x)


def assert_large_as_reference(threads, x):
    shape = x.shape
    grad, residual = x.flip(0).clone(), x.roll(1, 0).clone()
    weight, bias = normal(shape[1], seed=1), normal(shape[1], seed=2)
    found = []
    for team in (1, 3):
        threads(team)
        y, batch, own_mask = numba_cpu.forward(x, weight, bias, EPS, residual, relu=True)
        gate = ReluGate(bias, own_mask)
        grads = numba_cpu.backward(grad, x, batch.mean, batch.var, EPS, weight, gate)
        found.append((y, batch.mean, batch.var, *grads))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    expected, batch, _ = reference.forward(x, weight, bias, EPS, residual, relu=True)
    torch.testing.assert_close(found[0][0], expected)
    torch.testing.assert_close(found[0][2], batch.var, rtol=2e-6, atol=0)
    gate = ReluGate(bias, own_mask)
    exact = reference.backward(grad, x, batch.mean, batch.var, EPS, weight, gate)
    grad_x, grad_weight, grad_bias, grad_residual = found[0][3:]
    torch.testing.assert_close(grad_x, exact.x)
    torch.testing.assert_close(grad_residual, exact.residual)
    size = (x.numel() // x.shape[1]) ** 0.5
    for got, true in ((grad_weight, exact.weight), (grad_bias, exact.bias)):
        torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=1e-5 * size)


@pytest.mark.parametrize("var", [0.0, -1.0])
def test_a_variance_without_a_root_is_no_silent_end(var):
    x, variances = normal(4, 3, 50), torch.tensor([1.0, var, 1.0])
    got, expected = (
        batch_norm(x, torch.zeros(3), variances, None, None, False, 0.1, 0.0, backend=kernels)
        for kernels in ("numba", "reference")
    )
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_a_signal_handler_may_call_a_kernel_meanwhile(threads):
    threads(2)
    x, small = normal(8, 3, 64, 64), normal(64, 5, 7)
    expected = numba_cpu.moments(x)
    numba_cpu.moments(small)  # Compiled now: a compilation takes longer than the timer.
    calls = []

    def handler(*_):
        calls.append(numba_cpu.moments(small))

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        found = [numba_cpu.moments(x) for _ in range(300)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert calls
    for got in found:
        assert torch.equal(got.mean, expected.mean)
        assert torch.equal(got.var, expected.var)


def test_hooks_may_give_saved_tensors_back_in_another_dtype():
    x = normal(8, 3, 50).requires_grad_()
    weight = torch.ones(3, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: t.half() if t.is_floating_point() else t, lambda t: t.float()):
        y = batch_norm(x, None, None, weight, training=True)
    (got,) = torch.autograd.grad(y.square().sum() + y.pow(3).sum(), x)
    y = batch_norm(x, None, None, weight, training=True)
    (expected,) = torch.autograd.grad(y.square().sum() + y.pow(3).sum(), x)
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)


def test_a_tensor_that_stands_for_the_negative_of_its_memory():
    x = normal(8, 3, 50)
    negative = torch._neg_view(x)
    got = batch_norm(negative, None, None, training=True)
    torch.testing.assert_close(got, batch_norm(-x, None, None, training=True))


def test_the_bias_may_be_wider_than_the_weight():
    x, grad = normal(64, 3, 50), normal(64, 3, 50, seed=1)
    weight = torch.ones(3, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    y = batch_norm(x, None, None, weight, bias, training=True)
    _, got = torch.autograd.grad(y, (weight, bias), grad)
    assert got.dtype == torch.float64
    assert not torch.equal(got, got.float().double())
