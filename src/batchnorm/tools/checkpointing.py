"""Activation checkpointing that counts each batch once in the running statistics.

``torch.utils.checkpoint`` calls a function again during the backward pass, and batch norm layers
in it count that as one more batch. Here they work on copies of their statistics whenever a call is
a recomputation. They must not stop tracking instead: torch's layers save their buffers for
backward, and torch compares what both calls save.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from batchnorm.tools.patching import (
    Handle,
    InheritedMethod,
    LayerSelection,
    batch_norms,
    install_inherited,
    is_recomputing,
    updates_suppressed,
    work_on_copies,
)
from batchnorm.torch_internals import is_exporting


def checkpoint(
    function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any
) -> Any:
    """Calls ``function(*args, **kwargs)``, and computes its activations again in backward.

    A drop-in for ``torch.utils.checkpoint.checkpoint``: outputs and gradients are the same, and
    running statistics and counters are those of a step without checkpointing. The function may be
    a module, a method or any closure: the batch norm layers that it calls are found when it runs
    again. It costs what torch's costs, one more forward, and a hook on module calls during that.

    From the first function that runs again to the end of that backward pass, every layer that its
    thread calls counts as recomputed, also in torch's own checkpoints inside the function. The
    recomputed layers work on copies; a training step that another thread takes on the same model in
    that time moves no statistics.

    Args:
        function: The function; batch norm layers in it must be called, or be in a module that is.
        *args: Its arguments.
        use_reentrant: Selects one of torch's two kinds; see there.
        **kwargs: Torch's options (``preserve_rng_state``, ``context_fn``, ``determinism_check``,
            ``debug``, ``early_stop``), and keyword arguments of the function if not reentrant.

    Returns:
        The result of the function.

    Raises:
        ValueError: An option is for the other kind; torch's own message.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from batchnorm import checkpoint
        >>> block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
        >>> checkpoint(block, torch.randn(8, 4)).sum().backward()
        >>> int(block[1].num_batches_tracked)
        1
    """
    return torch.utils.checkpoint.checkpoint(
        _Rerun(function), *args, use_reentrant=use_reentrant, **kwargs
    )


def count_recomputation_once(model: nn.Module, layers: LayerSelection = None) -> Handle:
    """Lets layers count a batch once where the code calls torch's own checkpoint.

    Works for both kinds of checkpoints, wherever they are called, until the handle is removed; a
    copy of the model keeps doing so. A layer that is called during a backward pass counts as
    recomputed; updates of that layer by another thread during the call are lost. Costs nothing
    measurable, but an accelerated block calls its layers one by one. Not for ``DataParallel``,
    which copies the layers at each call. A layer that is rebuilt (``convert_sync_batchnorm``) goes
    on counting once.

    Compiled code has a graph break at each layer, because it is known only at run time if a
    backward pass runs; ``torch.compile(fullgraph=True)`` raises torch's error for it. There, call
    ``torch.utils.checkpoint`` inside the compiled function, which counts a batch once by itself.

    Args:
        model: Any module.
        layers: The layers that count once; None for all.

    Returns:
        A handle: call ``remove()``, or use it in a ``with`` statement around forward and backward.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A name fits no layer, or a layer is lazy.

    Warns:
        RuntimeWarning: There is no batch norm layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.checkpoint import checkpoint
        >>> from batchnorm import count_recomputation_once
        >>> block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
        >>> with count_recomputation_once(block):
        ...     checkpoint(block, torch.randn(8, 4), use_reentrant=False).sum().backward()
        >>> int(block[1].num_batches_tracked)
        1
    """
    chosen = batch_norms(model, layers, caller="count_recomputation_once")
    return install_inherited(_CountOnce(layer) for layer in chosen.values())


class _CountOnce(InheritedMethod):
    """Works on copies during a backward pass, which is where recomputations run."""

    tool = "count_recomputation_once"

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if is_exporting():
            return self.original(*args, **kwargs)
        is_rerun = _asked_at_run_time() if torch.compiler.is_compiling() else is_recomputing()
        if not is_rerun:
            return self.original(*args, **kwargs)
        with work_on_copies([self.module]):
            return self.original(*args, **kwargs)


@torch.compiler.disable(
    reason="count_recomputation_once needs a graph break at each layer, because it is known only "
    "at run time if a backward pass runs; compile without fullgraph=True."
)
def _asked_at_run_time() -> bool:
    return is_recomputing()


class _Rerun:
    """A function that updates no statistics when it runs again.

    That is not only during a backward pass: torch also recomputes when code reads a tensor that an
    operator saved (``grad_fn._saved_...``). And the first call may itself be in the recomputation
    of an outer checkpoint.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._has_run = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_rerun = self._has_run or is_recomputing()
        self._has_run = True
        if not is_rerun:
            return self._function(*args, **kwargs)
        with updates_suppressed(self._function):
            return self._function(*args, **kwargs)
