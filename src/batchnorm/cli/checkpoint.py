"""Checkpoints of users: read without running code in them, changed in place, written whole."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.files import whole_file

TORCH = (".pt", ".pth")
SAFETENSORS = ".safetensors"
_PLACES = ("state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")


class CheckpointError(ValueError):
    """A file that cannot be used; the message is one sentence."""


@dataclass(frozen=True)
class Checkpoint:
    """A file that holds a ``state_dict``.

    Attributes:
        path: Where it was read.
        content: All of it.
        state: The part that is the ``state_dict``, the same object.
        metadata: Of a safetensors file.
    """

    path: Path
    content: Any
    state: dict[str, Any]
    metadata: dict[str, str] | None

    def load_into(self, model: nn.Module) -> None:
        """Gives the model what the checkpoint holds; counters may be missing, as in old files.

        Raises:
            CheckpointError: It does not fit the model.
        """
        names = self._names_in(model)
        try:
            missing, unexpected = model.load_state_dict(
                {names[key]: value for key, value in self.state.items()}, strict=False
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip().rstrip(".")
            raise CheckpointError(f"{self.path} does not fit the model: {reason}.") from error
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
        for keys, what in ((missing, "lacks"), (unexpected, "holds, beyond the model,")):
            if keys:
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                raise CheckpointError(
                    f"{self.path} does not fit the model: it {what} {keys[0]}{more}; "
                    "name the factory of this very model."
                )

    def take_statistics(self, model: nn.Module, layers: Iterable[str]) -> None:
        """Takes the statistics of some layers; everything else stays the object that it was.

        Args:
            model: Its shape is that of the checkpoint.
            layers: Their names; what shares their buffers under other names is taken, too.

        Raises:
            CheckpointError: A number is too large for the dtype in the file.
        """
        new = {id(tensor) for name in layers for tensor in model.get_submodule(name).buffers()}
        current = model.state_dict(keep_vars=True)
        names = self._names_in(model)
        for key, old in self.state.items():
            tensor = current.get(names[key])
            if id(tensor) in new and tensor is not None:
                value = tensor.detach().to(old.dtype, copy=True)
                if not value.isfinite().all():
                    raise CheckpointError(
                        f"{self.path}: the new {key} is too large for {old.dtype}."
                    )
                self.state[key] = value

    def _names_in(self, model: nn.Module) -> dict[str, str]:
        """The model's name of each key; either side may be wrapped, and the other not."""
        ours, theirs = _prefix(self.state), _prefix(model.state_dict())
        return {key: theirs + key.removeprefix(ours) for key in self.state}

    def write(self, path: Path) -> None:
        """Writes all of it, whole or not at all, in the format in which it was read.

        Raises:
            OSError: That is not possible there.
        """
        with whole_file(path) as file:
            if path.suffix == SAFETENSORS:
                tensors = {key: value.contiguous() for key, value in self.state.items()}
                file.write(_safetensors().save(tensors, self.metadata))
            else:
                torch.save(self.content, file)


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
        CheckpointError: It is no checkpoint, or holds more than data.
        OSError: It cannot be read.
    """
    content, metadata = read_tensors(path)
    state = content
    for place in _PLACES:
        if isinstance(content, dict) and isinstance(content.get(place), dict):
            state = content[place]
            break
    if not (isinstance(state, dict) and state and all(map(_is_entry, state.items()))):
        raise CheckpointError(
            f"{path} holds no state_dict, neither as a whole nor under "
            f"{' or '.join(map(repr, _PLACES))}; save model.state_dict()."
        )
    return Checkpoint(path, content, state, metadata)


def read_tensors(path: Path) -> tuple[Any, dict[str, str] | None]:
    """The content of a file of torch's or safetensors', on the CPU, and its metadata.

    Raises:
        CheckpointError: It is of another kind, damaged, or holds more than data.
        OSError: It cannot be read.
    """
    if path.suffix in TORCH:
        with _readable(path):
            return torch.load(path, map_location="cpu", weights_only=True), None
    if path.suffix == SAFETENSORS:
        _safetensors()
        from safetensors import safe_open

        with path.open("rb"), _readable(path), safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    raise CheckpointError(
        f"{path} must end in {', '.join(TORCH)} or {SAFETENSORS}, which says how to read it."
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors and plain values, which could run "
            "code, so it is not loaded; save the state_dict alone."
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}.") from error


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise CheckpointError(
            "files that end in .safetensors need the package safetensors, which is not installed; "
            "install it with pip install safetensors."
        ) from error


def _is_entry(item: tuple[Any, Any]) -> bool:
    key, value = item
    return isinstance(key, str) and (isinstance(value, Tensor) or key.endswith("_extra_state"))


def _prefix(state: Mapping[str, Any]) -> str:
    """What stands before every key as wrappers put it: ``module.``, ``_orig_mod.``, both, or none.

    A model may have a child of that name; since both sides are asked, that does no harm.
    """
    prefix = ""
    while state:
        for wrapper in _WRAPPERS:
            if all(key.startswith(prefix + wrapper) for key in state):
                prefix += wrapper
                break
        else:
            break
    return prefix
