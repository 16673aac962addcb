"""Tensors that a layer keeps as ordinary attributes return with its buffers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm import (
    checkpoint,
    count_recomputation_once,
    guard,
    no_stats_update,
    recalibrate,
    transaction,
)
from look_alikes import Own

pytestmark = pytest.mark.untyped


class Counting(Own):
    """A cumulative average, whose counter is an ordinary attribute."""

    def __init__(self, channels):
        super().__init__(channels)
        self.calls = torch.tensor(0.0)

    def forward(self, x):
        if self.training:
            self.calls = self.calls + 1
            self.momentum = 1 / float(self.calls)
        return super().forward(x)


class CountingInPlace(Counting):
    def forward(self, x):
        if self.training:
            self.calls += 1
        return Own.forward(self, x)


class SeveralCounters(Counting):
    """Has more than one of them, of several shapes and dtypes."""

    def __init__(self, channels):
        super().__init__(channels)
        self.per_channel = torch.zeros(channels, dtype=torch.int64)
        self.has_started = torch.tensor(False)

    def forward(self, x):
        if self.training:
            self.per_channel += 1
            self.has_started = torch.tensor(True)
        return super().forward(x)


KINDS = [Counting, CountingInPlace, SeveralCounters]
kinds = pytest.mark.parametrize("kind", KINDS)


def state(layer):
    attributes = {n: v for n, v in vars(layer).items() if isinstance(v, torch.Tensor)}
    return {n: v.tolist() for n, v in {**attributes, **layer.state_dict()}.items()}


def data(bad=False):
    x = torch.randn(8, 4)
    x[0] = torch.inf if bad else 0
    return x


@kinds
def test_a_guard_restores_them(kind):
    layer = kind(4)
    layer(data())
    before = state(layer)
    with guard(layer) as guarded:
        layer(data(bad=True))
        assert state(layer) == before
        layer(data())
        assert guarded.skipped == {"": 1}
    assert state(layer)["calls"] == 2


@kinds
def test_a_guard_restores_them_after_an_error(kind):
    layer = kind(4)
    layer(data())
    before = state(layer)
    with guard(layer), pytest.raises(RuntimeError, match="must match the size"):
        layer(torch.randn(8, 3))
    assert state(layer) == before


@kinds
def test_without_updates(kind):
    layer = kind(4)
    layer(data())
    before = state(layer)
    with no_stats_update(layer):
        layer(data())
    assert state(layer) == before


@kinds
def test_in_a_transaction(kind):
    layer = kind(4)
    layer(data())
    before = state(layer)
    with transaction(layer) as step:
        layer(data())
        step.rollback()
        assert state(layer) == before
        layer(data())
        step.commit()
        after = state(layer)
        assert after["calls"] == 2
        layer(data())
        step.rollback()
        assert state(layer) == after
    assert state(layer) == after
    with pytest.raises(RuntimeError, match="must match the size"), transaction(layer):
        layer(torch.randn(8, 3))
    assert state(layer) == after


@kinds
def test_recomputation_counts_once(kind):
    layer, x = kind(4), data().requires_grad_()
    checkpoint(layer, x).sum().backward()
    assert state(layer)["calls"] == 1
    with count_recomputation_once(layer):
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert state(layer)["calls"] == 2


@kinds
def test_recalibration_leaves_them(kind):
    model = nn.Sequential(kind(4))
    before = state(model[0])["calls"]
    recalibrate(model, [data()])
    assert state(model[0])["calls"] == before


class Remembering(Own):
    """Keeps the input, which is the user's tensor."""

    last = None

    def forward(self, x):
        self.last = x
        return super().forward(x)


@pytest.mark.parametrize("rows", [8, 5])
def test_tensors_of_the_user_are_not_written(rows):
    layer = Remembering(4)
    batches = [data(), data()[:rows], data(bad=True), data()]
    copies = [batch.clone() for batch in batches]
    layer(batches[0])
    with guard(layer):
        layer(batches[1])
        layer(batches[2])
    with transaction(layer) as step:
        layer(batches[3])
        step.commit()
        layer(batches[1])
        step.rollback()
        layer(batches[0])
    with no_stats_update(layer):
        layer(batches[2])
    assert all(torch.equal(a, b) for a, b in zip(batches, copies, strict=True))


def test_results_with_a_graph_are_no_state():
    layer = Remembering(4)
    x = data().requires_grad_()
    y = 2 * x
    with transaction(layer) as step:
        layer(y)
        step.rollback()
        assert layer.last is y
    y.sum().backward()
    assert x.grad.unique().tolist() == [2]
