"""The IDX reader: what it takes, and the sentence for each thing that can be wrong."""

import gzip
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.experiment import idx
from idx_files import (
    TEST_IMAGES,
    TEST_LABELS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    idx_bytes,
    some_images,
    tiny_files,
    write,
)

SOURCE = Path("folder/train-images-idx3-ubyte")


@pytest.fixture
def tiny(monkeypatch):
    return tiny_files(monkeypatch)


def test_images_come_back_as_they_were_written():
    images = some_images(3)
    parsed = idx.parse(idx_bytes(images), (28, 28), source=SOURCE)
    assert parsed.dtype == torch.uint8
    assert torch.equal(parsed, images)


def test_parsed_values_can_be_written_to_without_touching_the_bytes():
    content = idx_bytes(some_images(1))
    idx.parse(content, (28, 28), source=SOURCE).fill_(7)
    assert content == idx_bytes(some_images(1))


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_labels_come_back_as_they_were_written(labels):
    parsed = idx.parse(idx_bytes(torch.tensor(labels)), (), source=SOURCE)
    assert parsed.tolist() == labels


@given(st.data())
def test_every_truncation_is_noticed(draw):
    content = idx_bytes(some_images(2, 3, 4))
    length = draw.draw(st.integers(0, len(content) - 1))
    with pytest.raises(idx.DataError, match=f"got {length}.*truncated, download it again"):
        idx.parse(content[:length], (3, 4), source=SOURCE)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_taken_exactly_or_refused(content):
    whole = content[:4] == b"\0\0\x08\1" and content[4:8] == struct.pack(">I", len(content) - 8)
    if whole and len(content) > 8:
        assert idx_bytes(idx.parse(content, (), source=SOURCE)) == content
    else:
        with pytest.raises(idx.DataError, match=rf"^{SOURCE}: (?s:.*)\.$"):
            idx.parse(content, (), source=SOURCE)


def test_the_message_of_a_truncated_file_has_both_lengths():
    with pytest.raises(
        idx.DataError,
        match=r"^folder/train-images-idx3-ubyte: expected 1584 bytes, got 512; the file is "
        r"truncated, download it again\.$",
    ):
        idx.parse(idx_bytes(some_images(2))[:512], (28, 28), source=SOURCE)


def test_bytes_after_the_end_are_refused():
    with pytest.raises(idx.DataError, match="expected 1584 bytes, got 1585; the file has bytes"):
        idx.parse(idx_bytes(some_images(2)) + b"\0", (28, 28), source=SOURCE)


def test_labels_where_images_belong_are_called_swapped():
    with pytest.raises(
        idx.DataError,
        match=r"train-images-idx3-ubyte: expected images \(magic number 0x00000803\), "
        r"got labels \(0x00000801\); the files of images and labels are swapped",
    ):
        idx.parse(idx_bytes(torch.arange(5)), (28, 28), source=SOURCE)


def test_images_where_labels_belong_are_called_swapped():
    with pytest.raises(idx.DataError, match=r"expected labels .*, got images .* are swapped"):
        idx.parse(idx_bytes(some_images(2)), (), source=SOURCE)


def test_a_web_page_is_not_an_idx_file():
    with pytest.raises(
        idx.DataError, match=r"begins with b'<!DO' \(0x3c21444f\); it is not an IDX file of bytes"
    ):
        idx.parse(b"<!DOCTYPE html><title>Log in</title>", (28, 28), source=SOURCE)


def test_idx_of_floats_is_refused():
    floats = struct.pack(">BBBBI4f", 0, 0, 0x0D, 1, 4, *range(4))
    with pytest.raises(idx.DataError, match="not an IDX file of bytes"):
        idx.parse(floats, (), source=SOURCE)


def test_images_of_another_size_are_refused():
    with pytest.raises(idx.DataError, match="expected images of 28×28 pixels, got 32×32;"):
        idx.parse(idx_bytes(some_images(1, 32, 32)), (28, 28), source=SOURCE)


def test_a_header_that_counts_nothing_is_refused():
    with pytest.raises(idx.DataError, match="the file is empty, its header counts 0"):
        idx.parse(idx_bytes(torch.zeros(0)), (), source=SOURCE)


@pytest.mark.parametrize("name", ["labels", "labels.gz"])
def test_gzip_is_known_by_its_bytes_and_not_by_the_name(tmp_path, name):
    content = idx_bytes(torch.arange(9))
    (tmp_path / name).write_bytes(gzip.compress(content))
    assert idx.read(tmp_path / name) == content
    (tmp_path / name).write_bytes(content)
    assert idx.read(tmp_path / name) == content


def test_truncated_gzip_names_the_file(tmp_path):
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(bytes(range(256)))[:100])
    with pytest.raises(
        idx.DataError, match=r"labels\.gz: the gzip stream breaks off after 100 bytes; .*truncated"
    ):
        idx.read(path)


@pytest.mark.parametrize("place", [20, -6], ids=["the data", "the checksum"])
def test_corrupt_gzip_names_the_file(tmp_path, place):
    packed = bytearray(gzip.compress(bytes(range(256)) * 4))
    packed[place] ^= 0xFF
    path = tmp_path / "labels.gz"
    path.write_bytes(packed)
    with pytest.raises(idx.DataError, match=r"labels\.gz: the gzip stream is corrupt \("):
        idx.read(path)


def test_a_file_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(idx.DataError, match=r"labels: cannot be read \(No such file"):
        idx.read(tmp_path / "labels")


def test_unpacking_stops_at_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "LARGEST", 1000)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes(1001)))
    with pytest.raises(idx.DataError, match=r"bomb\.gz: unpacks to more than 1000 bytes"):
        idx.read(path)


def test_plain_files_are_preferred_and_gzipped_ones_taken(tiny, tmp_path):
    write(tmp_path, tiny)
    assert idx.candidates(tmp_path, TRAIN_IMAGES) == [tmp_path / f"{TRAIN_IMAGES}.gz"]
    write(tmp_path, tiny, suffix="")
    assert idx.candidates(tmp_path, TRAIN_IMAGES)[0] == tmp_path / TRAIN_IMAGES
    assert idx.candidates(tmp_path, "other") == []
    values = idx.read_folder(tmp_path)
    assert torch.equal(values[TRAIN_IMAGES], some_images(6))
    assert values[TEST_LABELS].tolist() == [3, 4, 5, 6]


def test_one_file_is_verified_by_its_sum(tiny, tmp_path):
    write(tmp_path, tiny, suffix="")
    assert idx.read_file(tmp_path / TRAIN_LABELS, TRAIN_LABELS).tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(idx.DataError, match=r"train-labels.* has the content of train-labels"):
        idx.read_file(tmp_path / TRAIN_LABELS, TEST_LABELS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda files: {TEST_LABELS: files[TEST_LABELS][:10]},
            r"t10k-labels-idx1-ubyte\.gz: expected 12 bytes, got 10; the file is truncated, down",
            id="truncated",
        ),
        pytest.param(
            lambda files: {
                TRAIN_IMAGES: files[TRAIN_LABELS],
                TRAIN_LABELS: files[TRAIN_IMAGES],
            },
            r"train-images-idx3-ubyte\.gz: expected images .*, got labels .* are swapped, rename",
            id="images and labels swapped",
        ),
        pytest.param(
            lambda files: {
                TRAIN_IMAGES: files[TEST_IMAGES],
                TRAIN_LABELS: files[TEST_LABELS],
            },
            r"train-images-idx3-ubyte\.gz: has the content of t10k-images-idx3-ubyte; the training "
            "and the test files are swapped",
            id="test files in place of training",
        ),
        pytest.param(
            lambda files: {TRAIN_LABELS: idx_bytes(torch.arange(5))},
            r"train-labels-idx1-ubyte\.gz: 5 labels for the 6 images of train-images-idx3-ubyte"
            r"\.gz; they are not of one set",
            id="unequal counts",
        ),
        pytest.param(
            lambda files: {TRAIN_IMAGES: files[TRAIN_IMAGES][:-1] + b"\xff"},
            r"train-images-idx3-ubyte\.gz: expected the SHA-256 [0-9a-f]{16}… of the unpacked "
            "file, got [0-9a-f]{16}…; it is corrupt or of another data set",
            id="one wrong pixel",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tiny, tmp_path, change, message):
    with pytest.raises(idx.DataError, match=message):
        idx.read_folder(write(tmp_path, tiny | change(tiny)))


def test_missing_file_is_named(tiny, tmp_path):
    del tiny[TEST_LABELS]
    with pytest.raises(idx.DataError, match="t10k-labels-idx1-ubyte is missing, plain and as"):
        idx.read_folder(write(tmp_path, tiny))
