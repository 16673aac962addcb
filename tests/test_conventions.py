"""The tables of docs/conventions.md: one test for each row that is about this library."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import scratch
from batchnorm.learn.walkthrough import walkthrough

PAGE = (Path(__file__).parents[1] / "docs/conventions.md").read_text(encoding="utf-8")


def rows(header: str) -> list[list[str]]:
    """The rows below the header of a table, as the texts of their cells."""
    table = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def x() -> Tensor:
    return 2 * torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) + 1


# What is updated when


@dataclass
class Situation:
    """A layer, and how it is called: with what input, inside what."""

    layer: nn.Module
    input: Tensor
    inside: Callable = ExitStack
    error: type[Exception] | None = None


def make(situation: str) -> Situation:
    layer = batchnorm.BatchNorm1d(3)
    with torch.no_grad():
        layer.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
        layer.running_var.copy_(torch.tensor([0.5, 1.5, 2.5]))
        layer.num_batches_tracked.fill_(4)
    made = Situation(layer, x())
    match situation:
        case "`train()`":
            pass
        case "`train()` under `torch.no_grad()`":
            made.inside = torch.no_grad
        case "`eval()`":
            layer.eval()
        case "built with `track_running_stats=False`":
            made.layer = batchnorm.BatchNorm1d(3, track_running_stats=False)
        case "`track_running_stats` set to False later, `train()`":
            layer.track_running_stats = False
        case "`track_running_stats` set to False later, `eval()`":
            layer.eval().track_running_stats = False
        case "`momentum=None`, `train()`":
            layer.momentum = None
        case "frozen by `freeze`, in any mode":
            batchnorm.freeze(layer)
        case "inside `no_stats_update`, `train()`":
            made.inside = lambda: batchnorm.no_stats_update(layer)
        case "guarded, the batch's statistics are not finite":
            batchnorm.guard(layer)
            made.input[0, 0] = torch.inf
        case "empty batch, `train()` or `eval()`":
            made.input = made.input[:0]
        case "an argument is refused with an error":
            made.input, made.error = made.input[:1], ValueError
        case _:
            raise AssertionError(f"docs/conventions.md has a new row: {situation}")
    return made


@pytest.mark.parametrize("row", rows("| situation |"), ids=lambda row: row[0])
def test_what_is_updated_when(row: list[str]) -> None:
    situation, normalizes, statistics, counter = row
    check(make(situation), normalizes, statistics, counter)
    if re.search("in any mode|or `eval|in `eval", " ".join(row)):
        found = make(situation)
        found.layer.eval()
        check(found, normalizes, statistics, counter)


def check(found: Situation, normalizes: str, statistics: str, counter: str) -> None:
    layer, data = found.layer, found.input
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    mean = data.mean(0)
    var = ((data - mean) ** 2).mean(0)
    with found.inside():
        if found.error:
            with pytest.raises(found.error, match="Expected more than 1 value per channel"):
                layer(data)
        else:
            y = layer(data)
    match normalizes:
        case "the batch" | "the batch, in `eval()` too":
            expected = (data - mean) / torch.sqrt(var + layer.eps)
            torch.testing.assert_close(y, expected, equal_nan=True)
        case "running statistics" | "the buffers that are there":
            running = torch.sqrt(before["running_var"] + layer.eps)
            torch.testing.assert_close(y, (data - before["running_mean"]) / running)
        case "nothing to normalize":
            assert y.shape == (0, 3)
        case _:
            assert normalizes == "nothing"
    weight = {"move": 0.1, "cumulative average": 0.2, "stay": 0.0}.get(statistics)
    if weight is None:
        assert (statistics, counter) == ("none kept", "none kept")
        assert layer.running_mean is layer.num_batches_tracked is None
        return
    assert counter in ("+1", "stays")
    assert layer.num_batches_tracked == before["num_batches_tracked"] + (counter == "+1")
    if weight == 0:
        assert torch.equal(layer.running_mean, before["running_mean"])
        assert torch.equal(layer.running_var, before["running_var"])
    else:
        for name, new in (("running_mean", mean), ("running_var", data.var(0))):
            moved = (1 - weight) * before[name] + weight * new
            torch.testing.assert_close(getattr(layer, name), moved)


# Momentum


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, batchnorm.BatchNorm1d])
def test_momentum_is_the_weight_of_the_new_batch(kind: type[nn.Module]) -> None:
    assert rows("| where | name |")[0][:4] == [
        "`batchnorm`, `torch.nn`",
        "`momentum`",
        "`(1 - m) * old + m * new`",
        "0.1",
    ]
    layer = kind(3)
    layer(x())
    torch.testing.assert_close(layer.running_mean, 0.9 * 0 + 0.1 * x().mean(0))
    torch.testing.assert_close(layer.running_var, 0.9 * torch.ones(3) + 0.1 * x().var(0))


def test_momentum_is_the_weight_of_the_old_value_from_scratch() -> None:
    assert [
        *("`batchnorm.scratch`, `batchnorm.learn`", "`momentum`", "`m * old + (1 - m) * new`"),
        "0.9",
        "biased",
    ] == rows("| where | name |")[3][:5]
    layer = scratch.BatchNorm(3, 2)
    layer(x())
    mean, var = 0.1 * x().mean(0), 0.9 + 0.1 * x().var(0, correction=0)
    steps = {step.name: step.value for step in walkthrough(x())}
    for found in (dict(layer.named_buffers()), steps):
        torch.testing.assert_close(found["moving_mean"].flatten(), mean)
        torch.testing.assert_close(found["moving_var"].flatten(), var)


def test_one_convention_is_one_minus_the_other() -> None:
    ours, theirs = batchnorm.BatchNorm1d(3, momentum=0.3), scratch.BatchNorm(3, 2, momentum=0.7)
    ours(x()), theirs(x())
    torch.testing.assert_close(ours.running_mean, theirs.moving_mean.flatten())
