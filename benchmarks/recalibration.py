"""Compares `recalibrate` on a ResNet-50 with torch's ``update_bn`` and fvcore's precise BN.

Images differ in brightness and contrast, as real ones do. The reference values are the moments of
each layer's input over all the data in training mode, summed here in float64 without any of the
three. An error is the largest of any channel: of a mean in standard deviations, of a variance in
variances. The three take the same batches in turn; a time is the median of the rounds. The time of
the model without its batch norm layers is a lower bound for all of them.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from batchnorm.allocation import keep_freed_memory
from batchnorm.nets.norms import NormThen
from batchnorm.nets.resnet import ResNet
from batchnorm.tools.recalibration import recalibrate

DEPTH, IMAGES, SIZE, BATCH, ROUNDS = 50, 404, 112, 16, 5
TOLERANCES = (0.2, 0.1, 0.05)
SHARES = (0.25, 0.75, 1.0)
Truth = dict[str, tuple[Tensor, Tensor]]


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """Returns the batch norm layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def images(count: int) -> Tensor:
    """Makes images of noise, each with its own brightness and contrast, the dark ones first."""
    brightness = torch.randn(count, 1, 1, 1).sort(0).values
    contrast = 0.5 + torch.rand(count, 1, 1, 1)
    return brightness + contrast * torch.randn(count, 3, SIZE, SIZE)


@torch.no_grad()
def true_statistics(model: nn.Module, batches: Sequence[Tensor]) -> Truth:
    """Computes means and variances of the layers' inputs, in two passes."""
    layers = norms(model).items()
    count: dict[str, int] = {}
    total: dict[str, Tensor] = {}

    def pass_over(about: dict[str, Tensor], power: int) -> dict[str, Tensor]:
        count.clear()
        total.clear()

        def add(name: str, x: Tensor) -> None:
            centred = x.double() - about.get(name, torch.zeros(x.shape[1])).view(1, -1, 1, 1)
            total[name] = total.get(name, 0) + centred.pow(power).sum((0, 2, 3))
            count[name] = count.get(name, 0) + x.numel() // x.shape[1]

        hooks = [
            layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
            for name, layer in layers
        ]
        for batch in batches:
            model(batch)
        for hook in hooks:
            hook.remove()
        return {name: total[name] / count[name] for name in total}

    mean = pass_over({}, 1)
    var = pass_over(mean, 2)
    return {name: (mean[name], var[name] * count[name] / (count[name] - 1)) for name in mean}


@torch.no_grad()
def precise_bn(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Runs the algorithm of fvcore's ``update_bn_stats``, which takes 200 batches by default.

    With momentum 1 the buffers are the last batch's statistics after each batch. The means and the
    mean squares are averaged from these, weighted by the number of values, in float32 as the
    buffers. In the end their difference is the biased variance.
    """
    layers = list(norms(model).values())
    counts = dict.fromkeys(layers, 0)
    sizes: dict[nn.Module, int] = {}
    means = {layer: torch.zeros_like(layer.running_mean) for layer in layers}
    squares = {layer: torch.zeros_like(layer.running_var) for layer in layers}
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, args: sizes.update({layer: args[0].numel() // args[0].shape[1]})
        )
        for layer in layers
    ]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    for batch in batches:
        model(batch)
        for layer in layers:
            size = sizes[layer]
            counts[layer] += size
            share = size / counts[layer]
            mean, var = layer.running_mean, layer.running_var * ((size - 1) / size)
            means[layer] += (mean - means[layer]) * share
            squares[layer] += (var + mean * mean - squares[layer]) * share
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.running_mean.copy_(means[layer])
        layer.running_var.copy_(squares[layer] - means[layer] * means[layer])
    for hook in hooks:
        hook.remove()


METHODS: dict[str, Callable[[nn.Module, Sequence[Tensor]], object]] = {
    "ours": recalibrate,
    "update_bn": lambda model, batches: update_bn(batches, model),
    "precise BN": precise_bn,
}


def error(model: nn.Module, truth: Truth) -> float:
    """Returns the largest error of any channel of any layer."""
    worst = 0.0
    for name, layer in norms(model).items():
        mean, var = truth[name]
        of_mean = (layer.running_mean - mean).abs() / var.sqrt()
        of_var = (layer.running_var / var - 1).abs()
        worst = max(worst, of_mean.max().item(), of_var.max().item())
    return worst


def measure(
    model: nn.Module, batches: Sequence[Tensor], truth: Truth, rounds: int
) -> dict[str, tuple[float, float]]:
    """Measures error and seconds of each method."""
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    errors: dict[str, float] = {}
    for _ in range(rounds):
        for name, method in METHODS.items():
            started = time.perf_counter()
            method(model, batches)
            seconds[name].append(time.perf_counter() - started)
            errors[name] = error(model, truth)
    return {name: (errors[name], statistics.median(seconds[name])) for name in METHODS}


@torch.no_grad()
def floor(model: nn.Module, batches: Sequence[Tensor], rounds: int) -> float:
    """Measures the median seconds of the model without its batch norm layers."""
    bare = copy.deepcopy(model)
    for name in norms(model):
        bare.set_submodule(name, nn.Identity())
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        for batch in batches:
            bare(batch)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main(count: int = IMAGES, rounds: int = ROUNDS) -> None:
    """Prints the tables."""
    torch.manual_seed(0)
    keep_freed_memory()
    model = ResNet(DEPTH, NormThen).train()
    data = images(count)
    shuffled = data[torch.randperm(count)]
    recalibrate(model, shuffled[: 2 * BATCH].split(BATCH))  # loads the compiled kernels
    print(
        f"ResNet-{DEPTH}, {count} images of {SIZE} x {SIZE} in batches of {BATCH}, "
        f"{torch.get_num_threads()} threads\n"
    )
    for title, x in (("in random order", shuffled), ("from dark to bright", data)):
        batches = x.split(BATCH)
        truth = true_statistics(model, batches)
        print(f"{title:<22}" + "".join(f"{name:>22}" for name in METHODS))
        print(f"{'batches':<22}" + f"{'error':>13}{'seconds':>9}" * len(METHODS))
        rows = {}
        for share in SHARES if x is shuffled else SHARES[-1:]:
            used = max(1, round(share * len(batches)))
            rows[used] = measure(model, batches[:used], truth, rounds)
            cells = (f"{wrong:>13.1e}{took:>9.2f}" for wrong, took in rows[used].values())
            print(f"{used:<22}" + "".join(cells))
        for whose in ("update_bn", "precise BN"):
            target = rows[len(batches)][whose][0]
            times = []
            for name in METHODS:
                reached = [row[name][1] for row in rows.values() if row[name][0] <= target]
                times.append(f"{name} {min(reached):.2f} s" if reached else f"{name} never")
            print(f"To the error that {whose} ends with, {target:.1e}: {', '.join(times)}")
        print(f"The same batches without batch norm: {floor(model, batches, rounds):.2f} s")
        for tolerance in TOLERANCES if x is shuffled else ():
            result = recalibrate(model, batches, tolerance=tolerance)
            print(
                f"Ours with tolerance={tolerance}: {result.batches} batches, "
                f"error {error(model, truth):.1e}, {result.seconds:.2f} s"
            )
        print()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
