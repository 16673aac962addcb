"""Checkpoint files of users: read without running code in them, and written whole or not at all."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.files import whole_file
from batchnorm.tools.patching import (
    by_unwrapped_name,
    count_in,
    is_counter,
    statistics_of,
    without_wrappers,
)

TORCH = (".pt", ".pth", ".ckpt")
SAFETENSORS = ".safetensors"
_PLACES = ("state_dict", "model")


class CheckpointError(ValueError):
    """Error for a file that cannot be used; the message is one sentence."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of a file that holds a ``state_dict``.

    Attributes:
        path: The file.
        content: Everything in it.
        state: The ``state_dict``, the same object as in ``content``.
        metadata: Metadata of a safetensors file.
        prefix: Begins the names of the model's tensors in the file, after the parts that wrappers
            add (``module.``, ``_orig_mod.``) are removed; None looks for it. Lightning writes
            ``model.`` or the name of another attribute.
    """

    path: Path
    content: Any
    state: dict[str, Any]
    metadata: dict[str, str] | None
    prefix: str | None = None

    def with_prefix(self, prefix: str | None, model: nn.Module) -> Checkpoint:
        """Sets the prefix, or finds the one under which the file holds the model.

        Raises:
            CheckpointError: No name begins with ``prefix``, or there are several to choose from.
        """
        keys = by_unwrapped_name(self.state)
        if prefix is not None:
            return replace(self, prefix=self._written_prefix(prefix, keys))
        names = [n for n in by_unwrapped_name(model.state_dict()) if not is_counter(n)]
        found = [""]
        if names and not all(name in keys for name in names):
            starts = [key.removesuffix(names[0]) for key in keys if key.endswith(f".{names[0]}")]
            found = [start for start in starts if all(start + name in keys for name in names)]
        if len(found) > 1:
            choice = " or ".join(f"--prefix {start}" for start in found)
            raise CheckpointError(f"{self.path} holds the model several times; choose by {choice}.")
        return replace(self, prefix=found[0] if found else "")

    def _written_prefix(self, prefix: str, keys: Iterable[str]) -> str:
        """The prefix as the names have it, with a dot at its end and maybe without wrappers."""
        for start in (prefix.rstrip("."), without_wrappers(prefix.rstrip("."))):
            found = f"{start}." if start else ""
            if any(key.startswith(found) for key in keys):
                return found
        raise CheckpointError(f"{self.path} holds no name that begins with {prefix!r}.")

    def load_into(self, model: nn.Module) -> None:
        """Loads the checkpoint into the model; counters may be missing, as in old files.

        Raises:
            CheckpointError: The checkpoint does not fit the model.
        """
        own = model.state_dict()
        state = {
            name: self._entry(key, own.get(name)) for key, name in self.names_in(model).items()
        }
        try:
            missing, unexpected = model.load_state_dict(state, strict=False)
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

    def check_statistics(self, model: nn.Module, layers: Iterable[str]) -> None:
        """Checks that the file has a place for the statistics of the layers.

        Raises:
            CheckpointError: A layer keeps them outside of ``state_dict``, as in the d2l book.
        """
        for name in layers:
            layer = model.get_submodule(name)
            missing = [key for key in statistics_of(layer) if key not in layer._buffers]
            if missing:
                raise CheckpointError(
                    f"layer {name!r} ({type(layer).__name__}) keeps {missing[0]} as an ordinary "
                    "attribute, which is not in a checkpoint; make it a buffer by register_buffer."
                )

    def take_statistics(self, model: nn.Module, layers: Iterable[str]) -> None:
        """Copies the statistics of some layers from the model; everything else stays as it is.

        Counters get the model's dtype, because a smaller one in the file might not hold them.

        Args:
            model: A model that the checkpoint fits.
            layers: Names of the layers. Buffers that they share under other names are copied too.

        Raises:
            CheckpointError: A number is too large for the dtype in the file.
        """
        new = {id(tensor) for name in layers for tensor in model.get_submodule(name).buffers()}
        current = model.state_dict(keep_vars=True)
        names = self.names_in(model)
        for key, old in self.state.items():
            tensor = current.get(names.get(key, ""))
            if id(tensor) in new and tensor is not None:
                dtype = old.dtype if tensor.is_floating_point() else tensor.dtype
                value = tensor.detach().to(dtype, copy=True)
                if not value.isfinite().all():
                    raise CheckpointError(
                        f"{self.path}: the new {key} is too large for {old.dtype}."
                    )
                self.state[key] = value

    def names_in(self, model: nn.Module) -> dict[str, str]:
        """Returns the model's name of each key that begins with the prefix."""
        theirs, prefix = by_unwrapped_name(model.state_dict()), self.prefix or ""
        return {
            key: theirs.get(name.removeprefix(prefix), name)
            for name, key in by_unwrapped_name(self.state).items()
            if name.startswith(prefix)
        }

    def _entry(self, key: str, own: Any) -> Any:
        """An entry of the file; a counter in the shape that it has in the model."""
        entry = self.state[key]
        if not (is_counter(key) and isinstance(own, Tensor) and own.numel() == 1):
            return entry
        try:
            return torch.tensor(count_in(entry)).view(own.shape)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {key} {error}.") from None

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all, in the format in which it was read.

        Raises:
            OSError: The file cannot be written.
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
        CheckpointError: The file is no checkpoint, or holds more than data.
        OSError: The file cannot be read.
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
    """Reads a file of torch or safetensors to the CPU; returns the content and the metadata.

    Raises:
        CheckpointError: The file is of another kind, damaged, or holds more than data.
        OSError: The file cannot be read.
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
            f"{path} is damaged, or holds more than tensors and simple values, which could run "
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
