"""Every kind of batch norm layer that the tools must take, and what must not change in a model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

import batchnorm
import model_nets as nets
from everywhere import accelerate


class Own(nn.BatchNorm1d):
    """A user's subclass."""


def lazy():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d())
    model(torch.randn(6, 4))
    return model


def accelerated_resnet():
    model = nets.ResNet()
    accelerate(model)
    return model


def chain(layer):
    return nn.Sequential(nn.Linear(4, 4), layer)


KINDS = {
    "torch 1d": (lambda: chain(nn.BatchNorm1d(4)), (6, 4)),
    "torch 2d": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), (6, 3, 2, 2)),
    "torch 3d": (lambda: nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4)), (6, 3, 2, 2, 2)),
    "sync": (lambda: chain(nn.SyncBatchNorm(4)), (6, 4)),
    "lazy": (lazy, (6, 4)),
    "subclass": (lambda: chain(Own(4)), (6, 4)),
    "cumulative": (lambda: chain(nn.BatchNorm1d(4, momentum=None)), (6, 4)),
    "ours": (lambda: chain(batchnorm.BatchNorm1d(4)), (6, 4)),
    "accelerated": (accelerated_resnet, (6, 3, 8, 8)),
}


def built(kind: str, count: int = 3):
    """A model of that kind after one batch, and ``count`` batches for it."""
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    model = make().train()
    model(torch.randn(shape))
    return model, [torch.randn(shape) * 2 + 1 for _ in range(count)]


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def statistics(model):
    """The bytes of all running statistics and counters."""
    return {name: bytes_of(buffer) for name, buffer in model.named_buffers()}


def everything(model):
    """All that a model is: classes, attributes, hooks, objects, and the bytes of the tensors."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {
        "tensors": {n: (id(t), bytes_of(t), t.requires_grad) for n, t in tensors},
        "modules": {name: (type(m), attributes(m)) for name, m in model.named_modules()},
    }


def bytes_of(tensor):
    return tensor.detach().cpu().numpy().tobytes()


def attributes(module):
    return {
        name: [(key, id(item)) for key, item in value.items()] if isinstance(value, dict) else value
        for name, value in vars(module).items()
    }


def in_threads(*functions):
    """Results of functions that run at the same time, each in a thread of its own."""
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(f) for f in functions]]


class Stop(BaseException):
    """Like KeyboardInterrupt, no Exception."""
