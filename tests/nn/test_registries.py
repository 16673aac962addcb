"""Libraries that go by a module's exact class know our layers, whichever is imported first."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.nn import registries

ORDERS = ["import batchnorm.nn.layers; import {0}", "import {0}; import batchnorm.nn.layers"]
KINDS = {
    batchnorm.BatchNorm1d: nn.BatchNorm1d,
    batchnorm.BatchNorm2d: nn.BatchNorm2d,
    batchnorm.BatchNorm3d: nn.BatchNorm3d,
}


def in_a_new_process(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


# The mechanism, on a library of our own.


@pytest.fixture
def library(tmp_path, monkeypatch):
    (tmp_path / "zoo_of_counters.py").write_text("register_hooks = {}\nloader = __loader__\n")
    monkeypatch.syspath_prepend(tmp_path)
    entered = []
    monkeypatch.setitem(registries._ENTRIES, "zoo_of_counters", entered.append)
    yield entered
    sys.modules.pop("zoo_of_counters", None)


def test_an_entry_is_made_at_the_import_of_the_library(library):
    import zoo_of_counters

    assert library == [zoo_of_counters]
    assert zoo_of_counters.__loader__ is zoo_of_counters.__spec__.loader is zoo_of_counters.loader
    assert type(zoo_of_counters.__loader__).__name__ == "SourceFileLoader"


def test_an_entry_is_made_at_once_if_the_library_was_there(library, monkeypatch):
    monkeypatch.setattr(
        sys, "meta_path", [f for f in sys.meta_path if type(f).__module__ != registries.__name__]
    )
    import zoo_of_counters

    assert library == []
    registries.enter()
    assert library == [zoo_of_counters]


def test_a_library_that_is_missing_stays_missing(library):
    sys.path.pop(0)
    with pytest.raises(ModuleNotFoundError, match="No module named 'zoo_of_counters'"):
        import zoo_of_counters  # noqa: F401
    assert library == []


@pytest.mark.parametrize("name", ["opacus.validators", "thop.profile"])
@pytest.mark.parametrize(
    "has", [{}, {"ModuleValidator": SimpleNamespace(VALIDATORS={}, FIXERS={})}]
)
def test_a_library_that_has_changed_is_named(name, has):
    module = ModuleType(name)
    vars(module).update(has)
    with pytest.warns(RuntimeWarning, match=rf"{name} has no registry .* call batchnorm\.to_torch"):
        registries._enter(module)


def test_entries_are_those_of_torchs_classes():
    validators = {torchs: object() for torchs in KINDS.values()}
    fixers = {torchs: lambda layer, **options: nn.GroupNorm(1, 4) for torchs in KINDS.values()}
    opacus = ModuleType("opacus.validators")
    opacus.ModuleValidator = SimpleNamespace(VALIDATORS=validators, FIXERS=fixers)
    thop = ModuleType("thop.profile")
    thop.register_hooks = {torchs: object() for torchs in KINDS.values()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registries._enter(opacus)
        registries._enter(thop)
    for ours, torchs in KINDS.items():
        assert validators[ours] is validators[torchs]
        assert thop.register_hooks[ours] is thop.register_hooks[torchs]
        assert type(fixers[ours](ours(4))) is nn.GroupNorm
        fixed = fixers[ours](ours(4, activation="relu"))
        assert [type(part) for part in fixed] == [nn.GroupNorm, nn.ReLU]


# The libraries themselves.


@pytest.mark.parametrize("order", ORDERS)
def test_privacy_validator(order):
    pytest.importorskip("opacus", reason="opacus is not installed")
    in_a_new_process(
        order.format("opacus.validators")
        + """
from torch import nn
import batchnorm
from opacus.validators import ModuleValidator as V
for options in ({}, {"track_running_stats": False}, {"activation": "relu"}):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), batchnorm.BatchNorm2d(4, **options))
    assert len(V.validate(model, strict=False)) == 1, options
    fixed = V.fix(model)
    assert V.is_valid(fixed)
    ends = [type(m) for m in fixed.modules() if not list(m.children())]
    assert ends == [nn.Conv2d, nn.GroupNorm] + [nn.ReLU] * ("activation" in options)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
batchnorm.accelerate(model, everywhere=True)
assert len(V.validate(model, strict=False)) == 1
assert type(V.fix(model)[1]) is nn.GroupNorm
"""
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"activation": "relu"}])
@pytest.mark.parametrize("kind", [batchnorm.BatchNorm2d, nn.BatchNorm2d])
def test_private_training_is_refused(kind, options):
    opacus = pytest.importorskip("opacus", reason="opacus is not installed")
    if kind is nn.BatchNorm2d:
        options = {name: value for name, value in options.items() if name != "activation"}
    model = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4, **options), nn.Flatten(), nn.Linear(64, 2))
    if kind is nn.BatchNorm2d:
        batchnorm.accelerate(model, everywhere=True)
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 6, 6), torch.zeros(8).long())
    with pytest.raises(opacus.validators.errors.UnsupportedModuleError, match="BatchNorm cannot"):
        opacus.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=torch.utils.data.DataLoader(data, batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


@pytest.mark.parametrize("order", ORDERS)
def test_counter_of_operations(order):
    pytest.importorskip("thop", reason="thop is not installed")
    in_a_new_process(
        order.format("thop")
        + """
import torch
from torch import nn
import batchnorm, thop
x = torch.randn(1, 3, 16, 16)
def count(model):
    return thop.profile(model, (x,), verbose=False)
def build(kind, **options):
    return nn.Sequential(nn.Conv2d(3, 8, 3), kind(8, **options), nn.ReLU())
expected = count(build(nn.BatchNorm2d))
assert count(build(batchnorm.BatchNorm2d)) == expected
assert count(build(batchnorm.BatchNorm2d, activation="relu")) == expected
assert count(batchnorm.to_torch(build(batchnorm.BatchNorm2d))) == expected
model = build(nn.BatchNorm2d)
batchnorm.accelerate(model, everywhere=True)
assert count(model) == expected
"""
    )


@pytest.mark.parametrize("again", ["importlib.reload(batchnorm.nn)", "purge()"])
def test_a_second_import_leaves_one_finder(again):
    in_a_new_process(
        f"""
import importlib, sys, types
import batchnorm.nn
def purge():
    for name in ("batchnorm.nn", "batchnorm.nn.registries"):
        del sys.modules[name]
    importlib.import_module("batchnorm.nn")
{again}
finders = [f for f in sys.meta_path if type(f).__module__ == "batchnorm.nn.registries"]
assert len(finders) == 1, finders
assert finders[0].find_spec("thop.profile", []) is None
"""
    )
