"""The numbers of a network in training that a report shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.experiment import norm_layers
from batchnorm.experiment.results import QUANTILES
from batchnorm.nets.lenet import LAYERS
from batchnorm.tools.patching import Handle, SavedBuffers, listen, temporary_attributes


@torch.no_grad()
def pass_in_training(
    model: nn.Module,
    batches: Iterable[Tensor],
    layers: Mapping[str, nn.Module],
    listener: Callable[[str, Tensor], None],
) -> None:
    """Passes batches through a model in training mode, and leaves it as it was.

    Args:
        model: The model.
        batches: Its inputs.
        layers: Modules of the model by name.
        listener: Receives the name and the input of a layer, each time it is called.
    """
    modules = list(model.modules())
    with (
        Handle(SavedBuffers(modules).restore),
        temporary_attributes(modules, training=True),
        listen(layers, listener, caller="batchnorm train"),
    ):
        for batch in batches:
            model(batch)


def pre_activations(model: nn.Sequential, images: Tensor) -> dict[str, list[float]]:
    """Measures what each sigmoid of LeNet receives for ``images``, in training mode.

    Args:
        model: A `batchnorm.nets.lenet.lenet`; left as it was.
        images: Floats of shape (N, 1, 28, 28).

    Returns:
        The `QUANTILES` by name of the layer before the sigmoid.
    """
    found: dict[str, list[float]] = {}

    def note(name: str, x: Tensor) -> None:
        # NumPy selects where torch.quantile sorts, which took a quarter of an epoch of digits.
        found[name] = np.quantile(x.float().cpu().numpy(), QUANTILES).tolist()

    sigmoids = {name: model.get_submodule(f"{name}_sigmoid") for name in LAYERS}
    pass_in_training(model, [images], sigmoids, note)
    return found


def norm_state(model: nn.Module) -> list[dict[str, Any]]:
    """Returns γ, β and the running statistics of each batch norm layer, a number per channel."""
    return [
        {"layer": name}
        | {
            field: tensor.detach().flatten().tolist()
            for field, tensor in norm_layers.view(module)._asdict().items()
        }
        for name, module in norm_layers.modules(model).items()
    ]
