"""The scripts of benchmarks/, without the measuring."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench_results import memory, results, row, step

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def good():
    """Measurements that keep every promise."""
    both = {"pass": "both", "others": {"torch": 0.0123 * 3, "compile": 0.0123 * 1.5}}
    rows = [
        row(),
        row(**{"pass": "backward"}),
        row(**both),
        row(variant="relu", **both),
        row(variant="add-relu", **both),
        row(layout="channels_last", **both),
        row(dtype="bfloat16", **both),
    ]
    memories = [memory(ours=1024), memory("relu"), memory("add-relu")]
    return {**results(rows, [step()], memories), "compiled": [row(variant="add-relu", **both)]}


def judged(tmp_path, measured):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(measured))
    done = subprocess.run(
        [sys.executable, FOLDER / "acceptance.py", path], capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_every_promise_kept_is_exit_code_0(tmp_path):
    code, lines = judged(tmp_path, good())
    assert code == 0
    assert len(lines) == 13
    assert all(line.endswith(" ok") for line in lines)


@pytest.mark.parametrize(
    ("spoil", "broken"),
    [
        (lambda m: m["rows"][0].update(speedup={"torch": 2.4}), ["forward, times torch"]),
        (lambda m: m["rows"][0].update(to_copy_time=1.4), ["forward over a copy"]),
        (lambda m: m["steps"][0].update(share_of_cost=0.5), ["LeNet's step: cost of our norm"]),
        (
            lambda m: m["rows"].append(row((2, 2), group="nc", others={"torch": 0.0123 * 0.9})),
            ["slowest row: our time over torch's"],
        ),
        (lambda m: m["memory"].append(memory("relu", ours=1024)), ["the same with ReLU fused"]),
        (
            lambda m: m["compiled"][0].update(speedup={"compile": 1.2}),
            ["BN + add + ReLU, times torch.compile"],
        ),
    ],
)
def test_a_broken_promise_is_named_and_exit_code_1(tmp_path, spoil, broken):
    measured = good()
    spoil(measured)
    code, lines = judged(tmp_path, measured)
    assert code == 1
    found = [line for line in lines if line.endswith("BROKEN")]
    assert len(found) == len(broken)
    assert all(line.startswith(name) for line, name in zip(found, broken, strict=True))


def test_what_was_not_measured_is_not_kept(tmp_path):
    code, lines = judged(tmp_path, {**results(), "compiled": []})
    assert code == 1
    assert all(line.endswith("not measured") for line in lines)


def test_a_second_measurement_replaces_the_first():
    acceptance = script("acceptance")
    first = [row(ours=1.0), row(**{"pass": "both"}, ours=2.0)]
    again = [row(**{"pass": "both"}, ours=3.0)]
    assert acceptance.replaced(first, again) == [first[0], again[0]]
    assert math.isnan(acceptance._slowest([]))


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_table_of_a_readme_has_every_mean_and_step(name):
    readme = script("readme_table")
    table = readme.table(good(), readme.WORDS[name])
    lines = table.splitlines()
    assert sum(line.startswith("| BN") for line in lines) == 7
    assert "| 2.50× |  | 12.3 | 82 % |" in table
    assert sum("LeNet" in line and "8.80" in line and "1.22×" in line for line in lines) == 1
    assert "Test CPU 9000" in lines[-1]
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {6}


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
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_functional.py").write_text("def test_red(): assert False\n")
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
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_functional.py").write_text("def test_green(): pass\n")
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
    assert (tmp_path / "docs/bench.svg").read_text().startswith("<svg")


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


def test_start_up_times_every_stage(tmp_path):
    start_up = script("start_up")
    stages = start_up.seconds(str(tmp_path))
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


def test_the_watched_step_is_the_plain_one_and_a_record():
    from batchnorm.bench.clock import Timed

    done = []
    both = script("watch_overhead")._both(Timed(lambda x: done.append(x)), lambda: done.append(2))
    both(1)
    assert done == [1, 2]
