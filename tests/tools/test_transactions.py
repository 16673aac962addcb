"""transaction and autograd: a rollback changes nothing that a graph has saved, or anybody holds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm
from batchnorm.tools.statistics_updates import transaction
from layer_kinds import KINDS, built, everything, layers_of, statistics
from model_cases import EXACT

kinds = pytest.mark.parametrize("kind", KINDS)
leaves = pytest.mark.parametrize("ends", ["rollback inside", "rollback at the end", "error"])
torchs_and_ours = pytest.mark.parametrize(
    "layer_class", [nn.BatchNorm1d, batchnorm.BatchNorm1d], ids=["torch's", "ours"]
)


def written_back(layer, kept):
    """What looks right: the values, written where autograd does not look."""
    for buffer, value in zip(layer.buffers(), kept, strict=True):
        buffer.data.copy_(value)


def test_values_that_are_written_back_make_torchs_gradient_wrong_without_an_error():
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(1, momentum=1)
    kept = [buffer.clone() for buffer in layer.buffers()]
    layer(20 * torch.randn(64, 1))
    x = torch.randn(8, 1, requires_grad=True)
    y = layer.eval()(x).sum()
    (right,) = torch.autograd.grad(y, x, retain_graph=True)
    written_back(layer, kept)
    (wrong,) = torch.autograd.grad(y, x)
    assert right[0].item() == pytest.approx(0.05, abs=0.01)
    assert wrong[0].item() == pytest.approx(1.0, abs=1e-4)


def evaluated(model, batch):
    """What gives the gradients of an evaluation, and those that are right, when it is made."""
    modes = [module.training for module in model.modules()]
    x = batch.clone().requires_grad_()
    y = model.eval()(x).square().sum()
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    inputs = [x, *model.parameters()]
    right = torch.autograd.grad(y, inputs, retain_graph=True)
    return (lambda: torch.autograd.grad(y, inputs)), right


@kinds
@leaves
def test_evaluations_before_and_inside_have_the_gradients_of_their_time(kind, ends):
    model, batches = built(kind)
    before = everything(model)
    outside = evaluated(model, batches[0])

    def step():
        with transaction(model) as current:
            model(20 * batches[1])
            inside.append(evaluated(model, batches[0]))
            if ends == "error":
                raise ValueError("inside")
            current.rollback()
            if ends == "rollback inside":
                for later, right in (outside, inside[0]):
                    assert_close(later(), right, **EXACT)

    inside = []
    if ends == "error":
        with pytest.raises(ValueError, match="inside"):
            step()
    else:
        step()
    if ends != "rollback inside":
        for later, right in (outside, inside[0]):
            assert_close(later(), right, **EXACT)
    assert everything(model) == before


@kinds
def test_trainings_before_and_inside_can_be_differentiated_after_any_end(kind):
    for ends in ("rollback", "commit"):
        model, batches = built(kind)
        twin = copy.deepcopy(model)
        expected = [twin(batch).square().sum() for batch in batches[:2]]
        losses = [model(batches[0]).square().sum()]
        with transaction(model) as step:
            losses.append(model(batches[1]).square().sum())
            getattr(step, ends)()
        sum(losses).backward()
        sum(expected).backward()
        assert_close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


def test_after_a_rollback_torch_moves_none_of_what_a_graph_saved():
    """Also not by training that goes on in the same transaction."""
    model, batches = built("torch 1d")
    with transaction(model) as step:
        model(batches[0])
        later, right = evaluated(model, batches[0])
        step.rollback()
        model(20 * batches[1])
    model(20 * batches[2])
    assert_close(later(), right, **EXACT)


@torchs_and_ours
def test_what_refers_to_the_buffers_sees_the_end_and_only_that(layer_class):
    layer = layer_class(4)
    held, state = layer.running_mean, layer.state_dict()
    with transaction(layer) as step:
        layer(torch.randn(8, 4) + 3)
        assert torch.equal(held, torch.zeros(4))
        step.commit()
        committed = layer.running_mean.clone()
        assert torch.equal(held, committed)
        layer(torch.randn(8, 4) + 3)
        step.rollback()
    assert layer.running_mean is held
    assert torch.equal(held, committed)
    with transaction(layer):
        layer(torch.randn(8, 4) + 3)
    assert layer.running_mean is held
    assert torch.equal(state["running_mean"], held)
    assert held.min() > committed.min()
    assert state["num_batches_tracked"] == 2


@pytest.mark.parametrize("keep", [True, False])
def test_layers_that_share_buffers_go_on_sharing(keep):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    for name, buffer in model[0].named_buffers():
        setattr(model[1], name, buffer)
    own = model[0].running_mean
    with transaction(model) as step:
        model(torch.randn(8, 4) + 3)
        assert model[1].running_mean is model[0].running_mean
        assert model[0].num_batches_tracked == 2
        if not keep:
            step.rollback()
    assert model[1].running_mean is model[0].running_mean is own
    assert model[0].num_batches_tracked == (2 if keep else 0)


@pytest.mark.parametrize("keep", [True, False])
def test_a_model_that_is_cast_inside(keep):
    model, (batch, *_) = built("torch 1d")
    twin = copy.deepcopy(model).double()
    with transaction(model) as step:
        model.double()
        if keep:
            step.commit()
            twin(batch.double())
        model(batch.double())
        if not keep:
            step.rollback()
    assert statistics(model) == statistics(twin)
    later, right = evaluated(model, batch.double())
    assert_close(later(), right, **EXACT)


def test_a_commit_after_a_cast_is_what_a_rollback_comes_back_to():
    model, (batch, *_) = built("ours")
    with transaction(model) as step:
        model.double()
        model(batch.double())
        step.commit()
        kept = statistics(model)
        model(batch.double())
        step.rollback()
        assert statistics(model) == kept
    assert statistics(model) == kept


def test_buffers_that_are_assigned_inside_stay_or_go():
    layer = nn.BatchNorm1d(4)
    own, state = layer.running_mean, nn.BatchNorm1d(4).state_dict()
    with transaction(layer) as step:
        layer.load_state_dict(state, assign=True)
        step.rollback()
    assert layer.running_mean is own
    with transaction(layer):
        layer.load_state_dict(state, assign=True)
    assert layer.running_mean is state["running_mean"]
    with transaction(layer):
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    assert list(layer.buffers()) == []


@pytest.mark.parametrize("inner_ends", ["commit", "rollback"])
@pytest.mark.parametrize("outer_ends", ["commit", "rollback"])
def test_the_outer_one_decides_while_the_inner_one_is_open(outer_ends, inner_ends):
    model, batches = built("torch 1d")
    objects = everything(model)["modules"]
    states = [statistics(model)]
    with transaction(model) as outer:
        model(batches[0])
        states.append(statistics(model))
        with transaction(model) as inner:
            model(batches[1])
            states.append(statistics(model))
            getattr(outer, outer_ends)()
            assert statistics(model) == states[2 if outer_ends == "commit" else 0]
            getattr(inner, inner_ends)()
    if outer_ends == "rollback":
        assert statistics(model) == states[0]
    else:
        assert statistics(model) == states[2 if inner_ends == "commit" else 1]
    assert everything(model)["modules"] == objects


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_rollback_in_a_mode_without_gradients_leaves_buffers_that_can_be_saved(mode):
    model, (batch, *_) = built("torch 1d")
    before = everything(model)
    with transaction(model) as step:
        with mode():
            model(batch)
            step.rollback()
        assert not any(buffer.is_inference() for buffer in model.buffers())
        model(batch).sum().backward()
    model.zero_grad()
    assert everything(model)["modules"] == before["modules"]
    assert everything(model)["tensors"] == before["tensors"]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["torch 1d", "ours"])
@pytest.mark.untyped
def test_compiled(kind):
    model, (batch, *_) = built(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(batch)
    before = statistics(model)
    with transaction(compiled) as step:
        compiled(batch).sum().backward()
        assert statistics(model) != before
        step.rollback()
        assert statistics(model) == before
    assert statistics(model) == before
    compiled(batch)
    assert {layer.num_batches_tracked.item() for layer in layers_of(model)} == {3}


def test_a_transaction_ends_after_those_that_began_later():
    layer = nn.BatchNorm1d(3)
    own = layer.running_mean
    first = transaction(layer)
    second = transaction(layer)
    with pytest.raises(
        RuntimeError,
        match=r"^transaction: layer '' \(BatchNorm1d\) is in a later transaction that is still "
        r"open; end that one first\.$",
    ):
        first.remove()
    second.remove()
    first.remove()
    first.remove()
    assert layer.running_mean is own
