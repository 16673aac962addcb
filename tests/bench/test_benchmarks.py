"""The scripts of benchmarks/, without the measuring."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchnorm import BatchNorm2d
from batchnorm.kernels.compiled import storage
from bench_results import memory, results, row, step

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts_find_each_other(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def good():
    """Measurements above every bar."""
    both = {"pass": "both", "others": {"torch": 0.0123 * 3, "compile": 0.0123 * 6}}
    rows = [
        row(others={"torch": 0.0123 * 4}),
        row(**{"pass": "backward"}),
        row(**{"pass": "eval"}),
        row(**both),
        row(variant="relu", **both),
        row(variant="add-relu", **both),
        row(layout="channels_last", **both),
        row(dtype="bfloat16", **both),
    ]
    memories = [memory(ours=1024), memory("relu"), memory("add-relu")]
    steps = [step(), step("resnet50")]
    return {**results(rows, steps, memories), "compiled": [row(variant="add-relu", **both)]}


def judged(tmp_path, measured):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(measured))
    done = subprocess.run(
        [sys.executable, FOLDER / "regression.py", path], capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_every_bar_held_is_exit_code_0(tmp_path):
    code, lines = judged(tmp_path, good())
    assert code == 0
    assert len(lines) == 13
    assert all(line.endswith(" ok") for line in lines)


@pytest.mark.parametrize(
    ("spoil", "fallen"),
    [
        (lambda m: m["rows"][0].update(speedup={"torch": 2.9}), "forward, times torch"),
        (lambda m: m["rows"][0].update(to_copy_time=2.4), "forward, time over a copy"),
        (lambda m: m["steps"][0].update(share_of_cost=1.1), "LeNet's step: cost of our norm"),
        (lambda m: m["memory"].append(memory("relu", ours=1024)), "the same with ReLU"),
        (
            lambda m: m["compiled"][0].update(speedup={"compile": 4.0}),
            "with residual and ReLU, times torch.compile",
        ),
    ],
)
def test_a_fall_is_named_and_exit_code_1(tmp_path, spoil, fallen):
    measured = good()
    spoil(measured)
    code, lines = judged(tmp_path, measured)
    assert code == 1
    (found,) = [line for line in lines if not line.endswith(" ok")]
    assert found.startswith(fallen)
    assert found.endswith(" FALLEN")


def test_what_was_not_measured_is_no_success(tmp_path):
    code, lines = judged(tmp_path, {**results(), "compiled": []})
    assert code == 1
    assert all(line.endswith("not measured") for line in lines)


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_tables_of_a_readme_have_the_step_and_every_question(name):
    readme = script("readme_table")
    words = readme.WORDS[name]
    step_table, layer_table, machine = readme.tables(good(), words).split("\n\n")
    header, _, *rows = step_table.splitlines()
    assert "ResNet-50" in header
    assert "224×224" in header
    unit = words["seconds"].format(0.0121)
    assert rows == [
        f"| {words['torch']} | {unit} | 37 % |",
        f"| {words['batchnorm']} | {unit} | 12 % |",
        f"| {words['none']} | {unit} |  |",
    ]
    _, _, *rows = layer_table.splitlines()
    assert [line.split("|")[2].strip() for line in rows] == ["3.00×"] * 5 + ["2.50×"]
    assert "Test CPU 9000" in machine
    assert "batchnorm 0.1.0" in machine


def test_the_table_stands_between_the_markers():
    readme = script("readme_table")
    text = f"before\n{readme.START}\nold\n{readme.END}\nafter\n"
    replaced = readme.between_markers(text, "new", "README.md")
    assert replaced == f"before\n{readme.START}\nnew\n{readme.END}\nafter\n"
    with pytest.raises(ValueError, match=r"README.md: the lines <!-- bench --> and .* are missing"):
        readme.between_markers("no markers", "new", "README.md")


def test_a_red_test_writes_nothing(monkeypatch, tmp_path, capsys):
    readme = script("readme_table")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    text = f"{readme.START}\nold\n{readme.END}\n"
    for name in readme.WORDS:
        (tmp_path / name).write_text(text)
    for name in readme.TESTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("def test_red(): assert False\n")
    monkeypatch.setattr(sys, "argv", ["readme_table.py"])
    monkeypatch.setattr(readme, "measured", lambda *_: pytest.fail("something was measured"))
    assert readme.main() == 1
    assert "the tests are red" in capsys.readouterr().err
    assert all((tmp_path / name).read_text() == text for name in readme.WORDS)


def test_a_green_test_lets_the_readmes_and_the_chart_be_written(monkeypatch, tmp_path):
    readme = script("readme_table")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    for name in readme.WORDS:
        (tmp_path / name).write_text(f"{readme.START}\nold\n{readme.END}\n")
    (tmp_path / "docs").mkdir()
    for name in readme.TESTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("def test_green(): pass\n")
    monkeypatch.setattr(sys, "argv", ["readme_table.py"])

    def measured(*_):
        with (tmp_path / "README.md").open("a") as file:
            file.write("Written while it was measured.\n")
        return good()

    monkeypatch.setattr(readme, "measured", measured)
    assert readme.main() == 0
    assert "forward and backward" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "README.md").read_text().endswith("Written while it was measured.\n")
    assert "前向加反向" in (tmp_path / "README.zh.md").read_text()
    assert readme.stamps.stamp_in(tmp_path / "docs/bench.svg") == readme.stamps.stamp("bench.svg")


def test_the_tested_files_exist():
    assert all((FOLDER.parent / name).is_file() for name in script("readme_table").TESTS)


def test_call_overhead_compares_both():
    done = subprocess.run(
        [sys.executable, FOLDER / "call_overhead.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.split()[:2] == ["ours", "torch"]
    assert [line[:22].strip() for line in rows] == ["forward", "forward and backward"]
    assert all(float(number) > 0 for line in rows for number in line[22:].split())


def test_start_up_times_every_stage():
    BatchNorm2d(64)(torch.ones(8, 64, 28, 28, requires_grad=True)).sum().backward()
    start_up = script("start_up")
    stages = start_up.seconds(str(storage._folders()[0]))  # where these kernels are now
    assert len(stages) == len(start_up.STAGES)
    assert min(stages) > 0


def test_recalibration_is_measured_against_the_true_statistics(capsys, monkeypatch):
    recalibration = script("recalibration")
    monkeypatch.setattr(recalibration, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(recalibration, "DEPTH", 18)
    monkeypatch.setattr(recalibration, "SIZE", 32)
    monkeypatch.setattr(recalibration, "SHARES", (0.5, 1.0))
    recalibration.main(36, rounds=1)
    lines = capsys.readouterr().out.splitlines()
    tables = [lines.index(line) for line in lines if "update_bn" in line and "precise BN" in line]
    assert lines[0].startswith("ResNet-18, 36 images of 32 x 32 in batches of 16, ")
    last_rows = [line.split() for line in lines if line.startswith("3 ")]
    floors = [float(line.split()[-2]) for line in lines if "without batch norm:" in line]
    assert len(floors) == 2
    assert min(floors) > 0
    assert len(tables) >= 2
    assert len(last_rows) == 2
    for _, ours, _, theirs, _, precise, _ in last_rows:
        assert float(ours) < 1e-5
        assert float(precise) == pytest.approx(1 / 36, rel=0.05)  # its variance is the biased one
        assert float(theirs) > 0.05


def test_the_watched_step_is_the_unwatched_one_and_a_record():
    from batchnorm.bench.clock import Timed

    done = []
    both = script("watch_overhead")._both(Timed(lambda x: done.append(x)), lambda: done.append(2))
    both(1)
    assert done == [1, 2]
