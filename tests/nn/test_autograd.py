"""Derivatives of any order and in any direction, vmap, and what is kept for the way back."""

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.nn import functional as F

from batchnorm.nn.functional import batch_norm
from cases import laid_out

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
DIRECTIONS = {"r": jacrev, "f": jacfwd}
NESTINGS = ["".join(nest) for order in (1, 2, 3) for nest in product("rf", repeat=order)]


def normal(*shape, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=chance, dtype=torch.float64)


def statistics(channels=2, seed=5):
    return normal(channels, seed=seed), 0.5 + normal(channels, seed=seed + 1).square()


def named(*options):
    """A readable id: the options that are on."""
    names = ("weight", "bias", "residual", "relu")
    return "-".join(name for name, on in zip(names, options, strict=True) if on) or "plain"


def checked_function(training, kept, options):
    """A function of the leaves, and leaves away from the kink of the ReLU."""
    with_weight, with_bias, with_residual, relu = options
    start = statistics() if kept else (None, None)

    def function(x, *leaves):
        rest = iter(leaves)
        return batch_norm(
            x,
            *(None if each is None else each.clone() for each in start),
            weight=next(rest) if with_weight else None,
            bias=next(rest) if with_bias else None,
            training=training,
            eps=0.1,
            residual=next(rest) if with_residual else None,
            activation="relu" if relu else None,
        )

    for seed in range(100):
        leaves = [normal(3, 2, 1, seed=seed)]
        leaves += [normal(2, seed=seed + 1)] * with_weight + [normal(2, seed=seed + 2)] * with_bias
        leaves += [normal(3, 2, 1, seed=seed + 3)] * with_residual
        before_relu = batch_norm(
            leaves[0],
            *(statistics() if kept else (None, None)),
            weight=leaves[1] if with_weight else None,
            bias=leaves[1 + with_weight] if with_bias else None,
            training=training,
            eps=0.1,
            residual=leaves[-1] if with_residual else None,
        )
        if before_relu.abs().min() > 0.05 and (before_relu > 0).any() and (before_relu < 0).any():
            return function, tuple(leaf.requires_grad_() for leaf in leaves)
    raise AssertionError("no input away from the kink")


@pytest.mark.parametrize(
    ("training", "kept"),
    [(True, True), (True, False), (False, True)],
    ids=["training-kept", "training-unkept", "inference"],
)
@pytest.mark.parametrize(
    "options", list(product([True, False], repeat=4)), ids=lambda options: named(*options)
)
def test_first_and_second_derivatives(training, kept, options):
    function, leaves = checked_function(training, kept, options)
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, check_batched_grad=True)


RUNNING = statistics()


def by_formula(x, weight, bias, training):
    if training:
        var, mean = torch.var_mean(x, 0, correction=0)
    else:
        mean, var = RUNNING
    return (x - mean) / torch.sqrt(var + 0.25) * weight + bias


def by_library(x, weight, bias, training):
    running = [each.clone() for each in RUNNING]
    return batch_norm(x, *running, weight=weight, bias=bias, training=training, eps=0.25)


def cubed(compute, training):
    """A number from one vector that holds input, weight and bias, for the mixed derivatives."""

    def loss(packed):
        x, weight, bias = packed.split([8, 2, 2])
        return compute(x.reshape(4, 2), weight, bias, training).pow(3).sum()

    return loss


@MODES
@pytest.mark.parametrize("nesting", NESTINGS)
def test_every_nesting_of_directions(nesting, training):
    packed = normal(12)
    derivatives = []
    for compute in (by_formula, by_library):
        function = cubed(compute, training)
        for direction in reversed(nesting):
            function = DIRECTIONS[direction](function)
        derivatives.append(function(packed))
    expected, got = derivatives
    assert (got - expected).abs().max() / expected.abs().max() < 1e-12


@MODES
def test_three_times_backward_without_transforms(training):
    results = []
    for compute in (by_formula, by_library):
        packed = normal(12).requires_grad_()
        value = cubed(compute, training)(packed)
        for _ in range(3):
            (derivative,) = torch.autograd.grad(value, packed, create_graph=True)
            value = (derivative * normal(12, seed=9)).sum()
        results.append(derivative.detach())
    expected, got = results
    assert (got - expected).abs().max() / expected.abs().max() < 1e-12


def test_a_penalty_on_the_gradient_of_low_precision():
    x = normal(8, 3).bfloat16().requires_grad_()
    weight = torch.ones(3, requires_grad=True)
    y = batch_norm(x, None, None, weight, training=True, activation="relu")
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    first.square().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    assert weight.grad.isfinite().all()


@MODES
def test_vmap_is_a_loop(training):
    stacked, running = normal(5, 4, 2, 3), statistics()
    running = running if not training else (None, None)

    def one(x):
        return batch_norm(x, *running, training=training)

    torch.testing.assert_close(vmap(one)(stacked), torch.stack([one(x) for x in stacked]))
    last = stacked.movedim(0, -1)
    torch.testing.assert_close(vmap(one, in_dims=-1)(last), vmap(one)(stacked))


@MODES
def test_vmap_with_statistics_of_each(training):
    stacked = normal(5, 4, 2)
    weights, biases = normal(5, 2, seed=1), normal(5, 2, seed=2)

    def start():
        return normal(5, 2, seed=3), 0.5 + normal(5, 2, seed=4).square()

    def one(x, mean, var, weight, bias):
        return batch_norm(x, mean, var, weight, bias, training, activation="relu")

    mapped, looped = start(), start()
    y = vmap(one)(stacked, *mapped, weights, biases)
    rows = zip(stacked, *looped, weights, biases, strict=True)
    torch.testing.assert_close(y, torch.stack([one(*row) for row in rows]))
    torch.testing.assert_close(mapped, looped)
    assert torch.equal(mapped[0], start()[0]) is not training


def test_vmap_over_parameters_only():
    x, weights = normal(4, 2), normal(5, 2, seed=1)
    running = torch.zeros(2), torch.ones(2)
    y = vmap(lambda weight: batch_norm(x, *running, weight=weight, training=True))(weights)
    expected = batch_norm(x, None, None, training=True) * weights[:, None]
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(running[0].double(), 0.1 * x.mean(0))


@pytest.mark.parametrize("inside", [False, True], ids=["vmap", "grad_in_vmap"])
def test_vmap_cannot_share_statistics(inside):
    running = torch.full((2,), 2.0), torch.full((2,), 3.0)

    def one(x):
        return batch_norm(x, *running, training=True).square().sum()

    with pytest.raises(
        RuntimeError,
        match=r"^batch_norm under vmap: the input is mapped over but running_mean and "
        r"running_var, which training changes in place, are not; map over them too, or use "
        r"a layer with track_running_stats=False\.$",
    ):
        vmap(grad(one) if inside else one)(normal(5, 4, 2))
    assert (running[0].tolist(), running[1].tolist()) == ([2.0, 2.0], [3.0, 3.0])


def test_grad_moves_captured_statistics_as_torch():
    x, found = normal(6, 2), []
    for compute in (batch_norm, F.batch_norm):
        running = statistics()

        def loss(x, compute=compute, running=running):
            return compute(x, *running, training=True).pow(3).sum()

        found.append((grad(loss)(x), *running))
    torch.testing.assert_close(found[0], found[1])
    assert not torch.equal(found[0][1], statistics()[0])


def test_functional_call_moves_the_statistics_it_is_given():
    layer = torch.nn.Module()
    layer.register_buffer("mean", torch.zeros(2, dtype=torch.float64))
    layer.register_buffer("var", torch.ones(2, dtype=torch.float64))
    layer.forward = lambda x: batch_norm(x, layer.mean, layer.var, training=True).pow(3).sum()
    given = {"mean": torch.zeros(2).double(), "var": torch.ones(2).double()}
    x = normal(6, 2)
    functional_call(layer, given, (x,))
    torch.testing.assert_close(given["mean"], 0.1 * x.mean(0))
    assert layer.mean.tolist() == [0, 0]


@MODES
def test_gradient_of_each_example(training):
    stacked, running = normal(5, 4, 2), (None, None) if training else statistics()

    def loss(x):
        return batch_norm(x, *running, training=training, activation="relu").pow(3).sum()

    expected = torch.stack([grad(loss)(x) for x in stacked])
    torch.testing.assert_close(vmap(grad(loss))(stacked), expected)


def test_later_training_does_not_change_the_gradient_of_an_inference():
    running_mean, running_var = statistics()
    x = normal(8, 2).requires_grad_()
    weight = normal(2, seed=1).requires_grad_()
    expected = torch.autograd.grad(
        F.batch_norm(x, running_mean.clone(), running_var.clone(), weight).pow(3).sum(),
        (x, weight),
    )
    loss = batch_norm(x, running_mean, running_var, weight).pow(3).sum()
    for seed in range(5):
        batch_norm(7 * normal(8, 2, seed=seed), running_mean, running_var, training=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, weight)), expected)


def test_later_training_does_not_change_the_gradient_of_an_earlier_step():
    running = statistics()
    x = normal(8, 2).requires_grad_()
    loss = batch_norm(x, *running, training=True).pow(3).sum()
    batch_norm(normal(8, 2, seed=1), *running, training=True)
    expected = torch.autograd.grad(F.batch_norm(x, None, None, training=True).pow(3).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(loss, x), expected)


@pytest.mark.parametrize("kernels", [None, "reference"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_saved_tensors_may_come_back_in_another_layout(layout, create_graph, kernels):
    """A mask is laid out as the input was."""
    x = normal(4, 3, 5, 7).expand(4, 3, 5, 7)
    x = normal(4, 1, 5, 7).expand(4, 3, 5, 7) if layout == "expanded" else laid_out(x, layout)
    x, residual = x.requires_grad_(), normal(4, 3, 5, 7, seed=1).requires_grad_()
    grads = []

    def packed(tensor):
        return tensor.contiguous() if tensor.dim() == 4 else tensor

    for hooks in (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
        torch.autograd.graph.saved_tensors_hooks(packed, lambda tensor: tensor),
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: tensor,
            lambda tensor: laid_out(tensor, "channels_last") if tensor.dim() == 4 else tensor,
        ),
    ):
        with hooks:
            y = batch_norm(
                x,
                None,
                None,
                training=True,
                residual=residual,
                activation="relu",
                backend=kernels,
            )
        weights = normal(4, 3, 5, 7, seed=2)
        found = torch.autograd.grad(y, (x, residual), weights, create_graph=create_graph)
        assert all(grad.requires_grad is create_graph for grad in found[:1])
        grads.append([grad.detach() for grad in found])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0])


def test_a_residual_costs_one_bit_an_element():
    x = normal(16, 2, 8, 8).float().requires_grad_()
    residual = normal(16, 2, 8, 8, seed=1).float().requires_grad_()
    kept = []

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch_norm(x, None, None, training=True, residual=residual, activation="relu")
    assert sum(kept) == 4 * x.numel() + x.numel() // 8 + 2 * 2 * 8


def bytes_kept(compute, x):
    """Bytes of the different tensors of x's size that the graph keeps."""
    kept = {}

    def pack(tensor):
        if tensor.numel() >= x.numel():
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = compute(x)
    assert y.requires_grad
    return sum(kept.values())


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_no_more_is_kept_than_torch_keeps(training, dtype, activation):
    running = [tensor.float() for tensor in statistics()]
    weight = torch.ones(2, requires_grad=True)
    x = normal(16, 2, 8, 8).to(dtype).requires_grad_()

    def ours(x):
        return batch_norm(x, *running, weight, training=training, activation=activation)

    def torchs(x):
        y = F.batch_norm(x, *running, weight, training=training)
        return y if activation is None else y.relu()

    kept = bytes_kept(ours, x)
    assert x.numel() * x.element_size() <= kept <= bytes_kept(torchs, x)


@MODES
def test_only_what_needs_a_gradient_gets_one(training):
    leaves = [normal(4, 2), normal(2, seed=1), normal(2, seed=2), normal(4, 2, seed=3)]
    everything = [leaf.clone().requires_grad_() for leaf in leaves]

    def loss(x, weight, bias, residual):
        y = batch_norm(x, *statistics(), weight, bias, training, residual=residual)
        return y.pow(3).sum()

    expected = torch.autograd.grad(loss(*everything), everything)
    for at in range(4):
        some = [leaf.clone() for leaf in leaves]
        some[at].requires_grad_()
        loss(*some).backward()
        torch.testing.assert_close(some[at].grad, expected[at])
        assert [leaf.grad is None for leaf in some] == [k != at for k in range(4)]
