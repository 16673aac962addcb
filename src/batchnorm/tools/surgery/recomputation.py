"""Forwards that run again during a backward pass, and batch norm layers that then stay quiet."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from batchnorm.tools.surgery.changes import on_copies


def is_recomputing() -> bool:
    """Whether this thread is in a backward pass, so that a forward is one that runs again.

    Source:
        ``torch.utils.checkpoint`` and ``torch.utils.module_tracker`` ask the same.
    """
    return torch._C._current_graph_task_id() != -1


@contextmanager
def quiet(function: Any) -> Iterator[None]:
    """Whatever batch norm layers are called in this thread meanwhile update only copies.

    Which layers a function calls is seen when it calls them, by a hook on all modules that looks
    and does nothing to the modules of others.

    Args:
        function: What will be called. Only of a module, or a method of one, more is used than that
            it can be called: its layers are quiet although nobody calls the module itself.
    """
    with ExitStack() as changes:
        quieting = Quieting(changes)
        owner = getattr(function, "__self__", function)
        if isinstance(owner, nn.Module):
            quieting(owner)
        handle = register_module_forward_pre_hook(quieting)
        try:
            yield
        finally:
            handle.remove()


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
