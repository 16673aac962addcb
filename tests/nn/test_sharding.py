"""Tensors that are spread over processes: the numbers are those of the whole batch."""

from itertools import product

import pytest
import torch
from torch import distributed

import batchnorm
from batchnorm.nn.functional import batch_norm
from ranks import on_two_ranks

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed")

SHAPES = [(4, 6), (3, 5, 3), (2, 3, 4, 5)]
MODES = [(True, True, "relu"), (True, False, None), (False, True, None)]


def whole(shape, dtype=torch.float64):
    chance = torch.Generator().manual_seed(0)
    x, residual = torch.randn((2, *shape), generator=chance, dtype=torch.float64).to(dtype)
    weight, bias, mean, var = torch.randn((4, shape[1]), generator=chance, dtype=torch.float64)
    return x, weight, bias, mean, 0.5 + var.square(), residual


def results(tensors, training, tracked, activation):
    """Output, gradients and running statistics of a call."""
    x, weight, bias, mean, var, residual = tensors
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias, residual)]
    x, weight, bias, residual = leaves
    statistics = (mean, var) if tracked else (None, None)
    y = batch_norm(x, *statistics, weight, bias, training, residual=residual, activation=activation)
    grads = torch.autograd.grad(y.pow(3).sum(), leaves)
    with torch.no_grad():
        fixed = [None if each is None else each.clone() for each in statistics]
        again = batch_norm(x, *fixed, weight, bias, training)
    return [y.detach(), again, *grads, mean, var]


def placed(tensors, mesh, placements, of_vectors):
    """The same tensors as DTensors; a partial one is a sum over the processes."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    def spread(tensor):
        if not any(isinstance(placement, Partial) for placement in placements):
            return distribute_tensor(tensor.clone(), mesh, placements)
        local = tensor / mesh.size()
        return DTensor.from_local(local, mesh, [Partial()] * mesh.ndim)

    x, *vectors, residual = tensors
    vectors = [distribute_tensor(v.clone(), mesh, [of_vectors] * mesh.ndim) for v in vectors]
    if of_vectors != Replicate():
        assert vectors[0].placements[0] == of_vectors
    return [spread(x), *vectors, spread(residual)]


def all_placements(rank, shapes, sizes):
    """Compares every placement with a single process; the names of those that differ."""
    from torch.distributed.tensor import Partial, Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", sizes)
    wrong = []
    for shape in shapes:
        choices = [Replicate(), Partial(), *(Shard(dim) for dim in range(len(shape)))]
        for placement, of_vectors in product(choices, (Replicate(), Shard(0))):
            for training, tracked, activation in MODES:
                options = (training, tracked, activation)
                placements = [placement, *[Replicate()] * (mesh.ndim - 1)]
                tensors = placed(whole(shape), mesh, placements, of_vectors)
                got = [result.full_tensor() for result in results(tensors, *options)]
                expected = results(whole(shape), *options)
                for k, (one, other) in enumerate(zip(got, expected, strict=True)):
                    if not torch.allclose(one, other, rtol=1e-9, atol=1e-9):
                        wrong.append((k, shape, placement, of_vectors, *options))
    return wrong


def test_every_placement_on_two_processes(tmp_path):
    assert on_two_ranks(all_placements, SHAPES, (2,), tmp_path=tmp_path) == [[], []]


def test_a_mesh_of_two_dimensions(tmp_path):
    shapes = [(5, 3)]
    assert on_two_ranks(all_placements, shapes, (2, 1), tmp_path=tmp_path) == [[], []]


def layers(rank):
    """A layer whose parameters and buffers are spread learns what a layer in one process learns."""
    from torch.distributed.tensor import (
        Shard,
        distribute_module,
        distribute_tensor,
        init_device_mesh,
    )

    mesh = init_device_mesh("cpu", (2,))
    x = whole((4, 6, 2, 5), torch.float32)[0]
    alone, spread = (batchnorm.BatchNorm2d(6, activation="relu") for _ in range(2))
    distribute_module(spread, mesh)
    for dim in (0, 1):
        alone(x).square().sum().backward()
        spread(distribute_tensor(x, mesh, [Shard(dim)])).square().sum().backward()
    state = {name: value.full_tensor() for name, value in spread.state_dict().items()}
    torch.testing.assert_close(state, dict(alone.state_dict()))
    torch.testing.assert_close(spread.weight.grad.full_tensor(), alone.weight.grad)
    text = batchnorm.which_backend(distribute_tensor(x, mesh, [Shard(0)]))
    refused = None
    try:
        batch_norm(
            distribute_tensor(x, mesh, [Shard(0)]), None, None, training=True, backend="numba"
        )
    except RuntimeError as error:
        refused = str(error)
    return text, refused


def test_a_layer_of_spread_tensors(tmp_path):
    pytest.importorskip("numba")
    for text, refused in on_two_ranks(layers, tmp_path=tmp_path):
        assert text == (
            "The reference's formula computes this input, in ordinary torch operations: it is a "
            "DTensor."
        )
        assert refused == (
            "backend='numba' cannot take this input: it is a DTensor, and that needs the "
            "reference; leave backend out."
        )


def test_a_mesh_of_one_process(tmp_path):
    """In this process, which has joined no group before."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        assert all_placements(0, [(4, 6)], (1,)) == []
        mesh = init_device_mesh("cpu", (1,))
        x = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
        with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
            batch_norm(x, torch.zeros(3), torch.ones(3))
    finally:
        distributed.destroy_process_group()
