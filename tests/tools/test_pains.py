"""What users of batch norm suffer from: torch's own numbers as measured, and what ours say.

Before: torch alone, asserted to be as it is, so that we notice when it is mended. After: our tools.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm
from batchnorm.tools.monitoring import watch
from batchnorm.tools.recalibration import recalibrate
from recalibration_cases import normal

# Statistics that are not converged: what they start with, 0 and 1, still weighs (1 - momentum)^n.


def rows(count, seed=0):
    """Values of variance 100, exactly, in each batch."""
    x = normal(count, 1, seed=seed)
    return 10 * (x - x.mean(0)) / x.std(0)


def batches_until(layer, batch, limit):
    """After how many batches ``running_var`` is within 5 % of 100."""
    for done in range(1, limit + 1):
        layer(batch)
        if abs(layer.running_var.item() / 100 - 1) < 0.05:
            return done
    raise AssertionError(layer.running_var)


@pytest.mark.parametrize(("momentum", "count"), [(0.1, 29), (0.01, 298), (0.001, 2985)])
def test_a_momentum_needs_its_batches_and_recalibrating_needs_one(momentum, count):
    batch = rows(64)
    theirs, ours = nn.BatchNorm1d(1, momentum=momentum), nn.BatchNorm1d(1, momentum=momentum)
    with torch.no_grad():
        assert batches_until(theirs, batch, 3000) == count
    # (1 - momentum)^n of the distance of 99 from 1 to 100 must be below 5
    assert math.ceil(math.log(5 / 99) / math.log(1 - momentum)) == count
    ours(batch)
    assert ours.running_var.item() == pytest.approx(1 + 99 * momentum, rel=1e-4)
    recalibrate(ours, [batch])
    assert ours.running_var.item() == pytest.approx(100, rel=1e-6)


@pytest.mark.parametrize(("momentum", "left"), [(0.1, 22), (0.01, 230), (0.001, 2302)])
def test_how_long_the_initial_value_weighs_more_than_a_tenth(momentum, left):
    layer = nn.BatchNorm1d(1, momentum=momentum)
    layer.running_mean.fill_(1.0)  # and batches of mean 0: what is left of it is its weight
    batch = rows(8) / 10
    weights = []
    for _ in range(left):
        layer(batch)
        weights.append(layer.running_mean.item())
    assert weights[-1] < 0.1 < weights[-2]
    assert weights[-1] == pytest.approx((1 - momentum) ** left, rel=1e-2)


# Dropout before batch norm: training has another variance than evaluation.


def test_dropout_before_a_norm_makes_evaluation_narrow_and_recalibrating_mends_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(256, 64), nn.BatchNorm1d(64, momentum=None))
    x = normal(4096, 256)

    def std_in_evaluation():
        with torch.no_grad():
            return model.eval()(x).std(0).mean().item()

    with torch.no_grad():
        for seed in range(10):
            model.train()(normal(2048, 256, seed=1 + seed))
    assert std_in_evaluation() == pytest.approx(math.sqrt(0.5), abs=0.01)  # 0.705 as measured

    recalibrate(model.train(), x.split(512))  # dropout still drops: the same statistics again
    assert std_in_evaluation() == pytest.approx(math.sqrt(0.5), abs=0.02)

    result = recalibrate(model.eval(), x.split(512))
    assert std_in_evaluation() == pytest.approx(1.0, abs=1e-3)
    assert 0.45 < result.layers[0].var_ratio_min < result.layers[0].var_ratio_max < 0.55


# Statistics that nothing ever moved.


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, batchnorm.BatchNorm1d])
def test_statistics_that_never_moved_normalize_nothing_and_are_found_out(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(2), nn.ReLU(), kind(2)).eval()
    x = normal(500, 2, mean=5, std=3)
    with torch.no_grad():
        assert_close(model[0](x), x, rtol=1e-4, atol=0)  # 0 and 1, as if there were no layer
    assert model[0].num_batches_tracked == 0

    result = recalibrate(model, x.split(100))
    first = result.layers[0]
    assert first.mean_shift == pytest.approx(5, abs=0.3)  # in old deviations, of which each is 1
    assert first.var_ratio_min == pytest.approx(9, rel=0.15)
    assert model[0].num_batches_tracked == 5
    with torch.no_grad():
        y = model[0](x)
    assert_close(y.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    assert_close(y.std(0), torch.ones(2), rtol=1e-5, atol=0)


def test_a_layer_that_training_never_calls_is_seen_by_the_watch_and_by_recalibrate():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.forgotten = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.used(x)

    model, x = Forgetful(), normal(20, 2, mean=5)
    with watch(model) as seen:
        for _ in range(3):
            model(x)
            seen.step()
    batches = {record["layer"]: record["batches"] for record in seen.records[-2:]}
    assert batches == {"used": 1, "forgotten": 0}
    assert model.forgotten.running_mean.tolist() == [0.0, 0.0]
    assert model.forgotten.running_var.tolist() == [1.0, 1.0]

    result = recalibrate(model, [x])
    assert result.unreached == ("forgotten",)
    assert "Left alone: forgotten: no batch reached it." in str(result)


# Weights that were rounded: their statistics are those of other weights.


def test_rounded_weights_get_statistics_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16, momentum=None))
    x = normal(2000, 32, mean=3)
    with torch.no_grad():
        model(x)
        weight, step = model[0].weight, 0.1
        weight.copy_((weight / step).round() * step)  # a few levels, as quantization leaves
        stale = model.eval()(x)
        assert stale.mean(0).abs().max() > 0.3
        recalibrate(model, x.split(256))
        assert_close(model(x).mean(0), torch.zeros(16), rtol=0, atol=1e-4)
        assert_close(model(x).std(0), torch.ones(16), rtol=1e-3, atol=0)
