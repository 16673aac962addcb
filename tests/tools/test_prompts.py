"""A prompt and a notebook show what ``print`` shows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm


def model():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


RESULTS = {
    "freeze": lambda: batchnorm.freeze(model()),
    "unfreeze": lambda: batchnorm.unfreeze(model()),
    "guard": lambda: batchnorm.guard(model()),
    "watch": lambda: batchnorm.watch(model()),
    "reset_poisoned_statistics": lambda: batchnorm.reset_poisoned_statistics(model()),
    "recalibrate": lambda: batchnorm.recalibrate(model(), [torch.randn(8, 4)]),
}


@pytest.mark.parametrize("tool", RESULTS)
def test_the_repr_of_a_result_is_its_text(tool):
    result = RESULTS[tool]()
    assert repr(result) == str(result)
    assert "object at 0x" not in repr(result)
    assert str(result)[0].isupper()
    assert max(map(len, str(result).splitlines())) <= 80
