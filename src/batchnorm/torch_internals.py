"""Private names of torch, each behind a function of ours: the only file that uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def backward_pass_id() -> int:
    """Identifies the backward pass that this thread is in; -1 outside of one.

    Source:
        ``torch.utils.checkpoint`` and ``torch.utils.module_tracker`` ask the same.
    """
    return torch._C._current_graph_task_id()


def when_backward_pass_ends(callback: Callable[[], None]) -> None:
    """Has ``callback`` called at the end of the backward pass that this thread is in.

    Autograd does not call it if the pass fails, but drops it in either case.

    Source:
        ``DistributedDataParallel`` and FSDP finish their work in this way.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def has_hooks(module: nn.Module) -> bool:
    """Tells if somebody listens to calls of this module, or to its gradients."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def global_hooks() -> list[Any]:
    """Returns the hooks that run for every module; asked at each call of a fused block."""
    if not torch_module._has_any_global_hook():
        return []
    kinds = [getattr(torch_module, f"_global{hooks}") for hooks in _HOOKS]
    return [hook for kind in kinds for hook in kind.values()]
