"""Which kernels take a tensor."""

import pytest
import torch

from batchnorm.functional import batch_norm, moments
from batchnorm.kernels import dispatch, reference

UNKNOWN = r"^kernels must be None or one of reference, got 'fastest'\.$"


@pytest.mark.parametrize("name", [None, *dispatch.NAMES])
def test_the_reference_takes_everything(name):
    assert dispatch.choose(torch.zeros(2, 3), name) is reference


def test_every_name_is_known():
    for name in dispatch.NAMES:
        assert dispatch.choose(torch.ones(2, 3), name).refusal(torch.ones(2, 3)) is None


def test_unknown_kernels():
    with pytest.raises(ValueError, match=UNKNOWN):
        dispatch.choose(torch.zeros(2, 3), "fastest")


def test_kernels_that_refuse_are_not_replaced(monkeypatch):
    monkeypatch.setattr(reference, "refusal", lambda x: f"it has {x.dim()} dimensions")
    with pytest.raises(
        RuntimeError,
        match=r"^kernels='reference' cannot take this input: it has 2 dimensions\.$",
    ):
        dispatch.choose(torch.zeros(2, 3), "reference")


def test_the_function_passes_the_name_on():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    running = torch.zeros(3), torch.ones(3)
    for training in (True, False):
        with pytest.raises(ValueError, match=UNKNOWN):
            batch_norm(x, *running, training=training, kernels="fastest")
    assert (running[0].tolist(), running[1].tolist()) == ([0, 0, 0], [1, 1, 1])
    with pytest.raises(ValueError, match=UNKNOWN):
        moments(x, kernels="fastest")


def test_the_kernels_asked_for_compute(monkeypatch):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    calls = []
    for name in ("forward", "backward"):
        stage = getattr(reference, name)

        def counted(*args, stage=stage, name=name, **options):
            calls.append(name)
            return stage(*args, **options)

        monkeypatch.setattr(reference, name, counted)
    batch_norm(x, None, None, training=True, kernels="reference").sum().backward()
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("wrap", [lambda call: call, torch.vmap], ids=["empty", "vmap"])
def test_an_unknown_name_is_refused_where_no_kernel_would_run(wrap):
    x = torch.zeros(0, 3) if wrap is not torch.vmap else torch.zeros(2, 4, 3)
    call = wrap(lambda x: batch_norm(x, None, None, training=True, kernels="fastest"))
    with pytest.raises(ValueError, match=UNKNOWN):
        call(x)
