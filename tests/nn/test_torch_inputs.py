"""PyTorch's own test inputs for batch norm, given to torch and to us."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

import batchnorm
from batchnorm.nn import functional

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LAYERS = {
    nn.BatchNorm1d: batchnorm.BatchNorm1d,
    nn.BatchNorm2d: batchnorm.BatchNorm2d,
    nn.BatchNorm3d: batchnorm.BatchNorm3d,
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layer = pytest.mark.parametrize("torch_class", LAYERS, ids=lambda layer: layer.__name__)


@pytest.fixture(scope="module")
def module_infos() -> dict:
    from torch.testing._internal.common_modules import module_db

    return {info.module_cls: info for info in module_db}


@pytest.fixture(scope="module")
def op_infos() -> dict:
    from torch.testing._internal.common_methods_invocations import op_db

    return {info.name: info for info in op_db if info.variant_test_name == ""}


def samples_of(info, dtype: torch.dtype) -> Iterator:
    torch.manual_seed(0)
    return info.sample_inputs("cpu", dtype, requires_grad=True)


def copied(value, dtype: torch.dtype):
    """A leaf with the same values in ``dtype``, so that two calls share nothing."""
    if not isinstance(value, Tensor):
        return value
    leaf = value.detach().to(dtype, copy=True)
    return leaf.requires_grad_(value.requires_grad)


def observed(function: Callable, sample, dtype: torch.dtype) -> dict:
    """What a call in ``dtype`` returns, and what it does to its arguments and their gradients."""
    x, *arguments = (copied(value, dtype) for value in (sample.input, *sample.args))
    output = function(x, *arguments, **sample.kwargs)
    tensors = [value for value in (x, *arguments) if isinstance(value, Tensor)]
    output.backward(cotangent(output))
    return {
        "output": output.detach(),
        "arguments": [value.detach() for value in tensors],
        "gradients": [value.grad for value in tensors],
    }


def cotangent(output: Tensor) -> Tensor:
    """Sixteenths, which bfloat16 holds exactly."""
    return (torch.arange(output.numel()) % 37 - 11).reshape(output.shape).to(output.dtype) / 16


def truth_dtype(dtype: torch.dtype) -> torch.dtype:
    """What torch computes the expected values in.

    Its own bfloat16 rounds several times, ours once, at the end: so ours are held against torch's
    float64, and must be within one step of bfloat16.
    """
    return torch.float64 if dtype == torch.bfloat16 else dtype


def assert_same(ours: dict, torchs: dict, dtype: torch.dtype, case: str) -> None:
    tolerance = {"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else {}
    expected = tree_map_only(
        Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, torchs
    )
    assert_close(ours, expected, msg=lambda message: f"{case}: {message}", **tolerance)


@each_dtype
def test_operator_inputs(op_infos, dtype):
    samples = [
        sample
        for sample in samples_of(op_infos["nn.functional.batch_norm"], dtype)
        if sample.input.dim() > 1
    ]

    assert len(samples) >= 10
    assert {sample.kwargs.get("training", False) for sample in samples} == {True, False}
    for sample in samples:
        torchs = observed(F.batch_norm, sample, truth_dtype(dtype))
        ours = observed(functional.batch_norm, sample, dtype)
        assert_same(ours, torchs, dtype, sample.summary())


@pytest.mark.untyped
@each_dtype
def test_operator_inputs_without_a_channel_dimension(op_infos, dtype):
    samples = [
        sample
        for sample in samples_of(op_infos["nn.functional.batch_norm"], dtype)
        if sample.input.dim() == 1
    ]

    assert [tuple(sample.input.shape) for sample in samples] == [(0,), (0,)]
    for sample in samples:
        torchs = observed(F.batch_norm, sample, truth_dtype(dtype))
        ours = observed(functional.batch_norm, sample, dtype)
        assert_same(ours, torchs, dtype, sample.summary())


def test_operator_has_no_error_inputs(op_infos):
    """Should torch add some, they belong into this file."""
    assert op_infos["nn.functional.batch_norm"].error_inputs_func is None


@each_dtype
@pytest.mark.parametrize("name", ["native_batch_norm", "_native_batch_norm_legit"])
def test_native_operator_inputs(op_infos, name, dtype):
    operator = op_infos[name].op
    samples = list(samples_of(op_infos[name], dtype))

    def first_of_operator(*arguments):
        return operator(*arguments)[0]

    def ours(x, weight, bias, *rest):
        *running, training, momentum, eps = rest
        running_mean, running_var = running or (None, None)
        return functional.batch_norm(
            x, running_mean, running_var, weight, bias, training, momentum, eps
        )

    assert len(samples) >= 10
    for sample in samples:
        torchs = observed(first_of_operator, sample, truth_dtype(dtype))
        assert_same(observed(ours, sample, dtype), torchs, dtype, sample.summary())


@each_dtype
def test_native_operator_that_returns_the_statistics(op_infos, dtype):
    info = op_infos["_batch_norm_with_update"]
    samples = list(samples_of(info, dtype))

    assert len(samples) >= 8
    for sample in samples:
        leaves = (copied(value, truth_dtype(dtype)) for value in (sample.input, *sample.args))
        _, mean, inv_std, _ = info.op(*leaves)
        ours = functional.moments(sample.input.detach())
        got = {"mean": ours.mean, "inv_std": (ours.var + sample.args[-1]).rsqrt()}
        expected = {"mean": mean.double(), "inv_std": inv_std.double()}
        rtol = 1e-5 if dtype == torch.float32 else 1e-12
        assert_close(got, expected, rtol=rtol, atol=rtol)


def module_inputs(module_infos, torch_class, dtype, *, training: bool) -> list:
    torch.manual_seed(0)
    info = module_infos[torch_class]
    return info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )


def built_alike(torch_class: type[nn.Module], constructor, dtype: torch.dtype):
    """Torch's layer and ours, with the same random parameters and buffers."""
    torchs = torch_class(*constructor.args, **constructor.kwargs, dtype=dtype)
    ours = LAYERS[torch_class](*constructor.args, **constructor.kwargs, dtype=dtype)
    with torch.no_grad():
        for tensor in torchs.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2)
    ours.load_state_dict(torchs.state_dict())
    return torchs, ours


def observed_module(layer: nn.Module, module_input, dtype: torch.dtype) -> dict:
    x = copied(module_input.forward_input.args[0], dtype)
    output = layer(x)
    output.backward(cotangent(output))
    return {
        "output": output.detach(),
        "gradient": x.grad,
        "parameters": {name: p.grad for name, p in layer.named_parameters()},
        "buffers": {name: b.clone() for name, b in layer.named_buffers()},
    }


@each_dtype
@each_layer
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_module_inputs(module_infos, torch_class, dtype, training):
    inputs = module_inputs(module_infos, torch_class, dtype, training=training)

    assert len(inputs) >= 7
    for module_input in inputs:
        torchs, ours = built_alike(torch_class, module_input.constructor_input, dtype)
        torchs, ours = torchs.to(truth_dtype(dtype)).train(training), ours.train(training)
        expected = observed_module(torchs, module_input, truth_dtype(dtype))
        got = observed_module(ours, module_input, dtype)
        if training and module_input.desc == "zero_batch":
            # torch counts a batch in which there was nothing, we do not.
            assert expected["buffers"].pop("num_batches_tracked") == 1
            assert got["buffers"].pop("num_batches_tracked") == 0
        assert_same(got, expected, dtype, module_input.desc)


@each_dtype
@each_layer
def test_module_error_inputs(module_infos, torch_class, dtype):
    info = module_infos[torch_class]
    inputs = info.module_error_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=True
    )

    assert len(inputs) >= 2
    for error_input in inputs:
        constructor = error_input.module_error_input.constructor_input
        x = error_input.module_error_input.forward_input.args[0]
        layer = LAYERS[torch_class](*constructor.args, **constructor.kwargs, dtype=dtype)
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        with pytest.raises(error_input.error_type, match=error_input.error_regex):
            layer(x)
        assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)
