"""Every private name of torch that this library uses, each behind a name of its own.

torch has no public way to ask what these functions answer. A private name may vanish with any
release. Those that a layer needs are looked up here, once: where one is missing, a warning says so,
and the library becomes slower, or torch raises an error of its own; no result becomes wrong. The
hooks of modules and the engine's callback have no such replacement; tools need them.
``tests/test_torch_internals.py`` uses each name and takes each away.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, Variable, forward_ad, profiler
from torch.nn.modules import module as torch_module


def _private(path: str, otherwise: Any, consequence: str) -> Any:
    """Looks up ``torch.<path>``, or warns and returns ``otherwise``."""
    try:
        return functools.reduce(getattr, path.split("."), torch)
    except AttributeError:
        warnings.warn(
            f"batchnorm: torch {torch.__version__} has no torch.{path}; {consequence}. "
            "Use torch 2.13, or look for a newer batchnorm.",
            RuntimeWarning,
            stacklevel=3,
        )
        return otherwise


_NO_TRANSFORMS = "layers take the slower way through torch's dispatcher, and torch.func fails"
_transforms_active: Callable[[], bool] = _private(
    "_C._are_functorch_transforms_active", None, _NO_TRANSFORMS
)
_level: int | None = _private("autograd.forward_ad._current_level", None, _NO_TRANSFORMS)
_mode_depth: Callable[[], int] = _private(
    "_C._len_torch_dispatch_stack", lambda: 1, "layers go through torch's dispatcher, which is slow"
)
_top_hooks: Callable[[bool], object] = _private(
    "_C._autograd._top_saved_tensors_default_hooks",
    lambda _: True,
    "running statistics are updated outside of the kernels, which is slower",
)
# What ``torch.jit.trace`` records into; None if it does not run.
tracing_state: Callable[[], object] = _private(
    "_C._get_tracing_state",
    lambda: torch.jit.is_tracing() or None,
    "layers ask torch.jit.is_tracing, which is slower",
)
_set_tracing_state: Callable[[object], None] = _private(
    "_C._set_tracing_state", lambda _: None, "torch.jit.trace warns of checks that it records"
)
_graph_task: Callable[[], int] = _private(
    "_C._current_graph_task_id", lambda: -1, "recomputed forward passes count as new batches"
)
_profiler: Any = profiler
if _private("autograd.profiler._is_profiler_enabled", None, "profilers show no layers") is None:
    _profiler = SimpleNamespace(_is_profiler_enabled=False)

_is_mapped: Callable[[Tensor], bool] = _private(
    "_C._functorch.is_batchedtensor", lambda _: False, "forward mode through vmap fails in training"
)
_unmapped: Callable[[Tensor], Tensor] | None = _private(
    "_C._functorch.get_unwrapped", None, "forward mode through vmap fails in training"
)

# Hooks on calls and on gradients: attributes of a module, and of torch's module of modules.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS: list[dict[int, Callable[..., Any]]] = [
    getattr(torch_module, f"_global{kind}", {}) for kind in _HOOKS
]

# Tells if a tensor has memory of its own; wrappers of transforms have none.
has_storage: Callable[[Tensor], bool] = _private(
    "_C._has_storage", lambda _: False, "layers go through torch's dispatcher, which is slow"
)
# Tells if torch.export captures the code that runs.
is_exporting: Callable[[], bool] = _private(
    "compiler.is_exporting", lambda: False, "tools record tensors of torch.export"
)
_is_fake: Callable[[object], bool] = _private(
    "_subclasses.fake_tensor.is_fake", lambda _: False, "tools record tensors of torch.export"
)
_is_functional: Callable[[Tensor], bool] = _private(
    "_is_functional_tensor", lambda _: False, "tools record tensors of torch.func.functionalize"
)
# The library whose calls to OpenMP show which implementation torch was linked with.
LIBRARY_FILE: str | None = _private("_C.__file__", None, "kernels run on threads of their own")
KNOWS_TRANSFORMS = _transforms_active is not None and _level is not None


def is_transformed() -> bool:
    """Tells if a transform of ``torch.func`` or a level of forward mode is active.

    ``torch.autograd.Function`` itself asks the first question like this.
    """
    return KNOWS_TRANSFORMS and (_transforms_active() or forward_ad._current_level >= 0)


def is_real(x: Tensor) -> bool:
    """Tells if a tensor has values: it is not fake, not on meta, and in no transform or export.

    In code that ``torch.compile`` traces it is, because the code runs on values later.
    """
    if is_exporting():
        return False
    if torch.compiler.is_compiling():
        return True
    if x.is_meta or not has_storage(x) or _is_functional(x):
        return False
    return type(x) in (Tensor, nn.Parameter) or not _is_fake(x)


def is_func_transformed() -> bool:
    """Tells if a transform of ``torch.func`` (``grad``, ``vmap``, ...) is active."""
    return KNOWS_TRANSFORMS and _transforms_active()


def has_tangent(tensor: Tensor) -> bool:
    """Tells if a tensor has a forward-mode tangent, also if ``vmap`` maps over it."""
    return forward_ad.unpack_dual(without_vmap(tensor)).tangent is not None


def without_vmap(tensor: Tensor) -> Tensor:
    """The tensor that ``vmap`` maps over, with the mapped dimensions; others come back as is."""
    while _unmapped is not None and _is_mapped(tensor):
        tensor = _unmapped(tensor)
    return tensor


def is_recorded() -> bool:
    """Tells if a ``TorchDispatchMode`` (as for fake tensors) or ``torch.jit.trace`` is active."""
    return _mode_depth() > 0 or tracing_state() is not None


def is_traced() -> bool:
    """Tells if ``torch.jit.trace`` records."""
    return tracing_state() is not None


@contextmanager
def trace_paused() -> Iterator[None]:
    """Lets ``torch.jit.trace`` record nothing in the block: looks at shapes are no part of it."""
    state = tracing_state()
    _set_tracing_state(None)
    try:
        yield
    finally:
        _set_tracing_state(state)


def is_profiled() -> bool:
    """Tells if a profiler of torch runs, in this thread or another."""
    return _profiler._is_profiler_enabled


def has_saved_tensor_hooks() -> bool:
    """Tells if a ``torch.autograd.graph.saved_tensors_hooks`` block is active."""
    return _top_hooks(True) is not None


def direct_apply(function: type[Function]) -> Callable[..., Any]:
    """The ``apply`` in C++ that ``function.apply`` calls.

    It skips the search for dead wrappers of transforms, which costs more than a small kernel.
    """
    return getattr(super(Function, function), "apply", function.apply)


def backward_pass_id() -> int:
    """Number of the backward pass that runs on this thread; -1 outside of one.

    ``torch.utils.checkpoint`` asks the same.
    """
    return _graph_task()


def when_backward_pass_ends(callback: Callable[[], None]) -> None:
    """Calls ``callback`` at the end of the backward pass that runs on this thread.

    Autograd does not call it if the pass fails, but drops it in both cases.
    ``DistributedDataParallel`` finishes its work in this way.

    Raises:
        RuntimeError: No backward pass runs.
    """
    engine: Any = Variable._execution_engine  # pyright: ignore[reportAttributeAccessIssue]
    engine.queue_callback(callback)


def has_hooks(module: nn.Module) -> bool:
    """Tells if somebody listens to the calls of this module, or to its gradients."""
    return has_output_hooks(module) or bool(module._forward_pre_hooks)


def has_output_hooks(module: nn.Module) -> bool:
    """Tells if somebody listens to the outputs of this module, or to their gradients."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def clear_hooks(module: nn.Module) -> None:
    """Removes all hooks on the calls of this module and on its gradients."""
    for hooks in _HOOKS:
        getattr(module, hooks).clear()


def global_hooks() -> list[Callable[..., Any]]:
    """The hooks that run for every module (``register_module_forward_hook`` and its kin)."""
    if not any(_GLOBAL_HOOKS):
        return []
    return [hook for hooks in _GLOBAL_HOOKS for hook in hooks.values()]


def is_write_into_captured(error: RuntimeError) -> bool:
    """Tells if torch refused to write into a tensor that a transform captured.

    ``torch.func.grad`` does, and ``torch.func.functionalize``.
    """
    words = ("mutate a captured Tensor", "mutating a non-functional tensor")
    return any(word in str(error) for word in words)


def is_write_under_vmap(error: RuntimeError) -> bool:
    """Tells if torch refused to write mapped values into a tensor that is not mapped."""
    return any(words in str(error) for words in ("vmap", "Batching rule", "were not batched"))


@contextmanager
def exported_as(module_class: type[nn.Module] | None) -> Iterator[None]:
    """Notes what an export records in the block as the work of a module of ``torch.nn``.

    Quantizers look for its classes in these notes, by name. Nothing changes outside of an export,
    and where no batch norm layer is exported.

    Args:
        module_class: ``_BatchNorm`` for torch's class of the layer; another class for a part of
            the layer; None for the module that calls the layer.
    """
    stack = None if torch.compiler.is_dynamo_compiling() else _exported_modules()
    path, layer_class = next(reversed(stack.values())) if stack else ("", nn.Module)
    bases = [base for base in layer_class.__mro__ if base.__module__ == nn.BatchNorm1d.__module__]
    if not stack or not bases:
        yield
        return
    before, (key, _) = dict(stack), stack.popitem()
    if module_class is nn.modules.batchnorm._BatchNorm:
        stack[key] = (path, bases[0])
    elif module_class is not None:
        stack[key] = (f"{path}.{module_class.__name__.lower()}", module_class)
    try:
        yield
    finally:
        stack.clear()
        stack.update(before)


def _exported_modules() -> OrderedDict[str, tuple[str, type[nn.Module]]] | None:
    """Path and class of the modules whose call an export records now, the innermost last."""
    return getattr(getattr(_proxy_mode(), "tracer", None), "module_stack", None)


def is_made_fx() -> bool:
    """Tells if ``make_fx``, which others use to capture programs, records."""
    return _proxy_mode() is not None


def _proxy_mode() -> Any:
    proxy_tensor: Any = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return getattr(proxy_tensor, "get_proxy_mode", lambda: None)()
