"""accelerate compares the model before and after, and leaves no trace of it."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import model_nets as nets
from batchnorm.tools.acceleration import replacement, restore
from everywhere import accelerate
from model_cases import (
    EXACT,
    anatomy,
    images,
    is_ours,
    tail,
    varied,
)


def state_of(model: nn.Module) -> dict:
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    flags = {name: module.training for name, module in model.named_modules()}
    return {"tensors": tensors, "grads": grads, "flags": flags}


@pytest.mark.untyped  # the checks at run time draw random numbers
def test_verification_leaves_no_trace():
    model = varied(nets.VGG())
    model.features[1].eval()
    model(images()).sum().backward()
    model.classifier[1].bias.grad = None
    before, grad = state_of(model), model.features[0].weight.grad
    classes = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    x = images().requires_grad_()

    assert accelerate(model, x).verified

    now = state_of(model)
    assert now["flags"] == before["flags"]
    assert_close(now["tensors"], before["tensors"], **EXACT)
    assert model.features[0].weight.grad is grad
    assert model.classifier[1].bias.grad is None
    assert_close(grad, before["grads"]["features.0.weight"], **EXACT)
    assert x.grad is None
    assert_close(torch.get_rng_state(), classes[0], **EXACT)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == classes[1:]
    assert not any(module._forward_pre_hooks for module in model.modules())


def wrong_output(layer, *args):
    return RIGHT(layer, *args) * (1 + 1e-7)


def wrong_buffer(layer, *args):
    output = RIGHT(layer, *args)
    if layer.training:
        layer.running_var.mul_(1 + 1e-7)
    return output


def wrong_gradient(layer, *args):
    output = RIGHT(layer, *args)
    return output.detach() + (output - output.detach()) * 1.001


def wrong_shape(layer, *args):
    return RIGHT(layer, *args)[:1]


RIGHT = replacement.forward_of


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (wrong_output, "the output in evaluation differs by"),
        (wrong_buffer, "bn1.running_var after a call in training differs by"),
        (wrong_gradient, r"the gradient of input\[0\] in evaluation differs by"),
        (wrong_shape, "the output in evaluation differs by inf"),
    ],
)
def test_a_disagreement_is_named_and_undone(monkeypatch, wrong, message):
    model = varied(nets.ResNet())
    before, state = anatomy(model), state_of(model)
    monkeypatch.setattr(replacement, "forward_of", wrong)
    with pytest.raises(RuntimeError, match=message):
        accelerate(model, images())
    assert anatomy(model) == before
    assert_close(state_of(model)["tensors"], state["tensors"], **EXACT)


def fails(layer, *args):
    raise KeyboardInterrupt


def test_any_exception_leaves_the_model_as_it_was(monkeypatch):
    model = varied(nets.ResNet())
    before = anatomy(model)
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        accelerate(model, images()[:, :1])
    assert anatomy(model) == before
    monkeypatch.setattr(replacement, "forward_of", fails)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model, images())
    assert anatomy(model) == before


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixels, mask=None, *, options=()):
        out = self.bn(pixels)
        parts = [part * self.scale for part in options]
        masked = out if mask is None else out * mask[0]
        result = SimpleNamespace(loss=masked.sum(), count=3)
        return {"logits": (out.relu(), out.argmax(1)), "parts": parts, "all": result}


@pytest.mark.parametrize(
    "example",
    [
        images().float(),
        (images().float(), [torch.ones(4, 3, 8, 8, dtype=torch.int64)]),
        {"pixels": images().float(), "options": (torch.ones(2), torch.ones(2))},
    ],
)
def test_arguments_and_outputs_of_any_shape(example):
    model = Nested()
    assert accelerate(model, example).verified
    restore(model)
    model.bn.register_forward_hook(lambda m, args, out: (out + 1) if is_ours(m) else None)
    with pytest.raises(RuntimeError, match=r"the output\['logits'\]\[0\] in evaluation differs"):
        accelerate(model, example)
    assert type(model.bn) is nn.BatchNorm2d


def test_an_output_that_only_one_of_the_two_has():
    model = nets.Tail()
    model.tail = lambda out, residual: (out, out) if is_ours(model.bn) else (out,)
    with pytest.raises(RuntimeError, match=r"the output\[1\] in evaluation differs by inf"):
        accelerate(model, images().float())


def test_a_wrong_example_input():
    with pytest.raises(TypeError, match=r"must be a tensor, a tuple .* got list"):
        accelerate(nets.ResNet(), [images()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_disagreement(dtype):
    torch.manual_seed(0)
    model = nets.ResNet().to(dtype)
    result = accelerate(model, images().to(dtype))
    assert result.verified
    found = result.differences
    assert found.output <= 4 * found.rounding_of_output + 64 * torch.finfo(dtype).eps


def test_infinite_and_missing_numbers_may_agree():
    model = tail(lambda self, out, residual: F.relu(out))
    x = images()
    x[0, 0, 0, 0] = math.nan
    assert accelerate(model, x).verified
