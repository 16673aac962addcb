"""Activation checkpointing that updates running statistics once.

``torch.utils.checkpoint`` calls a function again during the backward pass, and batch norm layers in
it count that as one more batch. Here they work on copies of their statistics whenever a call is a
recomputation. That they track at all must not change: torch's layers save their buffers for
backward, and torch compares what both calls save.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint
from torch import nn

from batchnorm.tools.patching.buffers import work_on_copies
from batchnorm.tools.patching.handle import Handle
from batchnorm.tools.patching.methods import ReplacedMethod, install
from batchnorm.tools.patching.recomputation import is_recomputing, updates_suppressed
from batchnorm.tools.patching.selection import Choice, batch_norms


def checkpoint(
    function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any
) -> Any:
    """``function(*args, **kwargs)``, whose activations are computed again in the backward pass.

    A drop-in for ``torch.utils.checkpoint.checkpoint``: outputs and gradients are the same, and
    running statistics and counters are those of a step without checkpointing. The function may be
    a module, a method or any closure: which batch norm layers it calls is seen when it runs again.
    It costs what torch's costs, one more forward, and a hook on module calls meanwhile.

    From the first function that runs again to the end of that backward pass, every layer that its
    thread calls counts as recomputed: so do torch's own checkpoints inside of the function. The
    recomputed layers work on copies then; what another thread trains on the same model in that time
    moves no statistics.

    Args:
        function: What to call; batch norm layers in it must be called, or be in a module that is.
        *args: Its arguments.
        use_reentrant: Which of torch's two kinds; see there.
        **kwargs: Torch's options (``preserve_rng_state``, ``context_fn``, ``determinism_check``,
            ``debug``, ``early_stop``), and keyword arguments of the function if not reentrant.

    Returns:
        What the function returns.

    Raises:
        ValueError: An option is for the other kind; torch's own message.
    """
    return torch.utils.checkpoint.checkpoint(
        _Rerun(function), *args, use_reentrant=use_reentrant, **kwargs
    )


def count_recomputation_once(model: nn.Module, layers: Choice = None) -> Handle:
    """For code that calls torch's checkpoint itself: batch norm layers update once all the same.

    Works for both kinds of checkpoints, wherever they are called, until the handle is removed; a
    copy of the model does the same for good. A layer that is called during a backward pass counts
    as recomputed; what another thread trains on that layer during the call is lost. Costs nothing
    measurable, but an accelerated block calls its layers one by one meanwhile. Not for
    ``DataParallel``, which copies the layers at each call.

    Args:
        model: Any module.
        layers: Which of its batch norm layers; None for all.

    Returns:
        A handle: ``remove()`` it, or use it in a ``with`` statement around forward and backward.

    Raises:
        TypeError: ``model`` is not a module, or ``layers`` is one string.
        ValueError: A name fits no layer, or a layer is lazy.
    """
    chosen = batch_norms(model, layers, caller="count_recomputation_once")
    return install(_UpdatesOnce(layer) for layer in chosen.values())


class _UpdatesOnce(ReplacedMethod):
    """Works on copies during a backward pass, which is where recomputations run."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if not is_recomputing():
            return self.original(*args, **kwargs)
        with work_on_copies([self.module]):
            return self.original(*args, **kwargs)


class _Rerun:
    """A function that is quiet whenever it runs again.

    That is not only during a backward pass: torch also recomputes when somebody looks at what an
    operator saved. And the first call may itself be in the recomputation of an outer checkpoint.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._has_run = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runs_again = self._has_run or is_recomputing()
        self._has_run = True
        if not runs_again:
            return self._function(*args, **kwargs)
        with updates_suppressed(self._function):
            return self._function(*args, **kwargs)
