"""The four IDX files of Fashion-MNIST: strict reading, and a sentence for everything wrong.

An IDX file of unsigned bytes is a big-endian header, `00 00 08 rank`, then `rank` lengths of four
bytes each, then the values. Images have rank 3 (count, rows, columns), labels rank 1 (count).
The SHA-256 sums are those of the *unpacked* files, because a mirror or a package may compress them
anew; they also make a mirror without TLS safe.
"""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

LARGEST = 64 * 2**20
"""Bytes after which reading stops: the largest file of the MNIST family has 47,040,016."""

SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""The sums of the four files, unpacked."""

_GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTES = 0x0800
_PIXELS = (28, 28)
_KINDS = {0: "labels", 2: "images"}


class DataError(ValueError):
    """Data that is missing, broken or not what it should be; `str()` is a sentence for the user."""


def read(path: Path) -> bytes:
    """Read the file at `path`, unpacked if it is gzip, whatever its name says.

    Args:
        path: an IDX file, plain or compressed by gzip.

    Returns:
        The unpacked bytes, not yet looked at.

    Raises:
        DataError: if the file cannot be read, its gzip stream is truncated or corrupt, or it
            unpacks to more than `LARGEST` bytes.
    """
    try:
        with path.open("rb") as plain:
            packed = plain.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            plain.seek(0)
            with gzip.GzipFile(fileobj=plain) if packed else plain as unpacked:
                content = unpacked.read(LARGEST + 1)
    except EOFError as error:
        raise DataError(
            f"{path}: the gzip stream breaks off after {path.stat().st_size} bytes; "
            "the file is truncated, download it again."
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: the gzip stream is corrupt ({error}); download the file again."
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); "
            "check the file and its permissions."
        ) from error
    if len(content) > LARGEST:
        raise DataError(
            f"{path}: unpacks to more than {LARGEST} bytes, which no file of the data set does; "
            "download it again."
        )
    return content


def parse(
    content: bytes, item_shape: tuple[int, ...], *, source: Path
) -> UInt8[Tensor, " n *item"]:
    """Check an IDX file of unsigned bytes against what is expected of it, and take its values.

    Args:
        content: the unpacked bytes of the file.
        item_shape: `(rows, columns)` if the file must hold images, `()` if labels.
        source: where the bytes came from, for the messages.

    Returns:
        The values, shape `(n, *item_shape)`, dtype uint8, on the CPU.

    Raises:
        DataError: if the magic number, the size of the images or the length is another one.
    """
    if len(content) >= 4:
        _check_magic(content[:4], len(item_shape), source)
    header = 4 + 4 * (1 + len(item_shape))
    if len(content) < header:
        raise DataError(
            f"{source}: expected a header of {header} bytes, got {len(content)} bytes in all; "
            "the file is truncated, download it again."
        )
    count, *found_shape = struct.unpack_from(f">{1 + len(item_shape)}I", content, 4)
    if tuple(found_shape) != item_shape:
        raise DataError(
            f"{source}: expected images of {_times(item_shape)} pixels, "
            f"got {_times(found_shape)}; the file is of another data set."
        )
    _check_length(len(content), header + count * math.prod(item_shape), source)
    if count == 0:
        raise DataError(f"{source}: the file is empty, its header counts 0; download it again.")
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)
    return values.reshape(count, *item_shape)


def candidates(folder: Path, name: str) -> list[Path]:
    """List where `folder` has the file `name`: plain, as `.gz`, both or not at all."""
    return [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]


def read_file(path: Path, name: str) -> UInt8[Tensor, "..."]:
    """Read one file and verify that it is `name`, byte for byte.

    Args:
        path: the file, plain or compressed by gzip.
        name: which of the four it must be, a key of `SHA256`.

    Returns:
        The images, shape `(n, 28, 28)`, or the labels, shape `(n,)`.

    Raises:
        DataError: if it is not.
    """
    content = read(path)
    values = parse(content, _item_shape(name), source=path)
    _check_sum(content, name, path)
    return values


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Read the four files of a folder; faults of form and number are named before the sums.

    Args:
        folder: has the files, each plain (which is preferred) or as `.gz`.

    Returns:
        The values of each file, by the names in `SHA256`.

    Raises:
        DataError: if a file is missing, broken, swapped with another or not the published one.
    """
    paths, contents, values = {}, {}, {}
    for name in SHA256:
        found = candidates(folder, name)
        if not found:
            raise DataError(
                f"{folder}: {name} is missing, plain and as .gz; put all four files of "
                "Fashion-MNIST there."
            )
        paths[name] = found[0]
        contents[name] = read(found[0])
        values[name] = parse(contents[name], _item_shape(name), source=found[0])
    for part in ("train", "t10k"):
        images, labels = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
        if len(values[images]) != len(values[labels]):
            raise DataError(
                f"{paths[labels]}: {len(values[labels])} labels for the {len(values[images])} "
                f"images of {paths[images].name}; they are not of one set, download both again."
            )
    for name in SHA256:
        _check_sum(contents[name], name, paths[name])
    return values


def _item_shape(name: str) -> tuple[int, ...]:
    return _PIXELS if "images" in name else ()


def _check_sum(content: bytes, name: str, path: Path) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found == SHA256[name]:
        return
    for other, known in SHA256.items():
        if found == known:
            raise DataError(
                f"{path}: has the content of {other}; the training and the test files are "
                "swapped, rename them."
            )
    raise DataError(
        f"{path}: expected the SHA-256 {SHA256[name][:16]}… of the unpacked file, got "
        f"{found[:16]}…; it is corrupt or of another data set, download it again."
    )


def _check_magic(magic: bytes, item_rank: int, source: Path) -> None:
    expected, found = _UNSIGNED_BYTES + 1 + item_rank, int.from_bytes(magic, "big")
    if found == expected:
        return
    wanted = f"{_KINDS[item_rank]} (magic number {expected:#010x})"
    for rank, kind in _KINDS.items():
        if found == _UNSIGNED_BYTES + 1 + rank:
            raise DataError(
                f"{source}: expected {wanted}, got {kind} ({found:#010x}); "
                "the files of images and labels are swapped, rename them."
            )
    raise DataError(
        f"{source}: expected {wanted}, got a file that begins with {magic!r} ({found:#010x}); "
        "it is not an IDX file of bytes, download it again."
    )


def _check_length(found: int, expected: int, source: Path) -> None:
    if found < expected:
        raise DataError(
            f"{source}: expected {expected} bytes, got {found}; "
            "the file is truncated, download it again."
        )
    if found > expected:
        raise DataError(
            f"{source}: expected {expected} bytes, got {found}; "
            "the file has bytes that do not belong to it, download it again."
        )


def _times(shape: tuple[int, ...] | list[int]) -> str:
    return "×".join(str(length) for length in shape)
