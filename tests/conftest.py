"""What every test file shares: one thread a worker, and the real images."""

import os

import pytest
import torch

import annotations
import ranks


def pytest_addoption(parser):
    parser.addoption("--typed", action="store_true", help="check every annotation at run time")


def pytest_configure(config):
    if config.getoption("--typed"):
        annotations.check()


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_sessionfinish():
    """Ends the processes of distributed tests before coverage is collected."""
    ranks.end()


@pytest.fixture(scope="session")
def fashion_mnist():
    """The real Fashion-MNIST of Debian's package; skipped without it, except in CI."""
    from batchnorm.experiment import data

    if not data.DEBIAN_FOLDER.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail("Debian's dataset-fashion-mnist is not installed; CI must not skip this.")
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    return data.load(data.DEBIAN_FOLDER)


@pytest.fixture
def two_threads():
    """Two threads for a test, then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
