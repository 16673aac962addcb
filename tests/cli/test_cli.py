"""The command line as a user meets it, in a process of its own where that is quick."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.cells import cell_len

import cpu_time
from batchnorm import __version__, cli
from batchnorm.cli.options import announce_compilation
from batchnorm.cli.progress import Bar
from batchnorm.experiment.data import DIGITS, Dataset
from batchnorm.experiment.defaults import FOR_DIGITS
from cpu_time import budget_of_help, least_cpu_seconds
from training_cases import EPOCH_FIELDS, pattern

# typer demands the annotation typer.Context and hands over an object of another class.
pytestmark = pytest.mark.untyped

SMALL = ["--epochs", "2", "--batch-size", "64", "--population", "100", "--threads", "1"]


@pytest.fixture
def small_images(monkeypatch):
    """A small data set; this process gives its memory back as before. How often it was not to."""
    kept = []
    monkeypatch.setattr("batchnorm.cli.experiment.keep_freed_memory", lambda: kept.append(None))
    dataset = Dataset("patterns", "this test", *pattern(300, 0), *pattern(60, 1), tuple("0123"))
    monkeypatch.setattr("batchnorm.experiment.data.load", lambda *args, **kwargs: dataset)
    return kept


def run(capsys, *arguments):
    code = cli.run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def command(*arguments, **options):
    environment = {**os.environ, "COLUMNS": "80", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "batchnorm", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
        **options,
    )


def test_help_is_fast_and_loads_no_torch(monkeypatch):
    code = (
        "import sys; from batchnorm import cli; cli.run(['--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'numpy')))"
    )
    for name in [name for name in os.environ if name.startswith("COVERAGE")]:
        monkeypatch.delenv(name)
    done = command("--help")
    assert done.returncode == 0
    assert least_cpu_seconds(lambda: command("--help")) < budget_of_help()
    assert "explain" in done.stdout
    assert max(map(cell_len, done.stdout.splitlines())) <= 80
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("libraries", "budget"), [(0.05, 0.3), (0.15, 0.39), (0.2, 0.45), (5.0, 0.45)]
)
def test_the_budget_of_help_has_an_end(monkeypatch, libraries, budget):
    monkeypatch.setattr(cpu_time, "least_cpu_seconds", lambda run: libraries)
    assert budget_of_help() == pytest.approx(budget)


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"{__version__}\n", "")


def test_no_command_shows_help(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    assert "Usage: batchnorm" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nonsense"], "No such command 'nonsense'."),
        (["explain", "--nope"], "No such option: --nope."),
        (["explain", "pictures"], "'pictures' is not one of 'all', 'fully-connected'"),
        (["explain", "--lang", "fr"], "'fr' is not one of 'en', 'zh'"),
        (["train", "--epochs", "many"], "Invalid value for '--epochs'"),
        (["train", "--epochs", "0"], "Invalid value for '--epochs'"),
        (["train", "--norm", "layer"], "--norm expects different names out of batchnorm, scratch"),
        (["train", "--norm", "none,none"], "got 'none,none'."),
        (["train", "--lr", "-1"], "--lr expects a positive number, got -1.0."),
        (["train", "--lr", "nan"], "--lr expects a positive number, got nan."),
        (["train", "--device", "abacus"], "--device abacus cannot be used here: "),
        (["train", "--data", "/nowhere"], "/nowhere: no such folder"),
        (["train", "--resume", "/nowhere"], "/nowhere holds no run (config.json is missing)"),
        (["train", "--resume", "x", "--lr", "1"], "--resume takes its settings from config.json"),
        (["report", "/nowhere"], "/nowhere holds no results (report.json is missing)"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, arguments, sentence):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1
    assert err.startswith("batchnorm: ")
    assert err.endswith(".\n")


def test_missing_library_of_the_command_line_is_named(tmp_path):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('gone', name='typer')")
    done = command("explain", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr == (
        "batchnorm: the command line needs typer, which is not installed; "
        "install it with pip install 'batchnorm[cli]'.\n"
    )


def test_missing_library_of_a_command_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    code, _, err = run(capsys, "train", "--norm", "none")
    assert code == 2
    assert err == (
        "batchnorm: this command needs platformdirs, which is not installed; "
        "install it with pip install 'batchnorm[cli]'.\n"
    )


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_explain_prints_the_numbers_of_the_notes(lang):
    done = command("explain", "--lang", lang)
    assert done.returncode == 0
    assert done.stderr == ""
    for number in ("0.3445", "0.4517", "0.0924", "0.4546", "0.6116", "0.5013"):
        assert number in done.stdout
    assert max(map(cell_len, done.stdout.splitlines())) <= 80


def test_explain_as_json(capsys):
    code, out, _ = run(capsys, "explain", "convolution", "--json")
    assert code == 0
    (example,) = json.loads(out)["examples"]
    assert example["name"] == "convolution"
    assert len(example["steps"]) > 10


def test_compilation_of_kernels_is_announced_once(capsys):
    logger = logging.getLogger("batchnorm.kernels")
    announce_compilation()
    assert capsys.readouterr().err == ""
    logger.info("compiling %s", "forward")
    logger.info("compiling %s", "backward")
    assert capsys.readouterr().err == (
        "Compiling the CPU kernels for this machine (once; about half a minute).\n"
    )
    assert logger.handlers == []


def test_train_writes_everything(capsys, tmp_path, small_images):
    out_dir = tmp_path / "run"
    code, out, err = run(capsys, "train", *SMALL, "--out", out_dir)
    assert code == 0
    assert "batchnorm" in out
    assert "none" in out
    assert f"Report: {out_dir / 'report.html'}" in err
    assert len(small_images) == 1
    names = {path.name for path in out_dir.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "report.json", "report.html", "checkpoints"}
    assert "<svg" in (out_dir / "report.html").read_text()
    code, out, err = run(capsys, "train", *SMALL, "--out", out_dir)
    assert code == 2
    assert "already holds a run; continue it with --resume" in err


def test_digits_have_other_defaults_and_every_output_says_what_they_are(
    capsys, tmp_path, small_images, monkeypatch
):
    digits = Dataset(DIGITS, "this test", *pattern(130, 0), *pattern(60, 1), tuple("0123"))
    monkeypatch.setattr("batchnorm.experiment.data.load", lambda *args, **kwargs: digits)
    arguments = ["--epochs", "1", "--norm", "none", "--threads", "1"]
    code, out, _ = run(capsys, "train", *arguments, "--out", tmp_path / "run")
    assert code == 0
    assert out.startswith("Fashion-MNIST could not be found or downloaded.")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["batch_size"] == FOR_DIGITS.batch_size
    assert config["data"]["stand_in"] is True
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.index("could not be found or downloaded") < page.index('class="lead"')


def test_train_as_json_is_one_object(capsys, tmp_path, small_images):
    code, out, _ = run(
        capsys, "train", *SMALL, "--out", tmp_path / "run", "--json", "--norm", "none,torch"
    )
    assert code == 0
    result = json.loads(out)
    assert [run["norm"] for run in result["runs"]] == ["none", "torch"]
    assert list(result["runs"][0]["epochs"][0]) == EPOCH_FIELDS
    assert result["data"]["name"] == "patterns"


def test_ctrl_c_reports_and_resume_goes_on(capsys, tmp_path, small_images, monkeypatch):
    out_dir = tmp_path / "run"
    whole = tmp_path / "whole"
    arguments = [*SMALL, "--norm", "torch"]

    update = Bar.update

    def interrupt(self, examples):
        update(self, examples)
        if self.done > 300:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("batchnorm.cli.progress.Bar.update", interrupt)
        code, _, err = run(capsys, "train", *arguments, "--out", out_dir)
    assert code == 130
    assert "torch 1/2: loss " in err
    assert " running / " in err
    assert f"Interrupted; go on with: batchnorm train --resume {out_dir}" in err
    assert (out_dir / "report.html").exists()
    assert json.loads((out_dir / "report.json").read_text())["runs"][0]["complete"] is False
    assert run(capsys, "train", "--resume", out_dir)[0] == 0
    assert run(capsys, "train", *arguments, "--out", whole)[0] == 0
    resumed, uncut = (
        [
            {**json.loads(line), "examples_per_second": 0}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (out_dir, whole)
    )
    assert resumed == uncut
    code, _, _ = run(capsys, "report", out_dir, "--lang", "zh")
    assert code == 0
    assert 'lang="zh' in (out_dir / "report.html").read_text()


def test_resume_with_other_images_is_refused(capsys, tmp_path, small_images, monkeypatch):
    out_dir = tmp_path / "run"
    run(capsys, "train", *SMALL, "--norm", "none", "--out", out_dir)
    other = Dataset("digits", "this test", *pattern(300, 0), *pattern(60, 1), tuple("0123"))
    monkeypatch.setattr("batchnorm.experiment.data.load", lambda *args, **kwargs: other)
    code, _, err = run(capsys, "train", "--resume", out_dir)
    assert code == 2
    assert "was trained on patterns, but only digits was found" in err


@pytest.mark.images
def test_a_real_signal_ends_a_real_run_cleanly(tmp_path, fashion_mnist):
    out_dir = tmp_path / "run"
    arguments = ["train", "--examples", "2048", "--epochs", "200", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "batchnorm", *arguments, "--out", str(out_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (out_dir / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "go on with: batchnorm train --resume" in err
    assert "batchnorm" in out
    assert (out_dir / "report.html").exists()
