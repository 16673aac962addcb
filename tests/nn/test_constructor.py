"""The constructor as others see it: signatures, factories, ``help``, and a type checker."""

from __future__ import annotations

import functools
import inspect
import json
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm

ROOT = Path(__file__).parents[2]
LAYERS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
each_name = pytest.mark.parametrize("name", [*LAYERS, *(f"Lazy{name}" for name in LAYERS)])


def parameters(name, library):
    signature = inspect.signature(getattr(library, name))
    return {p.name: (p.kind, p.default) for p in signature.parameters.values()}


@each_name
def test_the_signature_is_torchs_and_the_activation(name):
    ours, torchs = parameters(name, batchnorm), parameters(name, nn)
    assert ours.pop("activation") == (inspect.Parameter.KEYWORD_ONLY, None)
    assert ours == torchs
    assert list(ours) == list(torchs)


@each_name
def test_help_shows_the_parameters(name):
    text = pydoc.plain(pydoc.render_doc(getattr(batchnorm, name)))
    shown = text[text.index("__init__(self") :][:700]
    assert all(parameter in shown for parameter in parameters(name, nn))
    assert "activation" in shown


def test_torch_can_skip_the_initialization():
    for name in LAYERS:
        layer = nn.utils.skip_init(
            getattr(batchnorm, name), 8, eps=0.1, activation="relu", dtype=torch.float64
        )
        assert layer.weight.dtype == layer.running_var.dtype == torch.float64
        assert (layer.num_features, layer.activation) == (8, "relu")


def test_arguments_are_taken_by_position_as_in_torch():
    arguments = (8, 1e-3, None, True, False, "meta", torch.float64)
    ours, torchs = batchnorm.BatchNorm2d(*arguments), nn.BatchNorm2d(*arguments)
    assert repr(ours) == repr(torchs)
    assert ours.weight.device.type == "meta"
    assert ours.weight.dtype == torch.float64
    lazy, lazy_torchs = (library.LazyBatchNorm1d(*arguments[1:5]) for library in (batchnorm, nn))
    assert repr(lazy) == repr(lazy_torchs)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("lazy", ["", "Lazy"])
def test_bias_may_be_left_out_of_any(name, lazy):
    arguments = () if lazy else (4,)
    layer = getattr(batchnorm, lazy + name)(*arguments, bias=False, activation="relu")
    shape = (6, 4, *[3] * int(name[-2]))
    y = layer(torch.randn(shape))
    assert layer.bias is None
    assert y.min() == 0


def by_names_of_parameters(layer_class, **wanted):
    """A factory that gives only what the constructor takes, as many libraries have one."""
    taken = inspect.signature(layer_class).parameters
    return layer_class(**{name: value for name, value in wanted.items() if name in taken})


def by_annotation(layer_class, **wanted):
    """A factory that asks the signature if a channel count is needed, as MONAI's does."""
    (first, *_) = inspect.signature(layer_class).parameters
    assert first == "num_features"
    return layer_class(**wanted)


@pytest.mark.parametrize("factory", [by_names_of_parameters, by_annotation])
@pytest.mark.parametrize("name", LAYERS)
def test_factories_that_look_at_the_signature(factory, name):
    made = factory(getattr(batchnorm, name), num_features=5, eps=1e-3, momentum=0.2)
    torchs = factory(getattr(nn, name), num_features=5, eps=1e-3, momentum=0.2)
    assert repr(made) == repr(torchs)


def test_a_partial_of_the_class_serves_as_norm_layer():
    norm_layer = functools.partial(batchnorm.BatchNorm2d, eps=1e-3, activation="relu")
    assert inspect.signature(norm_layer).parameters["eps"].default == 1e-3
    assert repr(norm_layer(4)) == repr(norm_layer(num_features=4))
    assert "eps=0.001" in repr(norm_layer(4))


@pytest.mark.untyped
def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'num_features'"):
        batchnorm.BatchNorm2d()
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'epsilon'"):
        batchnorm.BatchNorm2d(8, epsilon=1)


def test_torchs_state_fits_whatever_the_arguments():
    for options in ({"affine": False}, {"track_running_stats": False}, {"bias": False}):
        ours, torchs = batchnorm.BatchNorm2d(4, **options), nn.BatchNorm2d(4, **options)
        torchs.load_state_dict(ours.state_dict())
        x = torch.randn(3, 4, 5, 5)
        assert_close(ours(x), torchs(x))


SCRIPT = """
import batchnorm
from batchnorm import BatchNorm2d, LazyBatchNorm2d
BatchNorm2d()
BatchNorm2d("8")
BatchNorm2d(8, epsilon=1)
BatchNorm2d(8, activation="gelu")
LazyBatchNorm2d(1e-5, 0.1, True, True, None, None, 8)
batchnorm.nonexistent
layer = BatchNorm2d(8, 1e-3, momentum=None, device="cpu", activation="relu")
reveal_type(layer.eps)
reveal_type(BatchNorm2d)
LazyBatchNorm2d(1e-3, activation="relu")
batchnorm.batch_norm
"""
ERRORS = {
    4: 'Argument missing for parameter "num_features"',
    5: 'cannot be assigned to parameter "num_features" of type "int"',
    6: 'No parameter named "epsilon"',
    7: 'cannot be assigned to parameter "activation"',
    8: "Expected 6 positional arguments",
    9: '"nonexistent" is not a known attribute of module "batchnorm"',
}


def test_a_type_checker_sees_the_parameters(tmp_path):
    pyright = Path(sys.executable).with_name("pyright")
    if not pyright.exists():
        pytest.skip("pyright is not installed")
    (tmp_path / "user.py").write_text(SCRIPT)
    settings = {
        "extraPaths": [str(ROOT / "src")],
        "venvPath": str(Path(sys.prefix).parent),
        "venv": Path(sys.prefix).name,
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [pyright, "--outputjson", "-p", tmp_path], capture_output=True, text=True, check=False
    )
    told = json.loads(done.stdout)["generalDiagnostics"]
    errors = {
        d["range"]["start"]["line"] + 1: d["message"] for d in told if d["severity"] == "error"
    }
    assert errors.keys() == ERRORS.keys(), errors
    for line, words in ERRORS.items():
        assert words in errors[line]
    seen = [d["message"] for d in told if d["severity"] == "information"]
    assert seen == [
        'Type of "layer.eps" is "float"',
        'Type of "BatchNorm2d" is "type[BatchNorm2d]"',
    ]


class ComputesEps(batchnorm.BatchNorm2d):
    @property
    def eps(self):
        return self._eps

    @eps.setter
    def eps(self, value):
        self._eps = value


@pytest.mark.untyped  # eps is a tensor there
def test_eps_may_be_computed_by_a_subclass_or_be_a_buffer():
    x = torch.randn(2, 3, 4, 4)
    plain, computed, buffer = (
        kind(3, eps=0.5) for kind in (nn.BatchNorm2d, ComputesEps, batchnorm.BatchNorm2d)
    )
    del buffer.eps
    buffer.register_buffer("eps", torch.tensor(0.5))
    torch.testing.assert_close(computed(x), plain(x))
    torch.testing.assert_close(buffer(x), plain(x))
