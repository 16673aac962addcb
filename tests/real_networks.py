"""torchvision, also where its compiled operators do not fit this build of torch."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from importlib.util import find_spec

import pytest
import torch

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


@functools.cache
def import_torchvision():
    """torchvision; skips the test where it is not installed, except in CI.

    Without its compiled operators it cannot be imported, because it registers shapes for operators
    that do not exist; networks for classification call none of them.
    """
    if find_spec("torchvision") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("torchvision is not installed; CI must not skip this.")
        pytest.skip("torchvision is not installed")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    for operator in ("nms", "qnms"):
        OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")
