"""Records what a forward calls and reads while it is traced.

A graph records what happens to tensors. Everything else that the forward looks at (flags,
attributes, the clock) would silently become a constant of it. So each function that the forward
calls and each attribute that it reads must be known to be harmless, or becomes a condition of the
trace, or the forward is refused with a reason.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import math
import operator
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import get_ignored_functions

_CONTAINERS = (
    *(nn.ModuleList, nn.ModuleDict, nn.Sequential),
    *(nn.ParameterList, nn.ParameterDict),
)
_COMPARABLE = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format)
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
    """Reason why a forward cannot be followed: a clause whose subject is that forward."""


class Read(NamedTuple):
    """One attribute of a module that a forward read.

    Attributes:
        path: Names of the children from the traced module to the module that was read.
        name: The attribute.
        found: Its `fingerprint`.
    """

    path: tuple[str, ...]
    name: str
    found: Any


def fingerprint(value: Any) -> Any:
    """Reduces an attribute to what a traced forward depends on.

    A child is called by its name and may be replaced, so only its presence matters; of a container
    the names of its children matter too. None means that the value is missing, or that it cannot be
    compared cheaply.
    """
    if isinstance(value, _CONTAINERS):
        children = [(name, fingerprint(child)) for name, child in value._modules.items()]
        return ("children", *children, *value._parameters)
    if isinstance(value, (nn.Module, Tensor)):
        return "present"
    if isinstance(value, MethodType):
        return value.__func__
    if value is not None and _is_comparable(value):
        return (type(value), value)
    return None


def is_constant(value: Any) -> bool:
    """Tells if a default argument can be trusted to stay what it is."""
    return _is_comparable(value) or inspect.isroutine(value) or isinstance(value, type)


def _is_comparable(value: Any) -> bool:
    if type(value) is tuple:
        return all(_is_comparable(item) for item in value)
    return type(value) in _COMPARABLE


class Assumptions:
    """Conditions under which the trace of a module's forward is valid, collected while it runs.

    Attributes:
        root: The stand-in of the traced module.
        paths: Names of the children from the traced module to each module in it, by ``id``.
        reads: What the forward read, to be compared at each later call.
        read_training: Whether the forward read the module's own ``training``.
        lists: Names of the arguments that the forward takes for lists, because they are no tensors.
    """

    def __init__(self, code: CodeType) -> None:
        self.code = code
        self.root: nn.Module | None = None
        self.paths: dict[int, tuple[str, ...]] = {}
        self.watched: set[CodeType] = set()
        self.calls: Counter[Any] = Counter()
        self.reads: dict[Read, None] = {}
        self.read_training = False
        self.lists: set[str] = set()

    def enter(self, root: nn.Module) -> None:
        """Takes the stand-in of the module that is traced."""
        self.root = root
        self.paths = {id(m): tuple(n.split(".")) if n else () for n, m in root.named_modules()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the calls that the admitted functions make, in this thread only."""
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(None)

    def admit(self, code: CodeType, variables: dict[str, Any]) -> None:
        """Watches a function from now on, before it runs for the first time.

        Raises:
            Unproven: It does what neither a graph nor a condition can express.
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

    def record_read(self, module: nn.Module, name: str, value: Any) -> None:
        """Makes a condition of an attribute that the forward read.

        Raises:
            Unproven: Its value cannot be compared later, or what is read of it would be missed.
        """
        if name == "training" and module is self.root:
            self.read_training = True
            return
        if isinstance(value, nn.Module) and id(value) not in self.paths:
            raise Unproven(f"reads {name!r}, a module that is not in it")
        if isinstance(value, fx.Proxy):
            raise Unproven(f"reads {name!r}, which is computed")
        found = fingerprint(value)
        if found is None and value is not None:
            raise Unproven(f"reads {name!r}, a {type(value).__name__}")
        self.reads[Read(self.paths[id(module)], name, found)] = None

    def check_calls(self, graph: fx.Graph) -> None:
        """Checks that each call of one of torch's functions has become a node.

        Raises:
            Unproven: One took no traced tensor, such as a random number.
        """
        nodes = Counter(node.target for node in graph.nodes if node.op == "call_function")
        for function, count in self.calls.items():
            if nodes[function] < count:
                raise Unproven(f"calls torch.{function.__name__}() without one of its tensors")

    def _on_event(self, frame: FrameType, event: str, function: Any) -> None:
        """Checks a call that an admitted function makes; the callback of ``sys.setprofile``."""
        if event == "c_call" and frame.f_code in self.watched:
            self._check_c_function(frame, function)
        elif event == "call" and frame.f_back and frame.f_back.f_code in self.watched:
            self._check_python_function(frame)

    def _check_c_function(self, frame: FrameType, function: Any) -> None:
        """Admits functions written in C that are harmless, or become a node (`check_calls`)."""
        name = getattr(function, "__name__", str(function))
        if function is isinstance:
            self._check_isinstance(frame)
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

    def _check_isinstance(self, frame: FrameType) -> None:
        """Admits ``isinstance(argument, Tensor)``: false of a traced argument, as of a list."""
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

    def _check_python_function(self, frame: FrameType) -> None:
        """Watches functions written in Python too, unless they are torch's and harmless."""
        code, module = frame.f_code, frame.f_globals.get("__name__", "")
        if module in _OURS:
            return
        if module.split(".")[0] != "torch" or code is nn.Sequential.forward.__code__:
            if code not in self.watched:
                self.admit(code, frame.f_globals)
            self._check_arguments(code, frame.f_locals)
            return
        if f"{module}.".startswith(_TORCH_PYTHON) or code is torch._assert.__code__:
            return
        if module == "torch.nn.modules.container" and code.co_name in _READS_OF_CONTAINERS:
            return
        raise Unproven(f"calls {module}.{code.co_qualname}()")

    def _check_arguments(self, code: CodeType, values: Mapping[str, Any]) -> None:
        """Refuses arguments that can change unseen: among them may be defaults of the function."""
        if code.co_name.startswith("<"):  # A comprehension takes an iterator of watched code.
            return
        for name, value in values.items():
            if not self._is_traced(value):
                raise Unproven(f"calls {code.co_name}() with {name}, a {type(value).__name__}")

    def _is_traced(self, value: Any) -> bool:
        if isinstance(value, (list, tuple, set)):
            return all(self._is_traced(item) for item in value)
        if isinstance(value, dict):
            return all(self._is_traced(item) for item in value.values())
        if isinstance(value, nn.Module):
            return id(value) in self.paths
        return isinstance(value, (fx.Proxy, range, slice)) or is_constant(value)


def _steps(code: CodeType) -> list[dis.Instruction]:
    ignored = ("PUSH_NULL", "COPY", "RESUME", "NOT_TAKEN", "CACHE")
    return [step for step in dis.get_instructions(code) if step.opname not in ignored]


def _loads_argument(step: dis.Instruction, code: CodeType) -> bool:
    """Tells if a step loads an argument as it was given."""
    if not step.opname.startswith("LOAD_FAST") or isinstance(step.argval, tuple):
        return False
    stores = [s.argval for s in _steps(code) if s.opname.startswith("STORE_FAST")]
    stored = {name for one in stores for name in (one if isinstance(one, tuple) else (one,))}
    return step.argval in code.co_varnames[: code.co_argcount] and step.argval not in stored


def _check_global(
    before: list[dis.Instruction], step: dis.Instruction, variables: dict[str, Any]
) -> None:
    """Admits global modules, functions and classes; global data may change."""
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
    """Refuses questions of identity, whose answer for a traced tensor is always the same."""
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
