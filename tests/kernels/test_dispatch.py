"""Which kernels take a tensor."""

import re
import subprocess
import sys

import pytest
import torch

from batchnorm.kernels import dispatch, parallel, reference
from batchnorm.nn.functional import batch_norm, moments

UNKNOWN = r"^backend must be None or one of numba, reference, got 'fastest'\.$"


def test_numba_is_chosen_where_it_can_compute():
    assert dispatch.choose(torch.zeros(2, 3)) is dispatch.numba_cpu
    assert dispatch.choose(torch.zeros(2, 3), "numba") is dispatch.numba_cpu
    assert dispatch.choose(torch.zeros(2, 3), "reference") is reference
    assert dispatch.choose(torch.zeros(2, 3, device="meta")) is reference
    assert dispatch.choose(torch.zeros(2, 3, dtype=torch.float8_e5m2)) is reference


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(2, 3, device="meta"), "it is on meta, and these kernels are for the CPU"),
        (torch.zeros(2, 3, dtype=torch.float8_e5m2), "its dtype is torch.float8_e5m2"),
        (torch.zeros(2, 3).to_sparse(), "its layout is torch.sparse_coo"),
    ],
    ids=["device", "dtype", "layout"],
)
def test_numba_says_why_not(x, reason):
    with pytest.raises(
        RuntimeError, match=f"^backend='numba' cannot take this input: {re.escape(reason)}\\.$"
    ):
        dispatch.choose(x, "numba")
    assert dispatch.describe(x) == (
        "The reference computes this input, in eager torch and float64. "
        f"The Numba kernels cannot: {reason}."
    )


def test_without_numba_the_reference_computes(monkeypatch):
    reason = "numba is not installed; pip install 'batchnorm[cpu]'"
    monkeypatch.setattr(dispatch, "numba_cpu", None)
    monkeypatch.setattr(dispatch, "_missing", reason)
    assert dispatch.choose(torch.zeros(2, 3)) is reference
    assert dispatch.describe(torch.zeros(2, 3)).endswith(f"The Numba kernels cannot: {reason}.")
    with pytest.raises(
        RuntimeError,
        match=r"^backend='numba' cannot take this input: numba is not installed; "
        r"pip install 'batchnorm\[cpu\]'\.$",
    ):
        batch_norm(torch.zeros(2, 3), None, None, training=True, backend="numba")


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        ("sys.modules['numba'] = None", "numba is not installed|numba cannot be imported: "),
        ("sys.path.insert(0, sys.argv[1])", "numba cannot be imported: made to fail"),
    ],
    ids=["missing", "broken"],
)
def test_an_import_that_fails_leaves_the_reference(tmp_path, setup, reason):
    (tmp_path / "numba.py").write_text("raise SystemError('made to fail')")
    code = (
        f"import sys; {setup}\nimport torch, batchnorm\n"
        "layer = batchnorm.BatchNorm1d(3)\nlayer(torch.randn(4, 3)).sum().backward()\n"
        "print(batchnorm.which_backend(torch.randn(4, 3)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(reason, done.stdout)


@pytest.mark.parametrize(
    ("shape", "layout", "words"),
    [
        ((2, 3, 8, 8), torch.contiguous_format, "planes, on the calling thread."),
        ((2, 3, 8, 8), torch.channels_last, "columns of a matrix, on the calling thread."),
        ((36, 64, 64, 64), torch.contiguous_format, "planes, whose channels are shared out to 2"),
        ((64, 3, 64, 64), torch.contiguous_format, "planes, whose rows are shared out to 2"),
    ],
)
@pytest.mark.usefixtures("two_threads")
def test_explain_says_how(shape, layout, words):
    x = torch.zeros(shape).to(memory_format=layout)
    text = dispatch.describe(x)
    assert text.startswith(f"The Numba kernels compute this input as {words}")
    assert dispatch.describe(x, "numba") == text
    assert dispatch.describe(x, "reference") == (
        "The reference computes this input, in eager torch and float64."
    )
    if "shared" in words:
        assert text.endswith(f" threads of {parallel.backend()}.")
    else:
        assert "after copying it into contiguous memory" in dispatch.describe(x[..., ::2])


TRANSFORMED = (
    r"^backend='numba' cannot take this input: it is inside a transform \(torch\.func, vmap or "
    r"forward mode\), and that needs the reference; leave backend out\.$"
)


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.jacfwd, torch.func.jacrev])
def test_transforms_need_the_reference(transform):
    x = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))

    def by(kernels):
        return lambda x: batch_norm(x, None, None, training=True, backend=kernels)

    with pytest.raises(RuntimeError, match=TRANSFORMED):
        transform(by("numba"))(x)
    torch.testing.assert_close(transform(by(None))(x), transform(by("reference"))(x))


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
        match=r"^backend='reference' cannot take this input: it has 2 dimensions\.$",
    ):
        dispatch.choose(torch.zeros(2, 3), "reference")


def test_the_function_passes_the_name_on():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    running = torch.zeros(3), torch.ones(3)
    for training in (True, False):
        with pytest.raises(ValueError, match=UNKNOWN):
            batch_norm(x, *running, training=training, backend="fastest")
    assert (running[0].tolist(), running[1].tolist()) == ([0, 0, 0], [1, 1, 1])
    with pytest.raises(ValueError, match=UNKNOWN):
        moments(x, backend="fastest")


def test_the_kernels_asked_for_compute(monkeypatch):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    calls = []
    for name in ("forward", "backward"):
        stage = getattr(reference, name)

        def counted(*args, stage=stage, name=name, **options):
            calls.append(name)
            return stage(*args, **options)

        monkeypatch.setattr(reference, name, counted)
    batch_norm(x, None, None, training=True, backend="reference").sum().backward()
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("wrap", [lambda call: call, torch.vmap], ids=["empty", "vmap"])
def test_an_unknown_name_is_refused_where_no_kernel_would_run(wrap):
    x = torch.zeros(0, 3) if wrap is not torch.vmap else torch.zeros(2, 4, 3)
    call = wrap(lambda x: batch_norm(x, None, None, training=True, backend="fastest"))
    with pytest.raises(ValueError, match=UNKNOWN):
        call(x)
