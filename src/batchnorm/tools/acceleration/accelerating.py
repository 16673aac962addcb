"""``accelerate(model)`` puts our layers into a model that exists; ``restore(model)`` undoes it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.nn.layers import LAYERS
from batchnorm.tools.acceleration.fusion import FusedBlock, fuse
from batchnorm.tools.acceleration.replacement import WithActivation, put_back, replace
from batchnorm.tools.acceleration.verification import Differences, Snapshot, Verification

_WIDTH = 80


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did; ``str()`` of it is a summary.

    Attributes:
        replaced: Dotted names of the layers that are ours now.
        relus: Of the layers that also compute the ReLU after them.
        additions: Of the layers that also compute an addition and the ReLU after it.
        left: Layers and blocks that stay as they are, by name, and why.
        verified: Whether outputs, gradients and buffers were compared with the original's.
        differences: How far they are apart, if they were compared.
    """

    replaced: tuple[str, ...]
    relus: tuple[str, ...]
    additions: tuple[str, ...]
    left: Mapping[str, str]
    verified: bool
    differences: Differences | None

    def __str__(self) -> str:
        lines = [*self._what(), *self._checked()]
        if self.left:
            lines.append("Left as they are:")
            for name, reason in self.left.items():
                lines.append(f"  {name or 'the model itself'}: {reason}")
        return "\n".join(_wrapped(line) for line in lines)

    def _what(self) -> Iterator[str]:
        if not (self.replaced or self.relus or self.additions):
            yield "Nothing new to accelerate."
            return
        yield f"Replaced {_count(len(self.replaced), 'batch norm layer')}."
        yield (
            f"Fused {_count(len(self.relus), 'ReLU')} into the layer before, and "
            f"{_count(len(self.additions), 'addition')} with the ReLU after it."
        )

    def _checked(self) -> Iterator[str]:
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
    """What `restore` did; ``str()`` of it is a sentence.

    Attributes:
        layers: How many layers are torch's again.
        blocks: How many blocks have their own forward again.
    """

    layers: int
    blocks: int

    def __str__(self) -> str:
        if self.layers == self.blocks == 0:
            return "Nothing to restore: the model is not accelerated."
        layers, blocks = _count(self.layers, "layer"), _count(self.blocks, "block")
        return f"Restored {layers} and the forward of {blocks}."


def accelerate(model: nn.Module, example_input: Any = None) -> Acceleration:
    """Replaces torch's batch norm layers by ours, in place, and fuses what comes after them.

    Parameters, buffers, hooks, ``state_dict`` and optimizers stay what they are: the layers are the
    same objects with another class. ReLUs, and additions before them, are fused where the data flow
    proves that nothing else sees what comes between; `Acceleration.left` says where and why not.
    A model that is copied or pickled stays accelerated. Accelerate before ``torch.compile`` and
    before wrapping in ``DistributedDataParallel``. Not thread-safe while it runs.

    Args:
        model: Any module; it may have been accelerated before.
        example_input: A tensor, a tuple of arguments or a dict of keyword arguments. The model then
            runs on it in training and in evaluation, before and after, and outputs, gradients and
            buffers are compared. Nothing of that remains in the model or in the random number
            generators. None compares nothing.

    Returns:
        What was done.

    Raises:
        TypeError: ``example_input`` is something else.
        ValueError: The model cannot run without being changed, because a layer is lazy.
        RuntimeError: The accelerated model computes something else. After this, and after every
            other exception, the model is what it was.
    """
    if example_input is not None:
        _check_initialized(model)
    before = Snapshot(model, tensors=example_input is not None)
    try:
        return _accelerate(model, example_input, before)
    except BaseException:
        before.put_back()
        raise


def restore(model: nn.Module) -> Restoration:
    """Undoes `accelerate`, also on a copy; trained parameters and statistics stay.

    Args:
        model: Any module; nothing happens to one that is not accelerated.

    Returns:
        How much was restored.
    """
    changed = [module for module in model.modules() if put_back(module)]
    layers = sum(isinstance(module, _BatchNorm) for module in changed)
    return Restoration(layers, len(changed) - layers)


def _accelerate(model: nn.Module, example_input: Any, before: Snapshot) -> Acceleration:
    verification = None
    if example_input is not None:
        verification = Verification(model, example_input, before)
    replaced, relus, additions, left = [], [], [], {}
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, _BatchNorm) or isinstance(layer, LAYERS):
            continue
        reason = replace(layer)
        if reason is not None:
            left[name] = reason
            continue
        replaced.append(name)
        if isinstance(layer, WithActivation) and layer.fuses():
            relus.append(name)
    for name, block in list(model.named_modules()):
        if isinstance(block, FusedBlock) or not any(map(_may_fuse, _called_by(block))):
            continue
        fusions = fuse(block)
        prefix = f"{name}." if name else ""
        relus += [prefix + layer for layer in fusions.relus]
        additions += [prefix + layer for layer in fusions.additions]
        left |= {(prefix + n if n else name): reason for n, reason in fusions.left.items()}
    differences = None
    if verification is not None:
        differences = verification.check(model)
    names = (tuple(replaced), tuple(relus), tuple(additions))
    return Acceleration(*names, left, differences is not None, differences)


def _check_initialized(model: nn.Module) -> None:
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(parameter):
            raise ValueError(
                f"accelerate: cannot try the model on example_input, {name} is lazy and has no "
                "shape yet; call the model once before."
            )


def _called_by(block: nn.Module) -> Iterator[nn.Module]:
    """The children, and those in containers, which have no forward of their own."""
    for child in block.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called_by(child)
        else:
            yield child


def _may_fuse(module: nn.Module) -> bool:
    return isinstance(module, LAYERS) and not isinstance(module, WithActivation)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _wrapped(line: str) -> str:
    return textwrap.fill(line, _WIDTH, subsequent_indent="    " if line.startswith(" ") else "")
