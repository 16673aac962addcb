"""Layers are found in any model, and selected by the names that they have."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from batchnorm import (
    count_recomputation_once,
    ema_update,
    freeze,
    guard,
    is_frozen,
    keep_statistics_in_float32,
    no_stats_update,
    recalibrate,
    reset_poisoned_statistics,
    transaction,
    unfreeze,
    watch,
)
from batchnorm.tools.patching import batch_norms
from look_alikes import Own

pytestmark = pytest.mark.untyped


def data():
    return torch.randn(8, 4)


# Parts that are compiled by TorchScript.

SCRIPTED = {
    "scripted": lambda: torch.jit.script(nn.Linear(4, 4)),
    "traced": lambda: torch.jit.trace(nn.Linear(4, 4), data()),
    "scripted block": lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())),
    "frozen by torch": lambda: torch.jit.freeze(torch.jit.script(nn.Linear(4, 4).eval())),
}
SCRIPTED_LAYERS = {
    "scripted": lambda: torch.jit.script(nn.BatchNorm1d(4)),
    "traced": lambda: torch.jit.trace(nn.BatchNorm1d(4).eval(), data()),
}
TOOLS = {
    "freeze": freeze,
    "unfreeze": unfreeze,
    "guard": guard,
    "watch": watch,
    "no_stats_update": no_stats_update,
    "transaction": transaction,
    "count_recomputation_once": count_recomputation_once,
    "keep_statistics_in_float32": keep_statistics_in_float32,
    "reset_poisoned_statistics": reset_poisoned_statistics,
    "is_frozen": is_frozen,
    "recalibrate": lambda model: recalibrate(model, [data()]),
    "ema_update": lambda model: ema_update(copy.deepcopy(model), model, 0.9, "merge"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
@pytest.mark.parametrize("kind", SCRIPTED)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_part_in_torchscript_is_no_obstacle(tool, kind):
    model = nn.Sequential(SCRIPTED[kind](), nn.BatchNorm1d(4), nn.ReLU())
    result = TOOLS[tool](model)
    assert list(batch_norms(model, caller="test")) == ["1"]
    model(data())
    if tool == "freeze":
        assert result.layers == ("1",)
    if tool == "recalibrate":
        assert [change.name for change in result.layers] == ["1"]


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
@pytest.mark.parametrize("kind", SCRIPTED_LAYERS)
@pytest.mark.parametrize("tool", sorted(TOOLS.keys() - {"is_frozen", "unfreeze", "ema_update"}))
def test_a_layer_in_torchscript_is_named(tool, kind):
    model = nn.Sequential(SCRIPTED_LAYERS[kind](), nn.BatchNorm1d(4))
    message = rf"{tool}: passed over layer '0' \(\w+\), because it is compiled by TorchScript"
    with pytest.warns(RuntimeWarning, match=message):
        TOOLS[tool](model)


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
def test_a_whole_model_in_torchscript_is_named():
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    with pytest.warns(RuntimeWarning, match="freeze: ") as caught:
        assert not freeze(model).layers
    assert [str(warning.message) for warning in caught] == [
        "freeze: passed over layer '1' (RecursiveScriptModule), because it is compiled by "
        "TorchScript.",
        "freeze: nothing is done, the model (RecursiveScriptModule) has no batch norm layers.",
    ]


# Layers that compute in another method.


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def __call__(self, x):
        return (x - self.running_mean) / self.running_var.sqrt()


class CalledBySuper(Called):
    pass


@pytest.mark.parametrize("kind", [Called, CalledBySuper])
@pytest.mark.parametrize("tool", [freeze, guard, watch, reset_poisoned_statistics])
def test_a_layer_that_computes_in_call_is_named(tool, kind):
    reason = "it computes in __call__, past its hooks, and has no forward"
    message = rf"{tool.__name__}: passed over layer '0' \({kind.__name__}\), because {reason}"
    model = nn.Sequential(kind(), nn.BatchNorm1d(4))
    with pytest.warns(RuntimeWarning, match=message):
        tool(model)


def test_a_module_that_only_holds_tensors_is_no_layer():
    holder = nn.Module()
    holder.register_buffer("running_mean", torch.zeros(4))
    holder.register_buffer("running_var", torch.ones(4))
    assert freeze(nn.Sequential(holder, nn.BatchNorm1d(4))).layers == ("1",)


def test_a_layer_with_a_call_and_a_forward_is_one():
    class Logged(Own):
        def __call__(self, x):
            return super().__call__(x)

    assert freeze(Logged(4)).layers == ("",)


# Names that look like those of wrappers.


def nested(**children):
    """Modules by name; a list becomes batch norm layers."""
    parent = nn.Module()
    for name, child in children.items():
        is_list = isinstance(child, list)
        module = nested(**{each: nn.BatchNorm1d(4) for each in child}) if is_list else child
        parent.add_module(name, module)
    return parent


def compiled(model):
    return torch.compile(model, backend="eager")


CHOICES = [
    (lambda: nested(module=["0", "1"], head=["0"]), "module.*", ["module.0", "module.1"]),
    (lambda: nested(module=["0", "1"], head=["0"]), "module", ["module.0", "module.1"]),
    (lambda: nested(module=["0", "1"], head=["0"]), "module.1", ["module.1"]),
    (lambda: nested(module=["0"], head=["0"]), "*.0", ["module.0", "head.0"]),
    (lambda: nested(module=["bn"], bn=nn.BatchNorm1d(4)), "bn", ["bn"]),
    (lambda: nested(module=["bn"], bn=nn.BatchNorm1d(4)), "module.bn", ["module.bn"]),
    (lambda: nested(module=["bn2"], bn1=nn.BatchNorm1d(4)), "bn?", ["bn1"]),
    (lambda: nested(module=["bn2"], bn1=nn.BatchNorm1d(4)), "bn2", ["module.bn2"]),
    (lambda: nested(body=nested(module=["bn"]), bn=nn.BatchNorm1d(4)), "body.bn", None),
    (lambda: nested(a=compiled(nested(module=["0"])), b=["0"]), "a.module.*", None),
    (lambda: nested(a=compiled(nested(x=["0"])), b=nested(x=["0"])), "?.x.0", 2),
    (lambda: nested(a=compiled(nested(x=["0"])), b=nested(x=["0"])), "a._orig_mod.x", None),
    (lambda: nested(a=compiled(nested(x=["0"])), b=nested(x=["0"])), "*._orig_mod.*", None),
    (lambda: nn.DataParallel(nested(module=["0"], head=["0"])), "module.head", None),
    (lambda: nn.DataParallel(nested(module=["0"], head=["0"])), "head.*", ["module.head.0"]),
    (lambda: nested(a=["0"], b=["0"]), "module.a.0", ["a.0"]),
]


@pytest.mark.parametrize(("make", "pattern", "expected"), CHOICES)
def test_a_name_means_what_is_written_where_that_fits(make, pattern, expected):
    model = make()
    found = list(batch_norms(model, [pattern], caller="test"))
    if isinstance(expected, list):
        assert found == expected
    else:
        assert len(found) == (expected or 1)


def test_a_name_that_two_layers_would_have_without_wrappers_is_refused():
    model = nn.DataParallel(nested(module=["bn"], bn=nn.BatchNorm1d(4)))
    message = "no batch norm layer fits 'bn'; the model has 'module.module.bn', 'module.bn'"
    with pytest.raises(ValueError, match=message):
        batch_norms(model, ["bn"], caller="test")
    assert list(batch_norms(model, ["module.bn"], caller="test")) == ["module.bn"]
