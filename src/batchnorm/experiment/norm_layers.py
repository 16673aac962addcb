"""One view of the normalizing layers of a model, whichever library they come from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.scratch import BatchNorm


@dataclass(frozen=True)
class NormLayer:
    """The four vectors of a batch norm layer, by the names of torch.

    The tensors are the layer's own, in the layer's own shape.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    @torch.no_grad()
    def set_statistics(self, moments: Moments) -> None:
        """Makes the layer normalize by ``moments`` in evaluation."""
        for own, new in ((self.running_mean, moments.mean), (self.running_var, moments.var)):
            own.copy_(new.reshape(own.shape))


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """The normalizing modules of ``model`` by name, without a trailing ``_norm``."""
    kinds = (BatchNorm, nn.modules.batchnorm._BatchNorm)
    return {
        name.removesuffix("_norm"): module
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }


def view(module: nn.Module) -> NormLayer:
    """The vectors of one module of `modules`, as they are now."""
    if isinstance(module, BatchNorm):
        return NormLayer(module.gamma, module.beta, module.moving_mean, module.moving_var)
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    assert module.running_mean is not None
    assert module.running_var is not None
    return NormLayer(module.weight, module.bias, module.running_mean, module.running_var)


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Puts every buffer and the training mode back, whatever happens in between."""
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = model.training
    try:
        yield
    finally:
        model.train(training)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(saved[name])
