"""Small IDX files under the names of the real ones."""

import gzip
import hashlib
import struct

import torch

from batchnorm.experiment import idx


def idx_bytes(values):
    """Encode a uint8 tensor as IDX."""
    header = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    return header + values.to(torch.uint8).numpy().tobytes()


def some_images(count, rows=28, columns=28):
    return (torch.arange(count * rows * columns) % 251).to(torch.uint8).view(count, rows, columns)


TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = idx.SHA256


def tiny_files(monkeypatch):
    """Make four small files under the real names, and their sums the known ones."""
    files = {
        TRAIN_IMAGES: idx_bytes(some_images(6)),
        TRAIN_LABELS: idx_bytes(torch.arange(6)),
        TEST_IMAGES: idx_bytes(some_images(4).flip(0)),
        TEST_LABELS: idx_bytes(torch.arange(4) + 3),
    }
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(idx, "SHA256", sums)
    return files


def write(folder, files, suffix=".gz"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        packed = gzip.compress(content) if suffix else content
        (folder / f"{name}{suffix}").write_bytes(packed)
    return folder
