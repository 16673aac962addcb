"""What the tests of accelerate and restore share."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm
import model_nets as nets
from batchnorm.tools.acceleration import restore
from batchnorm.tools.acceleration.replacement import LayerForward
from everywhere import accelerate

EXACT = {"rtol": 0, "atol": 0}
OURS = (batchnorm.BatchNorm1d, batchnorm.BatchNorm2d, batchnorm.BatchNorm3d)


def images(count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)


def varied(model: nn.Module) -> nn.Module:
    """In float64, with no parameter or statistic at its telling default."""
    torch.manual_seed(0)
    model.double()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
                for tensor in (layer.weight, layer.running_var):
                    tensor.uniform_(0.3, 1)
                for tensor in (layer.bias, layer.running_mean):
                    tensor.uniform_(-0.3, 0.3)
    return model


def step(model: nn.Module, *args) -> dict[str, Tensor]:
    """Output, gradients and state after one call."""
    leaves = [a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    torch.manual_seed(1)
    output = model(*(a.clone() if isinstance(a, Tensor) else a for a in leaves))
    inputs = [a for a in leaves if isinstance(a, Tensor)]
    parameters = dict(model.named_parameters())
    wanted = [*inputs, *parameters.values()]
    loss = (output * torch.linspace(-1, 2, output.numel()).reshape(output.shape)).sum()
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    names = [*map(str, range(len(inputs))), *parameters]
    grads = {f"grad {n}": g for n, g in zip(names, grads, strict=True) if g is not None}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {"output": output.detach(), **grads, **state}


def assert_same_function(model: nn.Module, original: nn.Module, *args) -> None:
    args = args or (images(),)
    for training in (True, False):
        expected = step(original.train(training), *args)
        assert_close(step(model.train(training), *args), expected, rtol=1e-9, atol=1e-9)


class Calls(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__.rstrip("_"))
        return func(*args, **(kwargs or {}))


def relus_and_additions(model: nn.Module, *args) -> tuple[int, int]:
    """How many are computed on their own in one call."""
    model.eval()
    with torch.no_grad(), Calls() as calls:
        model(*(args or (images(),)))
    return calls.names.count("relu"), calls.names.count("add")


def is_ours(layer: nn.Module) -> bool:
    """Tells if our kernels compute a layer: it is of our class, or accelerated."""
    return isinstance(layer, OURS) or LayerForward.find(layer) is not None


def anatomy(model: nn.Module) -> dict:
    return {
        name: (type(m), dict(vars(m)), {k: id(v) for k, v in m.state_dict(keep_vars=True).items()})
        for name, m in model.named_modules(remove_duplicate=False)
    }


def tail(function, **names):
    """A `nets.Tail` whose end is ``function``."""
    return varied(type("Tail", (nets.Tail,), {"tail": function, **names})())


def accelerated(model: nn.Module) -> nn.Module:
    accelerate(varied(model))
    return model


def restored(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    restore(model)
    assert not any(map(is_ours, model.modules()))
    return model
