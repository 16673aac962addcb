"""What batch_norm refuses, in which words, and that it then has changed nothing."""

import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import batchnorm
from batchnorm.nn.functional import batch_norm, moments


@dataclass(frozen=True)
class Fault:
    """A call that must fail: what differs from a good one, and what is said about it."""

    name: str
    error: type[Exception]
    message: str
    shape: tuple[int, ...] = (4, 3, 5)
    changes: dict[str, Any] = field(default_factory=dict)
    torch_too: bool = True


NEITHER = "running_mean and running_var must either both be None or neither be None, got None for "
FAULTS = [
    Fault(
        "missing_mean",
        ValueError,
        NEITHER + "running_mean.",
        changes={"running_mean": None},
    ),
    Fault("missing_var", ValueError, NEITHER + "running_var.", changes={"running_var": None}),
    Fault(
        "missing_mean_in_inference",
        RuntimeError,
        "running_mean and running_var must be defined in evaluation mode, got None; give them, "
        "or set training=True to normalize by the batch's own statistics.",
        changes={"running_mean": None, "training": False},
    ),
    Fault(
        "no_statistics_in_inference",
        RuntimeError,
        "running_mean and running_var must be defined in evaluation mode, got None; give them, "
        "or set training=True to normalize by the batch's own statistics.",
        changes={"running_mean": None, "running_var": None, "training": False},
    ),
    Fault(
        "weight_elsewhere",
        RuntimeError,
        "weight must be on the input's device cpu, got meta.",
        changes={"weight": torch.ones(3, device="meta")},
        torch_too=False,
    ),
    Fault(
        "residual_of_another_dtype",
        RuntimeError,
        "residual must have the input's dtype torch.float32, got torch.float64.",
        changes={"residual": torch.zeros(4, 3, 5, dtype=torch.float64)},
        torch_too=False,
    ),
    Fault(
        "residual_elsewhere",
        RuntimeError,
        "residual must have the input's device cpu, got meta.",
        changes={"residual": torch.zeros(4, 3, 5, device="meta")},
        torch_too=False,
    ),
    Fault(
        "eps_of_zero",
        ValueError,
        "batch_norm eps must be positive during training, but got 0.0.",
        changes={"eps": 0.0},
    ),
    Fault(
        "negative_eps",
        ValueError,
        "batch_norm eps must be positive during training, but got -0.1.",
        changes={"eps": -0.1},
    ),
    Fault(
        "eps_that_is_no_number",
        ValueError,
        "batch_norm eps must be positive during training, but got nan.",
        changes={"eps": float("nan")},
        torch_too=False,
    ),
    *(
        Fault(
            f"eps_of_{eps}_in_inference",
            ValueError,
            f"batch_norm eps must be non-negative, but got {eps}.",
            changes={"eps": eps, "training": False},
            torch_too=eps == eps,
        )
        for eps in (-1e-3, -2.0, float("-inf"), float("nan"))
    ),
    Fault(
        "one_value",
        ValueError,
        "Expected more than 1 value per channel when training, got input size (1, 3); "
        "use a larger batch, freeze the layer, or call eval().",
        shape=(1, 3),
    ),
    Fault(
        "one_pixel",
        ValueError,
        "Expected more than 1 value per channel when training, got input size (1, 3, 1, 1); "
        "use a larger batch, freeze the layer, or call eval().",
        shape=(1, 3, 1, 1),
    ),
]
VECTORS = ("running_mean", "running_var", "weight", "bias")
FLOATING = "{0} must be of a floating dtype, got {1}; convert it with {0}.to(torch.float32)."
DENSE = "batch_norm expects {0} as a dense tensor, got layout {1}; convert it with {0}.to_dense()."


def vector_faults(training):
    """Vectors that are no dense floating tensors, one at a time."""
    ones = torch.ones(3)
    for name in VECTORS:
        for dtype in (torch.int64, torch.bool, torch.complex64):
            yield Fault(
                f"{name}_of_{dtype}-{training}",
                RuntimeError,
                FLOATING.format(name, dtype),
                changes={name: ones.to(dtype), "training": training},
            )
        for vector in (ones.to_sparse(), ones.to_mkldnn()):
            yield Fault(
                f"{name}_of_{vector.layout}-{training}",
                NotImplementedError,
                DENSE.format(name, vector.layout),
                changes={name: vector, "training": training},
                torch_too=vector.layout == torch.sparse_coo,
            )
        yield Fault(
            f"{name}_as_a_list-{training}",
            TypeError,
            f"batch_norm expects {name} as a tensor or None, got list.",
            changes={name: [1.0, 1.0, 1.0], "training": training},
        )


def input_faults(training):
    """Inputs that are no dense floating tensors."""
    x = torch.ones(4, 3, 5, 5)
    for other in (x.bool(), x.to(torch.uint8), x.to(torch.complex64)):
        yield Fault(
            f"{other.dtype}-{training}",
            NotImplementedError,
            f"batch_norm expects a floating-point tensor, got {other.dtype}; convert it with "
            "x.to(torch.float32).",
            changes={"x": other, "training": training},
        )
    with warnings.catch_warnings(action="ignore"):  # Some kinds are new in torch, others leave it.
        per_channel = torch.ones(3), torch.zeros(3, dtype=torch.int64), 1, torch.quint8
        quantized_inputs = (
            torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
            torch.quantize_per_channel(x, *per_channel),
        )
        sparse_inputs = x.to_sparse(), x[..., 0, 0].to_sparse_csr(), x.to_mkldnn()
        parts = [torch.ones(2, 5), torch.ones(3, 5)]
        nested_inputs = [
            torch.nested.nested_tensor(parts, layout=layout)
            for layout in (torch.strided, torch.jagged)
        ]
    for quantized in quantized_inputs:
        yield Fault(
            f"{quantized.dtype}-{training}",
            NotImplementedError,
            f"batch_norm expects a floating-point tensor, got {quantized.dtype}; convert it with "
            "x.dequantize().",
            changes={"x": quantized, "training": training},
        )
    for other in sparse_inputs:
        yield Fault(
            f"{other.layout}-{training}",
            NotImplementedError,
            DENSE.format("x", other.layout),
            changes={"x": other, "training": training},
            torch_too=other.layout == torch.sparse_coo,
        )
    for nested in nested_inputs:
        yield Fault(
            f"nested_{nested.layout}-{training}",
            NotImplementedError,
            "batch_norm expects x as a dense tensor, got a nested tensor; concatenate its parts "
            "along their common dimensions.",
            changes={"x": nested, "training": training},
            torch_too=False,
        )


UNTYPED_FAULTS = [
    *vector_faults(training=True),
    *vector_faults(training=False),
    *input_faults(training=True),
    *input_faults(training=False),
    *(
        Fault(
            f"eps_{eps!r}",
            TypeError,
            f"batch_norm expects eps as a number, got {eps!r}.",
            changes={"eps": eps, "training": training},
        )
        for eps, training in (("1e-5", True), (None, False), ([1e-5], False))
    ),
    Fault(
        "list",
        TypeError,
        "batch_norm expects a tensor, got list.",
        changes={"x": [[1.0, 2.0, 3.0]]},
        torch_too=False,
    ),
    Fault(
        "integers",
        NotImplementedError,
        "batch_norm expects a floating-point tensor, got torch.int64; "
        "convert it with x.to(torch.float32).",
        changes={"x": torch.ones(4, 3, dtype=torch.int64)},
    ),
    Fault(
        "complex_numbers",
        NotImplementedError,
        "batch_norm expects a floating-point tensor, got torch.complex64; "
        "convert it with x.to(torch.float32).",
        changes={"x": torch.ones(4, 3, dtype=torch.complex64)},
        torch_too=False,
    ),
    Fault(
        "vector",
        IndexError,
        "batch_norm expects a tensor of shape (N, C, ...), got shape (4,).",
        shape=(4,),
        changes={"running_mean": None, "running_var": None},
    ),
    Fault(
        "scalar",
        IndexError,
        "batch_norm expects a tensor of shape (N, C, ...), got shape ().",
        shape=(),
        torch_too=False,
    ),
    Fault(
        "activation",
        ValueError,
        "activation must be None or 'relu', got 'gelu'.",
        changes={"activation": "gelu"},
        torch_too=False,
    ),
    Fault(
        "no_momentum",
        TypeError,
        "batch_norm expects momentum as a number or a 0-d tensor, got None; for the cumulative "
        "average pass 1 / (num_batches_tracked + 1).",
        changes={"momentum": None},
    ),
    *(
        Fault(
            f"{name}_of_another_size",
            RuntimeError,
            f"{name} should contain 3 elements, one a channel (dimension 1 of the input of shape "
            "(4, 3, 5)), got shape (2,).",
            changes={name: torch.ones(2)},
        )
        for name in ("running_mean", "running_var", "weight", "bias")
    ),
    Fault(
        "channels_at_the_end",
        RuntimeError,
        "weight should contain 3 elements, one a channel (dimension 1 of the input of shape "
        "(4, 3, 5)), got shape (5,); dimension 2 has size 5, but channels are dimension 1.",
        changes={"weight": torch.ones(5)},
    ),
    Fault(
        "channels_in_the_middle",
        RuntimeError,
        "bias should contain 3 elements, one a channel (dimension 1 of the input of shape "
        "(2, 3, 7, 5)), got shape (7,); dimension 2 has size 7, but channels are dimension 1.",
        shape=(2, 3, 7, 5),
        changes={"bias": torch.ones(7)},
    ),
    Fault(
        "weight_of_two_dimensions",
        RuntimeError,
        "weight should contain 3 elements, one a channel (dimension 1 of the input of shape "
        "(4, 3, 5)), got shape (5, 1).",
        changes={"weight": torch.ones(5, 1)},
    ),
    Fault(
        "residual_of_another_shape",
        RuntimeError,
        "residual must have the input's shape (4, 3, 5), got (4, 3, 1).",
        changes={"residual": torch.zeros(4, 3, 1)},
        torch_too=False,
    ),
]


def call_of(fault):
    chance = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(fault.shape, generator=chance),
        "running_mean": torch.full((3,), 2.0),
        "running_var": torch.full((3,), 5.0),
        "training": True,
        **fault.changes,
    }


def assert_refused(fault):
    call = call_of(fault)
    before = {
        name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)
    }
    with pytest.raises(fault.error, match=f"^{re.escape(fault.message)}$") as caught:
        batch_norm(**call)
    assert caught.type is fault.error
    for name, value in before.items():
        ordinary = value.layout == torch.strided and not (value.is_nested or value.is_quantized)
        assert value.device.type == "meta" or not ordinary or torch.equal(call[name], value)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_in_values(fault):
    assert_refused(fault)


@pytest.mark.untyped
@pytest.mark.parametrize("fault", UNTYPED_FAULTS, ids=lambda fault: fault.name)
def test_faults_against_the_annotations(fault):
    assert_refused(fault)


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS + UNTYPED_FAULTS if f.torch_too], ids=lambda fault: fault.name
)
def test_torch_raises_the_same_type(fault):
    call = call_of(fault)
    x = call.pop("x")
    with pytest.raises(fault.error, match=r"\S") as caught:
        F.batch_norm(x, **call)
    assert caught.type is fault.error


@pytest.mark.parametrize("eps", [0.0, -0.0, 1.0, float("inf")])
def test_inference_takes_an_eps_that_is_not_negative(eps):
    x, mean, var = torch.randn(4, 3), torch.zeros(3), torch.tensor([1.0, 2.0, 0.5])
    torch.testing.assert_close(
        batch_norm(x, mean, var, eps=eps), F.batch_norm(x, mean, var, eps=eps)
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_with_a_wrong_eps_is_refused_in_both_modes(training):
    layer = batchnorm.BatchNorm2d(3, eps=-1.0).train(training)
    rule = "positive during training" if training else "non-negative"
    with pytest.raises(ValueError, match=rf"^batch_norm eps must be {rule}, but got -1\.0\.$"):
        layer(torch.randn(2, 3, 4, 4))
    assert layer.num_batches_tracked == 0


def test_one_value_is_fine_in_inference():
    y = batch_norm(torch.full((1, 3), 4.0), torch.full((3,), 2.0), torch.ones(3), eps=0.0)
    assert y.tolist() == [[2.0, 2.0, 2.0]]


@pytest.mark.parametrize("shape", [(1, 3, 2), (2, 3)])
def test_two_values_are_enough(shape):
    x = torch.arange(6.0).reshape(shape)
    assert batch_norm(x, None, None, training=True).isfinite().all()


@pytest.mark.untyped
@pytest.mark.parametrize(
    "fault",
    [f for f in UNTYPED_FAULTS if f.name in ("list", "integers", "vector", "scalar")],
    ids=lambda fault: fault.name,
)
def test_moments_refuse_what_is_no_batch(fault):
    with pytest.raises(fault.error, match=f"^{re.escape(fault.message)}$"):
        moments(call_of(fault)["x"])
