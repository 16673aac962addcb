"""``BatchNorm1d``, ``BatchNorm2d`` and ``BatchNorm3d``, and their lazy forms.

They inherit torch's classes. ``state_dict``, pickle and every ``isinstance`` check stay as they
are; the constructor also takes ``activation``, and the forward pass a residual. Overridden are the
forward pass, the check of the rank and ``extra_repr``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from batchnorm.nn.functional import Activation, _batch_norm
from batchnorm.nn.running_statistics import weight_of_new_batch
from batchnorm.nn.validation import check_activation


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """The forward pass that all layers share."""

    activation: Activation = None
    shapes: ClassVar[dict[int, str]]

    def __init__(self, *args: Any, activation: Activation = None, **kwargs: Any) -> None:
        check_activation(activation)
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(
        self,
        input: Float[Tensor, "n c *spatial"],
        residual: Float[Tensor, "n c *spatial"] | None = None,
    ) -> Float[Tensor, "n c *spatial"]:
        """Normalizes ``input``, adds ``residual`` and applies the activation.

        In training the layer normalizes by the batch's own statistics and updates the running ones;
        in evaluation it normalizes by the running ones, or by the batch's own if it has none.

        Raises:
            ValueError: The rank is wrong, or a training batch has one value a channel. Buffers and
                the counter are then as they were.
            RuntimeError: The number of channels, the dtype or the device does not fit.
        """
        self._check_input_dim(input)
        tracks = self.training and self.track_running_stats
        uses_buffers = tracks or not self.training
        running_mean = self.running_mean if uses_buffers else None
        running_var = self.running_var if uses_buffers else None
        return _batch_norm(
            input,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            self.training or running_mean is None,
            self._weight_of_this_batch() if tracks and running_mean is not None else 0.0,
            self.eps,
            self.num_batches_tracked if tracks else None,
            residual,
            self.activation,
        )

    def extra_repr(self) -> str:
        """Torch's own, and the activation if there is one."""
        base = super().extra_repr()
        return base if self.activation is None else f"{base}, activation={self.activation!r}"

    def _weight_of_this_batch(self) -> float | Tensor:
        if self.momentum is not None:
            return self.momentum
        return weight_of_new_batch(self.momentum, self.num_batches_tracked)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() in self.shapes:
            return
        ranks = " or ".join(f"{rank}-D input {shape}" for rank, shape in self.shapes.items())
        name = type(self).__name__
        raise ValueError(f"{name} expects a {ranks}, got shape {tuple(input.shape)}.")


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L), a drop-in for ``torch.nn.BatchNorm1d``.

    Args:
        *args: As for torch's class: ``num_features, eps, momentum, affine, track_running_stats,
            device, dtype``.
        activation: None, or ``"relu"`` to apply it in the same pass.
        **kwargs: As for torch's class.

    Raises:
        ValueError: The activation is unknown.

    Example:
        >>> import torch, batchnorm
        >>> layer = batchnorm.BatchNorm1d(2)
        >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).round(decimals=3)
        tensor([[-1., -1.],
                [ 1.,  1.]], grad_fn=<RoundBackward1>)
    """

    shapes: ClassVar[dict[int, str]] = {2: "(N, C)", 3: "(N, C, L)"}


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W), a drop-in for ``torch.nn.BatchNorm2d``.

    Args:
        *args: As for torch's class: ``num_features, eps, momentum, affine, track_running_stats,
            device, dtype``.
        activation: None, or ``"relu"`` to apply it in the same pass.
        **kwargs: As for torch's class.

    Raises:
        ValueError: The activation is unknown.

    Example:
        >>> import torch, batchnorm
        >>> layer = batchnorm.BatchNorm2d(16, activation="relu")
        >>> x, shortcut = torch.randn(2, 8, 16, 32, 32)
        >>> layer(x, residual=shortcut).shape  # relu(batch_norm(x) + shortcut)
        torch.Size([8, 16, 32, 32])
    """

    shapes: ClassVar[dict[int, str]] = {4: "(N, C, H, W)"}


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W), a drop-in for ``torch.nn.BatchNorm3d``.

    Args:
        *args: As for torch's class: ``num_features, eps, momentum, affine, track_running_stats,
            device, dtype``.
        activation: None, or ``"relu"`` to apply it in the same pass.
        **kwargs: As for torch's class.

    Raises:
        ValueError: The activation is unknown.

    Example:
        >>> import torch, batchnorm
        >>> batchnorm.BatchNorm3d(4)(torch.randn(2, 4, 3, 8, 8)).shape
        torch.Size([2, 4, 3, 8, 8])
    """

    shapes: ClassVar[dict[int, str]] = {5: "(N, C, D, H, W)"}


LAYERS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


class _LazyBatchNorm(_BatchNorm):
    """A wrong first input leaves the layer uninitialized."""

    def initialize_parameters(self, input: Tensor) -> None:
        """Checks the rank, then takes ``num_features`` from ``input``."""
        self._check_input_dim(input)
        super().initialize_parameters(input)  # pyright: ignore[reportAttributeAccessIssue]


class LazyBatchNorm1d(_LazyBatchNorm, nn.LazyBatchNorm1d):
    """`BatchNorm1d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm1d  # pyright: ignore[reportAssignmentType]
    shapes = BatchNorm1d.shapes


class LazyBatchNorm2d(_LazyBatchNorm, nn.LazyBatchNorm2d):
    """`BatchNorm2d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm2d  # pyright: ignore[reportAssignmentType]
    shapes = BatchNorm2d.shapes


class LazyBatchNorm3d(_LazyBatchNorm, nn.LazyBatchNorm3d):
    """`BatchNorm3d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm3d  # pyright: ignore[reportAssignmentType]
    shapes = BatchNorm3d.shapes
