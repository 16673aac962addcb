"""recalibrate on several processes: all get the statistics of all data, and fail together."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from batchnorm.tools.recalibration import recalibrate
from batchnorm.tools.recalibration.distributed import AllRanks, uninterrupted
from ranks import on_two_ranks
from recalibration_cases import bits, net, normal

BATCHES = [normal(size, 3, 8, 8, seed=size) for size in (4, 7, 3, 5)]
OF_RANK = {
    "uneven": (BATCHES[:3], BATCHES[3:]),
    "first has all": (BATCHES, []),
    "second has all": ([], BATCHES),
}


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


STOPS = (RuntimeError, ValueError, OSError, KeyboardInterrupt, SystemExit)


def failing_in_turn(rank, cases):
    """One case after the other, in the same processes: a failure leaves them fit for the next."""
    messages = []
    for case in cases:
        model = net()
        before = bits(model)
        with pytest.raises(STOPS) as caught:
            case(model, rank)
        assert bits(model) == before, case
        messages.append(f"{type(caught.value).__name__}: {caught.value}")
    return messages


def interrupted_loader(model, rank):
    def loader():
        yield BATCHES[0]
        if rank == 1:
            raise KeyboardInterrupt

    recalibrate(model, loader())


def interrupted_model(model, rank, sequential=False):
    calls = []

    def forward(model, batch):
        calls.append(None)
        if rank == 1 and len(calls) == (6 if sequential else 2):
            raise SystemExit(3)
        model(batch)

    recalibrate(model, BATCHES, forward=forward, sequential=sequential)


def interrupted_model_in_a_later_pass(model, rank):
    interrupted_model(model, rank, sequential=True)


def interrupted_while_waiting(model, rank):
    """Ctrl-C reaches rank 0 while it waits for the slower rank 1."""

    def loader():
        yield BATCHES[0]
        if rank == 0:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            time.sleep(1)

    recalibrate(model, loader())


def wrong_layers(model, rank):
    recalibrate(model, BATCHES, layers=["9"] if rank == 1 else None)


def wrong_number(model, rank):
    recalibrate(model, BATCHES, tolerance=2 if rank == 0 else None)


def other_layers(model, rank):
    recalibrate(model, BATCHES, layers=["1"] if rank == 1 else None)


def other_way(model, rank):
    recalibrate(model, BATCHES, sequential=rank == 1)


class Unwritable(torch.Tensor):
    def fill_(self, value):
        raise OSError("read only")


def unwritable(model, rank):
    counter = model[4].num_batches_tracked
    if rank == 1:
        model[4].num_batches_tracked = counter.as_subclass(Unwritable)
    try:
        recalibrate(model, BATCHES)
    finally:
        model[4].num_batches_tracked = counter


REST = "so nothing is changed on any"
DIFFERENT = "ValueError: recalibrate: all ranks must give the same layers and the same sequential, "


@pytest.mark.parametrize(
    ("cases", "messages"),
    [
        (
            (interrupted_loader, interrupted_model, interrupted_model_in_a_later_pass),
            [
                (f"rank 1 failed, {REST}: KeyboardInterrupt", "KeyboardInterrupt: "),
                (f"rank 1 failed, {REST}: SystemExit: 3", "SystemExit: 3"),
                (f"rank 1 failed, {REST}: SystemExit: 3", "SystemExit: 3"),
            ],
        ),
        (
            (wrong_layers, wrong_number, other_layers, other_way),
            [
                (f"rank 1 failed, {REST}: ValueError: recalibrate: no batch", "layer fits '9'"),
                ("between 0 and 1, got 2", f"rank 0 failed, {REST}: ValueError: recalibrate: tol"),
                (f"{DIFFERENT}and rank 1 has 1 layer, but rank 0 has 2 layers.",) * 2,
                (f"{DIFFERENT}and rank 1 has 2 layers in sequence, but rank 0 has 2 la",) * 2,
            ],
        ),
        (
            (interrupted_while_waiting, unwritable),
            [
                ("KeyboardInterrupt: ", f"rank 0 failed, {REST}: KeyboardInterrupt"),
                (f"rank 1 failed, {REST}: OSError: read only", "OSError: read only"),
            ],
        ),
    ],
    ids=["interrupted", "wrong", "late"],
)
def test_whatever_stops_one_rank_stops_all(cases, messages, tmp_path):
    found = zip(*on_two_ranks(failing_in_turn, cases, tmp_path=tmp_path), strict=True)
    for of_ranks, expected in zip(found, messages, strict=True):
        for message, part in zip(of_ranks, expected, strict=True):
            assert part in message


def test_one_process_shares_with_itself():
    with AllRanks() as ranks:
        assert ranks.share(3) == [3]
        ranks.agree()
    with pytest.raises(OSError, match="disk gone"), AllRanks():
        raise OSError("disk gone")


def test_an_interruption_waits_for_the_end_of_the_block():
    done = []

    def work():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("first")
            signal.raise_signal(signal.SIGINT)
            done.append("second")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        work()
    assert done == ["first"]
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_have_no_interruption_to_wait_for():
    done = []

    def work():
        with uninterrupted():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.getsignal(signal.SIGINT)]
