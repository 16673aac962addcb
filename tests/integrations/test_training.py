"""What the callbacks have in common, without a trainer: ranks, look-alikes, and errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.integrations.training import TrainingTools
from ranks import on_two_ranks

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(3)) * 3 + 1


def net():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))


def of_rank(rank):
    model, tools = net(), TrainingTools()
    tools.begin(model)
    model(X[:8])
    told = tools.finish(model, [X[:16], X[16:]][rank].split(8))
    return model.state_dict(), tools.recalibrated.samples, len(told)


def test_ranks_recalibrate_together(tmp_path):
    (state, samples, told), (other, *_) = on_two_ranks(of_rank, tmp_path=tmp_path)
    assert samples == 24
    assert told == 2
    expected = net()
    batchnorm.recalibrate(expected, X.split(8))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(other[name], tensor)


def failing_on_one(rank):
    model, tools = net(), TrainingTools()
    tools.begin(model)
    batches = [X, X.add(torch.nan)][rank].split(8)
    with pytest.warns(RuntimeWarning, match="recalibrate failed") as caught:
        tools.finish(model, batches)
    return tools.recalibrated is None and int(model[1].num_batches_tracked) == 0, str(
        caught[0].message
    )


def test_a_failure_on_one_rank_leaves_the_statistics_on_all(tmp_path):
    (kept, message), (also_kept, _) = on_two_ranks(failing_on_one, tmp_path=tmp_path)
    assert kept
    assert also_kept
    assert "the training left them: " in message


class LookAlike(nn.Module):
    """Normalizes by its statistics in training, too, so `recalibrate` cannot take it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(6))
        self.register_buffer("running_var", torch.ones(6))

    def forward(self, x):
        return (x - self.running_mean) / self.running_var.sqrt()


@pytest.mark.filterwarnings("ignore:(guard|BatchNormCallback). passed over:RuntimeWarning")
def test_what_only_looks_like_batch_norm_is_passed_over_with_a_warning():
    model, tools = nn.Sequential(*net(), LookAlike()), TrainingTools()
    tools.begin(model)
    with pytest.warns(RuntimeWarning, match=r"recalibrate: passed over layer '2' \(LookAlike\)"):
        tools.finish(model, X.split(8))
    assert [change.name for change in tools.recalibrated.layers] == ["1"]


def test_modes_are_what_they_were_afterwards():
    model, tools = nn.Sequential(*net(), nn.Dropout(), nn.BatchNorm1d(6)), TrainingTools()
    model[3].eval()
    tools.begin(model)
    tools.finish(model, X.split(8))
    assert [change.name for change in tools.recalibrated.layers] == ["1"]
    assert [module.training for module in model] == [True, True, True, False]


def test_an_interruption_passes_and_leaves_the_model_as_it_was():
    def forward(model, batch):
        raise KeyboardInterrupt("stop")

    model, tools = net(), TrainingTools(forward=forward, watch=1)
    tools.begin(model)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        tools.finish(model, X.split(8))
    assert model.training
    assert model[1].training
    assert "forward" not in vars(model[1])


def test_a_lazy_layer_is_refused_before_the_training():
    model = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"BatchNormCallback: layer '0' .* is lazy"):
        TrainingTools().begin(model)


def test_what_begins_again_ends_what_was():
    model, tools = net(), TrainingTools(watch=1)
    tools.begin(model)
    first = tools.watched
    tools.begin(model)
    with pytest.raises(RuntimeError, match="it was removed and records nothing more"):
        first.step()
    tools.remove()
    tools.remove()
    assert "forward" not in vars(model[1])


def test_our_library_imports_none_of_the_others():
    code = (
        "import sys; others = ['lightning', 'pytorch_lightning', 'transformers', 'timm']\n"
        "import batchnorm, batchnorm.integrations.training\n"
        "for name in batchnorm.__all__: getattr(batchnorm, name)\n"
        "sys.exit(str([name for name in others if name in sys.modules] or '') or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
