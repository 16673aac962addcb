"""Blocks whose ReLUs, and additions before them, are computed in the batch norm's own pass.

A fused block has another class, made from its own, with a rewritten forward. Nothing is written
into the block itself, so copies, hooks, ``state_dict`` and ``isinstance`` stay as they are; nor
into its layers: whoever calls one directly gets plain batch norm. At each call the rewritten
forward first asks whether all that the proof rests on still holds; if not, it calls the original.
"""

from __future__ import annotations

import functools
import operator
import types
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from batchnorm.nn.layers import LAYERS
from batchnorm.tools.acceleration.replacement import (
    Sum,
    derived,
    obstacle_of,
    set_class,
    with_relu,
    with_residual,
)
from batchnorm.tools.flow.assumptions import Unproven
from batchnorm.tools.flow.tracing import Trace, module_at, trace
from batchnorm.tools.patching.recomputation import Quieting

_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE = (operator.iadd, "add_")
_MAKERS_OF_NEW_TENSORS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_OWN_WAYS = (
    *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getattribute__"),
    *("__deepcopy__", "__copy__", "__init_subclass__"),
)
_GLOBAL_HOOKS = (
    *("_global_forward_hooks", "_global_forward_pre_hooks"),
    *("_global_backward_hooks", "_global_backward_pre_hooks"),
)
_Members = tuple[tuple[tuple[str, ...], type[nn.Module]], ...]


@dataclass
class Fusions:
    """What was fused in one block.

    Attributes:
        relus: Names of the layers that now apply the ReLU after them.
        additions: Names of the layers that now add what was added to them, and apply the ReLU.
        left: Why something was not fused, by the name of the layer; the block's own name is empty.
    """

    relus: list[str] = field(default_factory=list)
    additions: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


class FusedBlock:
    """A block with a rewritten forward. Its class is made anew for each copy.

    A copy holds the original class and the state, and no code: the forward is traced again.
    """

    _plain: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _waiting, (self._plain,), self.__dict__


def fuse(block: nn.Module) -> Fusions:
    """Rewrites the block's forward with everything fused in it that can be proven."""
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
        obstacles = [f"{n}: {o}" for n, m in match.members(block) if (o := obstacle_of(m))]
        if obstacles:
            fusions.left[match.name] = f"the ReLU after it stays, because of {obstacles[0]}"
            continue
        members |= {name: type(module) for name, module in match.members(block)}
        (fusions.relus if match.addition is None else fusions.additions).append(match.name)
        match.rewrite(traced.graph)
    if members:
        paths = tuple((tuple(name.split(".")), kind) for name, kind in members.items())
        set_class(block, _fused_class(block, traced, paths))
    return fusions


@dataclass
class _Match:
    """A layer, what lies between it and a ReLU, and the ReLU."""

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
        """The modules that the rewritten forward does not call."""
        nodes = [self.layer, *self.identities, self.relu]
        names = [str(node.target) for node in nodes if node.op == "call_module"]
        return [(name, block.get_submodule(name)) for name in names]

    def rewrite(self, graph: fx.Graph) -> None:
        """Puts one node where the layer was, or where the addition was."""
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
    end, after = _behind_identities(block, relu.args[0])
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
        layer, before = _behind_identities(block, operand)
        if layer is None or residual is operand or not isinstance(residual, fx.Node):
            continue
        if _is_layer(block, layer) and _may_wait(block, graph, layer, end):
            matches.append(_Match(layer, [*before, *after], relu, end, residual, sum_))
    return max(matches, key=lambda match: match.layer, default=None)


def _behind_identities(block: nn.Module, node: Any) -> tuple[fx.Node | None, list[fx.Node]]:
    """What ``node`` is the same as, and the identities passed; None if others use it too."""
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
    return _is_plain_layer(block.get_submodule(str(node.target)))


def _is_plain_layer(layer: nn.Module | None) -> bool:
    return isinstance(layer, LAYERS) and type(layer) in LAYERS and layer.activation is None


def _may_wait(block: nn.Module, graph: fx.Graph, layer: fx.Node, place: fx.Node) -> bool:
    """Whether the layer gives the same result if it is computed later, at ``place``.

    What lies between must not use the layer, nor change the layer's input in place. The latter is
    sure of an input that nobody else knows: the fresh result of a convolution or a linear layer.
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
    for name in _OWN_WAYS:
        homes = [kind for kind in type(block).__mro__ if name in vars(kind)]
        if homes and homes[0] not in (nn.Module, object):
            raise Unproven(f"belongs to a class with a {name} of its own")


def _fused_class(block: nn.Module, traced: Trace, members: _Members) -> type[nn.Module]:
    plain, source = type(block), traced.source
    run = type(fx.GraphModule(block, traced.graph)).forward

    @functools.wraps(source)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (
            plain.forward is source
            and traced.holds(self, args, kwargs)
            and _are_as_before(self, members)
        ):
            return run(self, *args)
        return plain.forward(self, *args, **kwargs)

    return derived(plain, (FusedBlock,), {"forward": forward})


def _are_as_before(block: nn.Module, members: _Members) -> bool:
    """Whether the modules that a call would pass over are still there and nobody listens."""
    if _somebody_listens_to_all():
        return False
    for path, kind in members:
        module = module_at(block, path)
        if module is None or type(module) is not kind or obstacle_of(module) is not None:
            return False
        if kind in LAYERS and not _is_plain_layer(module):
            return False
    return True


def _somebody_listens_to_all() -> bool:
    """Whether modules have global hooks other than ours, which needs to see blocks only."""
    if not torch_module._has_any_global_hook():
        return False
    hooks = [hook for kind in _GLOBAL_HOOKS for hook in getattr(torch_module, kind).values()]
    return not all(isinstance(hook, Quieting) for hook in hooks)


class _Waiting:
    """A copied block that waits for its state."""

    _plain: ClassVar[type[nn.Module]]

    def __setstate__(self, state: dict[str, Any]) -> None:
        block: Any = self
        set_class(block, self._plain)
        block.__setstate__(state)
        fuse(block)


def _waiting(plain: type[nn.Module]) -> nn.Module:
    kind: Any = types.new_class(
        plain.__name__, (_Waiting, plain), exec_body=lambda names: names.update(_plain=plain)
    )
    return kind.__new__(kind)
