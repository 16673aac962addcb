"""Fuses the ReLUs of a block, and additions before them, into its batch norm layers.

A fused block has another class, made from its own, with a rewritten forward. Nothing is written
into the block itself, so copies, hooks, ``state_dict`` and ``isinstance`` stay as they are; nor
into its layers: a direct call of one computes batch norm alone. At each call the rewritten forward
first checks the conditions of its trace; if one fails, it calls the original.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.nn import functional as F

from batchnorm.nn.layers import LAYERS
from batchnorm.tools.acceleration.replacement import (
    Sum,
    obstacle_to_skipping,
    subclass_named_like,
    with_relu,
    with_residual,
)
from batchnorm.tools.flow.assumptions import Unproven
from batchnorm.tools.flow.tracing import Trace, change_class, module_at, trace
from batchnorm.tools.patching import RecomputationHook
from batchnorm.torch_internals import global_hooks

_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE = (operator.iadd, "add_")
_MAKERS_OF_NEW_TENSORS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_CUSTOM_METHODS = (
    *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getattribute__"),
    *("__deepcopy__", "__copy__", "__init_subclass__"),
)
_Members = tuple[tuple[tuple[str, ...], type[nn.Module]], ...]


@dataclass
class Fusions:
    """Report on one block.

    Attributes:
        relus: Names of the layers that now apply the ReLU after them.
        additions: Names of the layers that now add what was added to them, and apply the ReLU.
        left: Reasons why something was not fused, by layer; the block's own name is empty.
    """

    relus: list[str] = field(default_factory=list)
    additions: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


class FusedBlock:
    """Block with a rewritten forward. Each copy gets a class of its own.

    A copy or a pickle has the original class and the state, and no code: the forward is traced
    again.
    """

    _class_before_accelerate: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild_fused, (self._class_before_accelerate,), self.__dict__


def fuse(block: nn.Module) -> Fusions:
    """Rewrites the block's forward, with everything fused that is proven to be the same."""
    fusions = Fusions()
    try:
        _check_class(block)
        traced = trace(block)
    except Unproven as reason:
        fusions.left[""] = f"its forward {reason}"
        return fusions
    members: dict[str, type[nn.Module]] = {}
    for relu in list(traced.graph.nodes):
        match = _match(block, traced.graph, relu)
        if match is None:
            continue
        obstacles = [f"{n}: {o}" for n, m in match.members(block) if (o := obstacle_to_skipping(m))]
        if obstacles:
            fusions.left[match.name] = f"the ReLU after it stays, because of {obstacles[0]}"
            continue
        members |= {name: type(module) for name, module in match.members(block)}
        (fusions.relus if match.addition is None else fusions.additions).append(match.name)
        match.rewrite(traced.graph)
    if members:
        paths = tuple((tuple(name.split(".")), kind) for name, kind in members.items())
        change_class(block, _fused_class(block, traced, paths))
    return fusions


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
    is_addition = end.op in ("call_function", "call_method") and end.target in _ADDITIONS
    if not is_addition or len(end.args) != 2 or end.kwargs.get("alpha", 1) != 1:
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
    return _can_fuse(block.get_submodule(str(node.target)))


def _can_fuse(layer: nn.Module | None) -> bool:
    return isinstance(layer, LAYERS) and type(layer) in LAYERS and layer.activation is None


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


def _check_class(block: nn.Module) -> None:
    if "forward" in vars(block):
        raise Unproven("was replaced on this object")
    for name in _CUSTOM_METHODS:
        homes = [kind for kind in type(block).__mro__ if name in vars(kind)]
        if homes and homes[0] not in (nn.Module, object):
            raise Unproven(f"belongs to a class with a {name} of its own")


def _fused_class(block: nn.Module, traced: Trace, members: _Members) -> type[nn.Module]:
    original, source = type(block), traced.source
    run = type(fx.GraphModule(block, traced.graph)).forward

    @functools.wraps(source)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (
            original.forward is source
            and traced.is_valid_for(self, args, kwargs)
            and _may_skip(self, members)
        ):
            return run(self, *args)
        return original.forward(self, *args, **kwargs)

    return subclass_named_like(original, (FusedBlock,), {"forward": forward})


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
        if kind in LAYERS and not _can_fuse(module):
            return False
    return True


class _UnpicklingBlock:
    """Copied block without its state; when that is set, the block is traced and fused again."""

    _class_before_accelerate: ClassVar[type[nn.Module]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        block: Any = self
        change_class(block, self._class_before_accelerate)
        block.__setstate__(state)
        fuse(block)


def _rebuild_fused(original: type[nn.Module]) -> nn.Module:
    kind = subclass_named_like(original, (_UnpicklingBlock,), {})
    return kind.__new__(kind)
