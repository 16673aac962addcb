"""What the tests of recalibrate share."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import batchnorm

KINDS = (nn.BatchNorm2d, batchnorm.BatchNorm2d, nn.SyncBatchNorm)


def normal(*shape: int, seed: int = 0, mean: float = 0.0, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(*shape, generator=generator)


def bits(model: nn.Module) -> dict:
    """Everything that must not change: objects, modes, hooks, and the bytes of all tensors."""
    tensors = {
        name: (id(tensor), tensor.detach().numpy().tobytes())
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    modules = {
        name: {
            key: copy.copy(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
            if key not in ("_buffers", "_parameters")
        }
        for name, module in model.named_modules()
    }
    return {"tensors": tensors, "modules": modules}


def net(kind=nn.BatchNorm2d, **options) -> nn.Sequential:
    """Two layers, with statistics that are far from those of any data."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        kind(4, **options),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, bias=False),
        kind(5, **options),
        nn.ReLU(),
    )
    with torch.no_grad():
        for layer in (model[1], model[4]):
            layer.weight.uniform_(0.5, 2)
            layer.bias.uniform_(-1, 1)
            layer.running_mean.fill_(7)
            layer.running_var.fill_(0.25)
            layer.num_batches_tracked.fill_(11)
    return model


@torch.no_grad()
def layer_by_layer(model: nn.Sequential, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance of what each layer gets of all data at once, in evaluation."""
    found = {}
    x = x.double()
    for name, module in copy.deepcopy(model).double().named_children():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            dims = [0, *range(2, x.dim())]
            mean, var = x.mean(dims), x.var(dims)
            found[name] = mean, var
            view = (1, -1) + (1,) * (x.dim() - 2)
            x = (x - mean.view(view)) / (var.view(view) + module.eps).sqrt()
            x = x * module.weight.view(view) + module.bias.view(view)
        else:
            x = module(x)
    return found
