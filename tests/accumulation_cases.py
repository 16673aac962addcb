"""What the tests of accumulate share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from batchnorm.tools.accumulation import accumulate
from surgery_cases import anatomy

UNEVEN = (8, 3, 1, 20)


def data(count: int = 32, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 3, 8, 8, generator=generator, dtype=dtype)
    # The micro-batches differ, so that much of the variance is between them.
    x += torch.linspace(-1, 1, count, dtype=dtype).reshape(-1, 1, 1, 1)
    return x, torch.randint(5, (count,), generator=generator)


def split(batch: tuple[Tensor, Tensor], sizes=UNEVEN) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(tensor.split(list(sizes)) for tensor in batch), strict=True))


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, labels = batch
    output = model(x).flatten(1)
    weights = torch.linspace(-1, 2, output.shape[1], dtype=output.dtype)
    return ((output * weights).tanh().sum(1) + output[:, 0] * labels).square().mean()


def seeded(make, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = make().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def difference(model: nn.Module, large: nn.Module) -> float:
    expected = gradients(large)
    return float((gradients(model) - expected).norm() / expected.norm())


def pair(make, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    model = seeded(make, dtype)
    return model, copy.deepcopy(model)


def state_of(model: nn.Module) -> dict:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()
    ]
    return {"state": state, "grads": grads, "hooks": hooks}


def refused(model, batches, loss, error, message, **options):
    before = state_of(model)
    classes = anatomy(model)
    with pytest.raises(error, match=message):
        accumulate(model, batches, loss, **options)
    after = state_of(model)
    assert_close(after["state"], before["state"], rtol=0, atol=0, equal_nan=True)
    assert_close(after["grads"], before["grads"], rtol=0, atol=0, equal_nan=True)
    assert after["hooks"] == before["hooks"]
    assert {n: ids for n, (_, _, ids) in anatomy(model).items()} == {
        n: ids for n, (_, _, ids) in classes.items()
    }
