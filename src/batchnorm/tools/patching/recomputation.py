"""Forwards that run again during a backward pass, and batch norm layers that then stay quiet."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from batchnorm.tools.patching.changes import is_changed, on_copies


def is_recomputing() -> bool:
    """Whether this thread is in a backward pass, so that a forward is one that runs again.

    Source:
        ``torch.utils.checkpoint`` and ``torch.utils.module_tracker`` ask the same.
    """
    return torch._C._current_graph_task_id() != -1


def runs_again(layer: _BatchNorm) -> bool:
    """Whether a call of the layer now is one that has been before; not asked in compiled code."""
    if torch.compiler.is_compiling():
        return False
    return is_recomputing() or is_changed(layer, "running_mean")


@contextmanager
def quiet(function: Any) -> Iterator[None]:
    """Whatever batch norm layers are called in this thread meanwhile update only copies.

    Which layers a function calls is seen when it calls them, by a hook on all modules that looks
    and does nothing to the modules of others. In a backward pass it goes on to the end of that
    pass, because checkpoints inside of the function run again later than the function does.

    Args:
        function: What will be called. Only of a module, or a method of one, more is used than that
            it can be called: its layers are quiet although nobody calls the module itself.
    """
    owner = getattr(function, "__self__", function)
    with ExitStack() as changes:
        quieting = _quieting_of_this_pass() if is_recomputing() else _begun(changes)
        if isinstance(owner, nn.Module):
            quieting(owner)
        yield


class Quieting:
    """A hook on all modules: it quiets the batch norm layers in each module called in this thread.

    The layers of a whole module are taken at once, because a fused block does not call its layers.
    """

    def __init__(self, changes: ExitStack) -> None:
        self._changes = changes
        self._thread = threading.get_ident()
        self._seen: set[nn.Module] = set()

    def __call__(self, module: nn.Module, *_: Any) -> None:
        """Quiets what is in ``module`` and has not been met yet."""
        if threading.get_ident() != self._thread or module in self._seen:
            return
        new = [part for part in module.modules() if part not in self._seen]
        self._seen.update(new)
        layers = [part for part in new if isinstance(part, _BatchNorm)]
        if layers:
            self._changes.enter_context(on_copies(layers))


_of_passes: dict[tuple[int, int], Quieting] = {}


def _begun(changes: ExitStack) -> Quieting:
    quieting = Quieting(changes)
    changes.callback(register_module_forward_pre_hook(quieting).remove)
    return quieting


def _quieting_of_this_pass() -> Quieting:
    """One for a backward pass and thread; it ends with the pass, also with one that fails.

    Autograd calls what is queued only after a pass that succeeds, but always lets go of it.
    """
    place = torch._C._current_graph_task_id(), threading.get_ident()
    if place not in _of_passes:
        changes = ExitStack()
        changes.callback(_of_passes.pop, place)
        _of_passes[place] = _begun(changes)

        def end() -> None:
            """Nothing; that it is gone says that the pass is over."""

        weakref.finalize(end, changes.close)
        torch.autograd.Variable._execution_engine.queue_callback(end)
    return _of_passes[place]
