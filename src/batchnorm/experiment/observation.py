"""What a report shows of a network in training, as plain numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.experiment import norm_layers
from batchnorm.nets.lenet import LAYERS
from batchnorm.tools.patching import listen

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@torch.no_grad()
def pre_activations(model: nn.Sequential, images: Tensor) -> dict[str, list[float]]:
    """Quantiles of what each sigmoid of `lenet` gets for ``images``, in training mode.

    Args:
        model: A `batchnorm.nets.lenet.lenet`; left as it was.
        images: Floats of shape (N, 1, 28, 28).

    Returns:
        The `QUANTILES` for each layer name.
    """
    found: dict[str, list[float]] = {}

    def note(name: str, x: Tensor) -> None:
        values = x.float().flatten()
        at = torch.tensor(QUANTILES, device=values.device)
        found[name] = torch.quantile(values, at).tolist()

    sigmoids = {name: model.get_submodule(f"{name}_sigmoid") for name in LAYERS}
    with listen(sigmoids, note, caller="train"), norm_layers.preserved_buffers(model):
        model.train()
        model(images)
    return found


def norm_state(model: nn.Module) -> list[dict[str, Any]]:
    """γ, β and running statistics of each normalizing layer, a number a channel."""
    layers = []
    for name, module in norm_layers.modules(model).items():
        layer = norm_layers.view(module)
        layers.append(
            {
                "layer": name,
                "gamma": _numbers(layer.weight),
                "beta": _numbers(layer.bias),
                "running_mean": _numbers(layer.running_mean),
                "running_var": _numbers(layer.running_var),
            }
        )
    return layers


def _numbers(tensor: Tensor) -> list[float]:
    return tensor.detach().flatten().tolist()
