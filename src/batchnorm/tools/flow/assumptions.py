"""Watches what a forward calls and reads while ``torch.fx`` traces it.

fx writes down what happens to tensors and silently bakes in whatever else the forward looked at:
flags, attributes, the clock. Here every function that the forward calls and every attribute that it
reads is known to be harmless, or becomes a condition, or the forward is given up with a reason.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import math
import operator
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, MethodType, ModuleType
from typing import Any, NamedTuple, no_type_check

import torch
from torch import Tensor, fx, nn
from torch.overrides import get_ignored_functions

_CONTAINERS = (
    *(nn.ModuleList, nn.ModuleDict, nn.Sequential),
    *(nn.ParameterList, nn.ParameterDict),
)
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format)
_HARMLESS_FUNCTIONS = (iter, len, max, min, next, sum, abs, any, all, sorted, getattr)
_HARMLESS_OWNERS = (math, operator, sys.modules["_operator"])
_HARMLESS_TYPES = (list, tuple, dict, str, int, float, range)
_HARMLESS_CLASSES = (
    *(list, tuple, dict, set, str, int, float, bool, slice),
    *(range, enumerate, zip, reversed, map, super),
)
_HARMLESS_MODULES = {"torch", "math", "operator", "_operator"}
_TORCH_HOMES = (torch, torch.nn.functional)
_TORCH_PYTHON = (
    *("torch.fx.", "torch.nn.functional.", "torch.functional.", "torch._tensor."),
    *("torch._jit_internal.", "torch.overrides."),
)
_OURS = {__name__, "batchnorm.tools.flow.tracing"}
_READS_OF_CONTAINERS = {
    *("__iter__", "__len__", "__getitem__", "__contains__", "_get_abs_string_index"),
    *("keys", "values", "items"),
}
_FORBIDDEN = {
    "STORE_ATTR": "writes attributes",
    "DELETE_ATTR": "deletes attributes",
    "STORE_GLOBAL": "writes global variables",
    "STORE_SUBSCR": "assigns to items",
    "DELETE_SUBSCR": "deletes items",
    "IMPORT_NAME": "imports modules",
    "PUSH_EXC_INFO": "uses with or try",
    "YIELD_VALUE": "is a generator",
}


class Unproven(Exception):
    """Why a block cannot be rewritten: a clause whose subject is the block's forward."""


class Read(NamedTuple):
    """What a forward found when it read an attribute of a module.

    Attributes:
        path: Names of the children from the block to the module.
        name: The attribute.
        found: What it was, see `found_in`.
    """

    path: tuple[str, ...]
    name: str
    found: Any


def found_in(value: Any) -> Any:
    """What a traced forward depends on in a value that it read.

    A child is called by its name and may be replaced, so only its presence matters; of a container
    the names of its children matter too. None stands for a value that is missing, or that cannot be
    compared cheaply.
    """
    if isinstance(value, _CONTAINERS):
        children = [(name, found_in(child)) for name, child in value._modules.items()]
        return ("children", *children, *value._parameters)
    if isinstance(value, (nn.Module, Tensor)):
        return "present"
    if isinstance(value, MethodType):
        return value.__func__
    if value is not None and _is_plain(value):
        return (type(value), value)
    return None


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(_is_plain(item) for item in value)
    return type(value) in _PLAIN


class Watch:
    """Sees what a block's forward, and all that it calls outside torch, calls and reads.

    Attributes:
        reads: What it read, to be found again at each call.
        read_training: Whether it asked for the block's own ``training``.
        lists: Names of the arguments that it takes for lists, because they are no tensors.
    """

    def __init__(self, block: nn.Module, code: CodeType) -> None:
        self.block = block
        self.code = code
        self.paths = {id(m): tuple(n.split(".")) if n else () for n, m in block.named_modules()}
        self.watched: set[CodeType] = set()
        self.calls: Counter[Any] = Counter()
        self.reads: dict[Read, None] = {}
        self.read_training = False
        self.lists: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches this thread. Like fx's own tracing it changes ``nn.Module`` meanwhile."""

        @no_type_check  # a check would stand between the forward and this function
        def read(module: nn.Module, name: str) -> Any:
            if sys._getframe(1).f_code not in self.watched:
                return object.__getattribute__(module, name)
            try:
                value = object.__getattribute__(module, name)
            except AttributeError:
                self._note(module, name, _child(module, name))
                raise
            self._note(module, name, value)
            return value

        nn.Module.__getattribute__ = read
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)
            del nn.Module.__getattribute__

    def admit(self, code: CodeType, variables: dict[str, Any]) -> None:
        """Watches a function from now on, before it runs for the first time.

        Raises:
            Unproven: It does what neither a graph nor a condition can hold.
        """
        inner = code.co_name.startswith("<")
        if not inner and any(name != "__class__" for name in code.co_freevars):
            raise Unproven(f"calls {code.co_name}(), which sees another function's variables")
        before: list[dis.Instruction] = []
        for step in _steps(code):
            if step.opname in _FORBIDDEN and not (inner and step.opname == "YIELD_VALUE"):
                raise Unproven(_FORBIDDEN[step.opname])
            if step.opname == "STORE_DEREF" and step.argval in code.co_freevars:
                raise Unproven("writes variables of another function")
            _check_global(before, step, variables)
            _check_identity(before, step, code)
            before.append(step)
        self.watched.add(code)

    def check_calls(self, graph: fx.Graph) -> None:
        """Each call of one of torch's functions must have become a node.

        Raises:
            Unproven: One took no traced tensor, such as a random number.
        """
        nodes = Counter(node.target for node in graph.nodes if node.op == "call_function")
        for function, count in self.calls.items():
            if nodes[function] < count:
                raise Unproven(f"calls torch.{function.__name__}() without one of its tensors")

    def _see(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and frame.f_code in self.watched:
            self._calls(frame, function)
        elif event == "call" and frame.f_back and frame.f_back.f_code in self.watched:
            self._enters(frame)

    def _calls(self, frame: FrameType, function: Any) -> None:
        """A function written in C is harmless, or belongs into the graph (`check_calls`)."""
        name = getattr(function, "__name__", str(function))
        if function is isinstance:
            self._asks_type(frame)
            return
        if function in _HARMLESS_FUNCTIONS:
            return
        owner = getattr(function, "__self__", None)
        kind = getattr(function, "__objclass__", type(owner))
        if owner in _HARMLESS_OWNERS or kind in _HARMLESS_TYPES:
            return
        is_torch = any(getattr(home, name, None) is function for home in _TORCH_HOMES)
        if is_torch and function not in get_ignored_functions():
            self.calls[function] += 1
            return
        raise Unproven(f"calls {name}()")

    def _asks_type(self, frame: FrameType) -> None:
        """``isinstance(argument, Tensor)`` is false of a traced argument: it stands for a list."""
        steps = [step for step in _steps(frame.f_code) if step.offset < frame.f_lasti]
        while steps[-1].opname in ("PRECALL", "CALL"):
            steps.pop()
        kind = steps.pop()
        home = steps.pop() if kind.opname == "LOAD_ATTR" else kind
        subject = steps.pop()
        asked = _global(home.argval, frame.f_globals)
        asked = getattr(asked, "Tensor", None) if home is not kind else asked
        is_argument = frame.f_code is self.code and _loads_argument(subject, frame.f_code)
        if asked is not Tensor or not is_argument:
            raise Unproven("calls isinstance()")
        self.lists.add(subject.argval)

    def _enters(self, frame: FrameType) -> None:
        """A function written in Python is watched too, unless it is torch's and harmless."""
        code, module = frame.f_code, frame.f_globals.get("__name__", "")
        if code in self.watched or module in _OURS:
            return
        if module.split(".")[0] != "torch" or code is nn.Sequential.forward.__code__:
            self.admit(code, frame.f_globals)
            return
        if f"{module}.".startswith(_TORCH_PYTHON) or code is torch._assert.__code__:
            return
        if module == "torch.nn.modules.container" and code.co_name in _READS_OF_CONTAINERS:
            return
        raise Unproven(f"calls {module}.{code.co_qualname}()")

    def _note(self, module: nn.Module, name: str, value: Any) -> None:
        if name == "training" and module is self.block:
            self.read_training = True
            return
        if id(module) not in self.paths:
            raise Unproven(f"reads {name!r} of a module that is not its child")
        found = found_in(value)
        if found is None and value is not None:
            raise Unproven(f"reads {name!r}, a {type(value).__name__}")
        self.reads[Read(self.paths[id(module)], name, found)] = None


def _steps(code: CodeType) -> list[dis.Instruction]:
    ignored = ("PUSH_NULL", "COPY", "RESUME", "NOT_TAKEN", "CACHE")
    return [step for step in dis.get_instructions(code) if step.opname not in ignored]


def _loads_argument(step: dis.Instruction, code: CodeType) -> bool:
    """Whether a step loads an argument as it was given."""
    if not step.opname.startswith("LOAD_FAST") or isinstance(step.argval, tuple):
        return False
    stores = [s.argval for s in _steps(code) if s.opname.startswith("STORE_FAST")]
    stored = {name for one in stores for name in (one if isinstance(one, tuple) else (one,))}
    return step.argval in code.co_varnames[: code.co_argcount] and step.argval not in stored


def _child(module: nn.Module, name: str) -> Any:
    for kind in ("_parameters", "_buffers", "_modules"):
        if name in module.__dict__[kind]:
            return module.__dict__[kind][name]
    return None


def _check_global(
    before: list[dis.Instruction], step: dis.Instruction, variables: dict[str, Any]
) -> None:
    """Global modules, functions and classes are fine; global data may change."""
    if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and before:
        origin = before[-1]
        value = _global(origin.argval, variables) if origin.opname == "LOAD_GLOBAL" else None
        if isinstance(value, type) or step.argval == "backends":
            raise Unproven(f"reads {origin.argval}.{step.argval}")
    if step.opname not in ("LOAD_GLOBAL", "LOAD_NAME"):
        return
    value = _global(step.argval, variables)
    if isinstance(value, ModuleType):
        harmless = value.__name__.split(".")[0] in _HARMLESS_MODULES
    elif isinstance(value, type) and value.__module__ == "builtins":
        harmless = value in _HARMLESS_CLASSES or issubclass(value, BaseException)
    else:
        harmless = isinstance(value, type) or inspect.isroutine(value)
    if not harmless:
        raise Unproven(f"uses the global {step.argval}")


def _global(name: str, variables: dict[str, Any]) -> Any:
    return variables[name] if name in variables else getattr(builtins, name, None)


def _check_identity(before: list[dis.Instruction], step: dis.Instruction, code: CodeType) -> None:
    """A traced tensor is never None and never another one, so only sure cases may ask."""
    if step.opname == "IS_OP":
        if before[-1].opname != "LOAD_CONST" or before[-1].argval is not None:
            raise Unproven("compares by identity")
        subject = before[-2]
    elif step.opname.endswith(("IF_NONE", "IF_NOT_NONE")):
        subject = before[-1]
    else:
        return
    if subject.opname not in ("LOAD_ATTR", "LOAD_GLOBAL") and not _loads_argument(subject, code):
        raise Unproven("asks whether a value that it computed is None")
