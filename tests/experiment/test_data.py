"""Finding, verifying and downloading the images; the network here ends at 127.0.0.1."""

import contextlib
import gzip
import hashlib
import re
import socket
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import platformdirs
import pytest
import sklearn.datasets
import torch

from batchnorm.experiment import data

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = data.SHA256


def idx_bytes(values):
    """Encode a uint8 tensor as IDX."""
    header = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    return header + values.to(torch.uint8).numpy().tobytes()


def some_images(count):
    return (torch.arange(count * 28 * 28) % 251).to(torch.uint8).view(count, 28, 28)


def write(folder, files, suffix=".gz"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        packed = gzip.compress(content) if suffix else content
        (folder / f"{name}{suffix}").write_bytes(packed)
    return folder


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Four small files in place of the real ones, no Debian package, no proxy."""
    files = {
        TRAIN_IMAGES: idx_bytes(some_images(6)),
        TRAIN_LABELS: idx_bytes(torch.arange(6)),
        TEST_IMAGES: idx_bytes(some_images(4).flip(0)),
        TEST_LABELS: idx_bytes(torch.arange(4) + 3),
    }
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(data, "SHA256", sums)
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "not-debian")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return files


def is_tiny(dataset):
    return (
        dataset.name == "Fashion-MNIST"
        and torch.equal(dataset.train_images, some_images(6))
        and dataset.train_labels.tolist() == [0, 1, 2, 3, 4, 5]
        and torch.equal(dataset.test_images, some_images(4).flip(0))
        and dataset.test_labels.tolist() == [3, 4, 5, 6]
    )


@contextlib.contextmanager
def mirror(answers):
    """Serve `{name: bytes}` on 127.0.0.1, and 404 for the rest; yields the address and a log."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/data/").removesuffix(".gz")
            asked.append(name)
            body = answers.get(name)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/data/", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def dead_mirror():
    """An address where nobody answers."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}/data"


def quiet(line):
    pass


def gzipped(files):
    return {name: gzip.compress(content) for name, content in files.items()}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("layout", [".", "FashionMNIST/raw", "raw"])
def test_named_folder_may_have_either_layout_plain_or_gzipped(tiny, tmp_path, layout, suffix):
    write(tmp_path / "mine" / layout, tiny, suffix)
    dataset = data.load(tmp_path / "mine")
    assert is_tiny(dataset)
    assert dataset.source == str(tmp_path / "mine")
    dataset.train_images.fill_(7)  # The tensors own their memory.
    assert dataset.classes[9] == "Ankle boot"
    assert dataset.train_images.dtype == dataset.test_images.dtype == torch.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == torch.int64


def test_places_are_looked_in_in_order_and_silently(tiny, tmp_path, monkeypatch):
    mine, cache, debian = (write(tmp_path / place, tiny) for place in ("mine", "cache", "debian"))
    monkeypatch.setattr(data, "DEBIAN_FOLDER", debian)
    monkeypatch.setattr(data, "default_cache", lambda: cache)
    lines = []
    assert data.load(mine, announce=lines.append).source == str(mine)
    assert data.load(mirrors=[], announce=lines.append).source == f"the cache {cache}"
    dataset = data.load(cache=tmp_path / "none", mirrors=[], announce=lines.append)
    assert dataset.source == f"Debian's dataset-fashion-mnist, {debian}"
    assert is_tiny(dataset)
    assert lines == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere: no such folder; name the folder that has the four files of Fashion"),
        (
            "empty",
            r"empty: train-images-idx3-ubyte, .*, t10k-labels-idx1-ubyte missing, unpacked and as "
            r".gz, there and in FashionMNIST/raw and raw; put all four files of Fashion-MNIST into",
        ),
    ],
)
def test_named_folder_without_files_never_falls_through(tiny, tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match=message):
        data.load(tmp_path / name, cache=write(tmp_path / "cache", tiny))


def test_missing_file_is_named(tiny, tmp_path):
    del tiny[TEST_LABELS]
    with pytest.raises(data.DataError, match=r"mine: t10k-labels-idx1-ubyte missing, unpacked and"):
        data.load(write(tmp_path / "mine", tiny))


WRONG = [
    pytest.param(lambda good: gzip.compress(good)[:-20], "damaged .Compressed file", id="cut gzip"),
    pytest.param(lambda good: gzip.compress(good)[:-4] + b"1234", "damaged ", id="corrupt gzip"),
    pytest.param(lambda good: gzip.compress(good[:-1]), "expected the SHA-256", id="truncated"),
    pytest.param(lambda good: good[:-1] + b"\xff", "expected the SHA-256", id="another pixel"),
    pytest.param(lambda good: b"<html>Log in</html>", "expected the SHA-256", id="web page"),
    pytest.param(lambda good: b"", "expected the SHA-256", id="nothing"),
]


@pytest.mark.parametrize(("body", "message"), WRONG)
def test_damaged_or_other_file_is_named(tiny, tmp_path, body, message):
    path = write(tmp_path, tiny) / f"{TRAIN_LABELS}.gz"
    path.write_bytes(body(tiny[TRAIN_LABELS]))
    with pytest.raises(
        data.DataError,
        match=rf"^{path}: {message}.*download it again\.$",
    ):
        data.load(tmp_path)


def test_swapped_files_are_refused(tiny, tmp_path):
    swapped = {**tiny, TRAIN_IMAGES: tiny[TEST_IMAGES], TEST_IMAGES: tiny[TRAIN_IMAGES]}
    with pytest.raises(
        data.DataError, match=r"train-images-.*: expected the SHA-256 [0-9a-f]{16}…"
    ):
        data.load(write(tmp_path, swapped))


def test_unpacking_stops_at_a_limit(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LARGEST", 1000)
    with pytest.raises(data.DataError, match=r"train-images-.*: expected the SHA-256"):
        data.load(write(tmp_path, tiny))


def test_broken_debian_files_are_announced_and_passed_over(tiny, tmp_path, monkeypatch):
    debian = write(tmp_path / "debian", {**tiny, TEST_IMAGES: b"\0" * 99})
    monkeypatch.setattr(data, "DEBIAN_FOLDER", debian)
    lines = []
    with mirror(gzipped(tiny)) as (address, _):
        dataset = data.load(cache=tmp_path / "c", mirrors=[address], announce=lines.append)
    assert dataset.source == f"downloaded to the cache {tmp_path / 'c'}"
    assert lines[0].startswith(f"Passing over Debian's dataset-fashion-mnist: {debian}")
    assert f"{TEST_IMAGES}.gz: expected the SHA-256" in lines[0]


def test_default_cache_is_the_platforms(monkeypatch, tmp_path):
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda app: tmp_path / app)
    assert data.default_cache() == tmp_path / "batchnorm" / "fashion-mnist"


def test_download_fills_the_cache_and_the_next_load_needs_no_network(tiny, tmp_path):
    lines = []
    cache = tmp_path / "deep" / "cache"
    with mirror(gzipped(tiny)) as (address, asked):
        dataset = data.load(cache=cache, mirrors=[address], announce=lines.append)
    assert is_tiny(dataset)
    assert dataset.source == f"downloaded to the cache {cache}"
    assert asked == list(tiny)
    assert lines == [f"Downloading Fashion-MNIST (up to 31 MB) to {cache}"]
    assert sorted(path.name for path in cache.iterdir()) == sorted(f"{name}.gz" for name in tiny)
    assert data.load(cache=cache, mirrors=[]).source == f"the cache {cache}"


def test_second_mirror_serves_what_the_first_has_not(tiny, tmp_path):
    with mirror({}) as (first, asked), mirror(gzipped(tiny)) as (second, _):
        dataset = data.load(cache=tmp_path, mirrors=[first, second], announce=quiet)
    assert is_tiny(dataset)
    assert asked == list(tiny)


@pytest.mark.parametrize(("body", "_"), WRONG)
def test_wrong_content_is_never_kept_and_is_said(tiny, tmp_path, body, _):
    lines = []
    with mirror({name: body(content) for name, content in tiny.items()}) as (bad, _):
        dataset = data.load(cache=tmp_path, mirrors=[bad], announce=lines.append)
        assert dataset.name == "digits (scikit-learn)"
        assert re.search(r"train-images-idx3-ubyte\.gz: 127\.0\.0\.1:\d+: wrong content", lines[1])
        assert list(tmp_path.iterdir()) == []
        with mirror(gzipped(tiny)) as (good, _):
            dataset = data.load(cache=tmp_path, mirrors=[bad, good], announce=lines.append)
    assert is_tiny(dataset)


def test_broken_cache_entry_is_announced_and_fetched_again(tiny, tmp_path):
    cache = write(tmp_path / "cache", tiny)
    broken = cache / f"{TEST_IMAGES}.gz"
    broken.write_bytes(broken.read_bytes()[:30])
    lines = []
    with mirror(gzipped(tiny)) as (address, asked):
        dataset = data.load(cache=cache, mirrors=[address], announce=lines.append)
    assert is_tiny(dataset)
    assert asked == [TEST_IMAGES]
    assert lines[0].startswith(f"Passing over a file of the cache: {broken}: damaged (Compressed")
    assert is_tiny(data.load(cache=cache, mirrors=[]))


def test_without_network_digits_stand_in_and_one_line_says_so(tiny, tmp_path, dead_mirror):
    lines = []
    dataset = data.load(cache=tmp_path, mirrors=[dead_mirror, dead_mirror], announce=lines.append)
    host = dead_mirror.split("/")[2]
    assert dataset.name == "digits (scikit-learn)"
    assert lines[1:] == [
        "Fashion-MNIST could not be downloaded (train-images-idx3-ubyte.gz: "
        f"{host}: ConnectionError; {host}: ConnectionError), so scikit-learn's digits stand in "
        "(1,797 real images, resized to 28×28); for the real one install Debian's package "
        "dataset-fashion-mnist or name a folder that has the files with --data DIR."
    ]


def test_announcements_go_to_standard_error(tiny, tmp_path, capsys):
    with mirror({}) as (address, _):
        data.load(cache=tmp_path, mirrors=[address])
    out, err = capsys.readouterr()
    assert out == ""
    assert "HTTP 404), so scikit-learn's digits stand in" in err


@pytest.mark.parametrize(
    ("mirrors", "reason"),
    [((), "no mirror was named"), (("no-scheme",), "no-scheme: MissingSchema")],
)
def test_useless_mirrors_are_said(tiny, tmp_path, mirrors, reason):
    lines = []
    data.load(cache=tmp_path, mirrors=mirrors, announce=lines.append)
    assert f"{reason})" in lines[1]


def test_cache_that_cannot_be_written_is_said(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    lines = []
    data.load(cache=tmp_path / "file" / "cache", mirrors=[], announce=lines.append)
    assert re.search(r"downloaded \(.*file.cache: Not a directory\), so", lines[1])


def test_mirrors_with_tls_come_first():
    schemes = [address.partition(":")[0] for address in data.MIRRORS]
    assert schemes == ["https", "https", "https", "http"]


class Bar:
    """Takes down what pooch does with it."""

    def __init__(self, name):
        self.name, self.total, self.done, self.closed = name, 0, 0, False

    def update(self, amount):
        self.done += amount

    def reset(self):
        self.done = 0

    def close(self):
        self.closed = True


def test_each_file_gets_a_bar_that_fills_and_closes(tiny, tmp_path):
    bars = []

    def make(name):
        bars.append(Bar(name))
        return bars[-1]

    packed = gzipped(tiny)
    with mirror(packed) as (address, _):
        data.load(cache=tmp_path, mirrors=[address], announce=quiet, progress=make)
    assert [bar.name for bar in bars] == [f"{name}.gz" for name in tiny]
    assert [bar.done for bar in bars] == [bar.total for bar in bars]
    assert [bar.total for bar in bars] == [len(content) for content in packed.values()]
    assert all(bar.closed for bar in bars)


def test_bar_closes_when_the_mirror_fails(tiny, tmp_path):
    bar = Bar("only")
    with mirror({}) as (address, _):
        data.load(cache=tmp_path, mirrors=[address], announce=quiet, progress=lambda name: bar)
    assert bar.closed


def test_named_folder_needs_no_optional_library(tiny, tmp_path, monkeypatch):
    for module in ("pooch", "requests", "sklearn", "platformdirs", "rich"):
        monkeypatch.setitem(sys.modules, module, None)
    assert is_tiny(data.load(write(tmp_path, tiny)))


def test_digits_are_of_the_form_of_fashion_mnist(tiny, tmp_path):
    digits = data.load(cache=tmp_path, mirrors=[], announce=quiet)
    assert digits.train_images.shape == (1437, 28, 28)
    assert digits.test_images.shape == (360, 28, 28)
    assert digits.train_images.dtype == digits.test_images.dtype == torch.uint8
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64
    assert digits.train_labels.bincount(minlength=10).min() >= 140
    assert digits.test_labels.bincount(minlength=10).min() >= 30
    assert digits.classes == tuple("0123456789")
    assert "load_digits" in digits.source


def test_digits_use_the_range_of_bytes_and_keep_their_brightness(tiny, tmp_path):
    images = data.load(cache=tmp_path, mirrors=[], announce=quiet).train_images
    original = sklearn.datasets.load_digits().images[:1437].mean() * 255 / 16
    assert (images.min(), images.max()) == (0, 255)
    assert images.double().mean().item() == pytest.approx(original, rel=0.02)


@pytest.mark.images
def test_real_images_have_the_published_numbers(fashion_mnist):
    assert fashion_mnist.train_images.shape == (60000, 28, 28)
    assert fashion_mnist.test_images.shape == (10000, 28, 28)
    assert fashion_mnist.train_labels.bincount().tolist() == [6000] * 10
    assert fashion_mnist.test_labels.bincount().tolist() == [1000] * 10
    pixels = fashion_mnist.train_images.double() / 255
    assert pixels.mean().item() == pytest.approx(0.28604, abs=5e-6)
    assert pixels.std().item() == pytest.approx(0.35302, abs=5e-6)


@pytest.mark.images
def test_real_images_are_found_without_being_named(fashion_mnist, tmp_path):
    lines = []
    dataset = data.load(cache=tmp_path, mirrors=[], announce=lines.append)
    assert dataset.source == f"Debian's dataset-fashion-mnist, {data.DEBIAN_FOLDER}"
    assert torch.equal(dataset.test_images, fashion_mnist.test_images)
    assert lines == []


@pytest.mark.images
def test_first_real_images_are_what_their_labels_say(fashion_mnist):
    first = [fashion_mnist.classes[label] for label in fashion_mnist.train_labels[:4]]
    assert first == ["Ankle boot", "T-shirt/top", "T-shirt/top", "Dress"]
