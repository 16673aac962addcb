"""Running statistics that are differentiated, mapped over, or written inside of a transform."""

import re

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F

import batchnorm
from batchnorm.nn.functional import batch_norm


def normal(*shape, seed=0, dtype=torch.float64):
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=chance, dtype=torch.float64).to(dtype)


def statistics(*shape, dtype=torch.float64):
    return normal(*shape, seed=5, dtype=dtype), 0.5 + normal(*shape, seed=6, dtype=dtype).square()


def by_hand(x, mean, var, weight=None, bias=None, eps=1e-5):
    """Inference in ordinary operations."""
    along = (1, -1, *[1] * (x.dim() - 2))
    y = (x - mean.reshape(along)) / (var.reshape(along) + eps).sqrt()
    y = y if weight is None else y * weight.reshape(along)
    return y if bias is None else y + bias.reshape(along)


WHICH = pytest.mark.parametrize("which", ["mean", "var", "both"])


def learned(which, channels=3, dtype=torch.float64):
    mean, var = statistics(channels, dtype=dtype)
    return mean.requires_grad_(which != "var"), var.requires_grad_(which != "mean")


def refusal(name):
    return (
        f"^batch_norm: {name} requires a gradient, but training changes it in place and the output "
        rf"does not depend on it; pass {name}\.detach\(\)\.$"
    )


@WHICH
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (3, 3, 40, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_inference_has_the_gradient_of_its_statistics(which, shape, affine):
    x = normal(*shape).requires_grad_()
    affine = [normal(3, seed=7).requires_grad_(), normal(3, seed=8).requires_grad_()] * affine
    found = []
    for compute in (batch_norm, by_hand):
        mean, var = learned(which)
        leaves = [leaf for leaf in (x, mean, var, *affine) if leaf.requires_grad]
        y = compute(x, mean, var, *affine)
        found.append(torch.autograd.grad(y.pow(3).sum(), leaves))
        compute(x, mean, var, *affine).pow(3).sum().backward()
        assert [leaf.grad is not None for leaf in (mean, var)] == [
            which != "var",
            which != "mean",
        ]
    torch.testing.assert_close(*found)


@WHICH
def test_gradients_of_gradients_of_statistics(which):
    x, (mean, var) = normal(4, 3).requires_grad_(), learned(which)
    leaves = tuple(leaf for leaf in (mean, var) if leaf.requires_grad)

    def function(x, *leaves):
        rest = iter(leaves)
        means = next(rest) if mean.requires_grad else mean
        variances = next(rest) if var.requires_grad else var
        return batch_norm(x, means, variances, eps=0.1, activation="relu")

    assert gradcheck(function, (x, *leaves), check_forward_ad=True)
    assert gradgradcheck(function, (x, *leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtype_of_the_statistics(dtype):
    mean, var = learned("both", dtype=torch.float32)
    batch_norm(normal(4, 3, dtype=dtype), mean, var).float().square().sum().backward()
    assert (mean.grad.dtype, var.grad.dtype) == (torch.float32, torch.float32)
    assert mean.grad.isfinite().all()


def test_a_layer_learns_its_statistics_in_evaluation():
    layer = batchnorm.BatchNorm1d(3).eval()
    layer.running_mean.requires_grad_()
    layer(torch.ones(4, 3)).sum().backward()
    torch.testing.assert_close(layer.running_mean.grad, torch.full((3,), -4 / (1 + 1e-5) ** 0.5))
    with torch.no_grad():
        assert not layer(torch.ones(4, 3)).requires_grad


@pytest.mark.untyped
@pytest.mark.parametrize("backend", [None, "reference"])
def test_compiled_inference_has_the_gradient_too(backend):
    def function(x, mean, var):
        return batch_norm(x, mean, var, backend=backend)

    x, (mean, var) = normal(4, 3), learned("both")
    torch.compile(function, backend="aot_eager", fullgraph=True)(x, mean, var).sum().backward()
    expected = torch.autograd.grad(by_hand(x, mean, var).sum(), (mean, var))
    torch.testing.assert_close((mean.grad, var.grad), expected)


def test_a_named_backend_is_refused_where_only_the_formula_has_the_gradient():
    pytest.importorskip("numba")
    mean, var = learned("both")
    with pytest.raises(
        RuntimeError,
        match=r"^backend='numba' cannot take this input: its running statistics require a "
        r"gradient, and that needs the reference; leave backend out\.$",
    ):
        batch_norm(normal(4, 3), mean, var, backend="numba")
    with torch.no_grad():
        batch_norm(normal(4, 3), mean, var, backend="numba")


@WHICH
@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("compute", [batch_norm, F.batch_norm], ids=["ours", "torchs"])
def test_training_refuses_to_differentiate_what_it_changes(which, of_input, compute):
    mean, var = learned(which)
    before = mean.clone(), var.clone()
    name = "running_var" if which == "var" else "running_mean"
    message = refusal(name) if compute is batch_norm else f"argument '{name}'"
    with pytest.raises(RuntimeError, match=message):
        compute(normal(4, 3).requires_grad_(of_input), mean, var, training=True)
    torch.testing.assert_close((mean, var), before, rtol=0, atol=0)
    with torch.no_grad():
        compute(normal(4, 3), mean, var, training=True)
    compute(normal(4, 3), mean.detach(), var.detach(), training=True)
    assert not torch.equal(mean, before[0])


@pytest.mark.parametrize("argument", [0, 1])
def test_grad_refuses_it_in_training(argument):
    def loss(mean, var):
        return batch_norm(normal(4, 3), mean, var, training=True).sum()

    with pytest.raises(RuntimeError, match=refusal(("running_mean", "running_var")[argument])):
        grad(loss, argument)(*statistics(3))


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
@pytest.mark.parametrize("argument", [0, 1])
def test_transforms_differentiate_fixed_statistics(transform, argument):
    x, found = normal(4, 3), []
    for compute in (batch_norm, by_hand):
        function = transform(lambda *fixed, of=compute: of(x, *fixed).pow(2).sum(), argument)
        found.append(function(*statistics(3)))
    torch.testing.assert_close(*found)


def tangents_of_training(of_input, of_mean, of_var):
    """Tangents of the output and the running statistics after a step in training."""
    mean, var = statistics(3)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(normal(4, 3), normal(4, 3, seed=1)) if of_input else normal(4, 3)
        mean = forward_ad.make_dual(mean, torch.ones_like(mean)) if of_mean else mean
        var = forward_ad.make_dual(var, torch.ones_like(var)) if of_var else var
        y = batch_norm(x, mean, var, training=True)
        return [forward_ad.unpack_dual(tensor).tangent for tensor in (y, mean, var)]


def refused_tangent(name):
    return (
        f"^batch_norm: the input and {name} have forward-mode tangents, but training does not "
        rf"differentiate the update of {name}; pass it without a tangent\.$"
    )


@pytest.mark.parametrize(("of_mean", "of_var"), [(True, False), (False, True), (True, True)])
def test_forward_mode_is_not_silently_wrong_in_training(of_mean, of_var):
    name = "running_mean" if of_mean else "running_var"
    with pytest.raises(RuntimeError, match=refused_tangent(name)):
        tangents_of_training(True, of_mean, of_var)
    y, *moved = tangents_of_training(False, of_mean, of_var)
    assert y is None
    for tangent, given in zip(moved, (of_mean, of_var), strict=True):
        assert (tangent is not None) is given
        assert tangent is None or tangent.tolist() == [0.9] * 3


def test_tangents_of_the_input_alone_are_fine():
    y, mean, var = tangents_of_training(True, False, False)
    (expected,) = jvp(
        lambda x: F.batch_norm(x, None, None, training=True),
        (normal(4, 3),),
        (normal(4, 3, seed=1),),
    )[1:]
    torch.testing.assert_close(y, expected)
    assert (mean, var) == (None, None)


def one_jvp(function, *primals):
    return jvp(function, primals, tuple(map(torch.ones_like, primals)))


@pytest.mark.parametrize(
    "nested",
    [
        lambda step: one_jvp(step, normal(4, 3), *statistics(3)),
        lambda step: one_jvp(vmap(step), normal(2, 4, 3), *statistics(2, 3)),
        lambda step: vmap(lambda *args: one_jvp(step, *args))(normal(2, 4, 3), *statistics(2, 3)),
        lambda step: one_jvp(
            vmap(vmap(step)), *(a[None] for a in (normal(2, 4, 3), *statistics(2, 3)))
        ),
    ],
    ids=["jvp", "jvp_of_vmap", "vmap_of_jvp", "jvp_of_vmap_of_vmap"],
)
def test_nested_tangents_are_found(nested):
    def step(x, mean, var):
        return batch_norm(x, mean, var, training=True).pow(2).sum()

    with pytest.raises(RuntimeError, match=refused_tangent("running_mean")):
        nested(step)


MAPPED = {
    "grad_of_vmap": lambda each, x, *rest: grad(
        lambda scale: vmap(lambda x, *r: each(scale * x, *r))(x, *rest).sum()
    )(torch.ones(()).to(x)),
    "jvp_of_vmap": lambda each, x, *rest: one_jvp(
        lambda scale: vmap(lambda x, *r: each(scale * x, *r))(x, *rest).sum(), torch.ones(()).to(x)
    )[1],
    "hessian_of_vmap": lambda each, x, *rest: hessian(
        lambda scale: vmap(lambda x, *r: each(scale * x, *r))(x, *rest).sum()
    )(torch.ones(()).to(x)),
    "vmap_of_grad": lambda each, *args: vmap(lambda x, *r: grad(lambda x: each(x, *r))(x))(*args),
    "vmap_of_jvp": lambda each, *args: vmap(lambda x, *r: one_jvp(lambda x: each(x, *r), x)[1])(
        *args
    ),
    "vmap_of_grad_of_all": lambda each, *args: vmap(grad(each))(*args),
    "vmap_of_vmap_of_grad": lambda each, *args: vmap(
        vmap(lambda x, *r: grad(lambda x: each(x, *r))(x))
    )(*(arg[None] for arg in args)),
    "vmap_over_another_dimension": lambda each, x, *rest: vmap(
        lambda x, *r: grad(lambda x: each(x, *r))(x), in_dims=(0, 1, 1)
    )(x, *(statistic.T for statistic in rest)),
}


@pytest.mark.parametrize("nesting", MAPPED)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5, 4, 3), torch.float64), ((2, 3, 3, 4), torch.float64), ((3, 8, 3), torch.float32)],
    ids=str,
)
def test_mapped_statistics_move_inside_of_derivatives_as_torchs(nesting, shape, dtype):
    found = []
    for compute in (batch_norm, F.batch_norm):
        mean, var = statistics(shape[0], shape[2], dtype=dtype)

        def each(x, mean, var, compute=compute):
            return compute(x, mean, var, training=True, momentum=0.3).pow(3).sum()

        derivative = MAPPED[nesting](each, normal(*shape, dtype=dtype), mean, var)
        found.append((derivative, mean, var))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(*found, **tolerance)
    assert not torch.equal(found[0][1], statistics(shape[0], shape[2], dtype=dtype)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mapped_statistics_of_low_precision_are_written_to_the_bit(dtype):
    x = normal(5, 4, 3, dtype=torch.float32)
    mapped, looped = statistics(5, 3, dtype=dtype), statistics(5, 3, dtype=dtype)

    def loss(x, mean, var):
        return batch_norm(x, mean, var, training=True).pow(3).sum()

    vmap(lambda x, *r: grad(lambda x: loss(x, *r))(x))(x, *mapped)
    for row in zip(x, *looped, strict=True):
        loss(*row)
    assert all(map(torch.equal, mapped, looped))


def test_an_ensemble_of_layers_trains_inside_of_grad():
    """Stacked parameters and buffers, as ``torch.func.stack_module_state`` makes them."""
    found = []
    for layer_class in (batchnorm.BatchNorm1d, torch.nn.BatchNorm1d):
        layers = [layer_class(3).double() for _ in range(4)]
        parameters, buffers = torch.func.stack_module_state(layers)
        if layer_class is torch.nn.BatchNorm1d:  # Torch's layer cannot count here.
            counter = buffers.pop("num_batches_tracked")[0]
            buffers["num_batches_tracked"] = counter.new_ones(4)

        def loss(parameters, base=layers[0], buffers=buffers, is_ours=not found):
            def one(parameters, buffers, x):
                state = {**parameters, **buffers}
                if not is_ours:
                    state["num_batches_tracked"] = torch.zeros(())
                return functional_call(base, state, (x,)).pow(3).sum()

            return vmap(one)(parameters, buffers, normal(4, 6, 3)).sum()

        values = {name: value.detach() for name, value in parameters.items()}
        found.append((grad(loss)(values), buffers))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("mapped", ["mean", "var"])
def test_both_statistics_move_or_neither(mapped):
    mean, var = (value.expand(5, 3).clone() for value in statistics(3))
    fixed = var[0] if mapped == "mean" else mean[0]
    before = mean.clone(), var.clone()

    def train(x, vector):
        pair = (vector, fixed) if mapped == "mean" else (fixed, vector)
        return batch_norm(x, *pair, training=True)

    with pytest.raises(RuntimeError, match=re.escape("batch_norm under vmap: the input is mapped")):
        vmap(train)(normal(5, 4, 3), mean if mapped == "mean" else var)
    torch.testing.assert_close((mean, var), before, rtol=0, atol=0)


def test_what_is_not_mapped_is_still_refused():
    mean, var = statistics(3)
    with pytest.raises(RuntimeError, match=re.escape("batch_norm under vmap: the input is mapped")):
        grad(
            lambda s: vmap(lambda x: batch_norm(s * x, mean, var, training=True).sum())(
                normal(5, 4, 3)
            ).sum()
        )(torch.ones(()).double())
    torch.testing.assert_close((mean, var), statistics(3), rtol=0, atol=0)
