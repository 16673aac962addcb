"""The forward of one block as a graph, with the conditions under which the graph is right."""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, no_type_check

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from batchnorm.tools.flow.assumptions import Read, Unproven, Watch, found_in


@dataclass(frozen=True)
class Trace:
    """A forward as a graph, right as long as its conditions hold.

    Attributes:
        graph: Every operation in order, each child module one node.
        source: The forward as it is written.
        arguments: For each argument its type, ``Tensor`` or ``list``.
        children: Names of the block's children, in order.
        reads: What the forward must find.
    """

    graph: fx.Graph
    source: Callable[..., Any]
    arguments: tuple[type, ...]
    children: tuple[str, ...]
    reads: tuple[Read, ...]

    def holds(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the graph computes what the forward would for this call."""
        if kwargs or len(args) != len(self.arguments) or tuple(block._modules) != self.children:
            return False
        for argument, kind in zip(args, self.arguments, strict=True):
            if not isinstance(argument, kind):
                return False
        for path, name, found in self.reads:
            module = module_at(block, path)
            if module is None or found_in(getattr(module, name, None)) != found:
                return False
        return True


def trace(block: nn.Module) -> Trace:
    """Traces the forward of ``block``; every child is one node.

    The block's parameters, buffers and flags stay as they are.

    Raises:
        Unproven: The graph might differ from the forward for some input or state.
    """
    source = type(block).forward
    names = _arguments_of(source)
    if sys.getprofile() is not None:
        raise Unproven("cannot be watched while a profiler runs")
    training = block.__dict__["training"]
    try:
        graph, watch = _run(block, source, names)
        if watch.read_training:
            block.__dict__["training"] = not training
            other, _ = _run(block, source, names)
            if _text(other) != _text(graph):
                raise Unproven("does other things in training than in evaluation")
    finally:
        block.__dict__["training"] = training
    kinds = tuple(list if name in watch.lists else Tensor for name in names)
    return Trace(graph, source, kinds, tuple(block._modules), tuple(watch.reads))


def module_at(block: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    """The descendant of ``block`` at ``path``, None if there is none."""
    module: nn.Module | None = block
    for name in path:
        if module is None:
            return None
        module = module._modules.get(name)
    return module


def _text(graph: fx.Graph) -> str:
    return graph.python_code(root_module="self").src


def _arguments_of(source: Any) -> list[str]:
    """Names of the arguments that must be given."""
    if not isinstance(source, FunctionType) or hasattr(source, "__wrapped__"):
        raise Unproven("is wrapped by a decorator")
    if str(source.__module__).split(".")[0] == "torch" and source is not nn.Sequential.forward:
        raise Unproven("is torch's own")
    _, *parameters = inspect.signature(source).parameters.values()
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Unproven("takes any number of arguments")
    given = [parameter for parameter in parameters if parameter.default is parameter.empty]
    if any(parameter.kind is parameter.KEYWORD_ONLY for parameter in given):
        raise Unproven("takes an argument that must be named")
    return [parameter.name for parameter in given]


def _run(block: nn.Module, source: Any, names: list[str]) -> tuple[fx.Graph, Watch]:
    """Traces once; random numbers drawn by mistake are put back."""
    watch = Watch(block, source.__code__)
    watch.admit(source.__code__, source.__globals__)
    try:
        with torch.random.fork_rng(devices=[]), watch.watching():
            graph = _Tracer(names).trace(block)
    except Unproven:
        raise
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        raise Unproven(f"cannot be traced ({line or type(error).__name__})") from error
    watch.check_calls(graph)
    for node in graph.nodes:
        node.type = None
    return graph, watch


class _InPlace:
    """``x += y`` on a traced tensor, which fx would record as ``x = x + y``."""

    def __init_subclass__(cls) -> None:
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
            setattr(cls, f"__i{name}__", _recorded(getattr(operator, f"i{name}")))
        for name in ("and", "or", "xor", "lshift", "rshift"):
            setattr(cls, f"__i{name}__", _recorded(getattr(operator, f"i{name}")))


def _recorded(target: Callable[..., Any]) -> Callable[..., Any]:
    @no_type_check  # as in `Watch.watching`
    def method(proxy: fx.Proxy, other: Any) -> fx.Proxy:
        return proxy.tracer.create_proxy("call_function", target, (proxy, other), {})

    return method


class _Attribute(_InPlace, Attribute):
    pass


class _Proxy(_InPlace, fx.Proxy):
    @no_type_check
    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)  # pyright: ignore[reportCallIssue]


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, names: list[str]) -> None:
        super().__init__(autowrap_modules=())  # pyright: ignore[reportArgumentType]
        self.names = names

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        tensors = [self.create_proxy("placeholder", name, (), {}) for name in self.names]
        return root_fn, [self.root, *tensors]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise Unproven("uses a tensor that is neither an argument nor a buffer")
        return super().create_arg(a)
