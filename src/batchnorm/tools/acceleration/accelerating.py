"""`accelerate` lets our kernels compute an existing model's layers; `restore` undoes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.nn.layers import LAYERS
from batchnorm.tools.acceleration.fusion import BlockForward, fuse
from batchnorm.tools.acceleration.replacement import (
    EVERYWHERE,
    REPLACED_FORWARD,
    AcceleratedForward,
    LayerForward,
    can_fuse,
    obstacle_to_kernels,
    replace,
)
from batchnorm.tools.acceleration.timing import Fused, Timing, choose
from batchnorm.tools.acceleration.verification import Differences, Snapshot, Verification
from batchnorm.tools.patching import has_accelerated_mark, is_batch_norm, unlike, warn
from batchnorm.tools.wording import counted, displayed, wrapped


@dataclass(frozen=True)
class Acceleration:
    """Report of `accelerate`; ``str()`` of it is a summary.

    Attributes:
        found: Number of batch norm layers in the model.
        replaced: Dotted names of the layers that our kernels compute now.
        relus: Dotted names of the layers that also compute the ReLU after them.
        additions: Dotted names of the layers that also compute an addition and the ReLU after it.
        left: Layers and blocks that stay as they are: the reason by name.
        timings: What was measured on the example, in training and in evaluation.
        verified: True if outputs, gradients and buffers were compared with the original's.
        differences: The largest differences found, if they were compared.
    """

    found: int
    replaced: tuple[str, ...]
    relus: tuple[str, ...]
    additions: tuple[str, ...]
    left: Mapping[str, str]
    timings: tuple[Timing, ...]
    verified: bool
    differences: Differences | None

    def __str__(self) -> str:
        lines = [*self._summary(), *self._comparison()]
        if self.left:
            lines += ["Left as they are:", *self._left()]
        return "\n".join(wrapped(line, "    " if line[0] == " " else "") for line in lines)

    def _summary(self) -> Iterator[str]:
        if not self.found:
            yield "Nothing was accelerated: the model has no batch norm layer of torch's or ours."
            return
        if not (self.replaced or self.relus or self.additions):
            slower = "was accelerated: torch's kernels are faster."
            yield f"Nothing {slower if self.timings else 'new to accelerate.'}"
            yield from map(str, self.timings)
            return
        yield f"Replaced {counted(len(self.replaced), 'batch norm layer')}."
        yield (
            f"Fused {counted(len(self.relus), 'ReLU')} into the layer before, and "
            f"{counted(len(self.additions), 'addition')} with the ReLU after it."
        )
        yield from map(str, self.timings)

    def _left(self) -> Iterator[str]:
        """One line for each reason, with three names at most."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(displayed(name))
        for reason, names in by_reason.items():
            more = f", and {counted(len(names) - 2, 'other')}" if len(names) > 3 else ""
            yield f"  {', '.join(names[:2] if more else names)}{more}: {reason}"

    def _comparison(self) -> Iterator[str]:
        if self.differences is not None:
            found = self.differences
            yield (
                "Verified in training and in evaluation: outputs differ by at most "
                f"{found.output:.0e} of the largest (rounding can make it "
                f"{found.rounding_of_output:.0e}), gradients by {found.gradient:.0e} "
                f"({found.rounding_of_gradient:.0e})."
            )
        elif self.replaced or self.relus or self.additions:
            yield "Not verified: give accelerate an example_input to compare with the original."


@dataclass(frozen=True)
class Restoration:
    """Report of `restore`; ``str()`` of it is a sentence.

    Attributes:
        layers: Number of layers that are torch's again.
        blocks: Number of blocks that have their own forward again.
    """

    layers: int
    blocks: int

    def __str__(self) -> str:
        if self.layers == self.blocks == 0:
            return "Nothing to restore: the model is not accelerated."
        layers, blocks = counted(self.layers, "layer"), counted(self.blocks, "block")
        return f"Restored {layers} and the forward of {blocks}."


def accelerate(
    model: nn.Module, example_input: Any = None, *, everywhere: bool = False
) -> Acceleration:
    """Lets our kernels compute batch norm where they are faster, in place, and fuses what follows.

    Layers and blocks stay the same objects of the same classes, and parameters, buffers, hooks,
    ``state_dict`` and optimizers stay what they are: only their ``forward`` is replaced, on the
    object. A ReLU after a layer, and an addition before it, is fused where the data flow proves
    that nothing else uses the values between; `Acceleration.left` has the places where it is not,
    with the reason. A model that is copied or pickled stays accelerated; a shallow copy by
    ``copy.copy`` shares the forward, which then runs the original. Call it before or after
    ``torch.compile``, ``DistributedDataParallel`` and ``fully_shard``; call `restore` before
    ``torch.jit.script``. Not thread-safe with calls of the model while it runs. Not for
    ``DataParallel``, which copies the layers at each call.

    Torch's kernels go on computing what they compute faster: small inputs, and evaluation where
    nothing is fused. With an example that is decided by a measurement of each layer, so it can
    differ from run to run, and with it the rounding; without one, by the size of each input.

    Args:
        model: Any module; it may have been accelerated before.
        example_input: A tensor, a tuple of arguments or a dict of keyword arguments. The model then
            runs on it in training and in evaluation, before and after, and outputs, gradients and
            buffers are compared. Layers are timed on inputs as they get them, and those that
            torch's kernels compute faster are left to them. Nothing of that remains in the model or
            in the random number generators. None compares and times nothing.
        everywhere: True lets our kernels compute every input that they can take: for their accuracy
            and the memory that fused layers save, whether that is faster or not.

    Returns:
        The names of the layers that were replaced and fused; ``print`` shows a summary.

    Raises:
        TypeError: ``example_input`` is something else.
        ValueError: The model cannot run without being changed, because a layer is lazy; or it is
            in ``DataParallel``.
        RuntimeError: The accelerated model computes something else. After this, and after every
            other exception, the model is what it was.

    Warns:
        RuntimeWarning: There is no batch norm, or no fast kernel for a layer: Numba is missing, or
            the layer is on another device than the CPU.

    Example:
        >>> import torch, batchnorm
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        >>> result = batchnorm.accelerate(model, torch.randn(16, 3, 66, 66))
        >>> result.replaced, result.relus, result.verified
        (('1',), ('1',), True)
        >>> type(model[1]) is nn.BatchNorm2d
        True
    """
    _check_replicas(model)
    if example_input is not None:
        _check_initialized(model)
    before = Snapshot(model, tensors=example_input is not None)
    try:
        return _accelerate(model, example_input, before, everywhere=everywhere)
    except BaseException:
        before.restore()
        raise


def restore(model: nn.Module) -> Restoration:
    """Undoes `accelerate`, also on a copy; parameters and statistics keep their current values.

    Compile a model again after it. `to_torch` also converts layers that were built as ours.

    Args:
        model: Any module; nothing happens to one that is not accelerated.

    Returns:
        The number of layers and blocks that were restored.

    Raises:
        RuntimeError: Foreign code replaced a ``forward`` since then; nothing is restored.

    Example:
        >>> import batchnorm
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU())
        >>> _ = batchnorm.accelerate(model)
        >>> print(batchnorm.restore(model))
        Restored 1 layer and the forward of 1 block.
        >>> type(model[1]) is nn.BatchNorm1d
        True
    """
    found = {}
    for name, module in model.named_modules():
        if not has_accelerated_mark(module):
            continue
        forward = found[module] = AcceleratedForward.find(module)
        if forward is None:
            raise RuntimeError(
                f"restore: the forward of {displayed(name)} ({type(module).__name__}) was replaced "
                "by other code since accelerate; undo that first. Nothing was restored."
            )
        if module is not forward.module and vars(module)["forward"] is not forward:
            raise RuntimeError(
                f"restore: {displayed(name)} ({type(module).__name__}) is a shallow copy, and "
                "shares its forward, which another tool replaced, with the original; restore the "
                "original, or end that tool first. Nothing was restored."
            )
    for module, forward in found.items():
        forward.uninstall(module)
    layers = sum(isinstance(forward, LayerForward) for forward in found.values())
    return Restoration(layers, len(found) - layers)


@dataclass
class _Changes:
    """Changes a model, and keeps the names of the layers and blocks that it changed."""

    model: nn.Module
    found: int = 0
    layers: dict[str, LayerForward] = field(default_factory=dict)
    relus: list[str] = field(default_factory=list)
    additions: list[str] = field(default_factory=list)
    blocks: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    without_kernels: list[str] = field(default_factory=list)

    def replace_layers(self) -> None:
        """Replaces the forwards of all layers that our kernels can compute."""
        for name, layer in list(self.model.named_modules()):
            if not isinstance(layer, _BatchNorm):
                if is_batch_norm(layer):
                    kind = type(layer).__name__
                    self.left[name] = f"it is a {kind}, which is no batch norm layer of torch's"
                continue
            self.found += 1
            if isinstance(layer, LAYERS) or has_accelerated_mark(layer):
                continue
            no_kernels = obstacle_to_kernels(layer)
            if no_kernels is not None:
                self.without_kernels.append(name)
            reason = no_kernels or replace(layer)
            forward = LayerForward.find(layer)
            if reason is not None or forward is None:
                self.left[name] = reason or REPLACED_FORWARD
                continue
            self.layers[name] = forward
            if forward.fuses():
                self.relus.append(name)

    def fuse_blocks(self) -> None:
        """Replaces the forwards of the blocks in which something can be fused."""
        for name, block in list(self.model.named_modules()):
            if has_accelerated_mark(block) or not any(map(can_fuse, _called_by(block))):
                continue
            fusions = fuse(block)
            prefix = f"{name}." if name else ""
            relus = [prefix + layer for layer in fusions.relus]
            additions = [prefix + layer for layer in fusions.additions]
            self.left |= {(prefix + n if n else name): why for n, why in fusions.left.items()}
            if relus or additions:
                self.blocks[name] = [*relus, *additions]
                self.relus += relus
                self.additions += additions

    def set_smallest(self) -> None:
        """Tells the blocks what our kernels compute of their layers."""
        modules = dict(self.model.named_modules())
        for name, layers in self.blocks.items():
            forward = BlockForward.find(modules[name])
            if forward is not None:
                forward.expect(modules[layer] for layer in layers)

    def leave(self, slower: Set[str]) -> None:
        """Takes back what is done to layers that torch's kernels compute faster."""
        modules = dict(self.model.named_modules())
        for name, layers in list(self.blocks.items()):
            forward = BlockForward.find(modules[name])
            if forward is not None and slower >= set(layers):
                forward.uninstall()
                del self.blocks[name]
        still_fused = {layer for layers in self.blocks.values() for layer in layers}
        for name in [name for name in self.layers if name in slower - still_fused]:
            self.layers.pop(name).uninstall()
            self.left[name] = "torch's kernels are faster"
        for fused in (self.relus, self.additions):
            fused[:] = [name for name in fused if name in still_fused or name in self.layers]


def _accelerate(
    model: nn.Module, example_input: Any, before: Snapshot, *, everywhere: bool
) -> Acceleration:
    verification = None
    if example_input is not None:
        verification = Verification(model, example_input, before)
    changes = _Changes(model, left=_left(model))
    changes.replace_layers()
    changes.fuse_blocks()
    timings: tuple[Timing, ...] = ()
    if everywhere:
        for forward in changes.layers.values():
            forward.smallest = EVERYWHERE
    elif verification is not None:
        fused = Fused(changes.relus, changes.additions)
        timings, slower = choose(changes.layers, verification.inputs, fused)
        before.rewind_random()
        changes.leave(slower)
    changes.set_smallest()
    names = (tuple(changes.layers), tuple(changes.relus), tuple(changes.additions))
    differences = None
    if verification is not None and any(names):
        differences = verification.check(model)
    if not changes.found:
        warn(
            f"accelerate: nothing is done, the model ({type(model).__name__}) has no batch norm "
            "layers of torch's."
        )
    if changes.without_kernels:
        first = changes.without_kernels[0]
        warn(
            f"accelerate: torch's kernels go on computing "
            f"{counted(len(changes.without_kernels), 'layer')}, such as {displayed(first)!r}: "
            f"{changes.left[first]}."
        )
    return Acceleration(
        changes.found, *names, changes.left, timings, differences is not None, differences
    )


def _left(model: nn.Module) -> dict[str, str]:
    """Modules that have statistics but are no batch norm, or whose forward was replaced again."""
    left = unlike(model)
    for name, module in model.named_modules():
        if has_accelerated_mark(module) and AcceleratedForward.find(module) is None:
            left[name] = REPLACED_FORWARD
    return left


def _check_replicas(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            raise ValueError(
                f"accelerate: {displayed(name)} is a DataParallel, which copies layers at each "
                "call, and the copies would compute with the original's tensors; use "
                "DistributedDataParallel."
            )


def _check_initialized(model: nn.Module) -> None:
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(parameter):
            raise ValueError(
                f"accelerate: cannot try the model on example_input, {name} is lazy and has no "
                "shape yet; call the model once before."
            )


def _called_by(block: nn.Module) -> Iterator[nn.Module]:
    """Yields the children, and those in containers, which have no forward of their own."""
    for child in block.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called_by(child)
        else:
            yield child
