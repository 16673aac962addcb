"""checkpoint and count_recomputation_once: recomputed forwards do not count."""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils import checkpoint as torchs

import batchnorm
import model_nets as nets
from batchnorm.tools.checkpointing import checkpoint, count_recomputation_once
from batchnorm.tools.patching.recomputation import is_recomputing, updates_suppressed
from everywhere import accelerate
from layer_kinds import KINDS, Stop, built, everything, layers_of, statistics
from model_cases import EXACT, images, varied

kinds = pytest.mark.parametrize("kind", KINDS)
reentrant = pytest.mark.parametrize("use_reentrant", [True, False])


def grads_of(model, x, y):
    loss = y.square().sum()
    loss.backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def step(model, batch, run):
    """Output and gradients; ``run`` calls the model."""
    x = batch.clone().requires_grad_()
    y = run(x)
    return [y.detach(), *grads_of(model, x, y)]


# What torch does.


@reentrant
@pytest.mark.parametrize("layer_class", [nn.BatchNorm1d, batchnorm.BatchNorm1d])
def test_torchs_checkpoint_updates_twice(layer_class, use_reentrant):
    torch.manual_seed(0)
    x = (torch.randn(8, 4) + 3).requires_grad_()
    layer, plain = layer_class(4), layer_class(4)
    plain(x.detach())
    y = torchs.checkpoint(lambda x: layer(x).exp(), x, use_reentrant=use_reentrant)
    y.sum().backward()
    assert layer.num_batches_tracked == 2
    ratio = layer.running_mean / plain.running_mean
    assert_close(ratio, torch.full((4,), 1.9), rtol=1e-5, atol=0)


# When a forward is a recomputation.


class Seen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, notes):
        ctx.notes = notes
        notes.append(is_recomputing())
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(is_recomputing()))
        thread.start()
        thread.join()
        ctx.notes += [is_recomputing(), *elsewhere]
        return grad, None


def test_a_backward_pass_is_told_from_a_forward():
    """If this fails, torch has changed what ``_current_graph_task_id`` says."""
    notes = []
    x = torch.randn(3, requires_grad=True)
    assert not is_recomputing()
    y = Seen.apply(x, notes).sum()
    assert notes == [False]
    y.backward()
    assert notes == [False, True, False]
    assert not is_recomputing()
    with torch.no_grad():
        assert not is_recomputing()


@reentrant
def test_a_recomputation_is_told_from_a_forward(use_reentrant):
    notes = []

    def function(x):
        notes.append(is_recomputing())
        return x.exp()

    y = torchs.checkpoint(function, torch.randn(3, requires_grad=True), use_reentrant=use_reentrant)
    y.sum().backward()
    assert notes == [False, True]


def test_not_after_a_backward_that_failed():
    x = torch.randn(3, requires_grad=True)
    x.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        x.sum().backward()
    assert not is_recomputing()


# checkpoint.


@kinds
@reentrant
def test_one_step_is_one_without_checkpointing(kind, use_reentrant):
    model, batches = built(kind)
    twin = copy.deepcopy(model)
    before = everything(model)["modules"]
    for batch in batches:
        for each in (model, twin):
            each.zero_grad()
        expected = step(twin, batch, twin)
        got = step(model, batch, lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
        assert_close(got, expected)
        assert statistics(model) == statistics(twin)
    assert everything(model)["modules"] == before


@reentrant
def test_without_a_backward(use_reentrant):
    model, (batch, *_) = built("torch 1d")
    twin = copy.deepcopy(model)
    twin(batch)
    checkpoint(model, batch.requires_grad_(), use_reentrant=use_reentrant)
    assert statistics(model) == statistics(twin)
    with torch.no_grad():
        twin(batch)
        checkpoint(model, batch, use_reentrant=use_reentrant)
    assert statistics(model) == statistics(twin)


@reentrant
def test_in_evaluation(use_reentrant):
    model, (batch, *_) = built("ours")
    model.eval()
    expected = step(copy.deepcopy(model), batch, copy.deepcopy(model))[:2]
    before = statistics(model)
    got = step(model, batch, lambda x: checkpoint(model, x, use_reentrant=use_reentrant))[:2]
    assert_close(got, expected, **EXACT)
    assert statistics(model) == before


class Owner:
    """No module, but it has some."""

    def __init__(self, model):
        self.parts = [(model,)]

    def method(self, x):
        return self.parts[0][0](x)


FUNCTIONS = {
    "closure": lambda model: lambda x: model(x),
    "method of a stranger": lambda model: Owner(model).method,
    "bound forward": lambda model: model.forward,
    "closure over a list": lambda model: (lambda parts: lambda x: parts[0](x))([model]),
    "forward of a layer": lambda model: lambda x: model[1](model[0].forward(x)),
}


@reentrant
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_any_function(function, use_reentrant):
    model, (batch, *_) = built("torch 1d")
    twin = copy.deepcopy(model)
    expected = step(twin, batch, twin)
    got = step(model, batch, lambda x: checkpoint(function(model), x, use_reentrant=use_reentrant))
    assert_close(got, expected)
    assert statistics(model) == statistics(twin)


@reentrant
def test_the_forward_of_a_layer_itself(use_reentrant):
    layer = batchnorm.BatchNorm1d(4)
    checkpoint(
        layer.forward, torch.randn(6, 4, requires_grad=True), use_reentrant=use_reentrant
    ).sum().backward()
    assert layer.num_batches_tracked == 1


def test_options_and_keyword_arguments_are_passed_on():
    layer, seen = nn.BatchNorm1d(4), []

    def function(x, *, factor):
        seen.append(torch.rand(1).item())
        return layer(x) * factor, x.exp(), "text"

    x = torch.randn(6, 4, requires_grad=True)
    y, z, text = checkpoint(function, x, factor=3, determinism_check="none", early_stop=False)
    (y.sum() + z.sum()).backward()
    assert text == "text"
    assert layer.num_batches_tracked == 1
    assert seen[0] == seen[1]
    y, *_ = checkpoint(function, x, factor=3, preserve_rng_state=False)
    y.sum().backward()
    assert seen[2] != seen[3]
    assert layer.num_batches_tracked == 2
    with pytest.raises(ValueError, match="Unexpected keyword arguments: factor"):
        checkpoint(function, x, use_reentrant=True, factor=3)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@reentrant
def test_nested(use_reentrant):
    model, (batch, *_) = built("accelerated")
    twin = copy.deepcopy(model)
    expected = step(twin, batch, twin)

    def inner(x):
        return checkpoint(model.layer1, x, use_reentrant=use_reentrant)

    def outer(x):
        return model.layer2(inner(stem(model, x)))

    def run(x):
        y = checkpoint(outer, x, use_reentrant=use_reentrant)
        return model.fc(y.mean((2, 3)))

    assert_close(step(model, batch, run), expected)
    assert statistics(model) == statistics(twin)


def stem(model, x):
    return torch.relu(model.bn1(model.conv1(x)))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("inner_reentrant", [True, False])
@reentrant
@pytest.mark.parametrize("before_it", [True, False])
def test_torchs_checkpoint_inside_of_the_function(before_it, use_reentrant, inner_reentrant):
    """As in a memory-efficient DenseNet; torch then calls the inner function by itself."""
    model, batches = built("torch 1d")
    twin = copy.deepcopy(model)

    def inner(x):
        return model(x).exp()

    def function(x):
        if before_it:
            x = x.sin()
        return torchs.checkpoint(inner, x, use_reentrant=inner_reentrant).cos()

    for batch in batches:
        model.zero_grad()
        twin.zero_grad()
        expected = step(twin, batch, lambda x: twin(x.sin() if before_it else x).exp().cos())
        got = step(model, batch, lambda x: checkpoint(function, x, use_reentrant=use_reentrant))
        assert_close(got, expected)
        assert statistics(model) == statistics(twin)
        assert not torch.nn.modules.module._has_any_global_hook()
    model(batches[0])
    assert statistics(model) != statistics(twin)


@reentrant
def test_nothing_is_left_of_a_backward_that_fails_after_the_recomputation(use_reentrant):
    layer = nn.BatchNorm1d(4)
    attributes = everything(layer)["modules"]
    x = torch.randn(6, 4, requires_grad=True)
    x.register_hook(lambda grad: 1 / 0)
    y = checkpoint(lambda x: layer(x).exp(), x, use_reentrant=use_reentrant)
    before = statistics(layer)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        y.sum().backward()
    assert everything(layer)["modules"] == attributes
    assert statistics(layer) == before
    assert not torch.nn.modules.module._has_any_global_hook()
    layer(x)
    assert layer.num_batches_tracked == 2


@reentrant
@pytest.mark.parametrize("tool", ["checkpoint", "count_recomputation_once"])
def test_autocast(tool, use_reentrant):
    model, batches = built("torch 2d")
    twin = copy.deepcopy(model)
    run = checkpoint if tool == "checkpoint" else torchs.checkpoint

    def trained(each, call):
        with torch.autocast("cpu", torch.bfloat16):
            x = batches[0].clone().requires_grad_()
            y = call(x)
            assert y.dtype == torch.bfloat16
        return [y.detach(), *grads_of(each, x, y.float())]

    with (
        count_recomputation_once(model)
        if tool == "count_recomputation_once"
        else contextlib.nullcontext()
    ):
        got = trained(model, lambda x: run(model, x, use_reentrant=use_reentrant))
    assert_close(got, trained(twin, twin), **EXACT)
    assert statistics(model) == statistics(twin)
    assert model[1].num_batches_tracked == 2  # one before


@reentrant
def test_a_chain_of_segments(use_reentrant):
    def segment():
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())

    torch.manual_seed(0)
    model = nn.Sequential(*(segment() for _ in range(4)))
    twin = copy.deepcopy(model)
    batch = torch.randn(6, 4)

    def run(x):
        for start in (0, 2):
            x = checkpoint(model[start : start + 2], x, use_reentrant=use_reentrant)
        return x

    assert_close(step(model, batch, run), step(twin, batch, twin))
    assert statistics(model) == statistics(twin)


@reentrant
def test_a_layer_that_is_used_twice_updates_twice(use_reentrant):
    layer = nn.BatchNorm1d(4)
    twin = copy.deepcopy(layer)
    batch = torch.randn(6, 4)
    expected = step(twin, batch, lambda x: twin(twin(x).exp()))
    run = lambda x: checkpoint(lambda x: layer(layer(x).exp()), x, use_reentrant=use_reentrant)  # noqa: E731
    assert_close(step(layer, batch, run), expected)
    assert statistics(layer) == statistics(twin)
    assert layer.num_batches_tracked == 2


@reentrant
def test_two_backward_passes(use_reentrant):
    layer = nn.BatchNorm1d(4)
    x = torch.randn(6, 4, requires_grad=True)
    y = checkpoint(lambda x: layer(x.exp()).exp(), x, use_reentrant=use_reentrant).sum()
    before = statistics(layer)
    y.backward(retain_graph=True)
    first = x.grad.clone()
    y.backward()
    assert_close(x.grad, 2 * first)
    assert statistics(layer) == before


def test_a_recomputation_without_a_backward_does_not_count_either():
    """Torch recomputes when somebody looks at a saved tensor."""
    layer = nn.BatchNorm1d(4)
    y = checkpoint(lambda x: layer(x).exp(), torch.randn(6, 4, requires_grad=True))
    assert y.grad_fn._saved_result.shape == (6, 4)
    assert layer.num_batches_tracked == 1


@reentrant
def test_fused_blocks_stay_fused_in_both_passes(use_reentrant):
    model = varied(nets.ResNet())
    accelerate(model)
    twin = copy.deepcopy(model)
    expected = step(twin, images(), twin)
    got = step(model, images(), lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    assert_close(got, expected, **EXACT)
    assert statistics(model) == statistics(twin)


def fails_again(error):
    """A function that fails when it is called for the second time."""
    layer, calls = nn.BatchNorm1d(4), []

    def function(x):
        calls.append(x)
        y = layer(x)
        if len(calls) == 2:
            raise error("again")
        return y.exp()

    return layer, function


@reentrant
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("tool", ["checkpoint", "count_recomputation_once"])
def test_a_recomputation_that_fails_leaves_nothing(tool, error, use_reentrant):
    layer, function = fails_again(error)
    attributes = everything(layer)["modules"]
    x = torch.randn(6, 4, requires_grad=True)
    if tool == "checkpoint":
        y = checkpoint(function, x, use_reentrant=use_reentrant, early_stop=False).sum()
    else:
        handle = count_recomputation_once(layer)
        y = torchs.checkpoint(function, x, use_reentrant=use_reentrant, early_stop=False).sum()
    before = statistics(layer)
    with pytest.raises(error, match="again"):
        y.backward()
    assert statistics(layer) == before
    if tool == "count_recomputation_once":
        handle.remove()
    assert everything(layer)["modules"] == attributes
    assert not torch.nn.modules.module._has_any_global_hook()


def test_another_thread_trains_its_own_model_meanwhile():
    ours, theirs = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    x = torch.randn(6, 4)

    def function(x):
        if is_recomputing():
            thread = threading.Thread(target=theirs, args=(x.detach(),))
            thread.start()
            thread.join()
        return ours(x).exp()

    checkpoint(function, x.requires_grad_()).sum().backward()
    assert ours.num_batches_tracked == 1
    assert theirs.num_batches_tracked == 1


def test_updates_are_suppressed_only_for_what_is_called():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    x = torch.randn(6, 4)
    before = {layer: {id(buffer) for buffer in layer.buffers()} for layer in model}
    with updates_suppressed(model[2].forward):
        model[0](x)
        same = [{id(buffer) for buffer in layer.buffers()} == b for layer, b in before.items()]
        assert same == [False, True, False]
        assert [layer.num_batches_tracked.item() for layer in model] == [1, 0, 0]
    assert [{id(buffer) for buffer in layer.buffers()} for layer in model] == [*before.values()]
    assert [layer.num_batches_tracked.item() for layer in model] == [0, 0, 0]


# count_recomputation_once.


class Checkpointed(nn.Module):
    """A user's model that calls torch's checkpoint itself."""

    def __init__(self, body, use_reentrant):
        super().__init__()
        self.body, self.use_reentrant, self.on = body, use_reentrant, True

    def forward(self, x):
        if not self.on:
            return self.part(x)
        return torchs.checkpoint(self.part, x, use_reentrant=self.use_reentrant)

    def part(self, x):
        return self.body(x).exp()


@kinds
@reentrant
def test_existing_code_counts_once(kind, use_reentrant):
    body, batches = built(kind)
    model = Checkpointed(body, use_reentrant)
    twin = copy.deepcopy(model)
    twin.on = False
    before = everything(model)["modules"]
    with count_recomputation_once(model):
        for batch in batches:
            for each in (model, twin):
                each.zero_grad()
            assert_close(step(model, batch, model), step(twin, batch, twin))
            assert statistics(model) == statistics(twin)
    assert everything(model)["modules"] == before

    counts = [layer.num_batches_tracked.item() for layer in layers_of(model)]
    step(model, batches[0], model)
    now = [layer.num_batches_tracked.item() for layer in layers_of(model)]
    assert now == [count + 2 for count in counts]


@reentrant
def test_a_second_thread_recomputes_its_own_layer(use_reentrant):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    twin = copy.deepcopy(model)
    batch = torch.randn(6, 4)

    def trained(layer):
        for _ in range(20):
            x = batch.clone().requires_grad_()
            y = torchs.checkpoint(lambda x: layer(x).exp(), x, use_reentrant=use_reentrant)
            y.sum().backward()

    before = everything(model)["modules"]
    with count_recomputation_once(model):
        thread = threading.Thread(target=trained, args=(model[0],))
        thread.start()
        trained(model[1])
        thread.join()
    for _ in range(20):
        twin[0](batch)
        twin[1](batch)
    assert statistics(model) == statistics(twin)
    assert everything(model)["modules"] == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
def test_a_forward_that_fails_leaves_nothing_of_count_recomputation_once(error):
    def fail(*_):
        raise error("inside")

    layer = nn.BatchNorm1d(4)
    layer.register_forward_pre_hook(fail)
    before = everything(layer)
    with pytest.raises(error, match="inside"), count_recomputation_once(layer):
        torchs.checkpoint(layer, torch.randn(6, 4, requires_grad=True), use_reentrant=False)
    assert everything(layer) == before


@reentrant
def test_torchs_checkpoint_sequential(use_reentrant):
    model = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(4)))
    x = torch.randn(6, 4, requires_grad=True)

    def train():
        y = torchs.checkpoint_sequential(model, 2, x, use_reentrant=use_reentrant)
        y.square().sum().backward()
        return [layer.num_batches_tracked.item() for layer in model]

    with count_recomputation_once(model):
        assert train() == [1, 1, 1, 1]
    with count_recomputation_once(model, ["1"]):
        assert train() == [3, 2, 2, 2]  # torch does not checkpoint the last segment


def test_early_stop_ends_the_recomputation_inside_of_the_layer():
    """Torch then throws through the layer's forward, once it has what it needs."""
    body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = Checkpointed(body, use_reentrant=False)
    with count_recomputation_once(model):
        buffers = list(body[1].buffers())
        step(model, torch.randn(6, 4), model)
        assert all(a is b for a, b in zip(buffers, body[1].buffers(), strict=True))
        assert body[1].num_batches_tracked == 1
        body(torch.randn(6, 4))
    assert body[1].num_batches_tracked == 2


def test_a_copy_counts_once_too():
    model = Checkpointed(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), use_reentrant=True)
    with count_recomputation_once(model):
        twin = copy.deepcopy(model)
    step(twin, torch.randn(6, 4), twin)
    assert twin.body[1].num_batches_tracked == 1
    assert model.body[1].num_batches_tracked == 0


@pytest.mark.untyped
def test_wrong_arguments():
    with pytest.raises(
        ValueError, match="count_recomputation_once: no batch norm layer fits 'bn1'; the model"
    ):
        count_recomputation_once(nn.Linear(2, 2), ["bn1"])
    with pytest.raises(
        TypeError, match=r"count_recomputation_once: model must be a torch\.nn\.Module, got NoneT"
    ):
        count_recomputation_once(None)


# Compiled code.

compiling = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@compiling
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by dynamo
@pytest.mark.untyped
@pytest.mark.parametrize("kind", ["torch 1d", "ours"])
def test_counting_once_in_compiled_code_breaks_graphs_and_says_so(kind):
    torch.compiler.reset()
    model, (batch, *_) = built(kind)
    counted = model[1].num_batches_tracked.item()
    with count_recomputation_once(model):
        compiled = torch.compile(model, backend="aot_eager")
        torchs.checkpoint(compiled, batch, use_reentrant=False).sum().backward()
        assert model[1].num_batches_tracked == counted + 1
        torch.compiler.reset()
        whole = torch.compile(model, backend="aot_eager", fullgraph=True)
        message = "count_recomputation_once needs a graph break at each layer, because it is known"
        with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
            whole(batch)
    whole(batch)
    assert model[1].num_batches_tracked == counted + 2


@compiling
@pytest.mark.untyped
@pytest.mark.parametrize("kind", ["torch 1d", "ours"])
def test_torchs_checkpoint_inside_compiled_code_counts_once_by_itself(kind):
    torch.compiler.reset()
    model, (batch, *_) = built(kind)
    counted = model[1].num_batches_tracked.item()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x):
        return torchs.checkpoint(model, x, use_reentrant=False)

    step(batch).sum().backward()
    assert model[1].num_batches_tracked == counted + 1
