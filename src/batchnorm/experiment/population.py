"""Population statistics: the exact statistics of many images under the weights of this moment.

Running statistics are an average over the last ten batches or so, each of which saw other weights.
At a learning rate of 1.0 the weights move so fast that this average describes no network that ever
existed, and accuracy in evaluation jumps. Population statistics do not look back.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from batchnorm.experiment import norm_layers
from batchnorm.experiment.observation import pass_in_training
from batchnorm.moments import Moments, merge_moments
from batchnorm.nn import functional
from batchnorm.scratch import BatchNorm
from batchnorm.tools.recalibration import recalibrate


def use_population(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replaces running statistics by population statistics, as `recalibrate` does.

    Layers of `batchnorm.scratch` keep the biased variance, and normalize as in training while
    their statistics are collected. A model without batch norm stays as it is.

    Args:
        model: Any model whose layers are of `batchnorm` and ``torch.nn``, or all of
            `batchnorm.scratch`.
        batches: Inputs of the model, of any sizes.
    """
    scratch = {name: m for name, m in model.named_modules() if isinstance(m, BatchNorm)}
    if not scratch:
        if norm_layers.modules(model):
            recalibrate(model, batches)
        return
    moments: dict[str, Moments] = {}

    def collect(name: str, x: Tensor) -> None:
        batch = functional.moments(x)
        moments[name] = merge_moments(moments[name], batch) if name in moments else batch

    pass_in_training(model, batches, scratch, collect)
    for name, merged in moments.items():
        norm_layers.view(scratch[name]).set_statistics(merged)
