"""One view of the batch norm layers of a model, whichever library they come from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.scratch import BatchNorm


class LayerTensors(NamedTuple):
    """The four vectors of a batch norm layer: its own tensors, in its own shape."""

    gamma: Tensor
    beta: Tensor
    running_mean: Tensor
    running_var: Tensor

    @torch.no_grad()
    def set_statistics(self, moments: Moments) -> None:
        """Makes the layer normalize by ``moments`` in evaluation."""
        for own, new in ((self.running_mean, moments.mean), (self.running_var, moments.var)):
            own.copy_(new.reshape(own.shape))


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Finds the batch norm modules of ``model`` by name, without a trailing ``_norm``."""
    kinds = (BatchNorm, nn.modules.batchnorm._BatchNorm)
    return {
        name.removesuffix("_norm"): module
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }


def view(module: nn.Module) -> LayerTensors:
    """Returns the vectors of one module of `modules`, as they are now."""
    if isinstance(module, BatchNorm):
        return LayerTensors(module.gamma, module.beta, module.moving_mean, module.moving_var)
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    assert module.running_mean is not None
    assert module.running_var is not None
    return LayerTensors(module.weight, module.bias, module.running_mean, module.running_var)
