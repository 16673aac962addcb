"""Buffers that return to what they were: by values, or by tensors that stand in for a while.

`SavedBuffers` writes saved values into the same tensors; it is for changes that fail. Stand-in
tensors (`work_on_copies`, `StandInBuffers`) leave the layers' own buffers untouched; they are for
changes that may count or not, because nothing that autograd has saved changes with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from batchnorm.tools.patching.attributes import temporary_attributes
from batchnorm.tools.patching.handle import Handle
from batchnorm.tools.patching.statistics import get_state, put_state, state_of


class SavedTensors:
    """Values of tensors, to be written back into the same tensors.

    Args:
        tensors: The tensors; each costs a copy.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._saved = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def restore(self) -> None:
        """Writes the values back, bit for bit.

        Autograd does not notice: torch saves buffers for backward without need in training, and
        would refuse the backward of a step whose buffers are written.
        """
        for tensor, value in self._saved:
            target = tensor.data
            strides = target.stride() if target.layout is torch.strided else ()
            for dim, stride in enumerate(strides):
                if stride == 0 and target.shape[dim] > 1:  # Expanded: all elements are one.
                    target, value = target.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
            target.copy_(value)


class SavedBuffers:
    """The buffers of modules and their values, to be put back into the same places.

    Tensors that a look-alike keeps as ordinary attributes count as buffers (`state_of`).

    Args:
        modules: The modules; of each its own buffers, not those of its children.
        names: Only buffers of these names; None for all.
    """

    def __init__(self, modules: Iterable[nn.Module], names: Collection[str] | None = None) -> None:
        self._places = [
            (module, name, buffer)
            for module in modules
            for name, buffer in state_of(module)
            if names is None or name in names
        ]
        self._values = SavedTensors(buffer for *_, buffer in self._places)

    def restore(self) -> None:
        """Gives the modules the same tensors with the same values."""
        for module, name, buffer in self._places:
            put_state(module, name, buffer)
        self._values.restore()

    def restore_where(self, condition: Tensor) -> None:
        """Writes the values back if ``condition`` holds, without waiting for the device.

        They go into the buffers that the modules have now. What has another shape now stays.

        Args:
            condition: One boolean, on the device of the buffers.
        """
        saved = (value for _, value in self._values._saved)
        for (module, name, old), value in zip(self._places, saved, strict=True):
            buffer = get_state(module, name)
            if buffer is None or buffer.shape != value.shape:
                continue
            restored = torch.where(condition, value, buffer)
            if buffer is old or name in module._buffers:
                buffer.data.copy_(restored)
            else:  # An attribute that was set in between may be somebody else's tensor.
                put_state(module, name, restored)


def work_on_copies(modules: Iterable[nn.Module]) -> Handle:
    """Lets modules work on copies of their buffers for a while; the copies are dropped at the end.

    Unlike ``track_running_stats=False`` this changes nothing of what autograd saves. Updates by
    another thread during that time are dropped with the copies.
    """
    with ExitStack() as stack:
        for module in modules:
            copies = {name: _copy(b) for name, b in state_of(module)}
            stack.enter_context(temporary_attributes([module], **copies))
        return Handle(stack.pop_all().close)


class StandInBuffers:
    """Copies of buffers that modules work on until it is decided whether the changes count.

    Torch's layers let autograd save the buffers themselves. Because nobody writes into a copy that
    was rolled back, graphs from before and graphs from inside both keep the values that they were
    computed with. A buffer that several modules share has one copy.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._own: dict[tuple[nn.Module, str], Tensor | None] = {
            (module, name): buffer for module in modules for name, buffer in state_of(module)
        }
        self._install()

    def follow(self, old: nn.Module, new: nn.Module) -> None:
        """Decides about the buffers of a layer, too, that was rebuilt with those of another."""
        for (module, name), own in list(self._own.items()):
            if module is old:
                self._own[new, name] = own
                self._stand_ins[new, name] = self._stand_ins[old, name]

    def commit(self) -> None:
        """Copies the current values into the modules' own buffers; a rollback returns to them."""
        for (module, name), own in self._own.items():
            now = get_state(module, name)
            stays = name in module._buffers or now is self._stand_ins[module, name]
            if own is not None and now is not None and _is_alike(own, now) and stays:
                own.data.copy_(now)
            else:
                self._own[module, name] = None if now is None else _copy(now)

    def rollback(self) -> None:
        """Returns to the last commit and gives the modules fresh copies to work on."""
        self._return_own()
        self._install()

    def end(self, *, commit: bool) -> None:
        """Gives the modules their own buffers again.

        Args:
            commit: Copies the current values into them first. A buffer that somebody assigned in
                the place of a copy then stays, as it would have without one.
        """
        if not commit:
            self._return_own()
            return
        for (module, name), own in self._own.items():
            stand_in = self._stand_ins[module, name]
            if own is None or stand_in is None:
                continue
            if get_state(module, name) is stand_in:
                own.data.copy_(stand_in)
                put_state(module, name, own)

    def _install(self) -> None:
        copies = {own: _copy(own) for own in self._own.values() if own is not None}
        self._stand_ins = {p: own if own is None else copies[own] for p, own in self._own.items()}
        for (module, name), stand_in in self._stand_ins.items():
            put_state(module, name, stand_in)

    def _return_own(self) -> None:
        """Gives modules their own buffers, moved or cast as the modules were in between."""
        for (module, name), own in self._own.items():
            now = get_state(module, name)
            if own is not None and now is not None:
                own = own.to(now.device, now.dtype)
            self._own[module, name] = own
            put_state(module, name, own)


def _copy(buffer: Tensor) -> Tensor:
    """A copy that autograd may save, also if the caller is in inference mode."""
    with torch.inference_mode(False):
        return buffer.detach().clone()


def _is_alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
