"""Fashion-MNIST, found on this machine or downloaded, and always verified by SHA-256.

`load` looks in this order: the folder that the user names; the cache; Debian's package
``dataset-fashion-mnist``; the mirrors. Where none of them has it, scikit-learn's digits stand in,
and that is announced.

The sums are those of the unpacked files, because mirrors and packages compress them anew. They
make a mirror without TLS safe, and leave nothing else to check: a file with the right sum has the
right header, shape and length.

Source:
    Xiao, Rasul & Vollgraf, "Fashion-MNIST" (2017), https://arxiv.org/abs/1708.07747.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from batchnorm.files import whole_file

FASHION_MNIST = "Fashion-MNIST"
DIGITS = "digits (scikit-learn)"

SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""The sums of the four files, unpacked."""

LARGEST = 64 * 2**20
"""Bytes after which unpacking stops; the largest of the four files has 47,040,016."""

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""The folder in which Debian's package ``dataset-fashion-mnist`` puts the files."""

MIRRORS = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets",
    "https://fashion-mnist.s3.eu-central-1.amazonaws.com",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
)
"""The authors' repository, Keras's copy, and the authors' bucket with and without TLS."""

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

_TIMEOUT = (5, 30)  # seconds to connect, and between two chunks
_LAYOUTS = (".", "FashionMNIST/raw", "raw")  # ours, and torchvision's two
_DIGITS_FOR_TRAINING = 1437  # of 1,797; the last 360 hold all ten classes


class DataError(ValueError):
    """Data that is missing or not what it should be; ``str()`` is a sentence for the user."""


@dataclass(frozen=True)
class Dataset:
    """Small grayscale images of ten classes, as stored: bytes, neither scaled nor shuffled.

    Attributes:
        name: `FASHION_MNIST` or `DIGITS`.
        source: Where the data was found, for the user to read.
        train_images: Pixels of the training set, 0 (background) to 255.
        train_labels: Class of each image, an index into ``classes``.
        test_images: Pixels of the test set.
        test_labels: Class of each image of the test set.
        classes: Names of the classes, in the order of the labels.
    """

    name: str
    source: str
    train_images: UInt8[Tensor, "train 28 28"]
    train_labels: Int64[Tensor, " train"]
    test_images: UInt8[Tensor, "test 28 28"]
    test_labels: Int64[Tensor, " test"]
    classes: tuple[str, ...]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def load(
    directory: Path | None = None,
    *,
    cache: Path | None = None,
    mirrors: Sequence[str] = MIRRORS,
    announce: Callable[[str], None] = _to_stderr,
    progress: Callable[[str], Any] | None = None,
) -> Dataset:
    """Loads Fashion-MNIST from the first place that has it, or scikit-learn's digits instead.

    Args:
        directory: The only place to look in, if given: a folder with the four files, unpacked or
            ``.gz``, or one with torchvision's layout (``FashionMNIST/raw``).
        cache: Folder of the downloads; None means `default_cache`.
        mirrors: Addresses of folders with the four ``.gz`` files, tried in turn for each file.
        announce: Receives each line that the user should read: a damaged file that is passed over,
            the start of a download, and that digits stand in.
        progress: Makes the bar of one download, with tqdm's interface, from the name of the file.

    Returns:
        Fashion-MNIST, verified: 60,000 training and 10,000 test images. Or the digits:
        scikit-learn's first 1,437 for training, the last 360 for testing.

    Raises:
        DataError: ``directory`` is given and does not hold the four files as published.
    """
    if directory is not None:
        return _read_folder(directory, str(directory))
    cache = cache or default_cache()
    found = _read_cache(cache, announce)
    if len(found) == len(SHA256):
        return _fashion_mnist(found, f"the cache {cache}")
    if DEBIAN_FOLDER.is_dir():
        try:
            return _read_folder(DEBIAN_FOLDER, f"Debian's dataset-fashion-mnist, {DEBIAN_FOLDER}")
        except (DataError, OSError) as error:
            announce(f"Passing over Debian's dataset-fashion-mnist: {error}")
    announce(f"Downloading Fashion-MNIST (up to 31 MB) to {cache}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for name in [name for name in SHA256 if name not in found]:
            found[name] = _download(name, cache, mirrors, progress)
    except OSError as error:
        reason = f"{cache}: {error.strerror}" if error.strerror else error
        announce(
            f"Fashion-MNIST could not be downloaded ({reason}), so scikit-learn's digits stand in "
            "(1,797 real images, resized to 28×28); for the real one install Debian's package "
            "dataset-fashion-mnist or name a folder that has the files with --data DIR."
        )
        return _digits()
    return _fashion_mnist(found, f"downloaded to the cache {cache}")


def default_cache() -> Path:
    """The platform's own place, on Linux ``~/.cache/batchnorm/fashion-mnist``."""
    from platformdirs import user_cache_path

    return user_cache_path("batchnorm") / "fashion-mnist"


def _read_folder(directory: Path, source: str) -> Dataset:
    if not directory.is_dir():
        raise DataError(
            f"{directory}: no such folder; name the folder that has the four files of "
            f"Fashion-MNIST ({', '.join(SHA256)}; unpacked or .gz)."
        )
    folders = [directory / layout for layout in _LAYOUTS]
    paths = {name: _find(folders, name) for name in SHA256}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise DataError(
            f"{directory}: {', '.join(missing)} missing, unpacked and as .gz, there and in "
            f"{' and '.join(_LAYOUTS[1:])}; put all four files of Fashion-MNIST into one of them."
        )
    values = {name: _values(path.read_bytes(), name, path) for name, path in paths.items() if path}
    return _fashion_mnist(values, source)


def _find(folders: Sequence[Path], name: str) -> Path | None:
    paths = (folder / f"{name}{suffix}" for folder in folders for suffix in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def _read_cache(cache: Path, announce: Callable[[str], None]) -> dict[str, Tensor]:
    """Reads the good files of the cache; a damaged one is announced, and stays until replaced."""
    found = {}
    for name in SHA256:
        path = cache / f"{name}.gz"
        if not path.is_file():
            continue
        try:
            found[name] = _values(path.read_bytes(), name, path)
        except (DataError, OSError) as error:
            announce(f"Passing over a file of the cache: {error}")
    return found


def _values(content: bytes, name: str, source: Path) -> UInt8[Tensor, ...]:
    """Takes the values of an IDX file of bytes, unpacked or gzipped, after comparing its sum."""
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(LARGEST + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{source}: damaged ({error}); download it again.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise DataError(
            f"{source}: expected the SHA-256 {SHA256[name][:16]}… of the unpacked file, got "
            f"{found[:16]}…; it is damaged or another file, download it again."
        )
    is_images = "images" in name
    header = 16 if is_images else 8  # magic number, then a length of four bytes for each dimension
    values = torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy())
    return values.view(-1, 28, 28) if is_images else values


def _download(
    name: str,
    cache: Path,
    mirrors: Sequence[str],
    progress: Callable[[str], Any] | None,
) -> Tensor:
    """Fetches one file into the cache from the first mirror that has the right one.

    Raises:
        OSError: No mirror has, or the cache cannot be written.
    """
    import pooch

    failures = []
    for mirror in mirrors:
        host = urlsplit(mirror).netloc or mirror
        bar = progress(f"{name}.gz") if progress else None
        fetch = pooch.HTTPDownloader(progressbar=bar or False, chunk_size=2**16, timeout=_TIMEOUT)
        packed = io.BytesIO()
        try:
            fetch(f"{mirror.rstrip('/')}/{name}.gz", packed, None)
            values = _values(packed.getvalue(), name, Path(f"{name}.gz"))
        except OSError as error:  # All errors of requests are.
            status = getattr(getattr(error, "response", None), "status_code", None)
            failures.append(f"{host}: {f'HTTP {status}' if status else type(error).__name__}")
        except DataError:
            failures.append(f"{host}: wrong content")
        else:
            with whole_file(cache / f"{name}.gz") as file:
                file.write(packed.getvalue())
            return values
        finally:
            if bar:
                bar.close()
    raise ConnectionError(f"{name}.gz: {'; '.join(failures) or 'no mirror was named'}")


def _fashion_mnist(files: dict[str, Tensor], source: str) -> Dataset:
    return Dataset(
        name=FASHION_MNIST,
        source=source,
        train_images=files["train-images-idx3-ubyte"],
        train_labels=files["train-labels-idx1-ubyte"].long(),
        test_images=files["t10k-images-idx3-ubyte"],
        test_labels=files["t10k-labels-idx1-ubyte"].long(),
        classes=FASHION_CLASSES,
    )


def _digits() -> Dataset:
    """Resizes scikit-learn's digits bilinearly, from 0..16 at 8×8 to 0..255 at 28×28."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    small = torch.as_tensor(pixels).view(-1, 1, 8, 8) * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear")
    images = large.squeeze(1).round().to(torch.uint8)
    labels = torch.as_tensor(classes).long()
    return Dataset(
        name=DIGITS,
        source="scikit-learn's load_digits, 8×8 images resized to 28×28",
        train_images=images[:_DIGITS_FOR_TRAINING],
        train_labels=labels[:_DIGITS_FOR_TRAINING],
        test_images=images[_DIGITS_FOR_TRAINING:],
        test_labels=labels[_DIGITS_FOR_TRAINING:],
        classes=tuple(str(digit) for digit in range(10)),
    )
