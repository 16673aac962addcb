"""Traces the forward of one module to a graph, with the conditions under which it is valid.

``torch.fx`` brings the graph and the proxies. Its ``Tracer`` is not used, because it replaces
methods of ``nn.Module`` for the whole process while it traces. Here only the traced module and the
modules in it have another class for that time.
"""

from __future__ import annotations

import inspect
import operator
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, no_type_check

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, GraphAppendingTracer

from batchnorm.tools.flow.assumptions import Assumptions, Read, Unproven, fingerprint, is_constant


@dataclass(frozen=True)
class Trace:
    """Graph of a forward, valid while its conditions are met.

    Attributes:
        graph: Every operation in order, each call of a module in the traced one as one node.
        source: The forward as it is written.
        arguments: For each argument its type, ``Tensor`` or ``list``.
        children: Names of the traced module's children, in order.
        reads: What the forward must find.
    """

    graph: fx.Graph
    source: Callable[..., Any]
    arguments: tuple[type, ...]
    children: tuple[str, ...]
    reads: tuple[Read, ...]

    def is_valid_for(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Tells if the graph computes what the forward would for this call."""
        if kwargs or len(args) != len(self.arguments) or tuple(module._modules) != self.children:
            return False
        for argument, kind in zip(args, self.arguments, strict=True):
            if not isinstance(argument, kind):
                return False
        for path, name, found in self.reads:
            owner = module_at(module, path)
            if owner is None or fingerprint(getattr(owner, name, None)) != found:
                return False
        return True


def trace(module: nn.Module) -> Trace:
    """Traces the forward of ``module`` without running it on numbers.

    Parameters, buffers and flags stay as they are. Not thread-safe with calls of this very module.

    Raises:
        Unproven: The graph might differ from the forward for some input or state.
    """
    source = type(module).forward
    names = _required_arguments(source)
    if sys.getprofile() is not None:
        raise Unproven("cannot be watched while a profiler runs")
    training = module.__dict__["training"]
    try:
        graph, assumptions = _trace_once(module, source, names)
        if assumptions.read_training:
            module.__dict__["training"] = not training
            other, _ = _trace_once(module, source, names)
            if _text(other) != _text(graph):
                raise Unproven("does other things in training than in evaluation")
    finally:
        module.__dict__["training"] = training
    kinds = tuple(list if name in assumptions.lists else Tensor for name in names)
    return Trace(graph, source, kinds, tuple(module._modules), tuple(assumptions.reads))


def module_at(root: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    """Returns the descendant of ``root`` at ``path``, None if there is none."""
    module: nn.Module | None = root
    for name in path:
        if module is None:
            return None
        module = module._modules.get(name)
    return module


def change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Changes the class of an object, whatever its ``__setattr__`` does."""
    object.__setattr__(module, "__class__", kind)


def _text(graph: fx.Graph) -> str:
    return graph.python_code(root_module="self").src


def _required_arguments(source: Any) -> list[str]:
    if not isinstance(source, FunctionType) or hasattr(source, "__wrapped__"):
        raise Unproven("is wrapped by a decorator")
    if str(source.__module__).split(".")[0] == "torch" and source is not nn.Sequential.forward:
        raise Unproven("is torch's own")
    _, *parameters = inspect.signature(source).parameters.values()
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Unproven("takes any number of arguments")
        if parameter.default is not parameter.empty and not is_constant(parameter.default):
            kind = type(parameter.default).__name__
            raise Unproven(f"has the default {parameter.name}, a {kind}, which may change")
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    if any(parameter.kind is parameter.KEYWORD_ONLY for parameter in required):
        raise Unproven("takes an argument that must be named")
    return [parameter.name for parameter in required]


def _trace_once(module: nn.Module, source: Any, names: list[str]) -> tuple[fx.Graph, Assumptions]:
    """Runs the forward on proxies; random numbers drawn by mistake are put back."""
    assumptions = Assumptions(module, source.__code__)
    assumptions.admit(source.__code__, source.__globals__)
    tracer = _Tracer(module)
    inputs = [tracer.create_proxy("placeholder", name, (), {}) for name in names]
    try:
        with torch.random.fork_rng(devices=[]), _observed(tracer, assumptions):
            output = source(module, *inputs)
        tracer.create_proxy("output", "output", (output,), {})
    except Unproven:
        raise
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        raise Unproven(f"cannot be traced ({line or type(error).__name__})") from error
    assumptions.check_calls(tracer.graph)
    return tracer.graph, assumptions


class _InPlace:
    """``x += y`` on a traced tensor, which fx would record as ``x = x + y``."""

    def __init_subclass__(cls) -> None:
        arithmetic = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
        for name in (*arithmetic, "and", "or", "xor", "lshift", "rshift"):
            setattr(cls, f"__i{name}__", _recorded(getattr(operator, f"i{name}")))


def _recorded(target: Callable[..., Any]) -> Callable[..., Any]:
    @no_type_check  # A run-time check would be called between the forward and this function.
    def method(proxy: fx.Proxy, other: Any) -> fx.Proxy:
        return proxy.tracer.create_proxy("call_function", target, (proxy, other), {})

    return method


class _Attribute(_InPlace, Attribute):
    pass


class _Proxy(_InPlace, fx.Proxy):
    @no_type_check
    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)  # pyright: ignore[reportCallIssue]


class _Tracer(GraphAppendingTracer):
    """Writes nodes for one module; its tensors and the modules in it are known by name."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__(fx.Graph())
        self.root = root
        self.modules = {id(module): name for name, module in root.named_modules()}
        tensors = (*root.named_parameters(), *root.named_buffers())
        self.tensors = {id(tensor): name for name, tensor in tensors}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def tensor(self, value: Any) -> Any:
        """Returns a proxy for a parameter or buffer, and anything else as it is."""
        if isinstance(value, Tensor) and id(value) in self.tensors:
            return self.create_proxy("get_attr", self.tensors[id(value)], (), {})
        return value

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy:
        if module is self.root:
            raise Unproven("calls the module itself")
        return self.create_proxy("call_module", self.modules[id(module)], args, kwargs)

    def create_arg(self, a: Any) -> Any:
        name = self.tensors.get(id(a), self.modules.get(id(a)))
        if name:
            return self.create_node("get_attr", name, (), {})
        if isinstance(a, Tensor):
            raise Unproven("uses a tensor that is neither an argument nor a parameter nor a buffer")
        return super().create_arg(a)


@contextmanager
def _observed(tracer: _Tracer, assumptions: Assumptions) -> Iterator[None]:
    """Lets the traced module and all modules in it report what is read of them and called."""
    before = [(module, type(module)) for module in tracer.root.modules()]
    observed = {kind: _observed_class(kind, tracer, assumptions) for _, kind in before}
    try:
        for module, kind in before:
            change_class(module, observed[kind])
        with assumptions.watching():
            yield
    finally:
        for module, kind in before:
            change_class(module, kind)


class _SilentBase:
    """Keeps a user's ``__init_subclass__`` from hearing of the classes made here."""

    def __init_subclass__(cls) -> None:
        pass


def _observed_class(
    kind: type[nn.Module], tracer: _Tracer, assumptions: Assumptions
) -> type[nn.Module]:
    """Makes a subclass of ``kind`` that reports reads by watched code, and records calls."""

    @no_type_check  # as in `_recorded`
    def read(module: nn.Module, name: str) -> Any:
        value = kind.__getattribute__(module, name)
        if sys._getframe(1).f_code in assumptions.watched:
            assumptions.record_read(module, name, value)
        return value

    @no_type_check
    def read_registered(module: nn.Module, name: str) -> Any:
        value = None
        try:
            value = kind.__getattr__(module, name)
        finally:
            if sys._getframe(1).f_code in assumptions.watched:
                assumptions.record_read(module, name, value)  # None: the attribute is missing.
        return tracer.tensor(value)

    @no_type_check
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return tracer.call(module, args, kwargs)

    body = {"__getattribute__": read, "__getattr__": read_registered, "__call__": call}
    bases = (_SilentBase, kind)
    return types.new_class(kind.__name__, bases, exec_body=lambda names: names.update(body))
