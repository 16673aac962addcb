"""watch while other threads are at work: on the same model, on another one, and when it fails."""

from __future__ import annotations

import copy
import importlib
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm
from batchnorm.tools.monitoring import watch
from layer_kinds import Stop, everything, in_threads, statistics

kinds = pytest.mark.parametrize(
    "kind", [nn.BatchNorm1d, batchnorm.BatchNorm1d], ids=["torch's", "ours"]
)


def net(kind: type[nn.Module]) -> nn.Sequential:
    """One layer whose buffers tell, and one that is listened to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), kind(4), kind(4))
    model[2].eval()
    model(batch(9))
    return model


def batch(seed: int) -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module, *seeds: int) -> None:
    for seed in seeds:
        model(batch(seed)).square().sum().backward()


@kinds
def test_another_thread_trains_the_same_model_between_two_steps(kind):
    model, twin = net(kind), net(kind)
    trained(twin, 0, 1, 2)
    before = everything(model)
    with watch(model) as watched:
        trained(model, 0)
        watched.step()
        in_threads(lambda: trained(model, 1))
        watched.step()
        trained(model, 2)
        in_threads(watched.step)
    assert statistics(model) == statistics(twin)
    gradients = [[p.grad for p in each.parameters()] for each in (model, twin)]
    assert_close(*gradients, rtol=0, atol=0)
    assert everything(model)["modules"] == before["modules"]
    told = [(r["step"], r["batches"]) for r in watched.records if r["layer"] == "1"]
    assert told == [(1, 1), (2, 1), (3, 1)]
    assert all(record["mean_shift"] is not None for record in watched.records)


@kinds
def test_another_thread_trains_and_watches_a_model_of_its_own(kind):
    ours, theirs = net(kind), net(kind)
    plain = copy.deepcopy(theirs)
    trained(plain, 5, 6)
    untouched = net(kind)
    before = everything(untouched)
    both_inside = threading.Barrier(2)

    def watching(model, *seeds):
        with watch(model) as watched:
            for seed in seeds:
                both_inside.wait(10)
                trained(model, seed)
                both_inside.wait(10)
                watched.step()
        return watched.records

    records = in_threads(lambda: watching(ours, 0, 1), lambda: watching(theirs, 5, 6))
    assert statistics(theirs) == statistics(plain)
    assert everything(untouched) == before
    for seed, (told, heard, *later) in zip((0, 5), records, strict=True):
        assert len(later) == 2
        hidden = untouched[0](batch(seed)).detach()
        assert told["batch_mean_high"] == pytest.approx(float(hidden.mean(0).max()), rel=1e-5)
        hidden = untouched[1](hidden).detach()
        assert heard["batch_var_high"] == pytest.approx(float(hidden.var(0).max()), rel=1e-5)


@kinds
def test_a_call_from_another_thread_amid_one_of_ours_is_heard_too(kind, monkeypatch):
    layer, parts = kind(4).eval(), [batch(seed) for seed in range(4)]
    module = importlib.import_module("batchnorm.tools.monitoring.watch")
    merge, remaining = module.merge_moments, parts[2:]

    def interrupted(*moments):
        if remaining:
            in_threads(lambda: layer(remaining.pop()))
        return merge(*moments)

    monkeypatch.setattr(module, "merge_moments", interrupted)
    with watch(layer) as watched:
        layer(parts[0])
        layer(parts[1])
        watched.step()
    (record,) = watched.records
    x = torch.cat(parts)
    assert not remaining
    assert record["batch_mean_high"] == pytest.approx(float(x.mean(0).max()), rel=1e-5)
    assert record["batch_var_low"] == pytest.approx(float(x.var(0).min()), rel=1e-5)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
@kinds
def test_after_an_error_the_model_is_as_without_a_watch(kind, error):
    model, twin = net(kind), net(kind)
    trained(twin, 0, 1)
    modules = everything(model)["modules"]

    def fail(watched):
        watched.step()
        trained(model, 1)
        raise error("inside")

    trained(model, 0)
    with pytest.raises(error, match="inside"), watch(model) as watched:
        in_threads(lambda: fail(watched))
    assert statistics(model) == statistics(twin)
    assert everything(model)["modules"] == modules
    assert [record["step"] for record in watched.records] == [1, 1]
