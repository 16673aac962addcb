"""Private names of torch, each behind a function of ours: the only file that uses them."""

from __future__ import annotations

from collections.abc import Callable

import torch


def backward_pass_id() -> int:
    """Identifies the backward pass that this thread is in; -1 outside of one.

    Source:
        ``torch.utils.checkpoint`` and ``torch.utils.module_tracker`` ask the same.
    """
    return torch._C._current_graph_task_id()


def when_backward_pass_ends(callback: Callable[[], object]) -> None:
    """Has ``callback`` called at the end of the backward pass that this thread is in.

    Autograd does not call it if the pass fails, but drops it in either case.

    Source:
        ``DistributedDataParallel`` and FSDP finish their work in this way.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)
