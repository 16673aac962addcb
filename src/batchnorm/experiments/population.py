"""Population statistics: the exact moments of many images under the weights of this moment.

Running statistics are an average over the last ten batches or so, each of which saw other weights.
At a learning rate of 1.0 the weights move so fast that this average describes no network that ever
existed, and accuracy in evaluation jumps. Population statistics do not look back.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import functional
from batchnorm.experiments import norm_layers
from batchnorm.moments import Moments, merge


@torch.no_grad()
def population_moments(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Moments]:
    """Moments of what each normalizing layer gets, over all batches together.

    The batches pass in training mode: each layer normalizes by its batch's own statistics, as it
    does while it learns, so what a layer gets does not depend on the running statistics of the
    layers before it. The moments of the batches are merged exactly. The model is left as it was.

    Args:
        model: Any model with layers of `batchnorm`, `batchnorm.scratch` or ``torch.nn``.
        batches: Inputs of the model, of any sizes.

    Returns:
        By layer name; empty for a model without such layers.
    """
    moments: dict[str, Moments] = {}

    def collect(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        batch = functional.moments(inputs[0])
        moments[name] = merge(moments[name], batch) if name in moments else merge(batch)

    handles = [
        module.register_forward_pre_hook(partial(collect, name))
        for name, module in norm_layers.modules(model).items()
    ]
    try:
        with norm_layers.preserved_buffers(model):
            model.train()
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return moments


def use_statistics(model: nn.Module, moments: dict[str, Moments]) -> None:
    """Makes the layers of ``model`` normalize by ``moments`` in evaluation."""
    for name, module in norm_layers.modules(model).items():
        norm_layers.view(module).set_statistics(moments[name])
