"""What accelerate says where there is nothing to do, and of what it leaves."""

from __future__ import annotations

import copy
import types
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm
import batchnorm.scratch
import model_nets as nets
from batchnorm.tools.acceleration import restore
from everywhere import accelerate
from model_cases import accelerated, anatomy, images, restored, varied

NOTHING_TO_DO = {
    "no batch norm": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()),
    "a look-alike": lambda: nn.Sequential(batchnorm.scratch.BatchNorm(3, 4)),
    "left": lambda: nn.Sequential(nn.Identity(), Other(3)),
    "done": lambda: accelerated(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())),
    "built as ours": lambda: nn.Sequential(batchnorm.BatchNorm2d(3)),
}


class Other(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("name", NOTHING_TO_DO)
def test_nothing_to_do_is_not_called_verified(name):
    model = NOTHING_TO_DO[name]().double()
    before = anatomy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = accelerate(model, images())
    assert len(caught) == (result.found == 0) == (name in ("no batch norm", "a look-alike"))
    assert (result.verified, result.differences) == (False, None)
    assert "erified" not in str(result)
    assert anatomy(model) == before


class Holder(nn.Module):
    """Only holds tensors."""

    def __init__(self, mean: Tensor, var: Tensor | None):
        super().__init__()
        self.register_buffer("running_mean", mean)
        if var is not None:
            self.register_buffer("running_var", var)


class Shift(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return x - self.running_mean


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            Shift(torch.zeros(3), torch.ones(3)),
            "it is a Shift, which is no batch norm layer of torch",
        ),
        (
            batchnorm.scratch.BatchNorm(3, 4),
            "it is a BatchNorm, which is no batch norm layer of to",
        ),
        (Shift(torch.zeros(3), None), "it keeps running_mean but no running_var"),
        (Shift(torch.zeros(3, 3), torch.ones(3, 3)), "its running_mean has the shape (3, 3)"),
        (Holder(torch.zeros(3), torch.ones(3)), None),
    ],
)
def test_what_is_no_batch_norm_is_judged_as_by_all_tools(module, reason):
    model = nn.Sequential(nn.BatchNorm2d(3), module)
    left = accelerate(model).left
    if reason is None:
        assert left == {}
    else:
        assert left.keys() == {"1"}
        assert left["1"].startswith(reason)


def unbound(module: nn.Module) -> None:
    module.forward = types.MethodType(type(module).forward, module)


def function(module: nn.Module) -> None:
    module.forward = lambda *args: type(module).forward(module, *args)


def wrapper(module: nn.Module) -> None:
    inner = module.forward
    module.forward = lambda *args: inner(*args)


@pytest.mark.parametrize("replace", [unbound, function, wrapper])
@pytest.mark.parametrize("name", ["bn1", "layer1.0.bn2", "layer1.0", "layer2.0.downsample.1", ""])
def test_a_forward_that_was_replaced_after_accelerate_is_named(name, replace):
    model = accelerated(nets.ResNet())
    plain = restored(model).eval()
    replace(model.get_submodule(name))
    again = accelerate(model.eval(), images())
    assert again.left[name] == "its forward was replaced on this object"
    assert (again.replaced, again.relus, again.additions) == ((), (), ())
    assert "Left as they are:" in str(again)
    assert_close(model(images()), plain(images()))
    del model.get_submodule(name).forward
    assert name not in accelerate(model).left


TOOLS = [batchnorm.guard, batchnorm.count_recomputation_once]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("tool_first", [True, False])
def test_a_shallow_copy_does_not_take_the_forward_from_the_original(tool, tool_first):
    model = varied(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    plain = copy.deepcopy(model)
    if not tool_first:
        accelerate(model)
    with tool(model):
        accelerate(model)
        twin = copy.copy(model[0])
        with pytest.raises(
            RuntimeError, match=r"restore: the .* is a shallow copy, and shares its"
        ):
            restore(twin)
        assert_close(twin(images()), plain[0](images()))
        assert restore(model).layers == 1
        accelerate(model)
    assert restore(model).layers == 1
    assert anatomy(model).keys() == anatomy(plain).keys()
    assert "forward" not in vars(model[0])


def test_a_shallow_copy_without_a_tool_is_restored_alone():
    model = varied(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    accelerate(model)
    twin = copy.copy(model[0])
    assert restore(twin).layers == 1
    assert "forward" not in vars(twin)
    assert restore(model) == batchnorm.tools.acceleration.Restoration(1, 1)
