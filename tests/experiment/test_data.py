"""Finding, verifying and downloading the images; the network here ends at 127.0.0.1."""

import contextlib
import gzip
import io
import re
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import platformdirs
import pytest
import sklearn.datasets
import torch

from batchnorm.experiment import data, idx
from idx_files import some_images, tiny_files, write

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = idx.SHA256


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Four small files in place of the real ones, no Debian package, no proxy."""
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "not-debian")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tiny_files(monkeypatch)


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
    folder = write(tmp_path / "mine" / layout, tiny, suffix)
    dataset = data.load(tmp_path / "mine")
    assert is_tiny(dataset)
    assert dataset.source == str(folder)
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
        ("empty", r"empty: none of the four files .* or in FashionMNIST/raw \(train-images-idx3"),
    ],
)
def test_named_folder_without_files_never_falls_through(tiny, tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match=message):
        data.load(tmp_path / name, cache=write(tmp_path / "cache", tiny))


def test_broken_debian_files_are_announced_and_passed_over(tiny, tmp_path, monkeypatch):
    debian = write(tmp_path / "debian", {**tiny, TEST_IMAGES: b"\0" * 99})
    monkeypatch.setattr(data, "DEBIAN_FOLDER", debian)
    lines = []
    with mirror(gzipped(tiny)) as (address, _):
        dataset = data.load(cache=tmp_path / "c", mirrors=[address], announce=lines.append)
    assert dataset.source == f"downloaded to the cache {tmp_path / 'c'}"
    assert lines[0].startswith(f"Passing over Debian's dataset-fashion-mnist: {debian}")
    assert "not an IDX file" in lines[0]


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


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda good: gzip.compress(good)[:-20], id="truncated"),
        pytest.param(lambda good: gzip.compress(good[:-1]), id="short"),
        pytest.param(lambda good: gzip.compress(good[:-1] + b"\xff"), id="another pixel"),
        pytest.param(lambda good: b"<html>Please log in</html>", id="web page"),
        pytest.param(lambda good: b"", id="nothing"),
    ],
)
def test_wrong_content_is_never_kept_and_is_said(tiny, tmp_path, body):
    lines = []
    with mirror({name: body(content) for name, content in tiny.items()}) as (bad, _):
        dataset = data.load(cache=tmp_path, mirrors=[bad], announce=lines.append)
        assert dataset.name == "digits (scikit-learn)"
        assert re.search(r"train-images-idx3-ubyte\.gz: 127\.0\.0\.1:\d+: wrong content", lines[1])
        assert list(tmp_path.iterdir()) == []
        with mirror(gzipped(tiny)) as (good, _):
            dataset = data.load(cache=tmp_path, mirrors=[bad, good], announce=lines.append)
    assert is_tiny(dataset)


def test_connection_that_breaks_off_is_said(tiny, tmp_path):
    class Longer(bytes):
        def __len__(self):
            return super().__len__() + 50

    lines = []
    with mirror({TRAIN_IMAGES: Longer(gzip.compress(tiny[TRAIN_IMAGES]))}) as (address, _):
        data.load(cache=tmp_path, mirrors=[address], announce=lines.append)
    assert ": broke off)" in lines[1]
    assert list(tmp_path.iterdir()) == []


def test_broken_cache_entry_is_announced_and_fetched_again(tiny, tmp_path):
    cache = write(tmp_path / "cache", tiny)
    broken = cache / f"{TEST_IMAGES}.gz"
    broken.write_bytes(broken.read_bytes()[:30])
    lines = []
    with mirror(gzipped(tiny)) as (address, asked):
        dataset = data.load(cache=cache, mirrors=[address], announce=lines.append)
    assert is_tiny(dataset)
    assert asked == [TEST_IMAGES]
    assert lines[0].startswith(f"Passing over a broken cache entry: {broken}: the gzip stream")
    assert is_tiny(data.load(cache=cache, mirrors=[]))


def test_without_network_digits_stand_in_and_one_line_says_so(tiny, tmp_path, dead_mirror):
    lines = []
    dataset = data.load(cache=tmp_path, mirrors=[dead_mirror, dead_mirror], announce=lines.append)
    host = dead_mirror.split("/")[2]
    assert dataset.name == "digits (scikit-learn)"
    assert lines[1:] == [
        "Fashion-MNIST could not be downloaded (train-images-idx3-ubyte.gz: "
        f"{host}: no connection; {host}: no connection), so scikit-learn's digits stand in (1,797 "
        "real images, resized to 28×28); for the real one install Debian's package "
        "dataset-fashion-mnist or name a folder that has the files with --data DIR."
    ]


def test_announcements_go_to_standard_error(tiny, tmp_path, capsys):
    with mirror({}) as (address, _):
        data.load(cache=tmp_path, mirrors=[address])
    out, err = capsys.readouterr()
    assert out == ""
    assert "HTTP status 404), so scikit-learn's digits stand in" in err


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
    assert re.search(r"file.cache cannot be written: ", lines[1])


def test_timeouts_are_said(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_TIMEOUT", (5, 0.05))
    lines = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        data.load(cache=tmp_path, mirrors=[address], announce=lines.append)
    assert ": timed out)" in lines[1]


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


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "total", "drawn"),
    [
        pytest.param(Terminal(), 1000, r"train-images.*0\.5/1\.0 kB", id="terminal"),
        pytest.param(Terminal(), 0, r"train-images.*500/\? bytes", id="unknown length"),
        pytest.param(io.StringIO(), 1000, "^$", id="file"),
    ],
)
def test_terminal_bar_draws_on_standard_error_only_on_a_terminal(
    monkeypatch, capsys, stream, total, drawn
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    bar = data.TerminalBar("train-images")
    bar.total = total
    bar.update(1000)
    bar.reset()
    bar.update(500)
    bar.close()
    bar.close()
    assert bar.total == total
    assert re.search(drawn, stream.getvalue(), re.DOTALL)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("module", "library"),
    [("pooch", "pooch"), ("sklearn.datasets", "sklearn"), ("platformdirs", "platformdirs")],
)
def test_missing_library_is_a_sentence(tiny, tmp_path, monkeypatch, module, library):
    monkeypatch.setitem(sys.modules, module, None)
    cache = None if module == "platformdirs" else tmp_path
    with pytest.raises(
        data.DataError,
        match=rf"needs the library {library}, .*; install it with pip install 'batchnorm\[cli\]'",
    ):
        data.load(cache=cache, mirrors=[], announce=quiet)


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
