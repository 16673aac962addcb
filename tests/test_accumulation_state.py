"""accumulate writes all or nothing, whoever interrupts, fails, overflows or calls meanwhile."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import surgery_nets as nets
from accumulation_cases import data, mean_loss, pair, refused, seeded, split, state_of
from batchnorm.tools.accumulation import accumulate, large_batch
from batchnorm.tools.guarding import guard

EXACT = {"rtol": 0, "atol": 0, "equal_nan": True}
GUARDS = {"guarded": guard, "alone": lambda model: nn.Module()}


# All or nothing.


@pytest.mark.parametrize("graded", [True, False], ids=["with gradients", "without"])
def test_a_cumulative_average_without_its_counter_is_refused_at_once(graded):
    model = seeded(nets.LeNet)
    if graded:
        mean_loss(model, data(8)).backward()
    model.bn3.momentum, model.bn3.num_batches_tracked = None, None
    passes = []

    def loss(model, batch):
        passes.append(None)
        return mean_loss(model, batch)

    message = (
        r"^accumulate: layer 'bn3' has momentum=None \(the cumulative average\) and no "
        r"num_batches_tracked to divide by; give it a momentum between 0 and 1, or a counter\.$"
    )
    refused(model, split(data()), loss, ValueError, message)
    assert not passes


class Interrupting(TorchDispatchMode):
    """Ctrl-C after the n-th operator."""

    def __init__(self, at: int):
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("graded", [True, False], ids=["with gradients", "without"])
def test_an_interrupt_at_any_operator_of_the_commit_undoes_it(graded, monkeypatch):
    commit = large_batch.commit
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)))
    batch = (torch.randn(8, 3, dtype=torch.float64), torch.ones(8))
    if graded:
        mean_loss(model, batch).backward()
        model[0].bias.grad = None
    before, objects = state_of(model), [p.grad for p in model.parameters()]
    at = 0
    while True:
        at += 1
        mode = Interrupting(at)

        def interrupted(*args, mode=mode):
            with mode:
                return commit(*args)

        monkeypatch.setattr(large_batch, "commit", interrupted)
        try:
            accumulate(model, split(batch, (4, 4)), mean_loss)
            break
        except KeyboardInterrupt:
            after = state_of(model)
        assert_close(after["state"], before["state"], **EXACT)
        assert_close(after["grads"], before["grads"], **EXACT)
        assert after["hooks"] == before["hooks"]
        assert all(p.grad is g for p, g in zip(model.parameters(), objects, strict=True))
    assert at > 20
    assert [int(layer.num_batches_tracked) for layer in model[1:]] == [1 + graded] * 2


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_loader_that_fails_or_is_interrupted(error):
    def batches():
        yield from split(data())[:3]
        raise error("disk gone")

    model = seeded(nets.ResNet)
    mean_loss(model, data(8)).backward()
    refused(model, batches(), mean_loss, error, "^disk gone$")


# Batches that are not finite.


@pytest.mark.parametrize("keeper", GUARDS.values(), ids=GUARDS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_large_batch_that_is_not_finite_moves_no_statistics(keeper, momentum):
    model, large = pair(nets.LeNet)
    for each in (model, large):
        each.bn2.momentum = momentum
    x, labels = data()
    x[9, 1, 2, 3] = torch.inf
    handle = keeper(model)
    with guard(large):
        mean_loss(large, (x, labels)).backward()
    result = accumulate(model, split((x, labels)), mean_loss)
    assert_close(dict(model.state_dict()), dict(large.state_dict()), **EXACT)
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert int(model.bn1.num_batches_tracked) == 0
    # As GradScaler expects it.
    assert not all(p.grad.isfinite().all() for p in model.parameters())
    assert result.kept_out == ("bn1", "bn2", "bn3")
    assert str(result).endswith(
        "\nNot finite, so these layers' statistics are as before: bn1, bn2, bn3."
    )
    assert getattr(handle, "skipped", {}) == {}

    accumulate(model.zero_grad() or model, split(data()), mean_loss)
    assert int(model.bn1.num_batches_tracked) == 1


def test_torch_alone_is_poisoned_by_such_a_batch():
    model = seeded(nets.LeNet)
    x, labels = data()
    x[9, 1, 2, 3] = torch.inf
    mean_loss(model, (x, labels)).backward()
    assert not model.bn1.running_var.isfinite().all()
    assert int(model.bn1.num_batches_tracked) == 1


def test_only_the_layers_that_it_reaches_are_kept():
    model = seeded(nets.LeNet)
    hook = model.conv2.register_forward_hook(lambda m, args, y: y * torch.inf)
    assert accumulate(model, split(data()), mean_loss).kept_out == ("bn2", "bn3")
    assert [int(model.get_buffer(f"bn{n}.num_batches_tracked")) for n in (1, 2, 3)] == [1, 0, 0]
    hook.remove()


def test_a_poisoned_channel_does_not_hold_the_others_back():
    model = seeded(lambda: nn.BatchNorm2d(3))
    model.running_mean[0] = torch.nan
    before = model.running_mean.clone()
    assert accumulate(model, split(data()), mean_loss).kept_out == ()
    assert (model.running_mean[1:] != before[1:]).all()


def test_a_step_of_grad_scaler_that_overflows():
    model = seeded(nets.LeNet, torch.float32)
    x, labels = data(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())

    def scaled(model: nn.Module, batch) -> Tensor:
        return scaler.scale(mean_loss(model, batch))

    x[0, 0, 0, 0] = torch.inf
    accumulate(model, split((x, labels)), scaled)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_close(dict(model.state_dict()), dict(before), **EXACT)


# Calls from another thread.


@pytest.mark.parametrize("during", ["pass", "backward", "between"])
def test_a_call_from_another_thread_is_refused_there_and_does_no_harm_here(during, monkeypatch):
    model, large = pair(nets.LeNet)
    caught: list[BaseException] = []
    calls = [0]

    def call():
        try:
            with torch.no_grad():
                model(data(4)[0])
        except BaseException as error:
            caught.append(error)

    def meanwhile(*_):
        calls[0] += 1
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    def loss(model, batch):
        if during == "pass":
            meanwhile()
        value = mean_loss(model, batch)
        if during == "backward" and value.requires_grad:
            value.register_hook(meanwhile)
        return value

    if during == "between":
        check = large_batch._check_loss
        monkeypatch.setattr(large_batch, "_check_loss", lambda value: meanwhile() or check(value))
    mean_loss(large, data()).backward()
    accumulate(model, split(data()), loss)
    assert len(caught) == calls[0] > 0
    for error in caught:
        assert type(error) is RuntimeError
        assert str(error) == (
            "accumulate: layer 'bn1' is called from another thread while accumulate is at work on "
            "it; wait for its end, or give that thread a copy of the model."
        )
    assert_close(dict(model.state_dict()), dict(large.state_dict()), rtol=1e-10, atol=1e-12)
    for name, parameter in large.named_parameters():
        assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-9, atol=1e-12)
    model(data(4)[0])


# How a layer's input is called.


class Named(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Keyworded(nn.Module):
    def __init__(self, value=None):
        super().__init__()
        self.conv, self.bn, self.value = nets.conv(3, 3), Named(3), value

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x=self.conv(x) if self.value is None else self.value)


def test_an_input_of_another_name():
    model, large = pair(Keyworded)
    mean_loss(large, data()).backward()
    accumulate(model, split(data()), mean_loss)
    assert_close(dict(model.state_dict()), dict(large.state_dict()))


def test_no_input_at_all():
    message = r"^accumulate: layer 'bn' \(Named\) is called without a tensor; give it its input\.$"
    model = seeded(lambda: Keyworded("nothing"))
    refused(model, split(data()), mean_loss, TypeError, message)
