"""Work on two processes, joined by gloo."""

import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing


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
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    try:
        result = work(rank, *args), None
    except BaseException:
        result = None, traceback.format_exc()
    torch.save(result, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()
