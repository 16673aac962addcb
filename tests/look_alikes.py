"""Layers that are no class of torch and look like batch norm, more or less."""

from __future__ import annotations

import importlib

import torch
from torch import nn
from torch.nn import functional as F

from batchnorm import scratch
from real_networks import import_torchvision


class Own(nn.Module):
    """A user's layer with torch's names and formulas, and a counter of its own."""

    def __init__(self, channels, momentum=0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("seen", torch.tensor(0))
        self.momentum = momentum

    def forward(self, x):
        shape = (1, -1, *(1,) * (x.dim() - 2))
        mean, var = self.running_mean, self.running_var
        if self.training:
            axes = (0, *range(2, x.dim()))
            mean, var = x.mean(axes), x.var(axes, unbiased=False)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(x.var(axes), self.momentum)
                self.seen += 1
        y = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        return y * self.weight.view(shape) + self.bias.view(shape)


def d2l_batch_norm(X, gamma, beta, moving_mean, moving_var, eps, momentum):
    if not torch.is_grad_enabled():
        X_hat = (X - moving_mean) / torch.sqrt(moving_var + eps)
    else:
        axes = 0 if X.dim() == 2 else (0, 2, 3)
        mean = X.mean(dim=axes, keepdim=True)
        var = ((X - mean) ** 2).mean(dim=axes, keepdim=True)
        X_hat = (X - mean) / torch.sqrt(var + eps)
        moving_mean = (1.0 - momentum) * moving_mean + momentum * mean
        moving_var = (1.0 - momentum) * moving_var + momentum * var
    return gamma * X_hat + beta, moving_mean.data, moving_var.data


class D2l(nn.Module):
    """The class of the d2l book: statistics are attributes, and the grad mode is the mode."""

    def __init__(self, num_features, num_dims):
        super().__init__()
        shape = (1, num_features) if num_dims == 2 else (1, num_features, 1, 1)
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape))
        self.moving_mean = torch.zeros(shape)
        self.moving_var = torch.ones(shape)

    def forward(self, X):
        if self.moving_mean.device != X.device:
            self.moving_mean = self.moving_mean.to(X.device)
            self.moving_var = self.moving_var.to(X.device)
        Y, self.moving_mean, self.moving_var = d2l_batch_norm(
            X, self.gamma, self.beta, self.moving_mean, self.moving_var, eps=1e-5, momentum=0.1
        )
        return Y


class Fused(Own):
    """Calls torch's function, so it takes bfloat16 beside float32, and has a ReLU."""

    def forward(self, x):
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training
        )
        return y.relu()


class WithoutVar(nn.Module):
    """Batch renormalization and others keep a deviation."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_std", torch.ones(channels))

    def forward(self, x):
        return x


class OfPixels(nn.Module):
    """Normalizes observations, a mean for each pixel."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels, 3, 3))
        self.register_buffer("running_var", torch.ones(channels, 3, 3))

    def forward(self, x):
        return x


class Parameters(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.running_mean = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.running_var = nn.Parameter(torch.ones(channels), requires_grad=False)

    def forward(self, x):
        return x


class Showing(nn.Module):
    """Shows the statistics of the layer inside as its own."""

    def __init__(self, channels):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    @property
    def running_mean(self):
        return self.bn.running_mean

    @property
    def running_var(self):
        return self.bn.running_var

    def forward(self, x):
        return self.bn(x)


def frozen_of_torchvision(channels):
    import_torchvision()
    return importlib.import_module("torchvision.ops.misc").FrozenBatchNorm2d(channels)


def frozen_of_timm(channels):
    import_torchvision()
    return importlib.import_module("timm.layers").FrozenBatchNormAct2d(channels)


LIKE = {
    "own": lambda: Own(4),
    "fused": lambda: Fused(4),
    "scratch": lambda: scratch.BatchNorm(4, num_dims=4),
    "d2l": lambda: D2l(4, num_dims=4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "torchvision frozen": lambda: frozen_of_torchvision(4),
    "timm frozen": lambda: frozen_of_timm(4),
}
MOVING = [name for name in LIKE if "frozen" not in name]
UNLIKE = {
    "no variance": (lambda: WithoutVar(4), "it keeps running_mean but no running_var"),
    "of pixels": (lambda: OfPixels(4), r"its running_mean has the shape \(4, 3, 3\) and its"),
    "parameters": (lambda: Parameters(4), "its running_mean is a parameter, not a buffer"),
}


def net(kind):
    """A convolution and the layer, and three batches for them."""
    torch.manual_seed(0)
    make = LIKE[kind] if kind in LIKE else UNLIKE[kind][0]
    return nn.Sequential(nn.Conv2d(3, 4, 1), make()), [torch.randn(6, 3, 3, 3) for _ in range(3)]


def statistics(layer):
    """Copies of the running mean and variance, by d2l's names or torch's."""
    names = ("moving_mean", "moving_var") if hasattr(layer, "moving_mean") else None
    mean, var = (getattr(layer, n).clone() for n in names or ("running_mean", "running_var"))
    return mean.flatten(), var.flatten()
