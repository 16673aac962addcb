"""``BatchNormCallback`` in the ``Trainer`` of Hugging Face's Transformers."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

import batchnorm
from real_networks import import_torchvision

if "torchvision" not in sys.modules:
    import_torchvision()  # Transformers imports it where it is installed.
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="Hugging Face's accelerate is missing")

BatchNormCallback = importlib.import_module("batchnorm.integrations.transformers").BatchNormCallback

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(3)) * 3 + 1
ROWS = [{"x": x, "labels": x.sum()} for x in X]


class Net(nn.Module):
    """Takes keywords and returns a loss, as models of Transformers do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3), nn.BatchNorm1d(3)
        )

    def forward(self, x, labels=None):
        logits = self.body(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": (logits.sum(1) - labels).square().mean(), "logits": logits}


@pytest.fixture(autouse=True)
def accelerator_of_its_own(monkeypatch):
    """Takes back what a Trainer leaves in the environment and in the library below it."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    importlib.import_module("accelerate.state").AcceleratorState._reset_state(True)


@pytest.fixture
def train(tmp_path):
    """Trains on the rows; the trainer."""

    def run(model, *callbacks, rows=ROWS, kind=transformers.Trainer, resume=None, **options):
        silent = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=8,
            **{**silent, "num_train_epochs": 2, "dataloader_pin_memory": False, **options},
        )
        trainer = kind(model, arguments, train_dataset=rows, callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def attributes(model):
    """What hooks and replaced methods would change."""
    return [
        vars(m).keys() | {(n, len(v)) for n, v in vars(m).items() if n.endswith("_hooks")}
        for m in model.body.modules()
    ]


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[n], other[n]) for n in state)


# What the callback does.


@pytest.mark.parametrize("recalibrate", [None, "all"])
def test_training_and_randomness_are_those_without_it(train, recalibrate):
    without, model = Net(), Net()
    train(without)
    drawn = torch.rand(3)
    callback, before = BatchNormCallback(watch=1, recalibrate=recalibrate), attributes(model)
    train(model, callback)
    assert torch.equal(torch.rand(3), drawn)
    assert equal(dict(model.named_parameters()), dict(without.named_parameters()))
    assert equal(model.state_dict(), without.state_dict()) == (recalibrate is None)
    assert attributes(model) == before
    assert model.body[2].training == without.body[2].training
    assert str(callback.guarded) == "Guarded 2 batch norm layers: no batch had to be skipped."


def test_recalibrates_in_evaluation_on_the_training_data(train):
    model, callback = Net(), BatchNormCallback()
    train(model, callback)
    expected = copy.deepcopy(model).eval()
    batchnorm.recalibrate(expected, [{"x": X}])
    assert callback.recalibrated.samples == 48
    torch.testing.assert_close(model.body[1].running_var, expected.body[1].running_var)
    # The last one sees what the first makes of each batch; without dropout both come close.
    last = model.body[4].running_var
    torch.testing.assert_close(last, expected.body[4].running_var, rtol=0.5, atol=0)


def test_a_bad_batch_is_kept_out(train):
    rows = copy.deepcopy(ROWS)
    rows[3]["x"][:] = torch.inf

    class Frozen(transformers.Trainer):
        def training_step(self, model, inputs, count=None):
            model.train()
            model(inputs["x"])
            return torch.zeros(())

    model, callback = Net(), BatchNormCallback(recalibrate=None)
    train(model, callback, rows=rows, kind=Frozen, num_train_epochs=1)
    assert callback.guarded.skipped == {"body.1": 1, "body.4": 1}
    assert model.body[1].running_mean.isfinite().all()
    assert int(model.body[1].num_batches_tracked) == 5


class Failing(transformers.Trainer):
    steps = 0

    def training_step(self, *args, **kwargs):
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("out of patience")
        return super().training_step(*args, **kwargs)


def test_after_an_exception_remove_or_the_block_or_the_next_training_ends_the_guard(train):
    model, callback = Net(), BatchNormCallback(watch=1)
    before = attributes(model)
    with callback, pytest.raises(RuntimeError, match="out of patience"):
        train(model, callback, kind=Failing)
    assert attributes(model) == before
    assert callback.watched.steps == 2

    with pytest.raises(RuntimeError, match="out of patience"):
        train(model, callback, kind=Failing)
    assert attributes(model) != before
    callback.remove()
    assert attributes(model) == before

    with pytest.raises(RuntimeError, match="out of patience"):
        train(model, callback, kind=Failing)
    train(model, callback)
    assert attributes(model) == before
    assert callback.watched.steps == 12
    assert callback.recalibrated.samples == 48


def test_the_watch_is_logged(train):
    callback = BatchNormCallback(watch=2, recalibrate=None)
    trainer = train(Net(), callback, logging_steps=3, num_train_epochs=1)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [3, 6]
    records = callback.watched.records
    for row, recorded in zip(rows, (2, 6), strict=True):
        latest = [record for record in records if record["step"] == recorded]
        assert row["batchnorm/mean_shift"] == max(record["mean_shift"] for record in latest)
        assert row["batchnorm/var_ratio_high"] == max(r["var_ratio_high"] for r in latest)
        assert row["batchnorm/skipped"] == 0
    assert "batchnorm/dead" not in trainer.state.log_history[-1]  # The summary.


def test_what_changed_is_said(train):
    told, before = [], transformers.logging.get_verbosity()
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    transformers.logging.add_handler(handler)
    transformers.logging.set_verbosity_info()
    try:
        train(Net(), BatchNormCallback())
    finally:
        transformers.logging.set_verbosity(before)
        transformers.logging.remove_handler(handler)
    told = "\n".join(told)
    assert "Recalibrated 2 layers on 48 samples in 6 batches" in told
    assert "Guarded 2 batch norm layers: no batch had to be skipped." in told


# Ways to train.


def test_a_step_is_one_of_the_optimizer(train):
    callback = BatchNormCallback(watch=1)
    train(Net(), callback, gradient_accumulation_steps=3, num_train_epochs=1)
    assert callback.watched.steps == 2
    assert [r["batches"] for r in callback.watched.records if r["layer"] == "body.1"] == [3, 3]
    assert callback.recalibrated.batches == 6


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from ROWS


@pytest.mark.parametrize(
    ("options", "rows", "batches"),
    [
        ({"max_steps": 2}, ROWS, 6),
        ({"max_steps": 4}, Endless(), 4),
        ({"max_steps": 2, "gradient_accumulation_steps": 2}, Endless(), 4),
        ({"bf16": True}, ROWS, 6),
        ({"auto_find_batch_size": True}, ROWS, 6),
        ({"dataloader_drop_last": True}, ROWS[:-1], 5),
    ],
)
def test_ways_to_train(train, options, rows, batches):
    model, callback = Net(), BatchNormCallback()
    train(model, callback, rows=rows, **options)
    assert callback.recalibrated.batches == batches
    assert int(model.body[4].num_batches_tracked) == batches


@pytest.mark.untyped
def test_a_compiled_model(train):
    without, model = Net(), Net()
    train(without)
    callback = BatchNormCallback(watch=1)
    train(model, callback, torch_compile=True, torch_compile_backend="eager")
    assert callback.watched.steps == 12
    assert {record["batches"] for record in callback.watched.records} == {1}
    for name, parameter in without.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter)
    torch.testing.assert_close(
        model.body[1].running_mean, model.body[0](X).mean(0).detach(), rtol=1e-5, atol=1e-6
    )


def test_a_batch_size_that_did_not_fit(train):
    class Full(transformers.Trainer):
        def training_step(self, model, inputs, *args):
            loss = super().training_step(model, inputs, *args)
            if len(inputs["x"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return loss

    model, callback = Net(), BatchNormCallback(watch=1)
    before = attributes(model)
    train(model, callback, kind=Full, auto_find_batch_size=True, num_train_epochs=1)
    assert attributes(model) == before
    assert callback.watched.steps == callback.recalibrated.batches > 6


def test_an_early_stop_and_evaluations_in_between(train):
    class Stop(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = True

    class Evaluating(transformers.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, eval_dataset=ROWS[:8])

    model, callback = Net(), BatchNormCallback(watch=1)
    train(model, Stop(), callback, kind=Evaluating, eval_strategy="epoch", num_train_epochs=9)
    assert callback.watched.steps == 6
    assert callback.recalibrated.batches == 6
    assert not model.training  # As the evaluation left it.


def test_layers_that_stay_in_evaluation_keep_their_statistics(train):
    class HalfFrozen(Net):
        def train(self, mode=True):
            super().train(mode)
            self.body[1].eval()
            return self

    model, callback = HalfFrozen(), BatchNormCallback()
    train(model, callback)
    assert int(model.body[1].num_batches_tracked) == 0
    assert [change.name for change in callback.recalibrated.layers] == ["body.4"]


def test_frozen_layers_keep_their_statistics(train):
    model, callback = Net(), BatchNormCallback()
    batchnorm.freeze(model, ["body.1"])
    train(model, callback)
    assert int(model.body[1].num_batches_tracked) == 0
    assert callback.recalibrated.left == {"body.1": "it is frozen"}


def test_a_model_of_transformers(train):
    configuration = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2
    )
    model = transformers.ResNetForImageClassification(configuration)
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(16)]
    callback = BatchNormCallback(watch=1)
    train(model, callback, rows=rows, num_train_epochs=1)
    assert len(callback.recalibrated.layers) == 6
    assert callback.recalibrated.unreached == ()
    assert callback.watched.steps == 2


# Files.


def test_checkpoints_and_resuming(train, tmp_path):
    model = Net()
    trainer = train(model, BatchNormCallback(), save_strategy="epoch")
    counter = "body.1.num_batches_tracked"
    stored = loaded(tmp_path / "checkpoint-12")
    assert stored[counter] == 12  # Of the training, so that it can be resumed.
    trainer.save_model(str(tmp_path / "end"))
    stored = loaded(tmp_path / "end")
    assert equal(stored, model.state_dict())
    assert stored[counter] == 6

    callback = BatchNormCallback(watch=1)
    train(Net(), callback, resume=str(tmp_path / "checkpoint-6"))
    assert callback.watched.steps == 6
    assert callback.recalibrated.batches == 6


def loaded(folder):
    return pytest.importorskip("safetensors.torch").load_file(folder / "model.safetensors")


def test_the_best_model_is_recalibrated(train, tmp_path):
    class Evaluating(transformers.Trainer):
        losses = iter([1.0, 2.0])

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, eval_dataset=ROWS[:8])

        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": next(self.losses)}
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    model, callback = Net(), BatchNormCallback()
    strategies = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    train(model, callback, kind=Evaluating, load_best_model_at_end=True, **strategies)
    stored = loaded(tmp_path / "checkpoint-6")
    assert torch.equal(stored["body.0.weight"], model.body[0].weight)
    expected = model.body[0](X).mean(0).detach()
    torch.testing.assert_close(model.body[1].running_mean, expected, rtol=1e-5, atol=1e-6)


def test_copies_and_pickles(train):
    callback, model = BatchNormCallback(watch=5, recalibrate=None), Net()
    train(model, pickle.loads(pickle.dumps(callback)))
    train(model, callback)
    copied = copy.deepcopy(callback)
    train(model, copied)
    assert copied.watched.steps == 12
    assert callback.watched is not copied.watched


# What cannot be.


def test_a_recalibration_that_fails_is_said_and_the_rest_goes_on(train):
    class Popping(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs["extra"] = inputs.pop("labels")
            return model(inputs["x"])["logits"].square().mean()

    def forward(model, batch):
        raise KeyError("extra")

    model, callback = Net(), BatchNormCallback(forward=forward)
    with pytest.warns(RuntimeWarning, match="the training left them: KeyError: 'extra'"):
        train(model, callback, kind=Popping)
    assert callback.recalibrated is None
    assert int(model.body[1].num_batches_tracked) == 12

    callback = BatchNormCallback(forward=lambda model, batch: model(batch["x"]), recalibrate=20)
    train(model, callback, kind=Popping)
    assert callback.recalibrated.samples == 24


def test_a_model_without_batch_norm_is_said_once(train):
    model = Net()
    model.body = nn.Linear(4, 3)
    with pytest.warns(RuntimeWarning) as caught:
        train(model, BatchNormCallback(watch=1))
    ours = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert ours == ["BatchNormCallback: nothing is done, the model (Net) has no batch norm layers."]


def test_a_poisoned_model_is_refused(train):
    model = Net()
    model.body[1].running_mean.fill_(torch.nan)
    before = attributes(model)
    with pytest.raises(ValueError, match=r"layer 'body.1' \(BatchNorm1d\) is poisoned already"):
        train(model, BatchNormCallback(watch=1))
    assert attributes(model) == before


def test_data_parallel_is_refused():
    arguments = SimpleNamespace(n_gpu=2)
    begin = BatchNormCallback.on_train_begin
    begin = getattr(begin, "__wrapped__", begin)  # Without the checks of annotations.
    with pytest.raises(ValueError, match=r"DataParallel, which copies the layers .* on 2 GPUs"):
        begin(BatchNormCallback(), arguments, None, None, model=Net())


def test_a_missing_library_is_said_in_one_sentence():
    code = (
        "import sys; sys.modules.update(transformers=None)\n"
        "import batchnorm.integrations.transformers"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: batchnorm.integrations.transformers needs Transformers, which is not "
        "installed; pip install 'transformers[torch]'."
    )
