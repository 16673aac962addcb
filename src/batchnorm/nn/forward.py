"""The forward of a batch norm layer as a function: it also computes torch's own layers."""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.nn.functional import Activation, _batch_norm
from batchnorm.nn.running_statistics import weight_of_new_batch
from batchnorm.torch_internals import check_rank


def forward_of(
    layer: _BatchNorm,
    input: Tensor,
    residual: Tensor | None = None,
    activation: Activation = None,
) -> Tensor:
    """Computes the output of a layer, torch's or ours, from the attributes that both have.

    Each attribute is read from the layer, because a parametrization may compute it.

    Args:
        layer: The layer; in training its statistics are updated.
        input: (N, C, ...), of the rank that the layer expects.
        residual: Added before the activation; shape, dtype and device of ``input``.
        activation: None or ``"relu"``.

    Raises:
        ValueError: The rank is wrong, or a training batch has one value a channel.
        RuntimeError: The number of channels, the dtype or the device does not fit.
    """
    check_rank(layer, input)
    tracks = layer.training and layer.track_running_stats
    uses_buffers = tracks or not layer.training
    running_mean = layer.running_mean if uses_buffers else None
    running_var = layer.running_var if uses_buffers else None
    counter = layer.num_batches_tracked if tracks else None
    weight_of_batch: float | Tensor = 0.0
    if tracks and running_mean is not None:
        momentum = layer.momentum
        weight_of_batch = weight_of_new_batch(None, counter) if momentum is None else momentum
    return _batch_norm(
        input,
        running_mean,
        running_var,
        layer.weight,
        layer.bias,
        layer.training or running_mean is None,
        weight_of_batch,
        layer.eps,
        counter,
        residual,
        activation,
    )
