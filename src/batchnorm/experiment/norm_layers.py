"""One view of the normalizing layers of a model, whichever library they come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.scratch import BatchNorm
from batchnorm.tools.patching import Handle, SavedBuffers, temporary_attributes


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


def preserved_buffers(model: nn.Module) -> Handle:
    """Restores every buffer and training mode of a model at the end, whatever happens before."""
    modules = list(model.modules())
    modes = (temporary_attributes([module], training=module.training) for module in modules)
    return Handle(SavedBuffers(modules).restore, *(mode.remove for mode in modes))
