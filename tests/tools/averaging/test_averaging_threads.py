"""Averages in several threads, and what they leave behind when they fail."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.tools.averaging import ema_update, keep_statistics_in_float32, merge_state_dicts
from layer_kinds import Stop, bytes_of, everything, in_threads, statistics
from recalibration_cases import net

kinds = pytest.mark.parametrize(
    "kind", [nn.BatchNorm2d, batchnorm.BatchNorm2d], ids=["torch's", "ours"]
)
policies = pytest.mark.parametrize("policy", ["copy", "average", "merge"])


def other_net(kind: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """Other numbers everywhere."""
    model = net(kind)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(3)
    return model


def bits(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: bytes_of(tensor) for name, tensor in state.items()}


@kinds
@policies
def test_two_threads_move_two_targets_after_one_model(kind, policy):
    model, targets = other_net(kind), [net(kind), net(kind)]
    expected = copy.deepcopy(targets)
    for target in expected:
        for _ in range(30):
            ema_update(target, model, 0.9, policy)
    before = everything(model)

    def following(target):
        for _ in range(30):
            ema_update(target, model, 0.9, policy)

    in_threads(*(lambda target=target: following(target) for target in targets))
    assert everything(model) == before
    for target, alone in zip(targets, expected, strict=True):
        assert bits(target.state_dict()) == bits(alone.state_dict())


@kinds
@policies
def test_a_target_that_is_refused_beside_one_that_follows(kind, policy):
    model, target, refused = other_net(kind), net(kind), net(kind)
    partly = other_net(kind)
    partly[4] = kind(5, device="meta")
    expected = copy.deepcopy(target)
    ema_update(expected, model, 0.5, policy)
    before, left = everything(refused), everything(model)

    def failing():
        with pytest.raises(
            ValueError, match=r"4\.weight is on the meta device in the model and has"
        ):
            ema_update(refused, partly, 0.5, policy)
        with pytest.raises(
            ValueError, match=r"4\.weight is on the meta device in the target and ha"
        ):
            ema_update(partly, refused, 0.5, policy)

    in_threads(failing, lambda: ema_update(target, model, 0.5, policy))
    assert everything(refused) == before
    assert everything(model) == left
    assert bits(target.state_dict()) == bits(expected.state_dict())


def test_two_threads_merge_the_same_checkpoints():
    states = [net().state_dict(), other_net().state_dict()]
    bad = {**states[1], "4.bias": torch.zeros(7)}
    before = [bits(state) for state in states]
    expected = [bits(merge_state_dicts(states, counts)) for counts in ([5, 15], [15, 5])]

    def failing():
        with pytest.raises(
            ValueError, match=r"merge_state_dicts: 4\.bias is torch\.float32 of shape"
        ):
            merge_state_dicts([states[0], bad], [5, 15])

    *merged, _ = in_threads(
        lambda: merge_state_dicts(states, [5, 15]),
        lambda: merge_state_dicts(states, [15, 5]),
        failing,
    )
    assert [bits(state) for state in merged] == expected
    assert [bits(state) for state in states] == before


@kinds
def test_another_thread_casts_a_model_that_does_not_keep_float32(kind):
    kept, plain = net(kind), net(kind)
    expected = net(kind).half().state_dict()

    def keeping():
        keep_statistics_in_float32(kept)
        kept.half()

    in_threads(keeping, plain.half)
    plain.half()
    assert bits(plain.state_dict()) == bits(expected)
    assert {module.__dict__.get("_apply") for module in plain.modules()} == {None}
    assert kept[1].running_var.dtype == torch.float32
    assert statistics(kept) == statistics(net(kind))


@kinds
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
def test_a_cast_that_fails_changes_nothing(kind, error):
    model = net(kind)
    before = everything(model)
    with pytest.raises(
        ValueError, match="keep_statistics_in_float32: no batch norm layer fits 'x'"
    ):
        keep_statistics_in_float32(model, ["1", "x"])
    assert everything(model) == before
    keep_statistics_in_float32(model, ["4"])
    kept = everything(model)

    def fail(tensor):
        raise error("inside")

    with pytest.raises(error, match="inside"):
        in_threads(lambda: model[4]._apply(fail))
    assert everything(model) == kept
    assert [layer.running_var.dtype for layer in model.half()[1:5:3]] == [
        torch.float16,
        torch.float32,
    ]
