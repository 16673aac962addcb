"""The folder of a run: what is written is read again, and what is damaged is named."""

import json

import pytest
import torch

from batchnorm.experiment.results import Results
from batchnorm.experiment.run_directory import RunDirectory, RunError
from report_results import results


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path)


def checked():
    return Results.model_validate(results())


def run_of(norm="none", epochs=1):
    run = checked().runs[0]
    return run.model_copy(update={"norm": norm, "epochs": run.epochs[:1] * epochs})


def test_settings_come_back(directory):
    directory.create(checked())
    config = directory.config()
    assert config.settings == checked().settings
    assert config.data == checked().data


def test_refuses_a_folder_with_a_run(directory):
    directory.create(checked())
    with pytest.raises(RunError, match="already holds a run; continue it with --resume"):
        directory.create(checked())


def test_refuses_an_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/run cannot be written: Not a directory"):
        RunDirectory(tmp_path / "file" / "run").create(checked())


def test_names_a_missing_run(directory):
    with pytest.raises(RunError, match=r"holds no run \(config.json is missing\); start a new"):
        directory.config()
    with pytest.raises(RunError, match=r"holds no results \(report.json is missing\); make it"):
        directory.results()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", " cannot be read as JSON"),
        ("[]", ": expected everything to be an object, got []"),
        ('{"settings": {}}', ": expected a field settings.norms, but it is missing"),
        ('{"settings": {"norms": ["layer"]}}', ": expected settings.norms[0] to be 'batchnorm', "),
    ],
)
def test_names_a_damaged_configuration(directory, text, fault):
    path = directory.path / "config.json"
    path.write_text(text)
    with pytest.raises(RunError) as caught:
        directory.config()
    assert str(caught.value).startswith(f"{path}{fault}")
    assert str(caught.value).endswith("; start a new run with --out.")


@pytest.mark.parametrize(
    ("text", "fault"),
    [("{", " cannot be read as JSON"), ("{}", ": expected a field schema, but it is missing")],
)
def test_names_damaged_results(directory, text, fault):
    path = directory.path / "report.json"
    path.write_text(text)
    with pytest.raises(RunError) as caught:
        directory.results()
    repair = f"make it again with batchnorm train --resume {directory.path}."
    assert str(caught.value) == f"{path}{fault}; {repair}"


def test_results_come_back_with_null_for_nan(directory):
    written = checked()
    written.runs[0].epochs[0].loss = float("nan")
    directory.write_results(written)
    assert (
        json.loads((directory.path / "report.json").read_text())["runs"][0]["epochs"][0]["loss"]
        is None
    )
    assert directory.results().runs[0].diverged_in == 1
    assert directory.results().runs[1] == written.runs[1]
    lines = (directory.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["norm"] for line in lines] == ["batchnorm"] * 10 + ["none"] * 10


def test_takes_the_last_checkpoint_by_number(directory):
    for epoch in (9, 10, 100):
        directory.save_checkpoint(run_of(epochs=epoch), {"epoch": epoch})
    directory.save_checkpoint(run_of("torch", epochs=200), {"epoch": 200})
    assert directory.last_checkpoint("none") == {
        "epoch": 100,
        "run": run_of(epochs=100).model_dump(),
    }
    assert directory.last_checkpoint("scratch") is None


def test_names_a_damaged_checkpoint(directory):
    directory.save_checkpoint(run_of(), {"weights": torch.zeros(1000)})
    path = directory.path / "checkpoints" / "none-epoch-01.pt"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(RunError, match=r"none-epoch-01.pt is damaged .*; delete it"):
        directory.last_checkpoint("none")


def test_never_executes_a_checkpoint(directory):
    class Attack:
        def __reduce__(self):
            return (directory.path.joinpath("hit").write_text, ("x",))

    folder = directory.path / "checkpoints"
    folder.mkdir()
    torch.save(Attack(), folder / "none-epoch-01.pt")
    with pytest.raises(RunError, match="not a checkpoint of this program"):
        directory.last_checkpoint("none")
    assert not (directory.path / "hit").exists()


def test_failing_save_keeps_the_old_file(directory):
    directory.save_checkpoint(run_of(), {"epoch": 1})
    with pytest.raises(AttributeError, match="local object"):
        directory.save_checkpoint(run_of(), {"epoch": lambda: None})
    kept = directory.last_checkpoint("none")
    assert kept is not None
    assert kept["epoch"] == 1
    assert len(list((directory.path / "checkpoints").iterdir())) == 1
