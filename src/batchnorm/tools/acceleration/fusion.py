"""Fuses the ReLUs of a block, and additions before them, into its batch norm layers.

A fused block has a replaced forward; its class and its layers stay as they are, and a direct call
of a layer computes batch norm alone. At each call the replaced forward first checks the conditions
of its trace; if one fails, it calls the original.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.tools.acceleration.replacement import (
    REPLACED_FORWARD,
    AcceleratedForward,
    LayerForward,
    Sum,
    can_fuse,
    is_written_down,
    obstacle_to_skipping,
    own_copying_method,
    with_relu,
    with_residual,
)
from batchnorm.tools.flow.assumptions import Unproven
from batchnorm.tools.flow.tracing import Conditions, module_at, trace
from batchnorm.tools.patching import RecomputationHook, is_replaced_by_others
from batchnorm.torch_internals import global_hooks, is_traced

_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE = (operator.iadd, "add_")
_MAKERS_OF_NEW_TENSORS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_SKIPPED = (nn.ReLU, nn.Identity)
_Members = tuple[tuple[tuple[str, ...], type[nn.Module]], ...]


@dataclass
class Fusions:
    """Report on one block.

    Attributes:
        relus: Names of the layers that now apply the ReLU after them.
        additions: Names of the layers that now add what was added to them, and apply the ReLU.
        left: Reasons why something was not fused, by layer; the block's own name is empty.
        widening: How many times as many values as the block's input the input of a layer may have.
    """

    relus: list[str] = field(default_factory=list)
    additions: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    widening: float = math.inf


@dataclass(frozen=True)
class _Rewritten:
    """A rewritten forward, and the conditions under which it may run in place of the original.

    It refers to no module, so equal blocks share it: block by block, compiled code is compiled once
    for all of them. A pickle holds None in its place.

    Attributes:
        conditions: Those of the trace; None if the forward cannot be followed.
        members: Path and class of the layers and modules that are not called.
        run: Takes the block and the arguments.
    """

    conditions: Conditions | None
    members: _Members
    run: Callable[..., Any]

    def fits(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tells if it computes what the original would for this call."""
        return (
            self.conditions is not None
            and self.conditions.are_met(block, args, kwargs)
            and _may_skip(block, self.members)
        )

    def __deepcopy__(self, memo: object) -> _Rewritten:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


_shared: WeakValueDictionary[tuple[Any, ...], _Rewritten] = WeakValueDictionary()
"""Rewritten forwards by conditions, members and source."""


class BlockForward(AcceleratedForward):
    """The forward of a block, with everything fused that is proven to be the same.

    Code is not pickled: an unpickled block traces its forward again, at the first call that is not
    compiled.
    """

    _widening = math.inf
    _least = (0.0, 0.0)

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self._rewritten: _Rewritten | None = None

    def expect(self, layers: Iterable[nn.Module]) -> None:
        """Takes the fused layers: a call in which all are left to torch runs the original at once.

        That is seen by the size of the block's input.
        """
        smallest = [LayerForward.smallest_of(layer) for layer in layers]
        self._least = (
            min(each.fused for each in smallest) / self._widening,
            min(each.training for each in smallest) / self._widening,
        )

    def rewrite(self) -> Fusions:
        """Traces the forward of the block's class and rewrites it."""
        fusions = Fusions()
        try:
            self._rewritten = _rewritten(self.module, fusions)
            self._widening = fusions.widening
        except Unproven as reason:
            self._rewritten = _Rewritten(None, (), _fails)
            fusions.left[""] = f"its forward {reason}"
        return fusions

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the rewritten forward if its conditions hold, else the original.

        Programs that others will run hold the original, with one entry for each module.
        """
        if self._is_small(args) or any(map(is_written_down, (*args, *kwargs.values()))):
            return self.original(*args, **kwargs)
        if self._rewritten is None and _may_trace():
            self.rewrite()
        rewritten = self._rewritten
        if rewritten is not None and rewritten.fits(self.module, args, kwargs):
            return rewritten.run(self.module, *args)
        return self.original(*args, **kwargs)

    def _is_small(self, args: tuple[Any, ...]) -> bool:
        if torch.compiler.is_compiling() or is_traced() or not args or type(args[0]) is not Tensor:
            return False
        return args[0].numel() < self._least[self.module.training]


def _fails(*_: Any) -> Any:
    raise NotImplementedError


def _may_trace() -> bool:
    """Tells if a forward can be traced inside a call of it."""
    return not torch.compiler.is_compiling() and sys.getprofile() is None


def fuse(block: nn.Module) -> Fusions:
    """Replaces the block's forward if something can be fused in it."""
    if is_replaced_by_others(block):
        return Fusions(left={"": REPLACED_FORWARD})
    method = own_copying_method(block)
    if method is not None:
        return Fusions(left={"": f"its forward belongs to a class with a {method} of its own"})
    forward = BlockForward(block)
    fusions = forward.rewrite()
    if fusions.relus or fusions.additions:
        forward.install_behind()
    return fusions


def _rewritten(block: nn.Module, fusions: Fusions) -> _Rewritten:
    """Traces the forward and writes fused calls into it.

    Raises:
        Unproven: It cannot be followed.
    """
    if type(block).__getattribute__ is not nn.Module.__getattribute__:
        raise Unproven("belongs to a class with a __getattribute__ of its own")
    graph, conditions = trace(block)
    fusions.widening = _widening(block, graph)
    members: dict[str, type[nn.Module]] = {}
    for relu in list(graph.nodes):
        match = _match(block, graph, relu)
        if match is None:
            continue
        obstacles = [f"{n}: {o}" for n, m in match.members(block) if (o := obstacle_to_skipping(m))]
        if obstacles:
            fusions.left[match.name] = f"the ReLU after it stays, because of {obstacles[0]}"
            continue
        members |= {name: type(module) for name, module in match.members(block)}
        (fusions.relus if match.addition is None else fusions.additions).append(match.name)
        match.rewrite(graph)
    paths = tuple((tuple(name.split(".")), kind) for name, kind in members.items())
    key = (conditions, paths, graph.python_code(root_module="self").src)
    found = _shared.get(key)
    if found is None:
        run = type(fx.GraphModule(block, graph)).forward
        found = _shared[key] = _Rewritten(conditions, paths, run)
    return found


def _widening(block: nn.Module, graph: fx.Graph) -> float:
    """Bounds how many times as many values as its input the block computes; inf if unknown."""
    product = 1.0
    for node in graph.nodes:
        if node.op == "call_module":
            product *= _widening_of(block.get_submodule(str(node.target)))
        elif node.op.startswith("call_") and not (_is_relu(block, node) or _is_addition(node)):
            return math.inf
    return product


def _widening_of(module: nn.Module) -> float:
    if type(module) is nn.Sequential:
        return math.prod(map(_widening_of, module))
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return max(1.0, module.out_channels / module.in_channels / math.prod(module.stride))
    if isinstance(module, nn.Linear):
        return max(1.0, module.out_features / module.in_features)
    return 1.0 if isinstance(module, (_BatchNorm, *_SKIPPED)) else math.inf


def _is_addition(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _ADDITIONS


@dataclass
class _Match:
    """Layer, a ReLU after it, and the nodes between the two."""

    layer: fx.Node
    identities: list[fx.Node]
    relu: fx.Node
    addition: fx.Node | None = None
    residual: fx.Node | None = None
    sum: Sum = "y + r"

    @property
    def name(self) -> str:
        return str(self.layer.target)

    def members(self, block: nn.Module) -> list[tuple[str, nn.Module]]:
        """Returns the modules that the rewritten forward does not call."""
        nodes = [self.layer, *self.identities, self.relu]
        names = [str(node.target) for node in nodes if node.op == "call_module"]
        return [(name, block.get_submodule(name)) for name in names]

    def rewrite(self, graph: fx.Graph) -> None:
        """Writes one node in the place of the layer, or of the addition."""
        with graph.inserting_before(self.addition or self.layer):
            layer = graph.get_attr(self.name)
            arguments = (layer, self.layer.args[0])
            if self.addition is None:
                fused = graph.call_function(with_relu, arguments)
            else:
                fused = graph.call_function(with_residual, (*arguments, self.residual, self.sum))
        self.relu.replace_all_uses_with(fused)
        nodes = [self.layer, *self.identities, self.relu, *filter(None, [self.addition])]
        for node in sorted(nodes, reverse=True):
            graph.erase_node(node)


def _match(block: nn.Module, graph: fx.Graph, relu: fx.Node) -> _Match | None:
    if not _is_relu(block, relu):
        return None
    end, after = _skip_identities(block, relu.args[0])
    if end is None:
        return None
    if _is_layer(block, end):
        return _Match(end, after, relu)
    if not _is_addition(end) or len(end.args) != 2 or end.kwargs not in ({}, {"alpha": 1}):
        return None
    first, second = end.args
    choices: list[tuple[Any, Any, Sum]] = [(first, second, "y + r"), (second, first, "r + y")]
    if end.target in _IN_PLACE:
        choices = [(first, second, "y += r")]
    matches = []
    for operand, residual, sum_ in choices:
        layer, before = _skip_identities(block, operand)
        if layer is None or residual is operand or not isinstance(residual, fx.Node):
            continue
        if _is_layer(block, layer) and _may_run_at(block, graph, layer, end):
            matches.append(_Match(layer, [*before, *after], relu, end, residual, sum_))
    return max(matches, key=lambda match: match.layer, default=None)


def _skip_identities(block: nn.Module, node: Any) -> tuple[fx.Node | None, list[fx.Node]]:
    """Returns the node behind identities, and these; None if something else uses a result too."""
    identities: list[fx.Node] = []
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if not _is_identity(block, node):
            return node, identities
        identities.append(node)
        node = node.args[0]
    return None, []


def _is_identity(block: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    return type(block.get_submodule(str(node.target))) is nn.Identity


def _is_relu(block: nn.Module, node: fx.Node) -> bool:
    if len(node.args) == 0 or node.all_input_nodes != [node.args[0]]:
        return False
    if node.op == "call_module":
        return type(block.get_submodule(str(node.target))) is nn.ReLU
    if node.op == "call_function":
        return node.target in _RELU_FUNCTIONS
    return node.op == "call_method" and node.target in ("relu", "relu_")


def _is_layer(block: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    return can_fuse(block.get_submodule(str(node.target)))


def _may_run_at(block: nn.Module, graph: fx.Graph, layer: fx.Node, place: fx.Node) -> bool:
    """Tells if the layer gives the same result when it is computed later, at ``place``.

    The nodes between must not use the layer, nor change the layer's input in place. The latter is
    certain if nothing else refers to the input: the new result of a convolution or a linear layer.
    """
    between = [n for n in graph.nodes if layer < n < place and not _is_identity(block, n)]
    if not between:
        return True
    source = layer.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
        return False
    if type(block.get_submodule(str(source.target))) not in _MAKERS_OF_NEW_TENSORS:
        return False
    module = block.get_submodule(str(layer.target))
    calls = [block.get_submodule(str(n.target)) for n in between if n.op == "call_module"]
    return all(module is not part for call in calls for part in call.modules())


def _may_skip(block: nn.Module, members: _Members) -> bool:
    """Tells if the modules that the rewritten forward skips are unchanged and have no hooks.

    Of hooks on all modules `RecomputationHook` does not count: it needs to see blocks only.
    """
    if not all(isinstance(hook, RecomputationHook) for hook in global_hooks()):
        return False
    for path, kind in members:
        module = module_at(block, path)
        if module is None or type(module) is not kind or obstacle_to_skipping(module) is not None:
            return False
        if kind not in _SKIPPED and not can_fuse(module):
            return False
    return True
