"""Private names of torch: each is there, answers what we think, and may vanish."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function, forward_ad
from torch.nn.modules.module import register_module_forward_hook

from batchnorm import torch_internals

NAMES = [
    "_C._are_functorch_transforms_active",
    "autograd.forward_ad._current_level",
    "_C._len_torch_dispatch_stack",
    "_C._autograd._top_saved_tensors_default_hooks",
    "_C._current_graph_task_id",
    "compiler.is_exporting",
    "_subclasses.fake_tensor.is_fake",
    "_is_functional_tensor",
    "_C._get_tracing_state",
    "_C._set_tracing_state",
    "autograd.profiler._is_profiler_enabled",
    "_C._has_storage",
    "_C.__file__",
    "_C._functorch.is_batchedtensor",
    "_C._functorch.get_unwrapped",
]


def seen_inside(look, transform):
    seen = []

    def function(x):
        seen.append(look())
        return x * 2

    transform(function)(torch.ones(3))
    return set(seen)


def test_transforms_are_seen():
    assert torch_internals.KNOWS_TRANSFORMS
    assert not torch_internals.is_transformed()
    for transform in (torch.func.vmap, torch.func.jacrev, torch.func.jacfwd):
        assert seen_inside(torch_internals.is_transformed, transform) == {True}
        assert seen_inside(torch_internals.is_func_transformed, transform) == {True}
    with forward_ad.dual_level():
        assert torch_internals.is_transformed()
        assert not torch_internals.is_func_transformed()


def test_tangents_are_seen_also_below_a_vmap():
    seen = []

    def look(x, y):
        seen.append((torch_internals.has_tangent(x), torch_internals.has_tangent(y)))
        return x * y

    ones = torch.ones(2, 3)
    look(ones, ones)
    torch.func.jvp(lambda x: look(x, ones), (ones,), (ones,))
    torch.func.jvp(lambda x: torch.func.vmap(look)(x, ones), (ones,), (ones,))
    with forward_ad.dual_level():
        look(ones, forward_ad.make_dual(ones, ones))
    assert seen == [(False, False), (True, False), (True, False), (False, True)]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_modes_and_traces_are_seen():
    assert not torch_internals.is_recorded()
    with FakeTensorMode():
        assert torch_internals.is_recorded()
    traced = seen_inside(
        torch_internals.is_recorded,
        lambda f: lambda x: torch.jit.trace(f, x, check_trace=False),
    )
    assert traced == {True}
    assert not torch_internals.is_traced()
    traced = seen_inside(
        torch_internals.is_traced,
        lambda f: lambda x: torch.jit.trace(f, x, check_trace=False),
    )
    assert traced == {True}


def test_profilers_are_seen():
    assert not torch_internals.is_profiled()
    with torch.profiler.profile():
        assert torch_internals.is_profiled()
    with torch.autograd.profiler.profile():
        assert torch_internals.is_profiled()
    assert not torch_internals.is_profiled()


def test_notes_of_an_export_are_seen_and_restored():
    def noted():
        return list(torch_internals._exported_modules().values())[-1]

    class Layer(torch.nn.BatchNorm2d):
        def forward(self, x):
            before = noted()
            with torch_internals.exported_as(torch.nn.modules.batchnorm._BatchNorm):
                seen.append(noted()[1])
            with torch_internals.exported_as(torch.nn.ReLU):
                seen.append(noted())
            with torch_internals.exported_as(None):
                seen.append(noted()[1].__name__)
            assert noted() == before
            return x + 1

    seen = []
    assert torch_internals._exported_modules() is None
    torch.export.export(torch.nn.Sequential(Layer(3)), (torch.ones(2, 3, 4, 4),))
    as_layer, (path, as_part), caller = seen[:3]
    assert (as_layer, as_part, caller) == (torch.nn.BatchNorm2d, torch.nn.ReLU, "Sequential")
    assert path.endswith("0.relu")
    with torch_internals.exported_as(torch.nn.ReLU):
        assert torch_internals._exported_modules() is None


def test_hooks_on_saved_tensors_are_seen():
    assert not torch_internals.has_saved_tensor_hooks()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert torch_internals.has_saved_tensor_hooks()


def test_memory_is_seen():
    assert torch_internals.has_storage(torch.ones(3))
    wrapped = []
    torch.func.vmap(lambda x: (wrapped.append(torch_internals.has_storage(x)), x)[1])(torch.ones(3))
    assert wrapped == [False]


def test_tensors_with_values_are_told_from_those_without():
    x = torch.ones(3)
    assert torch_internals.is_real(x)
    assert torch_internals.is_real(torch.nn.Parameter(x))
    assert not torch_internals.is_real(x.to("meta"))
    with FakeTensorMode() as mode:
        assert not torch_internals.is_real(mode.from_tensor(x))
        assert not torch_internals.is_real(torch.ones(3))
    assert torch_internals.is_real(x)
    for transform in (torch.func.vmap, torch.func.functionalize):
        assert seen_of(transform, x) == [False]

    class Look(torch.nn.Module):
        def forward(self, x):
            seen.append((torch_internals.is_exporting(), torch_internals.is_real(x)))
            return x * 2

    seen = []
    torch.export.export(Look(), (x,))
    assert set(seen) == {(True, False)}
    assert not torch_internals.is_exporting()


def seen_of(transform, x):
    seen = []
    transform(lambda x: (seen.append(torch_internals.is_real(x)), x * 2)[1])(x)
    return seen


def test_a_backward_pass_has_a_number_and_an_end():
    assert torch_internals.backward_pass_id() == -1
    told = []

    class Look(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            told.append(torch_internals.backward_pass_id())
            torch_internals.when_backward_pass_ends(lambda: told.append("end"))
            return grad * 2

    for _ in range(2):
        Look.apply(torch.ones(3, requires_grad=True)).sum().backward()
    assert told[1] == told[3] == "end"
    assert 0 <= told[0] < told[2]
    with pytest.raises(RuntimeError, match=r"inside a backward callback|during backward"):
        torch_internals.when_backward_pass_ends(lambda: None)


def test_the_direct_apply_is_that_of_torch():
    class Double(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = torch.ones(3, requires_grad=True)
    torch_internals.direct_apply(Double)(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


def test_global_hooks_are_listed():
    assert torch_internals.global_hooks() == []

    def hook(module, args, output):
        return None

    handle = register_module_forward_hook(hook)
    try:
        assert torch_internals.global_hooks() == [hook]
    finally:
        handle.remove()


def test_hooks_of_a_module_are_seen():
    for register in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        layer = torch.nn.Linear(2, 2)
        assert not torch_internals.has_hooks(layer)
        getattr(layer, register)(lambda *_: None)
        assert torch_internals.has_hooks(layer), register
        torch_internals.clear_hooks(layer)
        assert not torch_internals.has_hooks(layer)


def test_hooks_on_outputs_are_told_from_those_on_inputs():
    layer = torch.nn.BatchNorm1d(3)
    layer.register_forward_pre_hook(lambda *_: None)
    assert not torch_internals.has_output_hooks(layer)
    for kind in ("forward_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(layer, f"register_{kind}")(lambda *_: None)
        assert torch_internals.has_output_hooks(layer), kind
        handle.remove()
        assert not torch_internals.has_output_hooks(layer)


def test_refused_writes_are_told_apart():
    captured, mapped = torch.zeros(3), torch.zeros(3)
    with pytest.raises(RuntimeError, match="captured") as error:
        torch.func.grad(lambda x: (captured.copy_(x), x.sum())[1])(torch.ones(3))
    assert torch_internals.is_write_into_captured(error.value)
    with pytest.raises(RuntimeError, match="vmap") as error:
        torch.func.vmap(lambda x: mapped.copy_(x))(torch.ones(2, 3))
    assert torch_internals.is_write_under_vmap(error.value)
    with pytest.raises(RuntimeError, match="not batched") as error:
        torch.func.vmap(
            lambda x: torch.nn.functional.batch_norm(x, mapped, torch.ones(3), training=True)
        )(torch.ones(2, 4, 3))
    assert torch_internals.is_write_under_vmap(error.value)
    other = RuntimeError("something else")
    assert not torch_internals.is_write_into_captured(other)
    assert not torch_internals.is_write_under_vmap(other)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_vanishes_leaves_right_results_and_a_warning(name):
    """The name is looked for in vain, as if a new torch had dropped it."""
    code = f"""
        import functools, warnings
        import torch
        real = functools.reduce
        def reduce(function, path, start):
            if ".".join(path) == {name!r} and start is torch:
                raise AttributeError
            return real(function, path, start)
        functools.reduce = reduce
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            import batchnorm.torch_internals
        functools.reduce = real
        print(*[str(w.message) for w in told if "batchnorm" in str(w.message)])
        import batchnorm
        x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        ours, theirs = batchnorm.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
        grads = []
        for layer in (ours, theirs):
            leaf = x.clone().requires_grad_()
            layer(leaf).square().mul(torch.arange(5.0)).sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.running_var, theirs.running_var)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = f"batchnorm: torch {torch.__version__} has no torch.{name}; "
    assert done.stdout.startswith(expected), done.stdout
