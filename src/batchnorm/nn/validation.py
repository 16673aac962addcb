"""Checks of the arguments of `batchnorm.nn.functional.batch_norm`.

Each check raises the exception type that torch raises for the same fault, before anything is
changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm import torch_internals

ACTIVATIONS = (None, "relu")
VECTORS = ("running_mean", "running_var", "weight", "bias")
"""The arguments that have one number a channel, in the order in which they are passed here."""


def check_input(x: Tensor) -> None:
    """Raises if ``x`` is no floating tensor of shape (N, C, ...)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"batch_norm expects a tensor, got {type(x).__name__}.")
    if not x.is_floating_point():
        remedy = "x.dequantize()" if x.is_quantized else "x.to(torch.float32)"
        raise NotImplementedError(
            f"batch_norm expects a floating-point tensor, got {x.dtype}; convert it with {remedy}."
        )
    if x.dim() < 2 and x.numel() > 0:
        raise IndexError(
            f"batch_norm expects a tensor of shape (N, C, ...), got shape {tuple(x.shape)}."
        )


def check_activation(activation: str | None) -> None:
    """Raises if the activation cannot be fused."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or 'relu', got {activation!r}.")


def check_eps(eps: float, *, training: bool) -> None:
    """Raises if ``eps`` may leave nothing, or something negative, under the square root."""
    try:
        fits = eps > 0 if training else eps >= 0
    except TypeError:
        raise TypeError(f"batch_norm expects eps as a number, got {eps!r}.") from None
    if not fits:
        rule = "positive during training" if training else "non-negative"
        raise ValueError(f"batch_norm eps must be {rule}, but got {eps}.")


def check_channels(x: Tensor, *vectors: Tensor | None) -> None:
    """Raises if one of `VECTORS` does not hold one number of a floating dtype a channel."""
    dtype = x.dtype
    try:
        fitting = (x.shape[1] if x.dim() > 1 else 0,)
        for vector in vectors:
            if vector is not None and (
                vector.shape != fitting
                or (vector.dtype is not dtype and not vector.is_floating_point())
            ):
                break
        else:
            return
    except (AttributeError, RuntimeError):  # No tensor; a nested tensor has no shape.
        check_dense(x=x)
    for name, vector in zip(VECTORS, vectors, strict=True):
        if vector is not None:
            _check_vector(x, name, vector)


def _check_vector(x: Tensor, name: str, vector: Tensor) -> None:
    if not isinstance(vector, Tensor):
        raise TypeError(
            f"batch_norm expects {name} as a tensor or None, got {type(vector).__name__}."
        )
    check_dense(x=x, **{name: vector})
    channels = x.shape[1] if x.dim() > 1 else 0
    if vector.shape != (channels,):
        raise RuntimeError(
            f"{name} should contain {channels} elements, one a channel (dimension 1 of the "
            f"input of shape {tuple(x.shape)}), got shape {tuple(vector.shape)}{_hint(x, vector)}."
        )
    if not vector.is_floating_point():
        raise RuntimeError(
            f"{name} must be of a floating dtype, got {vector.dtype}; convert it with "
            f"{name}.to(torch.float32)."
        )


def check_devices(x: Tensor, *vectors: Tensor | None) -> None:
    """Raises if one of `VECTORS` is on another device; the direct route takes the CPU's alone."""
    for name, vector in zip(VECTORS, vectors, strict=True):
        if vector is not None and vector.device != x.device:
            raise RuntimeError(
                f"{name} must be on the input's device {x.device}, got {vector.device}."
            )


def check_dense(**tensors: Tensor | None) -> None:
    """Raises if a tensor is no ordinary array; such a tensor never takes the direct route."""
    for name, tensor in tensors.items():
        if tensor is None or (tensor.layout == torch.strided and not tensor.is_nested):
            continue
        kind, remedy = f"layout {tensor.layout}", f"convert it with {name}.to_dense()"
        if tensor.is_nested:
            kind, remedy = "a nested tensor", "concatenate its parts along their common dimensions"
        raise NotImplementedError(
            f"batch_norm expects {name} as a dense tensor, got {kind}; {remedy}."
        )


def check_statistics(
    running_mean: Tensor | None, running_var: Tensor | None, *, training: bool
) -> None:
    """Raises if only one of the two is given, or none where inference needs them."""
    if not training and (running_mean is None or running_var is None):
        raise RuntimeError(
            "running_mean and running_var must be defined in evaluation mode, got None; "
            "give them, or set training=True to normalize by the batch's own statistics."
        )
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(
            "running_mean and running_var must either both be None or neither be None, "
            f"got None for {missing}."
        )


def check_residual(x: Tensor, residual: Tensor | None) -> None:
    """Raises if the residual cannot be added element by element."""
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError(
            f"batch_norm expects residual as a tensor or None, got {type(residual).__name__}."
        )
    for rule in ("shape", "dtype", "device"):
        expected, got = getattr(x, rule), getattr(residual, rule)
        if expected != got:
            expected, got = (tuple(v) if rule == "shape" else v for v in (expected, got))
            raise RuntimeError(f"residual must have the input's {rule} {expected}, got {got}.")


def check_training(x: Tensor, momentum: float | Tensor | None) -> None:
    """Raises if the batch's own statistics cannot normalize it, or not move the running ones."""
    if momentum is None:
        raise TypeError(
            "batch_norm expects momentum as a number or a 0-d tensor, got None; for the cumulative "
            "average pass 1 / (num_batches_tracked + 1)."
        )
    if x.numel() == x.shape[1]:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input size "
            f"{tuple(x.shape)}; use a larger batch, freeze the layer, or call eval()."
        )


def refuse_to_learn(running_mean: Tensor) -> None:
    """Raises because a running statistic requires a gradient in training."""
    name = "running_mean" if running_mean.requires_grad else "running_var"
    raise RuntimeError(
        f"batch_norm: {name} requires a gradient, but training changes it in place and the "
        f"output does not depend on it; pass {name}.detach()."
    )


def check_tangents(x: Tensor, running_mean: Tensor, running_var: Tensor) -> None:
    """Raises if training would have to push tangents of ``x`` into those of the statistics."""
    if not torch_internals.has_tangent(x):
        return
    for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
        if torch_internals.has_tangent(buffer):
            raise RuntimeError(
                f"batch_norm: the input and {name} have forward-mode tangents, but training does "
                f"not differentiate the update of {name}; pass it without a tangent."
            )


def _hint(x: Tensor, vector: Tensor) -> str:
    """Names the dimension that was probably meant, if there is one."""
    fitting = [dim for dim in range(2, x.dim()) if x.shape[dim] == vector.numel()]
    if vector.dim() != 1 or not fitting:
        return ""
    return f"; dimension {fitting[0]} has size {vector.numel()}, but channels are dimension 1"
