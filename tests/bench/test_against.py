"""``benchmarks/against.py``: two checkouts, side by side."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/against.py"
ROW = ("tiny", (2, 4, 3, 3), "training", "add-relu", "channels_last", "bfloat16")


@pytest.fixture
def against():
    spec = importlib.util.spec_from_file_location("benchmarks_against", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kind_of_row_can_be_called(against):
    kinds = {row[2:]: row for row in against.rows()}
    assert {kind[1] for kind in kinds} == {"bn", "relu", "add-relu"}
    assert {kind[2:] for kind in kinds} >= {("channels_last", "float32"), ("planes", "bfloat16")}
    for name, _, *kind in kinds.values():
        assert against._call((name, (2, 4, 6, 6), *kind))() is not None


def test_titles_leave_out_defaults_and_tell_rows_apart(against):
    assert against.title(ROW) == "tiny, training, add-relu, channels_last, bfloat16"
    titles = [against.title(row) for row in against.rows()]
    assert titles[:3] == ["tiny, forward", "tiny, training", "tiny, evaluation"]
    assert len(set(titles)) == len(titles)


def pretended(against, monkeypatch, here, other):
    """Replaces the processes: seconds of two rows in each checkout, call after call."""
    asked = []

    def measured(checkout, wanted):
        asked.append((checkout, len(wanted)))
        times = {row: here if checkout == against.ROOT else other for row in wanted}
        return [seconds[against.title(row)] for row, seconds in times.items()]

    monkeypatch.setattr(against, "measured", measured)
    return asked


def test_processes_take_turns_and_only_slow_rows_are_measured_again(against, monkeypatch):
    fast, slow = against.rows()[:2]
    here = {"tiny, forward": 1.02, "tiny, training": 1.04}
    asked = pretended(against, monkeypatch, here, dict.fromkeys(here, 1.0))
    other = Path("/other")
    found = against.compare(other, [fast, slow], 2)
    assert asked[:4] == [(against.ROOT, 2), (other, 2), (other, 2), (against.ROOT, 2)]
    assert [rows for _, rows in asked[4:]] == [1] * 12
    assert (len(found[fast]), len(found[slow])) == (2, 8)
    assert against.ratio(found[slow]) == 1.04


@pytest.mark.parametrize(("seconds", "code"), [(1.0, 0), (1.1, 1)])
def test_a_slower_row_is_marked_and_exit_code_1(
    against, monkeypatch, capsys, tmp_path, seconds, code
):
    (tmp_path / "src/batchnorm").mkdir(parents=True)
    title = "tiny, evaluation"
    pretended(against, monkeypatch, {title: 1e-6 * seconds}, {title: 1e-6})
    only = ["--pairs", "1", "--only", title]
    monkeypatch.setattr(against, "rows", lambda rows=against.rows: rows()[2:3])
    monkeypatch.setattr(sys, "argv", ["against.py", str(tmp_path), *only])
    assert against.main() == code
    _, line = capsys.readouterr().out.splitlines()
    words = ["tiny,", "evaluation", f"{seconds}", "1.0", f"{seconds:.3f}"]
    assert line.split()[:5] == words
    assert line.endswith("SLOWER") == bool(code)


def test_a_process_measures_the_checkout_that_it_was_told(against, tmp_path):
    tiny = against.rows()[2]
    (seconds,) = against.measured(against.ROOT, [tiny])
    assert 0 < seconds < 1
    (tmp_path / "src").mkdir()
    with pytest.raises(SystemExit, match=r"the library was imported from .* instead"):
        against.measured(tmp_path, [tiny])


def test_other_has_to_be_a_checkout(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert "OTHER must be the root of a checkout, a folder with src/batchnorm in it" in done.stderr
