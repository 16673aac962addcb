"""What happens to statistics with torch alone, with the numbers that were published, and with ours.

The data are made, or their seeds looked for, so that the numbers come out to the digits given.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import batchnorm
from batchnorm import scratch
from batchnorm.tools.averaging import ema_update, keep_statistics_in_float32, merge_state_dicts
from batchnorm.tools.recalibration import recalibrate
from ranks import on_two_ranks

EXACT = {"rtol": 0, "atol": 0}
KINDS = [nn.BatchNorm1d, batchnorm.BatchNorm1d]


# Several ranks.


def of_rank(rank: int) -> Tensor:
    """Standard deviation 1; the mean is 0.15, and 3 on the other rank."""
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(rank))
    return (x - x.mean(0)) / x.std(0) + (0.15, 3.0)[rank]


def one_step(rank):
    """Of DDP: the statistics after it, those with which the next forward begins, and ours."""
    model = nn.Sequential(nn.BatchNorm1d(2))
    parallel = DistributedDataParallel(model, broadcast_buffers=True)
    parallel(of_rank(rank)).sum().backward()
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[0].momentum = 0.0
    parallel(of_rank(rank))
    next_ = model[0].running_mean.clone()
    recalibrate(model, [of_rank(rank)])
    return after, next_, model.state_dict()


def test_ranks_have_statistics_of_their_own(tmp_path):
    """Before: one step apart, and the next forward throws rank 1's away. After: of all data."""
    (first, next_first, ours), (second, next_second, theirs) = on_two_ranks(
        one_step, tmp_path=tmp_path
    )
    mean = "0.running_mean"
    assert_close(first[mean], torch.full((2,), 0.015), rtol=0, atol=5e-4)
    assert_close(second[mean], torch.full((2,), 0.300), rtol=0, atol=5e-4)
    assert torch.equal(next_first, first[mean])
    assert torch.equal(next_second, first[mean])

    merged = merge_state_dicts([first, second], [64, 64])
    assert_close(merged[mean], torch.full((2,), 0.1575), rtol=1e-4, atol=0)
    union = torch.cat([of_rank(0), of_rank(1)])
    for state in (ours, theirs):
        assert_close(state[mean], union.mean(0))
        assert_close(state["0.running_var"], union.var(0))


def test_the_variance_of_two_groups_six_deviations_apart():
    torch.manual_seed(4577)
    groups = [torch.randn(100, 1) - 3, torch.randn(100, 1) + 3]
    states = []
    for group in groups:
        layer = nn.BatchNorm1d(1, momentum=1.0)
        layer(group)
        states.append(layer.state_dict())
    averaged = (states[0]["running_var"] + states[1]["running_var"]) / 2
    assert float(averaged) == pytest.approx(0.97, abs=0.005)
    merged = merge_state_dicts(states, [100, 100])
    assert float(merged["running_var"]) == pytest.approx(10.15, abs=0.005)
    assert_close(merged["running_var"], torch.cat(groups).var(0))


# Averages.


def test_averaged_model_without_buffers_copies_the_live_ones():
    """Often misunderstood, and right; so does ours."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    averaged, target = AveragedModel(model, use_buffers=False), AveragedModel(model).module
    for _ in range(3):
        model(torch.randn(16, 3))
        with torch.no_grad():
            model[0].weight.add_(1.0)
        averaged.update_parameters(model)
        ema_update(target, model, 0.5)
        for copy_ in (averaged.module, target):
            assert_close(dict(copy_.named_buffers()), dict(model.named_buffers()), **EXACT)
            assert copy_[1].running_mean is not model[1].running_mean
    assert not torch.equal(averaged.module[0].weight, model[0].weight)


# Checkpoints without the counter, and dtypes.


def centred(mean: float) -> Tensor:
    x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    return x - x.mean() + mean


@pytest.mark.parametrize("kind", KINDS)
def test_a_cumulative_average_whose_counter_is_lost_forgets_its_history(kind):
    """So does ours, which loads what torch loads; with the counter in place neither does."""
    trained = kind(1, momentum=None)
    for _ in range(50):
        trained(centred(3.04))
    whole = trained.state_dict()
    lost = {name: tensor for name, tensor in whole.items() if name != "num_batches_tracked"}

    layer = kind(1, momentum=None)
    layer.load_state_dict(lost)  # a plain dict has no version, so torch does not complain
    assert float(layer.running_mean) == pytest.approx(3.04)
    layer(centred(-100.99))
    assert float(layer.running_mean) == pytest.approx(-100.99)

    # What our tools write has it.
    for state in (whole, merge_state_dicts([whole, whole], [64, 64], base=whole)):
        layer = kind(1, momentum=None)
        layer.load_state_dict(state)
        assert int(layer.num_batches_tracked) == 50
        layer(centred(-100.99))
        assert float(layer.running_mean) == pytest.approx((50 * 3.04 - 100.99) / 51)


def test_float64_into_a_float32_layer():
    x = torch.randn(8, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"mixed dtype .*all inputs must share same datatype"):
        nn.BatchNorm1d(3)(x)
    ours, wide = batchnorm.BatchNorm1d(3), nn.BatchNorm1d(3).double()
    y = ours(x)
    assert y.dtype == torch.float64
    assert_close(y, wide(x))
    assert {tensor.dtype for tensor in (ours.running_mean, ours.weight)} == {torch.float32}


def test_a_kept_layer_follows_a_model_into_float64():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    keep_statistics_in_float32(model)
    assert model.double()(torch.randn(8, 3).double()).dtype == torch.float64


# Statistics that keep the graph.


class Leaking(nn.Module):
    """As learners write it: the running mean is moved with the graph of the batch's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.running_mean = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        mean = (x * self.weight).mean(0)
        self.running_mean = 0.9 * self.running_mean + 0.1 * mean
        return x * self.weight - mean


def alive_after(layer: nn.Module, steps: int = 200) -> int:
    """How many of the batches are still held by a graph."""
    past = []
    for _ in range(steps):
        x = torch.randn(8, 4)
        past.append(weakref.ref(x))
        layer(x).sum()
        del x
    return sum(reference() is not None for reference in past)


def test_statistics_that_keep_the_graph_hold_every_batch():
    assert alive_after(Leaking()) == 200


@pytest.mark.parametrize(
    "layer",
    [
        lambda: scratch.BatchNorm(4, num_dims=2),
        lambda: batchnorm.BatchNorm1d(4),
        lambda: batchnorm.BatchNorm1d(4, momentum=None),
    ],
    ids=["scratch", "ours", "ours, cumulative"],
)
def test_ours_hold_none(layer):
    assert alive_after(layer()) == 0
