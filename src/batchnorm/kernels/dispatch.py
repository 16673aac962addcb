"""Which kernels take a tensor: the fastest that can, or the ones asked for by name."""

from __future__ import annotations

from torch import Tensor

from batchnorm.kernels import reference
from batchnorm.kernels.contract import Stages

NAMES = ("reference",)


def choose(x: Tensor, name: str | None = None) -> Stages:
    """The kernel module that will compute ``x``.

    Args:
        x: The input, (N, C, ...).
        name: A name in `NAMES`, obeyed or refused, never replaced; None chooses.

    Raises:
        ValueError: There are no kernels of that name.
        RuntimeError: They cannot take ``x``; the message says why.
    """
    if name is None:
        return reference
    kernels = _by_name(name)
    reason = kernels.refusal(x)
    if reason is not None:
        raise RuntimeError(f"kernels={name!r} cannot take this input: {reason}.")
    return kernels


def _by_name(name: str) -> Stages:
    if name == "reference":
        return reference
    raise ValueError(f"kernels must be None or one of {', '.join(NAMES)}, got {name!r}.")
