r"""Batch normalization from scratch, in the way of the d2l book: the file to read first.

For one channel, over the values :math:`x` that a mini-batch has in it:

.. math::

    \mu = \frac{1}{n} \sum x, \qquad
    \sigma^2 = \frac{1}{n} \sum (x - \mu)^2, \qquad
    \hat{x} = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}, \qquad
    y = \gamma\,\hat{x} + \beta

**Two kinds of numbers.** :math:`\gamma` and :math:`\beta` are *learned parameters*: the optimizer
moves them along the gradient of the loss, so that a layer may undo the normalization where that
helps. ``moving_mean`` and ``moving_var`` are *statistics*: nobody learns them. They are averages of
what the layer has seen, they get no gradient, and inference needs them because a single example has
no batch to take a mean over.

**Why the variance is biased here.** The formula divides by :math:`n`, not by :math:`n - 1`: the
batch is described, not the population it came from, and :math:`\hat x` then has a variance of
exactly one. This file stores the same number in ``moving_var``, as d2l does. torch normalizes by it
too, but *stores* the unbiased one, :math:`\sigma^2 n / (n - 1)`, as an estimate of the population.
For a batch of 4 the stored numbers differ by a quarter, for 256 images of 24 x 24 by nothing.

**Two conventions of momentum.** Here, as in d2l's Chinese edition and in Keras, momentum is the
weight of the *old* value: ``moving = momentum * moving + (1 - momentum) * batch``, typically 0.9.
In torch it is the weight of the *new* one: ``running = (1 - momentum) * running + momentum *
batch``, typically 0.1. Mixed up, the statistics of the last batch alone decide.

**Why the layer does not ask for the grad mode.** d2l's ``batch_norm`` takes ``is_grad_enabled()``
as the sign of training, and so does ``training=None`` here. That has traps: ``net.eval()`` alone
changes nothing; training under ``torch.no_grad()`` silently uses the moving statistics; and inside
a ``torch.autograd.Function``, or in the first pass of re-entrant activation checkpointing, grad
mode is off although the network is training. `BatchNorm` below passes ``self.training`` instead,
and keeps its statistics in buffers, so that they are saved, loaded, moved and copied with it.

Source: Ioffe and Szegedy (2015), "Batch Normalization", algorithms 1 and 2; Zhang et al., "Dive
into Deep Learning", section 8.5, for the names and the signature.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def batch_norm(
    X: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moving_mean: Tensor,
    moving_var: Tensor,
    eps: float,
    momentum: float,
    training: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Normalizes ``X``: :math:`Y = \gamma\,(X - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta`.

    Args:
        X: A mini-batch: (N, C) from a fully connected layer, or (N, C, L), (N, C, H, W) or
            (N, C, D, H, W) from a convolution.
        gamma: Scale; one number a channel, in a shape that broadcasts with ``X``: (1, C) or
            (1, C, 1, 1).
        beta: Shift, in the same shape.
        moving_mean: Moving average of the mean, in the same shape.
        moving_var: Moving average of the biased variance, in the same shape.
        eps: Added to the variance, so that nothing is divided by zero.
        momentum: Weight of the *old* moving averages, between 0 and 1.
        training: Normalize by the batch's own mean and variance and move the averages. None asks
            ``torch.is_grad_enabled()``, as d2l does; see above why that is a trap.

    Returns:
        ``Y`` in the shape of ``X``, and the new ``moving_mean`` and ``moving_var`` (without a
        gradient; the ones given are not changed).

    Raises:
        ValueError: ``X`` has another rank, or one value a channel in training: its variance would
            be zero, ``Y`` would be ``beta`` for any ``X``, and ``moving_var`` would shrink.

    Example:
        >>> X, one, zero = torch.tensor([[1.0], [3.0]]), torch.ones(1, 1), torch.zeros(1, 1)
        >>> Y, mean, var = batch_norm(X, one, zero, zero, one, eps=0.0, momentum=0.5, training=True)
        >>> Y.flatten().tolist(), mean.item(), var.item()
        ([-1.0, 1.0], 1.0, 1.0)
    """
    if X.dim() not in (2, 3, 4, 5):
        raise ValueError(
            f"batch_norm expects X with 2 to 5 dimensions, got shape {tuple(X.shape)}."
        )
    if training is None:
        training = torch.is_grad_enabled()

    if not training:
        X_hat = (X - moving_mean) / torch.sqrt(moving_var + eps)
        return gamma * X_hat + beta, moving_mean, moving_var

    if X.numel() == X.shape[1]:
        raise ValueError(
            "batch_norm expects more than one value per channel when training, got shape "
            f"{tuple(X.shape)}; use a larger batch, or training=False."
        )
    # Fully connected: over the examples. Convolution: over the examples and all positions.
    axes = (0, *range(2, X.dim()))
    mean = X.mean(dim=axes, keepdim=True)
    var = ((X - mean) ** 2).mean(dim=axes, keepdim=True)
    X_hat = (X - mean) / torch.sqrt(var + eps)
    Y = gamma * X_hat + beta

    moving_mean = momentum * moving_mean + (1 - momentum) * mean.detach()
    moving_var = momentum * moving_var + (1 - momentum) * var.detach()
    return Y, moving_mean, moving_var


class BatchNorm(nn.Module):
    """The layer around `batch_norm`, with d2l's signature.

    Args:
        num_features: Outputs of a fully connected layer, or channels of a convolution.
        num_dims: Dimensions of the input: 2 after a fully connected layer; 3, 4 or 5 after a
            convolution in one, two or three dimensions.
        eps: Added to the variance.
        momentum: Weight of the *old* moving averages.

    Raises:
        ValueError: ``num_dims`` is not 2, 3, 4 or 5.

    Example:
        >>> layer = BatchNorm(3, num_dims=4)
        >>> layer(torch.randn(2, 3, 5, 5)).shape
        torch.Size([2, 3, 5, 5])
    """

    moving_mean: Tensor
    moving_var: Tensor

    def __init__(
        self, num_features: int, num_dims: int, eps: float = 1e-5, momentum: float = 0.9
    ) -> None:
        super().__init__()
        if num_dims not in (2, 3, 4, 5):
            raise ValueError(f"BatchNorm expects num_dims 2, 3, 4 or 5, got {num_dims}.")
        self.eps = eps
        self.momentum = momentum
        shape = (1, num_features) + (1,) * (num_dims - 2)
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape))
        self.register_buffer("moving_mean", torch.zeros(shape))
        self.register_buffer("moving_var", torch.ones(shape))

    def forward(self, X: Tensor) -> Tensor:
        """Normalizes ``X``; in training it also saves the new moving averages.

        Raises:
            ValueError: ``X`` has another shape than the layer, or one value a channel in training.
        """
        if X.dim() != self.gamma.dim() or X.shape[1] != self.gamma.shape[1]:
            raise ValueError(
                f"BatchNorm expects {self.gamma.dim()} dimensions and {self.gamma.shape[1]} "
                f"channels (dimension 1), got shape {tuple(X.shape)}."
            )
        Y, self.moving_mean, self.moving_var = batch_norm(
            X,
            self.gamma,
            self.beta,
            self.moving_mean,
            self.moving_var,
            self.eps,
            self.momentum,
            training=self.training,
        )
        return Y
