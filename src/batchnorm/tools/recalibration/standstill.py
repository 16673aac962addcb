"""Everything of a model that must not move while some of its layers collect."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.tools.patching import changed, keeps_statistics, no_broadcast
from batchnorm.tools.recalibration.intake import Intake


@contextmanager
def standstill(model: nn.Module, intakes: Mapping[str, Intake]) -> Iterator[None]:
    """Meanwhile the intakes are in charge of their layers, and no buffer of the model changes.

    The other batch norm layers that keep statistics normalize by them. Buffers of other modules may
    move (spectral norms, queues) and are put back. ``DistributedDataParallel`` does not send
    buffers around, for which every rank would have to run as many batches.
    """
    collecting = {id(intake.layer) for intake in intakes.values()}
    modules = list(model.modules())
    others = [
        module
        for module in modules
        if isinstance(module, _BatchNorm)
        and keeps_statistics(module)
        and id(module) not in collecting
    ]
    with ExitStack() as stack:
        stack.callback(_Buffers(modules, collecting).put_back)
        stack.enter_context(changed(others, training=False))
        stack.enter_context(no_broadcast(model))
        for intake in intakes.values():
            stack.enter_context(intake.in_charge())
        if "torch._dynamo" in sys.modules:  # Compiled code does not see hooks that came later.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _Buffers:
    """Buffers and their values; those of layers that collect are out of reach anyway."""

    def __init__(self, modules: list[nn.Module], collecting: Collection[int]) -> None:
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = [
            (module, name, buffer, buffer.detach().clone())
            for module in modules
            if id(module) not in collecting
            for name, buffer in module.named_buffers(recurse=False)
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        for module, name, buffer, value in self._kept:
            if getattr(module, name, None) is not buffer:
                setattr(module, name, buffer)
            if not torch.equal(buffer, value):
                buffer.copy_(value)
