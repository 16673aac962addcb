"""Imports torchvision, also where its compiled operators do not fit this build of torch."""

from __future__ import annotations

import functools
import importlib
import sys

import torch

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


@functools.cache
def import_torchvision():
    """Without its operators it cannot be imported: it registers shapes for those that do not exist.

    Layers and networks for classification call none of them. timm imports torchvision, too.
    """
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
