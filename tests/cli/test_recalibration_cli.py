"""`batchnorm recalibrate` as a user meets it."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from batchnorm import cli, scratch
from batchnorm.cli.checkpoint import read
from batchnorm.cli.recalibration import _network, _progress
from batchnorm.tools.freezing import is_frozen, unfreeze
from batchnorm.tools.recalibration import recalibrate
from cpu_time import budget_of_help, least_cpu_seconds
from look_alikes import D2l
from real_networks import import_torchvision
from recalibration_cases import normal

# typer demands the annotation typer.Context and hands over an object of another class.
pytestmark = pytest.mark.untyped

CODE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4))

def frozen():
    model = net()
    model[1].eval()
    return model

def shared():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.append(model[0])
    return model

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = net()

    def forward(self, x):
        return self.module(x)

def parallel(): return nn.DataParallel(net())
def bare(): return nn.Flatten()
def endless():
    for batch in batches():
        yield batch
def loader(): return torch.utils.data.DataLoader([x[0] for x, _ in batches()])
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(x for x, _ in batches())
def stream(): return torch.utils.data.DataLoader(Stream(), batch_size=None)
def no_net(): return 5
def no_norm(): return nn.Linear(3, 4)
def fails(): raise KeyError("no such size")
def half(): return net().half()

def batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 3, generator=generator)
    return [(part, None) for part in x.split(20)]

def once(): return iter(batches())
def nothing(): return []
def wrong_shape(): return [torch.zeros(4, 7)]
def numbers(): return [1, 2]

class Holder:
    make = staticmethod(net)
"""
INPUTS = normal(90, 3)
INPUTS_OF_MINE = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder of a user, with a module, checkpoints and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr("batchnorm.cli.recalibration.keep_freed_memory", lambda: None)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found")
    state = net().state_dict()
    torch.save(state, "plain.pt")
    save_file(state, "plain.safetensors", {"author": "somebody"})
    torch.save(INPUTS, "inputs.pt")
    save_file({"x": INPUTS}, "inputs.safetensors")
    np.save("inputs.npy", INPUTS.double().numpy())
    return tmp_path


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4))


def run(capsys, *arguments, model="mine:net", data="mine:batches"):
    options = ["--model", model, "--data", data]
    code = cli.run(["recalibrate", *map(str, arguments), *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def expected(**options):
    model = net().eval()
    recalibrate(model, INPUTS.split(20), **options)
    return model.state_dict()


def assert_same(state, other):
    assert list(state) == list(other)
    for name, value in other.items():
        assert torch.equal(state[name], value), name
        assert state[name].dtype == value.dtype


# What is written.


def test_a_state_dict_gets_the_statistics_of_the_data(folder, capsys):
    before = (folder / "plain.pt").read_bytes()
    code, out, err = run(capsys, "plain.pt", "--out", "new.pt")
    assert (code, err) == (0, "Written: new.pt\n")
    assert out.startswith("Recalibrated 2 layers on 90 samples in 5 batches and ")
    assert max(map(len, out.splitlines())) <= 80
    assert_same(torch.load("new.pt", weights_only=True), expected())
    assert (folder / "plain.pt").read_bytes() == before


def test_safetensors_stays_safetensors_with_its_metadata(folder, capsys):
    assert run(capsys, "plain.safetensors", "--out", "new.safetensors")[0] == 0
    new = load_file("new.safetensors")
    assert_same(dict(sorted(new.items())), dict(sorted(expected().items())))
    with safe_open("new.safetensors", "pt") as file:
        assert file.metadata() == {"author": "somebody"}


@pytest.mark.parametrize("place", ["state_dict", "model"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_everything_else_in_the_file_is_kept(folder, capsys, place, prefix):
    state = {prefix + key: value for key, value in net().state_dict().items()}
    rest = {"epoch": 7, "optimizer": {"lr": 0.1, "momentum": [torch.ones(2)]}, "note": "mine"}
    torch.save({**rest, place: state}, "all.pth")
    assert run(capsys, "all.pth", "--out", "new.pt")[0] == 0
    new = torch.load("new.pt", weights_only=True)
    assert_same({k.removeprefix(prefix): v for k, v in new.pop(place).items()}, expected())
    assert torch.equal(new["optimizer"]["momentum"].pop(), torch.ones(2))
    assert new == {"epoch": 7, "optimizer": {"lr": 0.1, "momentum": []}, "note": "mine"}


def test_old_checkpoints_without_counters_stay_so(folder, capsys):
    state = {k: v for k, v in net().state_dict().items() if "tracked" not in k}
    torch.save(state, "old.pt")
    assert run(capsys, "old.pt", "--out", "new.pt")[0] == 0
    new = torch.load("new.pt", weights_only=True)
    assert_same(new, {k: v for k, v in expected().items() if "tracked" not in k})


def test_weights_keep_the_dtype_of_the_file(folder, capsys):
    torch.save(net().bfloat16().state_dict(), "bf16.pt")
    assert run(capsys, "bf16.pt", "--out", "new.pt")[0] == 0
    old, new = (torch.load(name, weights_only=True) for name in ("bf16.pt", "new.pt"))
    for name, value in new.items():
        assert value.dtype == old[name].dtype
        assert torch.equal(value, old[name]) == (not name.endswith(("mean", "var", "tracked")))


def test_a_layer_under_two_names_changes_under_both(folder, capsys):
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.append(model[0])
    torch.save({k: v.clone() for k, v in model.state_dict().items()}, "shared.pt")
    assert run(capsys, "shared.pt", "--out", "new.pt", model="mine:shared")[0] == 0
    new = torch.load("new.pt", weights_only=True)
    assert torch.equal(new["0.running_mean"], new["1.running_mean"])
    assert new["0.running_mean"].abs().min() > 0


def test_layers_that_the_factory_froze_stay(folder, capsys):
    code, out, _ = run(capsys, "plain.pt", "--out", "new.pt", model="mine:frozen")
    assert code == 0
    assert "Left alone: 1: it is frozen." in out
    new, old = torch.load("new.pt", weights_only=True), net().state_dict()
    assert torch.equal(new["1.running_mean"], old["1.running_mean"])
    assert not torch.equal(new["3.running_mean"], old["3.running_mean"])


def test_a_factory_may_stand_in_a_class(folder, capsys):
    assert run(capsys, "plain.pt", "--dry-run", model="mine:Holder.make")[0] == 0


@pytest.mark.parametrize("model", ["net", "Wrapped", "parallel"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.module.", "_orig_mod.module."])
def test_wrappers_on_either_side_do_not_matter(folder, capsys, model, prefix):
    state = {prefix + key: value for key, value in net().state_dict().items()}
    torch.save(state, "wrapped.pt")
    code, _, err = run(capsys, "wrapped.pt", "--out", "new.pt", model=f"mine:{model}")
    assert code == 0, err
    new = torch.load("new.pt", weights_only=True)
    assert_same({key.removeprefix(prefix): value for key, value in new.items()}, expected())


def test_a_model_without_parameters_fits_no_checkpoint(folder, capsys):
    code, _, err = run(capsys, "plain.pt", "--dry-run", model="mine:bare")
    assert code == 2
    assert "does not fit the model: it holds, beyond the model, 0.weight and 11 more; name" in err


def test_what_the_factory_froze_can_be_unfrozen(folder):
    sys.path.insert(0, str(folder))
    network = _network("mine:frozen")
    assert [layer.training for layer in network] == [False] * 4
    assert is_frozen(network[1])
    assert not is_frozen(network[3])
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert unfreeze(network).layers == ("1",)
    network.train()
    assert network[1].training


# Progress.


class Terminal(io.StringIO):
    """80 columns wide, as rich asks for them."""

    def isatty(self):
        return True


def shown(monkeypatch, batches, max_samples, passes, calls):
    """The last line on the terminal after ``calls`` batches of 20 samples."""
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with _progress(batches, max_samples, passes) as tell:
        for call in range(calls):
            tell(20 * (call + 1))
        start = len(terminal.getvalue())
        time.sleep(0.25)  # the line is drawn ten times a second
        drawn = terminal.getvalue()[start:]
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in drawn.split("\r")]
    assert max(map(len, lines)) <= 80
    return next(line for line in reversed(lines) if line.strip())


@pytest.mark.parametrize(
    ("batches", "max_samples", "passes", "calls", "share"),
    [
        ([0] * 10, None, 1, 4, "80/200 samples,"),
        ([0] * 10, None, 3, 15, "300/600 samples,"),
        ([0] * 1000, 100, 1, 1, "20/100 samples,"),
        ([0] * 4, 1000, 1, 1, "20/80 samples,"),
        (iter([]), 80, 2, 2, "40/160 samples,"),
        ([0] * 1000, 50, 1, 3, "60/60 samples,"),
    ],
)
def test_progress_is_a_bar_where_the_end_is_known(
    monkeypatch, batches, max_samples, passes, calls, share
):
    line = shown(monkeypatch, batches, max_samples, passes, calls)
    assert share in line
    assert "━" in line
    assert re.search(r"\d:\d\d:\d\d (to go|gone)", line)


def test_progress_without_a_known_end_counts(monkeypatch):
    line = shown(monkeypatch, iter([]), None, 1, 3)
    assert re.search(r" 60 samples, 0:00:0\d gone", line)


@pytest.mark.parametrize("data", ["loader", "stream", "endless", "batches"])
def test_all_kinds_of_data_come_through_the_terminal(folder, capsys, monkeypatch, data):
    monkeypatch.setattr(sys, "stderr", Terminal())
    arguments = ["recalibrate", "plain.pt", "--dry-run", "--json", "--model", "mine:net"]
    assert cli.run([*arguments, "--data", f"mine:{data}"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] > 0


# Data and options.


@pytest.mark.parametrize("data", ["inputs.pt", "inputs.safetensors", "inputs.npy"])
def test_files_of_inputs(folder, capsys, data):
    arguments = ["plain.pt", "--out", "new.pt", "--batch-size", "20", "--threads", "1"]
    assert run(capsys, *arguments, data=data)[0] == 0
    assert_same(torch.load("new.pt", weights_only=True), expected())


def test_json_is_one_object(folder, capsys):
    options = ["--json", "--max-samples", "40", "--layers", "3", "--layers", "1*", "--sequential"]
    code, out, err = run(capsys, "plain.pt", "--out", "new.pt", *options)
    assert (code, err) == (0, "Written: new.pt\n")
    result = json.loads(out)
    assert (result["schema"], result["checkpoint"], result["out"]) == (1, "plain.pt", "new.pt")
    assert (result["samples"], result["stopped"], result["sequential"]) == (40, "max_samples", True)
    assert [layer["name"] for layer in result["layers"]] == ["1", "3"]
    assert_same(torch.load("new.pt", weights_only=True), expected(max_samples=40, sequential=True))


def test_tolerance_is_passed_on(folder, capsys):
    options = ["--json", "--dry-run", "--tolerance", "0.9", "--batch-size", "6"]
    code, out, _ = run(capsys, "plain.pt", *options, data="inputs.pt")
    assert code == 0
    assert json.loads(out)["stopped"] == "tolerance"


def test_dry_run_writes_nothing(folder, capsys):
    before = sorted(path.name for path in folder.iterdir())
    for arguments in (["--dry-run"], ["--dry-run", "--out", "new.pt"]):
        code, out, err = run(capsys, "plain.pt", *arguments)
        assert (code, err) == (0, "Nothing is written: --dry-run.\n")
        assert "Recalibrated 2 layers" in out
    assert sorted(path.name for path in folder.iterdir()) == before


def test_force_replaces_a_file_even_the_checkpoint_itself(folder, capsys):
    assert run(capsys, "plain.pt", "--out", "plain.pt", "--force")[0] == 0
    assert_same(torch.load("plain.pt", weights_only=True), expected())


# Wrong use.


@pytest.mark.parametrize(
    ("arguments", "named", "sentence"),
    [
        (["plain.pt"], {}, "name a file for the result with --out, or use --dry-run."),
        (["plain.pt", "--out", "plain.pt"], {}, "--out plain.pt exists; --force replaces it."),
        (["plain.pt", "--out", "a.safetensors"], {}, "must be of the same format as plain.pt, so"),
        (["plain.pt", "--out", "no/a.pt"], {}, "--out: there is no folder no."),
        (["gone.pt", "--dry-run"], {}, "gone.pt: no such file or directory."),
        (["gone.safetensors", "--dry-run"], {}, "gone.safetensors: no such file or directory."),
        (["mine.py", "--dry-run"], {}, "mine.py must end in .pt, .pth, .ckpt or .safetensors"),
        (["junk.pt", "--dry-run"], {}, "junk.pt is damaged, or holds more than tensors"),
        (["junk.safetensors", "--dry-run"], {}, "junk.safetensors cannot be read: SafetensorErr"),
        (["code.pt", "--dry-run"], {}, "code.pt is damaged, or holds more than tensors and simple"),
        (["inputs.pt", "--dry-run"], {}, "inputs.pt holds no state_dict, neither as a whole nor"),
        (["few.pt", "--dry-run"], {}, "does not fit the model: it lacks 0.bias and 8 more; name"),
        (["more.pt", "--dry-run"], {}, "it holds, beyond the model, extra; name the factory of"),
        (["size.pt", "--dry-run"], {}, "does not fit the model: size mismatch for 0.weight: copy"),
        (["big.pt", "--out", "new.pt"], {"data": "huge.pt"}, "is too large for torch.float16."),
        (["plain.pt", "--dry-run"], {"model": "mine"}, "--model expects module:function, got 'mi"),
        (
            ["plain.pt", "--dry-run"],
            {"model": "gone:net"},
            "there is no module gone in this folder, and",
        ),
        (["plain.pt", "--dry-run"], {"model": "broken:net"}, "named 'nowhere_to_be_found' (broke"),
        (["plain.pt", "--dry-run"], {"model": "mine:gone"}, "--model mine:gone: module mine has"),
        (["plain.pt", "--dry-run"], {"model": "mine:CODE"}, "module mine has no CODE."),
        (["plain.pt", "--dry-run"], {"model": "mine:__name__"}, "__name__ is a str, no function"),
        (["plain.pt", "--dry-run"], {"model": "mine:fails"}, "failed with KeyError: 'no such siz"),
        (["plain.pt", "--dry-run"], {"model": "mine:no_net"}, "a torch.nn.Module, got a int."),
        (["norm.pt", "--dry-run"], {"model": "mine:no_norm"}, "has no batch norm layer to recalib"),
        (["plain.pt", "--dry-run"], {"data": "mine:nothing"}, "batches gave no samples; the model"),
        (["plain.pt", "--dry-run"], {"data": "mine:wrong_shape"}, "failed with RuntimeError: mat1"),
        (
            ["plain.pt", "--dry-run"],
            {"data": "mine:numbers"},
            "a batch must be a tensor, a dict of",
        ),
        (
            ["plain.pt", "--dry-run"],
            {"data": "mine:no_net"},
            "must be several batches, got one int",
        ),
        (["plain.pt", "--dry-run", "--sequential"], {"data": "mine:once"}, "gives them only once"),
        (["plain.pt", "--dry-run", "--batch-size", "3"], {}, "--batch-size is for files of inputs"),
        (["plain.pt", "--dry-run"], {"data": "gone.npy"}, "gone.npy: no such file or directory."),
        (["plain.pt", "--dry-run"], {"data": "junk.npy"}, "junk.npy holds no array of number"),
        (["plain.pt", "--dry-run"], {"data": "words.npy"}, "words.npy holds no array of numbers"),
        (["plain.pt", "--dry-run"], {"data": "plain.pt"}, "must hold one tensor of inputs, got a "),
        (
            ["plain.pt", "--dry-run"],
            {"data": "scalar.npy"},
            "must hold inputs of shape (N, ...), g",
        ),
        (["plain.pt", "--dry-run", "--layers", "9"], {}, "no batch norm layer fits '9'; the model"),
        (["plain.pt", "--dry-run", "--tolerance", "2"], {}, "tolerance must be between 0 and 1, "),
        (["plain.pt", "--dry-run", "--max-samples", "0"], {}, "Invalid value for '--max-samples'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(folder, capsys, arguments, named, sentence):
    for name in ("junk.pt", "junk.npy", "junk.safetensors"):
        (folder / name).write_bytes(b"nothing of use, but some bytes of it")
    state = net().state_dict()
    torch.save({"model": net()}, "code.pt")
    torch.save({"0.weight": state["0.weight"]}, "few.pt")
    torch.save({**state, "extra": torch.zeros(1)}, "more.pt")
    torch.save({**state, "0.weight": torch.zeros(2, 2)}, "size.pt")
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, "big.pt")
    torch.save(nn.Linear(3, 4).state_dict(), "norm.pt")
    torch.save(1e6 * INPUTS, "huge.pt")
    np.save("words.npy", np.array(["one", "two"]))
    np.save("scalar.npy", np.array(3.0))
    before = sorted(path.name for path in folder.iterdir())
    code, out, err = run(capsys, *arguments, **named)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.startswith("batchnorm: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    after = sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")
    assert after == before


def test_safetensors_that_is_not_installed_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    code, _, err = run(capsys, "plain.safetensors", "--out", "new.safetensors")
    assert code == 2
    assert "need the package safetensors, which is not installed; install it with pip" in err
    assert run(capsys, "plain.pt", "--dry-run")[0] == 0


def test_a_write_that_fails_leaves_the_old_file(folder, capsys, monkeypatch):
    before = (folder / "plain.pt").read_bytes()

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    code, _, err = run(capsys, "plain.pt", "--out", "plain.pt", "--force")
    assert (code, err) == (2, "batchnorm: No space left on device.\n")
    assert (folder / "plain.pt").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_ctrl_c_is_no_traceback(folder, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("batchnorm.tools.recalibration.recalibrate", interrupt)
    code, out, err = run(capsys, "plain.pt", "--out", "new.pt")
    assert (code, out, err) == (130, "", "Interrupted; nothing is written.\n")
    assert not (folder / "new.pt").exists()


def test_extra_state_is_kept(folder):
    torch.save({**net().state_dict(), "0._extra_state": {"scale": 2}}, "extra.pt")
    stored = read(folder / "extra.pt")
    assert stored.state["0._extra_state"] == {"scale": 2}


def test_help_is_fast_and_loads_no_torch(monkeypatch):
    for name in [name for name in os.environ if name.startswith("COVERAGE")]:
        monkeypatch.delenv(name)
    code = (
        "import sys; from batchnorm import cli; cli.run(['recalibrate', '--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'safetensors', 'numpy')))"
    )

    def run():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    done = run()
    assert done.returncode == 0, done.stderr
    assert "--sequential" in done.stdout
    assert least_cpu_seconds(run) < budget_of_help()


# Names with a prefix, as Lightning writes them, and counters of odd shape.


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_a_lightning_file(folder, capsys):
    import_torchvision()  # Lightning does so, too.
    lightning = pytest.importorskip("lightning.pytorch", reason="its checkpoints are read")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = net()
            self.loss = nn.CrossEntropyLoss(weight=torch.ones(4))
            self.save_hyperparameters({"lr": 0.1})

        def training_step(self, batch, index):
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(INPUTS), batch_size=30)
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, accelerator="cpu",
    )  # fmt: skip
    module = Module()
    trainer.fit(module, data)
    trainer.save_checkpoint("last.ckpt")
    code, _, err = run(capsys, "last.ckpt", "--out", "new.ckpt")
    assert code == 0, err
    said = "Names in last.ckpt are read without 'model.'; 1 other entries stay as they are."
    assert said in err
    changed = torch.load("new.ckpt", weights_only=True)["state_dict"]
    module.load_state_dict(changed)
    expected = net()
    expected.load_state_dict(module.model.state_dict())
    assert not torch.equal(changed["model.1.running_mean"], torch.zeros(4))
    assert torch.equal(changed["loss.weight"], torch.ones(4))


@pytest.mark.parametrize(
    "prefix",
    ["model.", "net.backbone.", "module.model.", "model._orig_mod.", "_forward_module.net."],
)
def test_a_prefix_is_found_and_said(folder, capsys, prefix):
    state = {prefix + key: value for key, value in net().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, "wrapped.pt")
    code, _, err = run(capsys, "wrapped.pt", "--out", "new.pt")
    assert code == 0
    short = prefix.replace("module.", "", 1) if prefix.startswith("module.") else prefix
    assert f"Names in wrapped.pt are read without '{short.replace('_orig_mod.', '')}'." in err
    new = torch.load("new.pt", weights_only=True)
    assert list(new["state_dict"]) == list(state)
    run(capsys, "plain.pt", "--out", "plain_new.pt")
    plain = torch.load("plain_new.pt", weights_only=True)
    assert all(torch.equal(new["state_dict"][prefix + key], value) for key, value in plain.items())


def test_without_a_prefix_nothing_is_said(folder, capsys):
    _, _, err = run(capsys, "plain.pt", "--dry-run")
    assert "are read without" not in err


def test_a_file_with_two_models_needs_a_choice(folder, capsys):
    torch.manual_seed(1)
    state = {
        f"{who}.{k}": v for who in ("student", "teacher") for k, v in net().state_dict().items()
    }
    torch.save(state, "two.pt")
    code, _, err = run(capsys, "two.pt", "--dry-run")
    assert code == 2
    assert (
        "two.pt holds the model several times; choose by --prefix student. or --prefix teac" in err
    )
    code, _, err = run(capsys, "two.pt", "--out", "new.pt", "--prefix", "teacher.")
    assert code == 0
    assert "are read without 'teacher.'; 12 other entries stay as they are." in err
    new = torch.load("new.pt", weights_only=True)
    assert not torch.equal(new["teacher.1.running_mean"], state["teacher.1.running_mean"])
    assert torch.equal(new["student.1.running_mean"], state["student.1.running_mean"])
    code, _, err = run(capsys, "two.pt", "--dry-run", "--prefix", "nobody.")
    assert code == 2
    assert "two.pt holds no name that begins with 'nobody.'." in err


@pytest.mark.parametrize(
    ("counter", "sentence"),
    [
        (
            torch.Tensor([]),
            "1.num_batches_tracked has the shape (0,), and a counter is one number.",
        ),
        (torch.ones(2), "1.num_batches_tracked has the shape (2,), and a counter is one number."),
        (torch.tensor(torch.nan), "1.num_batches_tracked is nan, and a counter is a whole number"),
    ],
)
def test_a_counter_that_is_no_number_is_refused(folder, capsys, counter, sentence):
    torch.save({**net().state_dict(), "1.num_batches_tracked": counter}, "odd.pt")
    code, out, err = run(capsys, "odd.pt", "--out", "new.pt")
    assert (code, out) == (2, "")
    assert f"odd.pt: {sentence}" in err
    assert not (folder / "new.pt").exists()


@pytest.mark.parametrize("counter", [torch.tensor([3]), torch.tensor(3.0), torch.Tensor([3])])
def test_a_counter_of_another_kind_is_a_number(folder, capsys, counter):
    torch.save({**net().state_dict(), "1.num_batches_tracked": counter}, "odd.pt")
    assert run(capsys, "odd.pt", "--out", "new.pt")[0] == 0
    new = torch.load("new.pt", weights_only=True)
    net().load_state_dict(new)
    assert new["1.num_batches_tracked"].item() == 5


LIKE = """
from torch import nn
from batchnorm import scratch
from look_alikes import D2l

def scratch_net():
    return nn.Sequential(nn.Linear(3, 4), scratch.BatchNorm(4, num_dims=2))

def d2l_net():
    return nn.Sequential(nn.Linear(3, 4), D2l(4, num_dims=2))
"""


@pytest.fixture
def like(folder):
    (folder / "like.py").write_text(LIKE)
    yield
    sys.modules.pop("like", None)


@pytest.mark.usefixtures("like")
def test_a_layer_from_scratch(folder, capsys):
    model = nn.Sequential(nn.Linear(3, 4), scratch.BatchNorm(4, num_dims=2))
    torch.save(model.state_dict(), "scratch.pt")
    code, out, err = run(capsys, "scratch.pt", "--out", "new.pt", model="like:scratch_net")
    assert code == 0, err
    assert "Recalibrated 1 layer" in out
    new = torch.load("new.pt", weights_only=True)
    y = model[0](INPUTS_OF_MINE).detach()
    torch.testing.assert_close(new["1.moving_mean"], y.mean(0, keepdim=True))
    torch.testing.assert_close(new["1.moving_var"], y.var(0, unbiased=False, keepdim=True))


@pytest.mark.usefixtures("like")
def test_a_layer_whose_statistics_are_in_no_checkpoint(folder, capsys):
    model = nn.Sequential(nn.Linear(3, 4), D2l(4, num_dims=2))
    torch.save(model.state_dict(), "d2l.pt")
    for option in (["--out", "new.pt"], ["--dry-run"]):
        code, out, err = run(capsys, "d2l.pt", *option, model="like:d2l_net")
        assert (code, out) == (2, "")
        said = "layer '1' (D2l) keeps moving_mean as an ordinary attribute, which is not in a check"
        assert said in err
    assert not (folder / "new.pt").exists()


COUNTING = """
import torch
from torch import nn
from look_alikes import D2l, Own

def many(): return [torch.randn(8, 3) for _ in range(300)]
def data(): return many()[:9]

class Counting(Own):
    def __init__(self, shape):
        super().__init__(4)
        self.register_buffer("num_batches_tracked", torch.zeros(shape, dtype=torch.long))

def net(layer): return nn.Sequential(nn.Linear(3, 4), layer, nn.BatchNorm1d(4))
def torchs(): return net(nn.BatchNorm1d(4))
def one(): return net(Counting((1,)))
def three(): return net(Counting((3,)))
def averaged(): return torch.optim.swa_utils.AveragedModel(one())

def in_evaluation(layer):
    model = net(layer)
    model[1].eval()
    return model

class ByBatch(Own):
    def forward(self, x):
        self.train()
        return super().forward(x)

class Failing(Own):
    def forward(self, x, mask=None):
        if x.dim() != 2 or len(x) < 7:
            raise ValueError("too few")
        return super().forward(x)

def d2l(): return in_evaluation(D2l(4, 2))
def by_batch(): return in_evaluation(ByBatch(4))
def failing(): return in_evaluation(Failing(4))
def own(): return in_evaluation(Own(4))
def two():
    model = d2l()
    model[2].eval()
    return model.append(nn.BatchNorm1d(4))
"""


@pytest.fixture
def counting(folder):
    (folder / "counting.py").write_text(COUNTING)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("counting")
    sys.modules.pop("counting", None)


def recalibrated(capsys, state, model, *options, data="data"):
    torch.save(state, "old.pt")
    arguments = ["old.pt", "--out", "new.pt", *options]
    code, out, err = run(capsys, *arguments, model=f"counting:{model}", data=f"counting:{data}")
    assert code == 0, err
    return torch.load("new.pt", weights_only=True), out, err


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.bool, torch.int16, torch.float16, torch.int64]
)
def test_a_counter_does_not_wrap_around(counting, capsys, dtype):
    state = counting.torchs().state_dict()
    state["1.num_batches_tracked"] = state["1.num_batches_tracked"].to(dtype)
    new, _, _ = recalibrated(capsys, state, "torchs", data="many")
    counters = [new["1.num_batches_tracked"], new["2.num_batches_tracked"]]
    assert [(each.item(), each.dtype) for each in counters] == [(300, torch.int64)] * 2


@pytest.mark.parametrize("model", ["one", "three", "averaged"])
def test_counters_have_the_shape_that_the_model_gives_them(counting, capsys, model):
    network = getattr(counting, model)()
    new, _, _ = recalibrated(capsys, network.state_dict(), model)
    network.load_state_dict(new)
    counters = [value for name, value in new.items() if name.endswith("1.num_batches_tracked")]
    assert [each.tolist() for each in counters] == [[9] * (3 if model == "three" else 1)]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_counter_of_one_number_fits_one_number(counting, capsys, shape):
    state = counting.one().state_dict()
    state["1.num_batches_tracked"] = torch.full(shape, 7.0)
    new, _, _ = recalibrated(capsys, state, "one")
    assert new["1.num_batches_tracked"].tolist() == [9]


@pytest.mark.parametrize("model", ["d2l", "by_batch", "failing", "own"])
def test_a_layer_in_evaluation_stays_whatever_its_code_does(counting, capsys, model):
    state = getattr(counting, model)().state_dict()
    new, out, _ = recalibrated(capsys, state, model, "--sequential")
    assert "Left alone: 1: it is frozen." in out
    changed = {name for name, value in state.items() if not torch.equal(new[name], value)}
    assert changed == {"2.running_mean", "2.running_var", "2.num_batches_tracked"}


def test_several_layers_in_evaluation_stay(counting, capsys):
    _, out, _ = recalibrated(capsys, counting.two().state_dict(), "two")
    assert "Recalibrated 1 layer" in out
    assert "Left alone: 1: it is frozen.\nLeft alone: 2: it is frozen.\n" in out


@pytest.mark.parametrize(
    ("written", "prefix", "found"),
    [
        ("model.", "model", "model."),
        ("net.module.", "net.module.", "net."),
        ("net.module.", "net.module", "net."),
        ("net.module.", "net", "net."),
        ("module.student._orig_mod.", "module.student._orig_mod", "student."),
        ("module.student.", "module.student.", "student."),
        ("a.b.", "a.b", "a.b."),
    ],
)
def test_a_prefix_may_be_written_in_several_ways(counting, capsys, written, prefix, found):
    state = {written + name: value for name, value in counting.torchs().state_dict().items()}
    state["other.model.weight"] = torch.ones(2)
    new, _, err = recalibrated(capsys, state, "torchs", "--prefix", prefix)
    assert f"Names in old.pt are read without {found!r}; 1 other entries stay" in err
    assert not torch.equal(new[f"{written}1.running_mean"], torch.zeros(4))


@pytest.mark.parametrize("prefix", ["mod", "model.0.weight", "odel.", "model.x", "nobody.module."])
def test_a_prefix_ends_at_a_dot(counting, capsys, prefix):
    state = {f"model.{name}": value for name, value in counting.torchs().state_dict().items()}
    torch.save(state, "old.pt")
    options = ["old.pt", "--dry-run", "--prefix", prefix]
    code, _, err = run(capsys, *options, model="counting:torchs", data="counting:data")
    assert code == 2
    assert f"old.pt holds no name that begins with {prefix!r}." in err
