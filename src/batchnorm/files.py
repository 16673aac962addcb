"""Files that are written whole or not at all, and plain JSON."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that appears at ``path`` when the block ends, and never if the block fails.

    It is on the disk before it gets its name, so that also after a crash of the machine what is
    there is whole: the old one or the new one.

    Args:
        path: What is there is replaced; the folder must exist.

    Raises:
        OSError: The folder does not exist or cannot be written.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _keep_names(path.parent)


def write_text(path: Path, text: str) -> None:
    """Puts ``text``, in UTF-8, at ``path``."""
    with whole_file(path) as file:
        file.write(text.encode())


def _keep_names(folder: Path) -> None:
    """Puts the names of a folder's files on the disk, or a crash may bring back old ones."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Some file systems keep names only as they like.
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    """What the user takes away from the rights of new files; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def as_json(value: Any) -> str:
    """JSON in one line, with null for numbers that JSON does not have (NaN, infinities)."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
