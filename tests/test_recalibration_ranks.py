"""recalibrate on several processes: all get the statistics of all data, and fail together."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from batchnorm.tools.recalibration import recalibrate
from batchnorm.tools.recalibration.ranks import together
from recalibration_cases import bits, net, normal

BATCHES = [normal(size, 3, 8, 8, seed=size) for size in (4, 7, 3, 5)]
OF_RANK = {
    "uneven": (BATCHES[:3], BATCHES[3:]),
    "first has all": (BATCHES, []),
    "second has all": ([], BATCHES),
}


def on_two_ranks(work, *args, tmp_path):
    """Runs ``work(rank, *args)`` on two ranks; what they return, in their order."""
    multiprocessing.spawn(_rank, (work, args, str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for _, failure in results:
        assert failure is None, failure
    return [result for result, _ in results]


def _rank(rank, work, args, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    try:
        result = work(rank, *args), None
    except BaseException:
        result = None, traceback.format_exc()
    torch.save(result, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def recalibrated(rank, of_rank, kind, sequential):
    model = net(nn.SyncBatchNorm if kind == "synchronized" else nn.BatchNorm2d)
    used = DistributedDataParallel(model) if kind == "DDP" else model
    result = recalibrate(used, OF_RANK[of_rank][rank], sequential=sequential)
    return model.state_dict(), result.samples, result.batches, result.unreached


@pytest.mark.parametrize(
    ("of_rank", "kind", "sequential"),
    [
        ("uneven", "plain", False),
        ("second has all", "plain", False),
        ("uneven", "plain", True),
        ("second has all", "plain", True),
        ("uneven", "DDP", False),
        ("first has all", "DDP", False),
        ("uneven", "synchronized", False),
        ("first has all", "synchronized", True),
    ],
)
def test_all_ranks_get_the_statistics_of_all_data(of_rank, kind, sequential, tmp_path):
    first, second = on_two_ranks(recalibrated, of_rank, kind, sequential, tmp_path=tmp_path)
    alone = net()
    recalibrate(alone, BATCHES, sequential=sequential)
    assert first[1:] == second[1:] == (19, 4, ())
    for name, value in alone.state_dict().items():
        assert torch.equal(first[0][name], second[0][name]), name
        assert_close(first[0][name], value, rtol=1e-6, atol=1e-7)


def failing(rank):
    def loader():
        yield BATCHES[0]
        if rank == 1:
            raise OSError("disk gone")

    model = net()
    before = bits(model)
    with pytest.raises(RuntimeError if rank == 0 else OSError) as caught:
        recalibrate(model, loader())
    assert bits(model) == before
    return str(caught.value)


def test_a_failure_of_one_rank_is_one_of_all(tmp_path):
    assert on_two_ranks(failing, tmp_path=tmp_path) == [
        "recalibrate: rank 1 failed, so nothing is changed on any: OSError: disk gone",
        "disk gone",
    ]


def without_data(rank):
    with pytest.raises(ValueError, match="batches gave no samples"):
        recalibrate(net(), [])
    return True


def test_no_data_on_any_rank_is_refused(tmp_path):
    assert on_two_ranks(without_data, tmp_path=tmp_path) == [True, True]


def test_one_process_is_together_with_itself():
    assert together(lambda: 3) == (3, [3])
    with pytest.raises(OSError, match="disk gone"):
        together(lambda: (_ for _ in ()).throw(OSError("disk gone")))
