"""Traces the forward of one module to a graph, with the conditions under which it is valid.

``torch.fx`` brings the graph and the proxies. Its ``Tracer`` is not used, because it replaces
methods of ``nn.Module`` for the whole process while it traces. Here the forward runs on stand-ins:
objects with the attributes of the module and of the modules in it, whose classes report each read
and each call. The modules themselves stay as they are, so other threads may call them.
"""

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
from torch.fx.proxy import Attribute, GraphAppendingTracer

from batchnorm.tools.flow.assumptions import Assumptions, Read, Unproven, fingerprint, is_constant


@dataclass(frozen=True)
class Conditions:
    """Conditions under which the graph of a forward is valid; they refer to no module.

    Attributes:
        source: The forward as it is written.
        arguments: For each argument its type, ``Tensor`` or ``list``.
        children: Names of the traced module's children, in order.
        reads: What the forward must find.
    """

    source: Callable[..., Any]
    arguments: tuple[type, ...]
    children: tuple[str, ...]
    reads: tuple[Read, ...]

    def are_met(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tells if the graph computes what the forward would for this call."""
        if type(module).forward is not self.source:
            return False
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


def trace(module: nn.Module) -> tuple[fx.Graph, Conditions]:
    """Traces the forward of ``module`` without running it on numbers.

    Nothing of the module is changed. An attribute of its own that replaces ``forward`` is ignored.

    Returns:
        Every operation in order, each call of a module in the traced one as one node; and the
        conditions.

    Raises:
        Unproven: The graph might differ from the forward for some input or state.
    """
    source = type(module).forward
    names = _required_arguments(source)
    if sys.getprofile() is not None:
        raise Unproven("cannot be watched while a profiler runs")
    training = module.__dict__["training"]
    graph, assumptions = _trace_once(module, source, names, training=training)
    if assumptions.read_training:
        other, _ = _trace_once(module, source, names, training=not training)
        if _text(other) != _text(graph):
            raise Unproven("does other things in training than in evaluation")
    kinds = tuple(list if name in assumptions.lists else Tensor for name in names)
    reads = tuple(assumptions.reads)
    return graph, Conditions(source, kinds, tuple(module._modules), reads)


def module_at(root: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    """Returns the descendant of ``root`` at ``path``, None if there is none."""
    module: nn.Module | None = root
    for name in path:
        if module is None:
            return None
        module = module._modules.get(name)
    return module


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


def _trace_once(
    module: nn.Module, source: Any, names: list[str], *, training: bool
) -> tuple[fx.Graph, Assumptions]:
    """Runs the forward on proxies; random numbers drawn by mistake are put back."""
    assumptions, tracer = Assumptions(source.__code__), _Tracer()
    assumptions.admit(source.__code__, source.__globals__)
    root = _StandIns(tracer, assumptions).of(module)
    root.__dict__["training"] = training
    tracer.enter(root)
    assumptions.enter(root)
    inputs = [tracer.create_proxy("placeholder", name, (), {}) for name in names]
    try:
        with torch.random.fork_rng(devices=[]), assumptions.watching():
            output = source(root, *inputs)
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

    def __init__(self) -> None:
        super().__init__(fx.Graph())

    def enter(self, root: nn.Module) -> None:
        """Takes the stand-in of the module that is traced."""
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


class _SilentBase:
    """Hides the classes made here from a user's ``__init_subclass__``."""

    def __init_subclass__(cls) -> None:
        pass


class _StandIns:
    """Makes a stand-in for each module: it has the same attributes, and reports to two objects."""

    def __init__(self, tracer: _Tracer, assumptions: Assumptions) -> None:
        self._observers = (tracer, assumptions)
        self._classes: dict[type[nn.Module], type[nn.Module]] = {}
        self._made: dict[int, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        """Returns the stand-in of ``module``, whose children are stand-ins too."""
        if id(module) in self._made:
            return self._made[id(module)]
        kind = type(module)
        if kind not in self._classes:
            self._classes[kind] = _observed_class(kind, *self._observers)
        made = self._made[id(module)] = object.__new__(self._classes[kind])
        children = vars(module).get("_modules", {})  # TorchScript's modules may have none.
        if isinstance(children, dict):
            children = {
                name: None if child is None else self.of(child) for name, child in children.items()
            }
        object.__setattr__(made, "__dict__", {**vars(module), "_modules": children})
        return made


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
    # Not `type(kind)(...)`: a user's metaclass may keep a registry of the classes that it makes.
    return type.__new__(type(kind), kind.__name__, (_SilentBase, kind), body)
