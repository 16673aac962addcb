"""Which kernels take a tensor: the fastest that can, or the ones asked for by name."""

from __future__ import annotations

import importlib.util

from torch import Tensor

from batchnorm.kernels import reference
from batchnorm.kernels.contract import Backend

NAMES = ("numba", "reference")


# Imported now and not in the first call that needs it.
try:
    from batchnorm.kernels import numba_cpu
except Exception as error:  # Also what a broken installation raises.
    numba_cpu, _missing = None, f"numba cannot be imported: {error}"
    if importlib.util.find_spec("numba") is None:
        _missing = "numba is not installed; pip install 'batchnorm[cpu]'"
else:
    _missing = None


def choose(x: Tensor, name: str | None = None) -> Backend:
    """The kernel module that will compute ``x``.

    Args:
        x: The input, (N, C, ...).
        name: A name in `NAMES`, obeyed or refused, never replaced; None chooses.

    Raises:
        ValueError: There are no kernels of that name.
        RuntimeError: They cannot take ``x``; the message says why.
    """
    if name is None:
        if numba_cpu is None or numba_cpu.refusal(x) is not None:
            return reference
        return numba_cpu
    backend, reason = _by_name(name)
    if backend is not None:
        reason = backend.refusal(x)
        if reason is None:
            return backend
    raise RuntimeError(f"backend={name!r} cannot take this input: {reason}.")


def refuse(name: str | None, reason: str) -> None:
    """Raises if other kernels than the reference are asked for, where only that will do.

    Raises:
        ValueError: There are no kernels of that name.
        RuntimeError: They are not the reference.
    """
    if name is not None and _by_name(name)[0] is not reference:
        raise RuntimeError(
            f"backend={name!r} cannot take this input: {reason}, and that needs the reference; "
            "leave backend out."
        )


def which_backend(x: Tensor, backend: str | None = None) -> str:
    """Who computes ``x`` and in what way, or why the fast kernels cannot; one or two sentences.

    Args:
        x: The input, (N, C, ...).
        backend: A name in `NAMES`; None chooses.

    Raises:
        ValueError: There are no kernels of that name.
        RuntimeError: They cannot take ``x``; the message says why.
    """
    chosen = choose(x, backend)
    if numba_cpu is not None and chosen is numba_cpu:
        return numba_cpu.describe(x)
    text = "The reference computes this input, in eager torch and float64."
    if backend is not None:
        return text
    reason = _missing if numba_cpu is None else numba_cpu.refusal(x)
    return f"{text} The Numba kernels cannot: {reason}."


def _by_name(name: str) -> tuple[Backend | None, str | None]:
    """The kernels of that name, or None and why there are none."""
    if name == "numba":
        return numba_cpu, _missing
    if name == "reference":
        return reference, None
    raise ValueError(f"backend must be None or one of {', '.join(NAMES)}, got {name!r}.")
