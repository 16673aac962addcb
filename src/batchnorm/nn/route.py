"""The one place that decides how a call is computed: its *route*.

There are four. The route says how torch gets to the numbers; `batchnorm.kernels.dispatch` says
which backend makes them.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn

from batchnorm import torch_internals
from batchnorm.kernels import dispatch
from batchnorm.nn import validation
from batchnorm.nn.sharding import is_sharded

_ORDINARY = (Tensor, nn.Parameter)


class Route(Enum):
    """The ways in which torch gets to the numbers of a call.

    Attributes:
        DIRECT: Python calls a backend, inside a `torch.autograd.Function` where gradients are
            recorded. For ordinary CPU tensors in eager mode, for which torch's dispatcher has
            nothing to do and costs more than a small kernel.
        OPERATOR: ``torch.ops.batchnorm.forward`` and ``.backward``, which call a backend when they
            run. For everything that torch has to see: compiled code, fake tensors, subclasses,
            other devices.
        FORMULA: The reference's formula in ordinary torch operations, differentiable to any order.
            For ``torch.func`` transforms, forward mode, gradients of gradients and tensors spread
            over processes (``docs/decisions/0002-higher-derivatives.md``).
        ATEN: ``torch.nn.functional.batch_norm``; the formula where torch's does not take the
            dtypes. For graphs that run without this library, or that a compiler fuses
            (``docs/decisions/0003-exported-programs-hold-aten-only.md``).
    """

    DIRECT = "direct"
    OPERATOR = "operator"
    FORMULA = "formula"
    ATEN = "aten"


def choose(
    *tensors: Tensor | None,
    backend: str | None = None,
    training: bool = True,
    differentiable: bool = False,
) -> Route:
    """Chooses the route of a call.

    Args:
        *tensors: The tensors that the call reads or changes.
        backend: The backend that the user named; a graph then holds our operator, which obeys it.
        training: True if the batch's own statistics normalize.
        differentiable: True if torch has to differentiate what the call does, as in a backward
            pass with ``create_graph=True``.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and backend is None and (torch.compiler.is_exporting() or not training):
        return Route.ATEN
    if differentiable and not compiling:
        return Route.FORMULA
    if not compiling and _may_skip_dispatcher(tensors):
        return Route.DIRECT
    if torch_internals.is_transformed() or any(map(is_sharded, tensors)):
        return Route.FORMULA
    recorded = not compiling and (torch_internals.is_traced() or torch_internals.is_made_fx())
    return Route.ATEN if backend is None and recorded else Route.OPERATOR


def _may_skip_dispatcher(tensors: tuple[Tensor | None, ...]) -> bool:
    """Tells if torch's dispatcher has nothing to do for these tensors in eager mode.

    The dispatcher is needed while a mode or a tracer records, under a transform, and for a tensor
    that is a subclass, is not on the CPU, wraps another tensor (as in
    ``torch.autograd.grad(..., is_grads_batched=True)``) or has its negative bit set.
    """
    if (
        not torch_internals.KNOWS_TRANSFORMS
        or torch_internals.is_recorded()
        or torch_internals.is_transformed()
    ):
        return False
    has_storage = torch_internals.has_storage
    for tensor in tensors:
        if tensor is not None and not (
            type(tensor) in _ORDINARY
            and tensor.is_cpu
            and has_storage(tensor)
            and not tensor.is_neg()
        ):
            return False
    return True


def may_read(*tensors: Tensor) -> bool:
    """Tells if the values of tensors are there to be looked at, and without waiting for a device.

    In compiled code and while something records, the look itself would become a part of the graph.
    """
    if torch.compiler.is_compiling() or torch_internals.is_recorded():
        return False
    return all(tensor.is_cpu for tensor in tensors)


def obstacle_to_speed(x: Tensor) -> str | None:
    """Returns why no fast backend computes ``x``, so that the reference would, or None."""
    return dispatch.refusal(x)


def which_backend(x: Tensor, backend: str | None = None, *, training: bool = True) -> str:
    """Says who computes ``x``; if the fast kernels do not, also why.

    It answers for the place where it is called: inside ``torch.func.grad``, for example, it names
    the formula.

    Args:
        x: The input, (N, C, ...). Parameters and statistics are taken to be ordinary tensors.
        backend: ``"numba"``, ``"reference"``, or None for the choice of the library.
        training: True if the layer is in training mode; in compiled code that makes a difference.

    Returns:
        One to three sentences.

    Raises:
        TypeError: ``x`` is not a tensor.
        NotImplementedError: ``x`` is not of a floating dtype.
        IndexError: ``x`` has no channel dimension.
        ValueError: There is no backend of that name.
        RuntimeError: It cannot take ``x``; the message says why.

    Example:
        >>> import torch, batchnorm
        >>> x = torch.zeros(8, 16, 30, 30, device="meta")
        >>> print(batchnorm.which_backend(x, "reference"))
        The reference computes this input, in eager torch and float64. torch calls it through the \
operator torch.ops.batchnorm.forward.
    """
    validation.check_input(x)
    if x.numel() == 0:
        return "Nothing computes this input, because it is empty."
    route = choose(x, backend=backend, training=training)
    if route is Route.FORMULA:
        reason = reason_for_formula(x)
        dispatch.require_reference(backend, reason)
        return (
            f"The reference's formula computes this input, in ordinary torch operations: {reason}."
        )
    if route is Route.ATEN:
        return (
            "torch's own operations compute this input, because it is compiled, exported or traced."
        )
    text = dispatch.describe(x, backend)
    if route is Route.DIRECT:
        return text
    return f"{text} torch calls it through the operator torch.ops.batchnorm.forward."


def reason_for_formula(x: Tensor) -> str:
    """Says why the formula computes ``x`` and not a backend."""
    return "it is a DTensor" if is_sharded(x) else IN_TRANSFORM


LEARNED = "its running statistics require a gradient"
IN_TRANSFORM = "it is inside a transform (torch.func, vmap or forward mode)"
