"""``BatchNorm1d``, ``BatchNorm2d`` and ``BatchNorm3d``, and their lazy forms.

They inherit torch's classes. ``state_dict``, pickle and every ``isinstance`` check stay as they
are; the constructor also takes ``activation``, and the forward pass a residual. Overridden are the
forward pass, the check of the rank, ``extra_repr``, and ``eps``, which warns converters of the
activation.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.jit import is_scripting
from torch.nn import functional as F
from torch.overrides import has_torch_function

from batchnorm.nn.converters import Eps
from batchnorm.nn.functional import Activation, _batch_norm
from batchnorm.nn.running_statistics import weight_of_new_batch
from batchnorm.nn.scripting import in_torchscript
from batchnorm.nn.validation import check_activation

AS_LEAF = nn.BatchNorm1d.__module__
"""The ``__module__`` of a layer, the object and not its class.

There ``torch.fx`` looks for the modules of ``torch.nn``, which it records as one node each.
"""


_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_BATCH_NORM = F.batch_norm


def forward_of(
    layer: nn.modules.batchnorm._BatchNorm,
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
    layer._check_input_dim(input)
    tracks = layer.training and layer.track_running_stats
    uses_buffers = tracks or not layer.training
    running_mean = layer.running_mean if uses_buffers else None
    running_var = layer.running_var if uses_buffers else None
    counter = layer.num_batches_tracked if tracks else None
    weight_of_batch: float | Tensor | None = 0.0
    if tracks and running_mean is not None:
        weight_of_batch = layer.momentum
        if weight_of_batch is None:
            weight_of_batch = weight_of_new_batch(None, counter)
    eps = layer.__dict__.get("eps")  # Past `Eps`, which costs.
    return _batch_norm(
        input,
        running_mean,
        running_var,
        layer.weight,
        layer.bias,
        layer.training or running_mean is None,
        weight_of_batch,
        layer.eps if eps is None else eps,
        counter,
        residual,
        activation,
    )


def computed_by_torch(layer: nn.modules.batchnorm._BatchNorm, input: Tensor) -> Tensor | None:
    """Computes what one of torch's layers does, in half of torch's time in Python.

    Returns:
        The output of torch's kernel, to the bit; None where the layer's forward must run, because
        somebody computes an attribute or listens to ``F.batch_norm``, or in unusual cases.
    """
    parameters, buffers, training = layer._parameters, layer._buffers, layer.training
    if not (_has_plain_tensors(type(layer)) and _TENSORS.isdisjoint(layer.__dict__)):
        return None
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var = buffers["running_mean"], buffers["running_var"]
        counter = buffers["num_batches_tracked"]
    except KeyError:
        return None
    plain = not has_torch_function((input, weight, bias, mean, var))
    if mean is None or var is None or layer.eps < 0 or not plain or F.batch_norm is not _BATCH_NORM:
        return None
    layer._check_input_dim(input)
    momentum = layer.momentum if training else 0.0
    if training:
        if counter is None or momentum is None or not layer.track_running_stats:
            return None
        if input.numel() <= len(mean):  # One value a channel, which is refused.
            return None
        counter.add_(1)
    options = (training, cast("float", momentum), layer.eps, torch.backends.cudnn.enabled)
    return torch.batch_norm(input, weight, bias, mean, var, *options)


@lru_cache(maxsize=256)
def _has_plain_tensors(kind: type[nn.Module]) -> bool:
    """Tells if a class leaves it to ``nn.Module`` to find the tensors of batch norm."""
    return (
        getattr(kind, "__getattr__", None) is nn.Module.__getattr__
        and kind.__getattribute__ is nn.Module.__getattribute__
        and not any(hasattr(kind, name) for name in _TENSORS)
    )


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """The constructor and the forward pass that all layers share."""

    activation: Activation = None
    eps: float = cast("float", Eps())
    shapes: ClassVar[dict[int, str]]
    ranks: ClassVar[tuple[int, ...]]
    __constants__: ClassVar[list[str]] = [*nn.modules.batchnorm._BatchNorm.__constants__, "ranks"]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation = None,
    ) -> None:
        """Builds a layer; all but ``activation`` is as in torch.

        Args:
            num_features: Number of channels C.
            eps: Added to the variance, in its unit; positive in training.
            momentum: Weight of the new batch in the running statistics, usually in [0, 1]; None for
                their cumulative average.
            affine: True for a learned ``weight`` and ``bias``.
            track_running_stats: True for running statistics, by which evaluation normalizes.
            device: Of parameters and buffers.
            dtype: Of parameters and running statistics.
            bias: False for a ``weight`` without a ``bias``.
            activation: None, or ``"relu"`` to apply it in the same pass. Converters that build a
                layer of their own from ``weight``, ``running_var`` and ``eps`` do not know it and
                drop it; reading ``eps`` of such a layer warns of that. Call
                ``batchnorm.to_torch(model)`` before them: the ReLU becomes a module of its own.

        Raises:
            ValueError: The activation is unknown.
        """
        check_activation(activation)
        options = (num_features, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(*options, **_without(bias))
        self.activation = activation
        self.__dict__["__module__"] = AS_LEAF

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalizes ``input``, adds ``residual`` and applies the activation.

        In training the layer normalizes by the batch's own statistics and updates the running ones;
        in evaluation it normalizes by the running ones, or by the batch's own if it has none.

        Args:
            input: (N, C, ...), of the rank that the class expects.
            residual: Added before the activation; shape, dtype and device of ``input``.

        Raises:
            ValueError: The rank is wrong, or a training batch has one value a channel. Buffers and
                the counter are then as they were.
            RuntimeError: The number of channels, the dtype or the device does not fit.
        """
        if is_scripting():
            return self._in_torchscript(input, residual)
        else:
            return forward_of(self, input, residual, self.activation)

    def extra_repr(self) -> str:
        """Torch's own, and the activation if there is one."""
        base = super().extra_repr()
        return base if self.activation is None else f"{base}, activation={self.activation!r}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes a pickle's state, of an earlier version too, which had no `AS_LEAF`."""
        super().__setstate__(state)
        self.__dict__["__module__"] = AS_LEAF

    def _in_torchscript(self, input: Tensor, residual: Tensor | None) -> Tensor:
        if input.dim() not in self.ranks:
            raise ValueError(
                f"This batch norm expects an input of rank {self.ranks}, got {input.dim()}."
            )
        tracks = self.training and self.track_running_stats
        counter = self.num_batches_tracked
        momentum = 0.0
        if self.momentum is not None:
            momentum = self.momentum
        elif tracks and counter is not None:
            momentum = 1.0 / (float(counter) + 1.0)
        mean = self.running_mean if tracks or not self.training else None
        var = self.running_var if tracks or not self.training else None
        y = in_torchscript(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            momentum,
            self.eps,
            residual,
            self.activation,
        )
        if tracks and counter is not None:
            counter.add_(1)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() in self.shapes:
            return
        if isinstance(input, Proxy):
            raise TypeError(
                f"torch.fx can record a {type(self).__name__} only as one node; trace a model that "
                "holds it, such as torch.nn.Sequential(layer), with a tracer whose is_leaf_module "
                "is true for it."
            )
        ranks = " or ".join(f"{rank}-D input {shape}" for rank, shape in self.shapes.items())
        name = type(self).__name__
        raise ValueError(f"{name} expects a {ranks}, got shape {tuple(input.shape)}.")


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L), a drop-in for ``torch.nn.BatchNorm1d``.

    Example:
        >>> import torch, batchnorm
        >>> layer = batchnorm.BatchNorm1d(2)
        >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).round(decimals=3)
        tensor([[-1., -1.],
                [ 1.,  1.]], grad_fn=<RoundBackward1>)
    """

    shapes: ClassVar[dict[int, str]] = {2: "(N, C)", 3: "(N, C, L)"}
    ranks: ClassVar[tuple[int, ...]] = tuple(shapes)


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W), a drop-in for ``torch.nn.BatchNorm2d``.

    Example:
        >>> import torch, batchnorm
        >>> layer = batchnorm.BatchNorm2d(16, activation="relu")
        >>> x, shortcut = torch.randn(2, 8, 16, 32, 32)
        >>> layer(x, residual=shortcut).shape  # relu(batch_norm(x) + shortcut)
        torch.Size([8, 16, 32, 32])
    """

    shapes: ClassVar[dict[int, str]] = {4: "(N, C, H, W)"}
    ranks: ClassVar[tuple[int, ...]] = tuple(shapes)


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W), a drop-in for ``torch.nn.BatchNorm3d``.

    Example:
        >>> import torch, batchnorm
        >>> batchnorm.BatchNorm3d(4)(torch.randn(2, 4, 3, 8, 8)).shape
        torch.Size([2, 4, 3, 8, 8])
    """

    shapes: ClassVar[dict[int, str]] = {5: "(N, C, D, H, W)"}
    ranks: ClassVar[tuple[int, ...]] = tuple(shapes)


def _without(bias: bool) -> dict[str, bool]:
    """The option of torch that leaves the bias out; older versions of torch do not know it."""
    return {} if bias else {"bias": False}


LAYERS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


class _LazyBatchNorm(_BatchNorm):
    """A wrong first input leaves the layer uninitialized."""

    shapes: ClassVar[dict[int, str]]  # TorchScript reads the annotations of the nearest class.

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation = None,
    ) -> None:
        """As the layer that it becomes, without ``num_features``."""
        check_activation(activation)
        options: Any = (eps, momentum, affine, track_running_stats, device, dtype)
        super(_BatchNorm, self).__init__(*options, **_without(bias))
        self.activation = activation
        self.__dict__["__module__"] = AS_LEAF

    def initialize_parameters(self, input: Tensor) -> None:
        """Checks the rank, then takes ``num_features`` from ``input``."""
        self._check_input_dim(input)
        super().initialize_parameters(input)  # pyright: ignore[reportAttributeAccessIssue]


class LazyBatchNorm1d(_LazyBatchNorm, nn.LazyBatchNorm1d):
    """`BatchNorm1d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm1d  # pyright: ignore[reportAssignmentType]
    shapes, ranks = BatchNorm1d.shapes, BatchNorm1d.ranks


class LazyBatchNorm2d(_LazyBatchNorm, nn.LazyBatchNorm2d):
    """`BatchNorm2d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm2d  # pyright: ignore[reportAssignmentType]
    shapes, ranks = BatchNorm2d.shapes, BatchNorm2d.ranks


class LazyBatchNorm3d(_LazyBatchNorm, nn.LazyBatchNorm3d):
    """`BatchNorm3d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm3d  # pyright: ignore[reportAssignmentType]
    shapes, ranks = BatchNorm3d.shapes, BatchNorm3d.ranks
