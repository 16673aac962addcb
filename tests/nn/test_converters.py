"""Code of others that rebuilds a layer: no fused activation is lost without a word."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.testing import assert_close
from torch.utils.mkldnn import to_mkldnn

import batchnorm
from real_networks import import_torchvision

WARNING = (
    r"^{reader} reads eps of a {layer} with activation='relu', as converters do that know no "
    r"activation: their result lacks it\. Call batchnorm\.to_torch\(model\) first, which makes the "
    r"activation a module of its own\.$"
)


def layer(rank=2, activation="relu"):
    made = getattr(batchnorm, f"BatchNorm{rank}d")(4, activation=activation, eps=0.1).eval()
    made(torch.randn(2, 4, *[3] * (rank if rank > 1 else 0)))
    return made


def with_timm(name):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    import_torchvision()
    return getattr(importlib.import_module("timm.layers"), name)


def frozen_as_detectron(module):
    """Detectron2's conversion, in short: ``FrozenBatchNorm2d.convert_frozen_batchnorm``."""
    frozen = import_torchvision().ops.FrozenBatchNorm2d(module.num_features)
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(frozen, name, getattr(module, name).data.clone().detach())
    frozen.eps = module.eps
    return frozen


def in_train(module):
    return nn.SyncBatchNorm.convert_sync_batchnorm(module.train())


CONVERTERS = {
    "sync": (
        lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m),
        r"torch\.nn\.modules\.batchnorm\.SyncBatchNorm\.convert_sync_batchnorm",
    ),
    "sync in training": (
        in_train,
        r"torch\.nn\.modules\.batchnorm\.SyncBatchNorm\.convert_sync_batchnorm",
    ),
    "into the convolution": (
        lambda m: fuse_conv_bn_eval(nn.Conv2d(3, 4, 1).eval(), m),
        r"torch\.nn\.utils\.fusion\.fuse_conv_bn_eval",
    ),
    "into the linear layer": (
        lambda m: fuse_linear_bn_eval(nn.Linear(3, 4).eval(), m),
        r"torch\.nn\.utils\.fusion\.fuse_linear_bn_eval",
    ),
    "mkldnn": (to_mkldnn, r"torch\.utils\.mkldnn\.MkldnnBatchNorm\.__init__"),
    "timm freezes": (
        lambda m: with_timm("freeze_batch_norm_2d")(m),
        r"timm\.layers\.norm_act\.freeze_batch_norm_2d",
    ),
    "timm's sync": (
        lambda m: with_timm("convert_sync_batchnorm")(m),
        r"timm\.layers\.norm_act\.convert_sync_batchnorm",
    ),
    "frozen": (frozen_as_detectron, r".*test_converters\.frozen_as_detectron"),
    "a function of somebody's own": (lambda m: nn.BatchNorm2d(4, eps=m.eps), r".*<lambda>"),
}
each_converter = pytest.mark.parametrize("name", CONVERTERS)
# torch's converter to mkldnn makes script modules.
scripts = pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated:DeprecationWarning")


@scripts
@each_converter
@pytest.mark.untyped
def test_a_converter_that_drops_the_activation_is_named(name):
    convert, reader = CONVERTERS[name]
    module = layer(1 if "linear" in name else 2)
    expected = WARNING.format(reader=reader, layer=type(module).__name__)
    with pytest.warns(UserWarning, match=expected) as told:
        convert(module)
    assert len(told) == 1
    assert not told[0].filename.endswith("nn/converters.py")


@scripts
@each_converter
@pytest.mark.untyped
def test_a_layer_without_activation_is_converted_without_a_word(name):
    convert, _ = CONVERTERS[name]
    module = layer(1 if "linear" in name else 2, activation=None)
    before = copy.deepcopy(module)
    assert convert(module) is not None
    assert module.__dict__["eps"] == before.__dict__["eps"] == 0.1


def test_a_whole_model_warns_once_a_place():
    model = nn.Sequential(*[layer() for _ in range(5)])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert len(told) == 1


def test_lazy_layers_warn_too():
    lazy = batchnorm.LazyBatchNorm2d(activation="relu")
    with pytest.warns(UserWarning, match="reads eps of a LazyBatchNorm2d with activation='relu'"):
        assert lazy.eps == 1e-5


def test_the_activation_may_come_later():
    module = layer(activation=None)
    assert module.eps == 0.1
    module.activation = "relu"
    with pytest.warns(UserWarning, match="reads eps of a BatchNorm2d"):
        assert module.eps == 0.1


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


QUIET = {
    "call": lambda m: m(torch.randn(2, 4, 3, 3)),
    "training": lambda m: m.train()(torch.randn(2, 4, 3, 3)).sum().backward(),
    "repr": repr,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved,
    "state_dict": lambda m: m.load_state_dict(m.state_dict()),
    "setting": lambda m: setattr(m, "eps", 0.5),
    "half": lambda m: copy.deepcopy(m).half(),
    "fx": lambda m: torch.fx.symbolic_trace(nn.Sequential(m)),
    "export": lambda m: torch.export.export(m, (torch.randn(2, 4, 3, 3),)),
    "compile": lambda m: torch.compile(m, backend="eager", fullgraph=True)(torch.randn(2, 4, 3, 3)),
    "accelerate": lambda m: batchnorm.accelerate(
        nn.Sequential(nn.Conv2d(4, 4, 1), m), everywhere=True
    ),
    "recalibrate": lambda m: batchnorm.recalibrate(m, [torch.randn(2, 4, 3, 3)]),
    "guard": lambda m: (batchnorm.guard(m), m(torch.randn(2, 4, 3, 3))),
    "freeze": batchnorm.freeze,
    "which_backend": lambda m: batchnorm.which_backend(torch.randn(2, 4, 3, 3)),
}


@pytest.mark.untyped
@pytest.mark.parametrize("name", QUIET)
def test_what_keeps_the_activation_is_quiet(name):
    torch.compiler.reset()
    QUIET[name](layer())  # The tests make a warning an error.


def test_eps_is_an_attribute_as_ever():
    module = layer(activation=None)
    assert "eps" in vars(module)
    module.eps = 0.25
    assert module.eps == copy.deepcopy(module).eps == 0.25
    assert "eps=0.25" in repr(module)
    x = torch.randn(2, 4, 3, 3)
    assert_close(module(x), x / 1.25**0.5, rtol=1e-3, atol=1e-3)
    del module.eps
    assert not hasattr(module, "eps")
    with pytest.raises(AttributeError, match=r"^'BatchNorm2d' object has no attribute 'eps'$"):
        module.eps  # noqa: B018
