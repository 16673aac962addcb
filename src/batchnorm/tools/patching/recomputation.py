"""Forwards that run again during a backward pass, and batch norm layers that must not count them.

Activation checkpointing calls functions again: in the backward pass, or, rarely, when code reads a
tensor that an operator saved (``grad_fn._saved_...``). Layers then work on copies of their
statistics.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from batchnorm.tools.patching.attributes import is_temporary
from batchnorm.tools.patching.buffers import work_on_copies
from batchnorm.tools.patching.statistics import is_batch_norm
from batchnorm.torch_internals import backward_pass_id, when_backward_pass_ends


def is_recomputing() -> bool:
    """Tells if this thread is in a backward pass, so a forward pass now repeats an earlier one."""
    return backward_pass_id() != -1


def is_repeated(layer: nn.Module) -> bool:
    """Tells if a call of the layer now repeats an earlier one; always False in compiled code."""
    if torch.compiler.is_compiling():
        return False
    return is_recomputing() or is_temporary(layer, "running_mean", "moving_mean")


@contextmanager
def updates_suppressed(function: Any) -> Iterator[None]:
    """Lets all batch norm layers that this thread calls in the block update copies only.

    A hook on all modules sees which layers are called. In a backward pass it stays until the pass
    ends, because checkpoints inside ``function`` run again later than the function does.

    Args:
        function: The function that the block calls. Of a module, or of a method's module, the
            layers are taken at once, although nobody calls the module itself.
    """
    owner = getattr(function, "__self__", function)
    with ExitStack() as stack:
        hook = _hook_of_this_pass() if is_recomputing() else RecomputationHook(stack)
        if isinstance(owner, nn.Module):
            hook(owner)
        yield


class RecomputationHook:
    """A hook on all modules: layers of the modules that this thread calls work on copies.

    It takes all layers in a module at once, because a fused block does not call its layers.

    Args:
        stack: Removes the hook and the copies when it is closed.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._thread = threading.get_ident()
        self._seen: set[nn.Module] = set()
        stack.callback(register_module_forward_pre_hook(self).remove)

    def __call__(self, module: nn.Module, *_: Any) -> None:
        """Gives copies to the layers in ``module`` that it has not met yet."""
        if threading.get_ident() != self._thread or module in self._seen:
            return
        new = [part for part in module.modules() if part not in self._seen]
        self._seen.update(new)
        layers = [part for part in new if is_batch_norm(part)]
        if layers:
            self._stack.enter_context(work_on_copies(layers))


_hooks: dict[tuple[int, int], RecomputationHook] = {}
"""The hooks of backward passes that are going on, by the pass and the thread."""


def _hook_of_this_pass() -> RecomputationHook:
    place = backward_pass_id(), threading.get_ident()
    if place not in _hooks:
        stack = ExitStack()
        stack.callback(_hooks.pop, place)
        _hooks[place] = RecomputationHook(stack)

        def marker() -> None:
            """Empty marker. The autograd engine drops it when the backward pass ends.

            The engine calls it only after a pass that succeeds, and gives no other sign of the end
            of one that fails. But it drops it in both cases, and the finalizer then restores the
            layers.
            """

        weakref.finalize(marker, stack.close)
        when_backward_pass_ends(marker)
    return _hooks[place]
