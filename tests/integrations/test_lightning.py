"""``BatchNormCallback`` in Lightning's own ``Trainer``, of both packages that have it."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from itertools import count

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import batchnorm
from real_networks import import_torchvision

if "torchvision" not in sys.modules:
    import_torchvision()  # Lightning's metrics import it.
pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

BatchNormCallback = importlib.import_module("batchnorm.integrations.lightning").BatchNormCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches .*is smaller:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `validation_step`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.training_step. returned .None.:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .*exists:UserWarning"),
]
X = torch.randn(48, 4, generator=torch.Generator().manual_seed(3)) * 3 + 1
Y = X.sum(1, keepdim=True)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request):
    return pytest.importorskip(request.param, reason="it is not installed")


@pytest.fixture
def one():
    """One of the two packages, where they do not differ."""
    return pytest.importorskip("lightning.pytorch")


def net():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3), nn.BatchNorm1d(3)
    )


def module_of(pl, model=None, **methods):
    """A LightningModule around the model; ``methods`` replace or add to its own."""

    def __init__(self):
        pl.LightningModule.__init__(self)
        self.model = net() if model is None else model

    def training_step(self, batch, index):
        return (self.model(batch[0]).sum(1, keepdim=True) - batch[1]).square().mean()

    own = {
        "__init__": __init__,
        "forward": lambda self, x: self.model(x),
        "training_step": training_step,
        "configure_optimizers": lambda self: torch.optim.SGD(self.parameters(), lr=0.01),
    }
    own |= methods
    kept = {name: method for name, method in own.items() if method is not None}
    return type("Net", (pl.LightningModule,), kept)()


def loader(x=X, **options):
    return DataLoader(TensorDataset(x, Y), **{"batch_size": 8, "shuffle": True, **options})


def fit(pl, module, *callbacks, data=None, **options):
    silent = {
        name: False
        for name in ("logger", "enable_checkpointing", "enable_progress_bar")
        if name not in options
    }
    trainer = pl.Trainer(
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_model_summary=False,
        **{"max_epochs": 2, **silent, **options},
    )
    torch.manual_seed(7)
    trainer.fit(module, loader() if data is None else data)
    return trainer


def attributes(model):
    """What hooks and replaced methods would change."""
    return [
        {
            n: v for n, v in vars(m).items() if n != "_modules" and not n.startswith("_trainer")
        }.keys()
        | {(n, len(v)) for n, v in vars(m).items() if n.endswith("_hooks")}
        for m in model.modules()
    ]


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[n], other[n]) for n in state)


def parameters(module):
    return dict(module.named_parameters())


# What the callback does.


@pytest.mark.parametrize("recalibrate", [None, "all"])
def test_training_and_randomness_are_those_without_it(pl, recalibrate):
    without, module = module_of(pl), module_of(pl)
    fit(pl, without)
    drawn = torch.rand(3)
    callback = BatchNormCallback(watch=1, recalibrate=recalibrate)
    before = attributes(module.model)
    fit(pl, module, callback)
    assert torch.equal(torch.rand(3), drawn)
    assert equal(parameters(module), parameters(without))
    assert equal(module.state_dict(), without.state_dict()) == (recalibrate is None)
    assert attributes(module.model) == before
    assert str(callback.guarded) == "Guarded 2 batch norm layers: no batch had to be skipped."


def test_recalibrates_in_evaluation_on_the_training_data(pl):
    module, callback = module_of(pl), BatchNormCallback()
    fit(pl, module, callback)
    expected = copy.deepcopy(module.model).eval()
    batchnorm.recalibrate(expected, [X])
    assert callback.recalibrated.samples == 48
    first, last = module.model[1], module.model[4]
    torch.testing.assert_close(first.running_var, expected[1].running_var)
    assert int(first.num_batches_tracked) == 6
    assert first.training
    assert module.model[2].training
    # The last one sees what the first makes of each batch; without dropout both come close.
    torch.testing.assert_close(last.running_var, expected[4].running_var, rtol=0.5, atol=0)


def test_a_bad_batch_is_kept_out(pl):
    x = X.clone()
    x[::8] = torch.inf  # In the first of its batches; the data are not shuffled.
    x[8:] = X[8:]
    module = module_of(pl, training_step=lambda self, batch, index: no_loss(self, batch[0]))
    callback = BatchNormCallback(recalibrate=None)
    fit(pl, module, callback, data=loader(x, shuffle=False), max_epochs=1)
    assert callback.guarded.skipped == {"model.1": 1, "model.4": 1}
    assert module.model[1].running_mean.isfinite().all()
    assert int(module.model[1].num_batches_tracked) == 5


def no_loss(module, x):
    module.model(x)


def test_an_exception_ends_everything(pl):
    steps = count()

    def training_step(self, batch, index):
        loss = self.model(batch[0]).square().mean()
        if next(steps) == 2:
            raise RuntimeError("out of patience")
        return loss

    module, callback = module_of(pl, training_step=training_step), BatchNormCallback(watch=1)
    before = attributes(module.model)
    with pytest.raises(RuntimeError, match="out of patience"):
        fit(pl, module, callback)
    assert attributes(module.model) == before
    assert callback.watched.steps == 2
    assert callback.recalibrated is None
    fit(pl, module, callback)
    assert callback.watched.steps == 12
    assert callback.recalibrated.samples == 48


class Log:
    def __init__(self, pl):
        self.rows = []

        class Logger(pl.loggers.logger.Logger):
            name = version = "memory"

            def log_metrics(_, metrics, step=None):
                self.rows.append((step, metrics))

            def log_hyperparams(_, *args, **kwargs):
                pass

        self.logger = Logger()


def test_the_watch_is_logged(pl):
    log, callback = Log(pl), BatchNormCallback(watch=2, recalibrate=None)
    fit(pl, module_of(pl), callback, logger=log.logger, log_every_n_steps=1, max_epochs=1)
    rows = [(step, row) for step, row in log.rows if "batchnorm/mean_shift" in row]
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5]  # The latest numbers, again and again.
    assert rows[1][1]["batchnorm/mean_shift"] == rows[0][1]["batchnorm/mean_shift"]
    latest = [record for record in callback.watched.records if record["step"] == 6]
    last = rows[-1][1]
    assert last["batchnorm/mean_shift"] == pytest.approx(max(r["mean_shift"] for r in latest))
    assert last["batchnorm/var_ratio_low"] == pytest.approx(min(r["var_ratio_low"] for r in latest))
    assert last["batchnorm/dead"] == 0
    assert last["batchnorm/skipped"] == 0


def test_what_changed_is_said(one, caplog):
    callback = BatchNormCallback()
    with caplog.at_level("INFO"):
        fit(one, module_of(one), callback)
    assert "Recalibrated 2 layers on 48 samples in 6 batches" in caplog.text
    assert "Guarded 2 batch norm layers: no batch had to be skipped." in caplog.text


# Ways to train.


def test_a_step_is_one_of_the_optimizer(one):
    callback = BatchNormCallback(watch=1)
    fit(one, module_of(one), callback, accumulate_grad_batches=3, max_epochs=1)
    assert callback.watched.steps == 2
    assert [r["batches"] for r in callback.watched.records if r["layer"] == "model.1"] == [3, 3]
    assert callback.recalibrated.batches == 6


def test_several_optimizers_step_by_hand(one):
    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.model(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.model[place].parameters(), lr=0.01) for place in (0, 3)]

    module = module_of(one, training_step=training_step, configure_optimizers=configure_optimizers)
    module.automatic_optimization = False
    callback = BatchNormCallback(watch=1)
    fit(one, module, callback, max_epochs=1)
    assert callback.watched.steps == 6
    assert {r["batches"] for r in callback.watched.records} == {2}


class Endless(IterableDataset):
    def __iter__(self):
        for index in count():
            yield X[index % 48], Y[index % 48]


@pytest.mark.parametrize(
    ("options", "data", "batches"),
    [
        ({"max_steps": 2, "max_epochs": -1}, None, 6),
        ({"limit_train_batches": 3}, None, 3),
        ({"fast_dev_run": True}, None, 1),
        ({"overfit_batches": 2}, None, 2),
        ({"max_steps": 4, "max_epochs": -1}, lambda: DataLoader(Endless(), batch_size=8), 4),
        ({"max_epochs": 1, "precision": "bf16-mixed"}, None, 6),
        ({"max_epochs": 1, "gradient_clip_val": 0.1}, None, 6),
        ({"max_epochs": 1, "inference_mode": False, "benchmark": True}, None, 6),
    ],
)
@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")
def test_ways_to_train(one, options, data, batches):
    module, callback = module_of(one), BatchNormCallback()
    fit(one, module, callback, data=data and data(), **options)
    assert callback.recalibrated.batches == batches
    assert int(module.model[4].num_batches_tracked) == batches


def test_mixed_precision_is_that_of_the_training(one):
    module, callback = module_of(one), BatchNormCallback()
    fit(one, module, callback, data=loader(shuffle=False), max_epochs=1, precision="bf16-mixed")
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([module.model[0](x) for x in X.split(8)]).double()
    torch.testing.assert_close(module.model[1].running_mean.double(), expected.mean(0))
    assert not torch.allclose(module.model[1].running_mean, module.model[0](X).mean(0), rtol=1e-6)


def test_an_early_stop_and_evaluations_in_between(one):
    class Stop(one.Callback):
        def on_validation_end(self, trainer, module):
            trainer.should_stop = not trainer.sanity_checking

    module = module_of(one, validation_step=lambda self, batch, index: no_loss(self, batch[0]))
    callback, stop = BatchNormCallback(watch=1), Stop()
    trainer = fit(one, module, stop, callback, data=Data(one), max_epochs=9)
    assert callback.watched.steps == 6
    assert callback.recalibrated.batches == 6
    trainer.validate(module, loader(shuffle=False), verbose=False)
    assert callback.watched.steps == 6
    assert int(module.model[1].num_batches_tracked) == 6


def Data(pl):
    class Both(pl.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader(shuffle=False)

        def on_before_batch_transfer(self, batch, index):
            return [batch[0] * 2, batch[1]]

    return Both()


def test_batches_are_prepared_as_in_training(one):
    module, callback = module_of(one), BatchNormCallback()
    fit(one, module, callback, data=Data(one), max_epochs=1)
    expected = module.model[0](2 * X)
    torch.testing.assert_close(module.model[1].running_mean, expected.mean(0).detach())


def test_several_loaders(one):
    def training_step(self, batch, index):
        return self.model(batch["a"][0]).square().mean() + self.model(batch["b"][0]).mean()

    module = module_of(one, training_step=training_step)
    callback = BatchNormCallback(forward=lambda module, batch: module(batch["b"][0]))
    loaders = {"a": loader(), "b": loader(X + 5, batch_size=4)}
    fit(one, module, callback, data=loaders, max_epochs=1)
    expected = module.model[0](X + 5).mean(0).detach()
    torch.testing.assert_close(module.model[1].running_mean, expected)


def test_a_loader_with_workers_that_stay(one):
    module, callback = module_of(one), BatchNormCallback(recalibrate=16)
    workers = {"num_workers": 1, "persistent_workers": True}
    fit(one, module, callback, data=loader(**workers), max_epochs=1)
    assert callback.recalibrated.samples == 16


def test_layers_that_stay_in_evaluation_keep_their_statistics(one):
    module, callback = module_of(one), BatchNormCallback()
    module.model[1].eval()
    fit(one, module, callback)
    assert int(module.model[1].num_batches_tracked) == 0
    assert not module.model[1].training
    assert [change.name for change in callback.recalibrated.layers] == ["model.4"]


def test_frozen_layers_keep_their_statistics(one):
    module, callback = module_of(one), BatchNormCallback()
    batchnorm.freeze(module, ["model.1"])
    fit(one, module, callback)
    assert int(module.model[1].num_batches_tracked) == 0
    assert callback.recalibrated.left == {"model.1": "it is frozen"}


# Files.


def test_checkpoints_and_resuming(one, tmp_path):
    module = module_of(one)
    saved = one.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    trainer = fit(one, module, saved, BatchNormCallback(), enable_checkpointing=True)
    counter = "model.1.num_batches_tracked"
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["state_dict"][counter] == 12  # Of the training, so that it can be resumed.
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    stored = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert equal(stored["state_dict"], module.state_dict())
    assert stored["state_dict"][counter] == 6

    resumed, callback = module_of(one), BatchNormCallback(watch=1)
    options = {"enable_checkpointing": False, "logger": False, "enable_progress_bar": False}
    again = one.Trainer(
        max_epochs=3, callbacks=[callback], accelerator="cpu", enable_model_summary=False, **options
    )
    again.fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert callback.watched.steps == 6
    assert callback.recalibrated.batches == 6


def test_copies_and_pickles(one):
    callback = BatchNormCallback(watch=5, recalibrate=None)
    module = module_of(one)
    fit(one, module, pickle.loads(pickle.dumps(callback)))
    fit(one, module, callback)
    copied = copy.deepcopy(callback)
    assert copied.watched.steps == 12
    fit(one, module, copied)
    assert copied.watched.steps == 12
    assert callback.watched is not copied.watched


# What cannot be.


def test_a_module_without_forward_is_refused_when_training_starts(pl):
    module = module_of(pl, forward=None)
    with pytest.raises(ValueError, match=r"Net has no forward; give forward=lambda module, batch"):
        fit(pl, module, BatchNormCallback())
    assert int(module.model[1].num_batches_tracked) == 0
    fit(pl, module, BatchNormCallback(recalibrate=None))
    callback = BatchNormCallback(forward=lambda module, batch: module.model(batch[0]))
    fit(pl, module, callback)
    assert callback.recalibrated.samples == 48


@pytest.mark.parametrize(
    ("collate", "error", "message"),
    [
        (
            lambda rows: {"x": stacked(rows, 0), "y": stacked(rows, 1)},
            TypeError,
            r"give the batches to Net.forward, which does not take them \(.*'y'\); give forward=",
        ),
        (
            lambda rows: [rows, 1],
            TypeError,
            "one of these, got list of list; give",
        ),
        (lambda rows: [], ValueError, "a batch is an empty list; give inputs"),
    ],
)
def test_batches_that_do_not_fit_are_refused_in_the_first_step(one, collate, error, message):
    module = module_of(one, training_step=lambda self, batch, index: no_loss(self, X))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=message):
        fit(one, module, BatchNormCallback(), data=loader(collate_fn=collate))
    assert equal(module.state_dict(), before)
    fit(one, module, BatchNormCallback(recalibrate=None), data=loader(collate_fn=collate))


def stacked(rows, place):
    return torch.stack([row[place] for row in rows])


def test_a_dict_that_fits(one):
    module = module_of(one, training_step=lambda self, batch, index: no_loss(self, batch["x"]))
    callback = BatchNormCallback()
    fit(one, module, callback, data=loader(collate_fn=lambda rows: {"x": stacked(rows, 0)}))
    assert callback.recalibrated.samples == 48


def test_a_recalibration_that_fails_is_said_and_the_rest_goes_on(one):
    x = X.clone()
    x[3] = torch.nan
    module = module_of(one, training_step=lambda self, batch, index: no_loss(self, batch[0]))
    callback = BatchNormCallback()
    with pytest.warns(RuntimeWarning, match="recalibrate failed, so the running statistics stay"):
        fit(one, module, callback, data=loader(x), max_epochs=1)
    assert callback.recalibrated is None
    assert sum(callback.guarded.skipped.values()) == 2
    assert int(module.model[1].num_batches_tracked) == 5
    assert module.model[1].running_mean.isfinite().all()
    assert module.model[2].training


def test_a_model_without_batch_norm_is_said_once(one):
    module = module_of(one, nn.Sequential(nn.Linear(4, 3)))
    with pytest.warns(RuntimeWarning) as caught:
        fit(one, module, BatchNormCallback(watch=1))
    ours = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert ours == ["BatchNormCallback: nothing is done, the model (Net) has no batch norm layers."]


def test_a_poisoned_model_is_refused(one):
    module = module_of(one)
    module.model[1].running_mean.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"layer 'model.1' \(BatchNorm1d\) is poisoned already"):
        fit(one, module, BatchNormCallback(watch=1))
    fit(one, module, BatchNormCallback(guard=False))
    assert module.model[1].running_mean.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"watch": 0}, "watch must be a number of steps, at least 1, got 0"),
        ({"recalibrate": 0}, "recalibrate must be 'all', a number of samples .* got 0"),
        ({"recalibrate": True}, "recalibrate must be 'all', a number of samples .* got True"),
        ({"recalibrate": -3}, "recalibrate must be 'all', a number of samples .* got -3"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=f"BatchNormCallback: {message}"):
        BatchNormCallback(**options)


def test_a_missing_library_is_said_in_one_sentence():
    code = (
        "import sys; sys.modules.update(lightning=None, pytorch_lightning=None)\n"
        "import batchnorm.integrations.lightning"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: batchnorm.integrations.lightning needs Lightning, which is not "
        "installed; pip install lightning."
    )
