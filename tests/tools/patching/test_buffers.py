"""Saved buffers: the same tensors with the same bits, in the same places."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.tools.patching.buffers import SavedBuffers, SavedTensors, work_on_copies
from layer_kinds import everything


def test_values_and_tensors_return_to_their_places():
    layer = nn.BatchNorm1d(2)
    layer.running_mean[0] = torch.nan
    before = everything(layer)
    saved = SavedBuffers([layer])
    layer.running_mean.fill_(3)
    layer.running_var = None
    layer.num_batches_tracked = torch.tensor(7)
    saved.restore()
    assert everything(layer) == before


def test_only_named_buffers():
    layer = nn.BatchNorm1d(2)
    saved = SavedBuffers([layer], ["running_mean"])
    layer.running_mean.fill_(3)
    layer.running_var.fill_(3)
    saved.restore()
    assert layer.running_mean.tolist() == [0, 0]
    assert layer.running_var.tolist() == [3, 3]


@pytest.mark.parametrize("condition", [True, False])
def test_where_a_condition_holds(condition):
    layer = nn.BatchNorm1d(2)
    saved = SavedBuffers([layer])
    layer.running_mean = now = torch.ones(2)
    saved.restore_where(torch.tensor(condition))
    assert layer.running_mean is now
    assert now.tolist() == ([0, 0] if condition else [1, 1])


def test_autograd_does_not_notice():
    x = torch.ones(2)
    weight = torch.ones(2, requires_grad=True)
    y = (x * weight).sum()
    saved = SavedTensors([x])
    x.data.fill_(5)
    saved.restore()
    y.backward()
    assert weight.grad.tolist() == [1, 1]


def test_what_is_written_into_copies_is_dropped():
    layer = nn.BatchNorm1d(2)
    before = everything(layer)
    with work_on_copies([layer]):
        layer(torch.randn(4, 2))
        assert layer.num_batches_tracked == 1
        with work_on_copies([layer]):
            layer(torch.randn(4, 2))
            assert layer.num_batches_tracked == 2
        assert layer.num_batches_tracked == 1
    assert everything(layer) == before
