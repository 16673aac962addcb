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

    The content is on the disk before the file gets its name. So ``path`` holds either the whole
    old file or the whole new one, also after a crash of the machine.

    Args:
        path: Path of the file; one that exists is replaced. The folder must exist.

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
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` in UTF-8, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def _sync_folder(folder: Path) -> None:
    """Puts the names of a folder's files on the disk; else a crash may bring back the old ones."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Some file systems cannot sync a folder.
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Returns the user's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def as_json(value: Any) -> str:
    """Returns JSON in one line, with null for NaN and infinities, which JSON does not have."""
    return json.dumps(for_json(value), ensure_ascii=False, allow_nan=False)


def for_json(value: Any) -> Any:
    """Returns ``value`` with None for NaN and infinities, in mappings and sequences as well."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(item) for item in value]
    return value
