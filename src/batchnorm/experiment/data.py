"""Fashion-MNIST, found on this machine or downloaded, and always verified by SHA-256.

Looked for in this order: the folder that the user names; the cache; Debian's package
`dataset-fashion-mnist`; the mirrors. Where none of them has it, scikit-learn's digits stand in, and
that is announced.

Source: Xiao, Rasul & Vollgraf, "Fashion-MNIST" (2017), https://arxiv.org/abs/1708.07747.
"""

import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol
from urllib.parse import urlsplit

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from batchnorm.experiment import idx
from batchnorm.experiment.idx import DataError

__all__ = ["MIRRORS", "DataError", "Dataset", "ProgressBar", "TerminalBar", "default_cache", "load"]

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts the files."""

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

_TIMEOUT = (5, 30)
_CHUNK = 64 * 1024
_LAYOUTS = (".", "FashionMNIST/raw", "raw")
_DIGITS_FOR_TRAINING = 1437
_REASONS = {
    "ConnectTimeout": "timed out",
    "ReadTimeout": "timed out",
    "ConnectionError": "no connection",
    "ChunkedEncodingError": "broke off",
}


@dataclass(frozen=True)
class Dataset:
    """Small grey images of ten classes, as they are stored: bytes, neither scaled nor shuffled.

    Args:
        name: "Fashion-MNIST" or "digits (scikit-learn)".
        source: where the data was found, for the user to read.
        train_images: pixels of the training set, 0 (background) to 255.
        train_labels: class of each image, an index into `classes`.
        test_images: pixels of the test set.
        test_labels: class of each image of the test set.
        classes: the names of the classes, in the order of the labels.
    """

    name: str
    source: str
    train_images: UInt8[Tensor, "train 28 28"]
    train_labels: Int64[Tensor, " train"]
    test_images: UInt8[Tensor, "test 28 28"]
    test_labels: Int64[Tensor, " test"]
    classes: tuple[str, ...]


class ProgressBar(Protocol):
    """What pooch asks of a progress bar."""

    @property
    def total(self) -> int:
        """Bytes to come, 0 if not known; pooch sets it."""
        ...

    @total.setter
    def total(self, amount: int) -> None: ...

    def update(self, amount: int) -> None:
        """Count `amount` further bytes."""
        ...

    def reset(self) -> None:
        """Count from 0 again."""
        ...

    def close(self) -> None:
        """Leave the screen; a second call does nothing."""
        ...


class TerminalBar:
    """A progress bar for one file, drawn by rich on standard error if that is a terminal.

    Args:
        name: the file that is downloaded.
    """

    def __init__(self, name: str) -> None:
        progress, console = _library("rich.progress"), _library("rich.console")
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            console=console.Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(name, total=None)

    @property
    def total(self) -> int:
        """Bytes to come, 0 if not known; the bar appears when it is set."""
        return int(self._progress.tasks[0].total or 0)

    @total.setter
    def total(self, amount: int) -> None:
        self._progress.update(self._task, total=amount or None)
        self._progress.start()

    def update(self, amount: int) -> None:
        """Count `amount` further bytes."""
        self._progress.advance(self._task, amount)

    def reset(self) -> None:
        """Count from 0 again."""
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """Leave the bar as it stands; a second call does nothing."""
        self._progress.stop()


class _DownloadError(Exception):
    """Why no mirror gave a good file."""


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def load(
    directory: Path | None = None,
    *,
    cache: Path | None = None,
    mirrors: Sequence[str] = MIRRORS,
    announce: Callable[[str], None] = _to_stderr,
    progress: Callable[[str], ProgressBar] | None = None,
) -> Dataset:
    """Load Fashion-MNIST from the first place that has it, or scikit-learn's digits instead.

    Args:
        directory: the only place to look in, if given: a folder with the four files, plain or
            `.gz`, or one with torchvision's layout (`FashionMNIST/raw`).
        cache: where downloads are kept; None means `default_cache()`.
        mirrors: addresses of folders that hold the four `.gz` files, tried in turn for each file.
        announce: is given each line that the user should read: a broken cache entry, the start of
            a download, and that digits stand in. Writes to standard error unless told otherwise.
        progress: makes the progress bar of a file from its name, e.g. `TerminalBar`; None: no bar.

    Returns:
        Fashion-MNIST, verified by SHA-256: 60,000 training and 10,000 test images. Or the digits:
        scikit-learn's first 1,437 for training, the last 360 (all ten classes) for testing.

    Raises:
        DataError: if `directory` is given and does not hold the four files as published, or a
            library of the extra `batchnorm[cli]` is needed and missing.
    """
    if directory is not None:
        folder = _folder_with_files(directory)
        return _fashion_mnist(idx.read_folder(folder), str(folder))
    cache = default_cache() if cache is None else cache
    found = _read_cache(cache, announce)
    if len(found) == len(idx.SHA256):
        return _fashion_mnist(found, f"the cache {cache}")
    if DEBIAN_FOLDER.is_dir():
        try:
            files = idx.read_folder(DEBIAN_FOLDER)
            return _fashion_mnist(files, f"Debian's dataset-fashion-mnist, {DEBIAN_FOLDER}")
        except DataError as error:
            announce(f"Passing over Debian's dataset-fashion-mnist: {error}")
    announce(f"Downloading Fashion-MNIST (up to 31 MB) to {cache}")
    try:
        for name in [name for name in idx.SHA256 if name not in found]:
            found[name] = _download(name, cache, mirrors, progress)
    except _DownloadError as error:
        announce(
            f"Fashion-MNIST could not be downloaded ({error}), so scikit-learn's digits stand in "
            "(1,797 real images, resized to 28×28); for the real one install Debian's package "
            "dataset-fashion-mnist or name a folder that has the files with --data DIR."
        )
        return _digits()
    return _fashion_mnist(found, f"downloaded to the cache {cache}")


def default_cache() -> Path:
    """Name the folder where downloads are kept: `fashion-mnist` in the user's cache for batchnorm.

    It is the platform's own place (on Linux `$XDG_CACHE_HOME/batchnorm` or `~/.cache/batchnorm`),
    so the platform's own variables move it.

    Raises:
        DataError: if platformdirs is not installed.
    """
    return _library("platformdirs").user_cache_path("batchnorm") / "fashion-mnist"


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"Finding the images needs the library {name.partition('.')[0]}, which cannot be "
            f"imported ({error}); install it with pip install 'batchnorm[cli]'."
        ) from error


def _folder_with_files(directory: Path) -> Path:
    if not directory.is_dir():
        raise DataError(
            f"{directory}: no such folder; name the folder that has the four files of "
            f"Fashion-MNIST ({', '.join(idx.SHA256)}; plain or .gz)."
        )
    for layout in _LAYOUTS:
        if any(idx.candidates(directory / layout, name) for name in idx.SHA256):
            return directory / layout
    raise DataError(
        f"{directory}: none of the four files of Fashion-MNIST is there or in FashionMNIST/raw "
        f"({', '.join(idx.SHA256)}; plain or .gz); put them there or name another folder."
    )


def _read_cache(cache: Path, announce: Callable[[str], None]) -> dict[str, Tensor]:
    """Read the good files of the cache; a broken one is announced, and stays until replaced."""
    found = {}
    for name in idx.SHA256:
        path = _cached(cache, name)
        if path.is_file():
            try:
                found[name] = idx.read_file(path, name)
            except DataError as error:
                announce(f"Passing over a broken cache entry: {error}")
    return found


def _cached(cache: Path, name: str) -> Path:
    return cache / f"{name}.gz"


def _download(
    name: str,
    cache: Path,
    mirrors: Sequence[str],
    progress: Callable[[str], ProgressBar] | None,
) -> Tensor:
    """Fetch one file into the cache from the first mirror that has it right."""
    pooch, exceptions = _library("pooch"), _library("requests.exceptions")
    failures = []
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
            for mirror in mirrors:
                host = urlsplit(mirror).netloc or mirror
                bar = progress(f"{name}.gz") if progress else None
                fetch = pooch.HTTPDownloader(
                    progressbar=bar or False, chunk_size=_CHUNK, timeout=_TIMEOUT
                )
                path = _cached(Path(folder), name)
                try:
                    fetch(f"{mirror.rstrip('/')}/{name}.gz", str(path), None)
                    values = idx.read_file(path, name)
                    os.replace(path, _cached(cache, name))
                    return values
                except exceptions.RequestException as error:
                    failures.append(f"{host}: {_reason(error)}")
                except DataError:
                    failures.append(f"{host}: wrong content")
                finally:
                    if bar:
                        bar.close()
    except OSError as error:
        raise _DownloadError(f"{cache} cannot be written: {error.strerror or error}") from error
    raise _DownloadError(f"{name}.gz: {'; '.join(failures) or 'no mirror was named'}")


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP status {response.status_code}"
    return _REASONS.get(type(error).__name__, type(error).__name__)


def _fashion_mnist(files: dict[str, Tensor], source: str) -> Dataset:
    return Dataset(
        name="Fashion-MNIST",
        source=source,
        train_images=files["train-images-idx3-ubyte"],
        train_labels=files["train-labels-idx1-ubyte"].long(),
        test_images=files["t10k-images-idx3-ubyte"],
        test_labels=files["t10k-labels-idx1-ubyte"].long(),
        classes=FASHION_CLASSES,
    )


def _digits() -> Dataset:
    """Resize scikit-learn's digits bilinearly, from 0..16 at 8×8 to 0..255 at 28×28."""
    digits = _library("sklearn.datasets").load_digits()
    small = torch.from_numpy(digits.images).unsqueeze(1) * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear")
    images = large.squeeze(1).round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    return Dataset(
        name="digits (scikit-learn)",
        source="scikit-learn's load_digits, 8×8 images resized to 28×28",
        train_images=images[:_DIGITS_FOR_TRAINING],
        train_labels=labels[:_DIGITS_FOR_TRAINING],
        test_images=images[_DIGITS_FOR_TRAINING:],
        test_labels=labels[_DIGITS_FOR_TRAINING:],
        classes=tuple(str(digit) for digit in range(10)),
    )
