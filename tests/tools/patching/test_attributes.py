"""Temporary attributes overlap in any order, and leave nothing, also if one cannot be set."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from batchnorm.tools.patching.attributes import (
    FALSE_UNTIL_COPIED,
    is_temporary,
    temporary_attributes,
)
from layer_kinds import everything


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_newest_decides_and_the_last_to_end_restores(order):
    layer = nn.BatchNorm1d(2, momentum=0.5)
    handles = {value: temporary_attributes([layer], momentum=value) for value in range(3)}
    assert layer.momentum == 2
    for value in order:
        handles.pop(value).remove()
        assert layer.momentum == max(handles, default=0.5)
        assert is_temporary(layer, "momentum") == bool(handles)
    assert not is_temporary(layer, "eps")


def test_several_modules_and_a_buffer():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    before, mean = everything(model), torch.ones(2)
    with temporary_attributes(model, running_mean=mean, training=False):
        assert all(layer.running_mean is mean and not layer.training for layer in model)
        assert len(list(model[0].buffers())) == 3
    assert everything(model) == before


def test_if_one_cannot_be_set_none_is():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    before = everything(model)
    with pytest.raises(TypeError, match="cannot assign"):
        temporary_attributes(model, eps=1.0, running_mean="text")
    assert everything(model) == before
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        temporary_attributes(model, eps=1.0, missing=1)
    assert everything(model) == before


def test_false_until_copied():
    assert not FALSE_UNTIL_COPIED
    assert repr(FALSE_UNTIL_COPIED) == "False"
    assert copy.deepcopy(FALSE_UNTIL_COPIED) is True
    assert pickle.loads(pickle.dumps(FALSE_UNTIL_COPIED)) is True
