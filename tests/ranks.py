"""Work on two processes, joined by gloo; they start once and serve all tests of a session."""

from __future__ import annotations

import itertools
import traceback
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
from torch import distributed, multiprocessing

_calls = itertools.count()


def on_two_ranks(work, *args, tmp_path):
    """Runs ``work(rank, *args)`` on two ranks; what they return, in their order."""
    folder = tmp_path / f"ranks-{next(_calls)}"
    folder.mkdir()
    ranks = _ranks()
    for _, pipe in ranks:
        pipe.send((work, args, str(folder)))
    try:
        for _, pipe in ranks:
            pipe.recv()
        results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
        for _, failure in results:
            assert failure is None, failure
    except BaseException:  # Nobody knows what they wait for now.
        end(at_once=True)
        raise
    return [result for result, _ in results]


def end(*, at_once=False):
    """Ends the processes, if there are some, so that they can write down their coverage."""
    if not _ranks.cache_info().currsize:
        return
    for process, pipe in _ranks():
        if at_once:
            process.kill()
        else:
            pipe.send(None)
    for process, pipe in _ranks():
        process.join()
        pipe.close()
    _ranks.cache_clear()


@cache
def _ranks():
    """Both processes, each with the pipe that takes its work."""
    context = multiprocessing.get_context("spawn")
    ranks = []
    for rank in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
        process.start()
        theirs.close()
        ranks.append((process, ours))
    return ranks


def _serve(rank, pipe):
    torch.set_num_threads(1)
    while (order := pipe.recv()) is not None:
        _rank(rank, *order)
        pipe.send("done")


def _rank(rank, work, args, folder):
    torch.manual_seed(0)
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
