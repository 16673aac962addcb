"""Small networks in the manner of the well-known ones, as torch's users write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(c_in: int, c_out: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=False)


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 4, 5), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 6, 5), nn.BatchNorm2d(6)
        self.fc1, self.bn3 = nn.Linear(24, 8), nn.BatchNorm1d(8)
        self.fc2 = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.avg_pool2d(torch.sigmoid(self.bn2(self.conv2(x))), 2)
        x = self.bn3(self.fc1(torch.flatten(x, 1))).relu()
        return self.fc2(x)


class VGG(nn.Module):
    def __init__(self):
        super().__init__()
        layers = []
        for c_in, c_out in ((3, 4), (4, 6)):
            layers += [conv(c_in, c_out), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, c_in: int = 4, c_out: int = 4, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c_out, stride=stride), nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(c_out, c_out), nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))
        self.layer2 = nn.Sequential(BasicBlock(4, 6, 2))
        self.fc = nn.Linear(6, 5)
        self.grad_checkpointing = False

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            raise NotImplementedError("no checkpointing")
        return self.layer2(self.layer1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x).mean((2, 3)))


class DenseLayer(nn.Module):
    def __init__(self, c_in: int):
        super().__init__()
        self.norm, self.relu, self.conv = nn.BatchNorm2d(c_in), nn.ReLU(), conv(c_in, 3)
        self.drop_rate = 0.0

    def forward(self, input: list[Tensor]) -> Tensor:
        features = [input] if isinstance(input, Tensor) else input
        out = self.conv(self.relu(self.norm(torch.cat(features, 1))))
        if self.drop_rate > 0:
            out = F.dropout(out, self.drop_rate, self.training)
        return out


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(3 * count) for count in (1, 2, 3))
        self.norm, self.fc = nn.BatchNorm2d(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        out = F.relu(self.norm(torch.cat(features, 1)), inplace=True)
        return self.fc(out.mean((2, 3)))


class BatchNormAct2d(nn.BatchNorm2d):
    """Shaped like timm's class of that name."""

    def __init__(self, channels: int, act: nn.Module | None = None, drop: nn.Module | None = None):
        super().__init__(channels)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "four dimensions")
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            factor = 1 / float(self.num_batches_tracked) if self.momentum is None else factor
        own = self.training or self.running_mean is None
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, own, factor, self.eps
        )
        return self.act(self.drop(x))


class ConvNormAct(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.conv, self.bn = conv(3, 4), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Tail(nn.Module):
    """A convolution, a batch norm layer, and what a subclass does with its output."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.bn(self.conv(x)), x.mean(1, keepdim=True).expand(-1, 4, -1, -1) + 0)

    def tail(self, out: Tensor, residual: Tensor) -> Tensor:
        raise NotImplementedError("no checkpointing")
