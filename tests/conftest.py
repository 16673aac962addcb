"""What every test file shares: one thread a worker, and the real images."""

import importlib.util
import os
import sys
from unittest.mock import patch

import pytest
import torch

if importlib.util.find_spec("numba"):
    # Numba cannot compile functions that are wrapped by checks at run time.
    from batchnorm.kernels import geometry, parallel  # noqa: F401

    plain = [finder for finder in sys.meta_path if "jaxtyping" not in type(finder).__module__]
    with patch.object(sys, "meta_path", plain):
        from batchnorm.kernels.compiled import plans  # noqa: F401

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


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
