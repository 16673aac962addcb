"""`batchnorm bench` as a user meets it."""

import json
from xml.etree import ElementTree

import pytest

from batchnorm import cli
from batchnorm.bench import cases, expected, measure
from batchnorm.cli import measurement

# typer demands the annotation typer.Context and hands over an object of another class.
pytestmark = pytest.mark.untyped

SMALL = {"resnet50": ((2, 4, 6, 6), (2, 5, 3, 3)), "nc": ((12, 5),)}


@pytest.fixture
def small_shapes(monkeypatch):
    for shapes in (cases.SHAPES, cases.QUICK_SHAPES):
        for group in cases.GROUPS:
            monkeypatch.setitem(shapes, group, SMALL.get(group, ()))
    monkeypatch.setattr(measurement, "keep_freed_memory", lambda: None)


def run(capsys, *arguments):
    code = cli.run(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_table_is_the_result(capsys, small_shapes, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(capsys, "--only", "resnet50", "--seconds", "0", "--threads", "1")
    assert (code, err) == (0, "")
    assert "torch 2." in out
    assert "ResNet-50, 32 images · float32 channels_last · BN · forward and backward" in out
    assert out.count("2×4×6×6") >= 8
    assert max(map(len, out.splitlines())) <= 80


def test_json_is_one_object_of_the_rows_asked_for(capsys, small_shapes):
    asked = ["--all", "--only", "resnet50, relu, nchw, float32, forward, eval"]
    code, out, _ = run(capsys, *asked, "--seconds", "0", "--threads", "1", "--json")
    assert code == 0
    results = json.loads(out)
    assert results["schema"] == 2
    assert {(row["variant"], row["pass"]) for row in results["rows"]} == {
        ("relu", "forward"),
        ("relu", "eval"),
    }
    assert results["steps"] == []
    assert results["settings"] == {"seconds": 0.0, "rounds": 9, "compile": False}


def test_quick_measures_less_and_svg_draws_it(capsys, small_shapes, tmp_path):
    path = tmp_path / "speed.svg"
    code, out, err = run(
        capsys, "--quick", "--only", "nc", "--threads", "1", "--svg", path, "--json"
    )
    assert code == 0
    assert json.loads(out)["settings"]["rounds"] == 5
    assert json.loads(out)["settings"]["seconds"] == pytest.approx(0.1)
    assert err == f"Chart: {path}\n"
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert [file.name for file in tmp_path.iterdir()] == ["speed.svg"]


def test_disagreement_prints_no_table_and_exits_with_1(capsys, small_shapes, monkeypatch, tmp_path):
    monkeypatch.setitem(expected.TOLERANCE, "float32", 1e-12)
    path = tmp_path / "speed.svg"
    code, out, err = run(capsys, "--only", "nc", "--svg", path)
    assert (code, out) == (1, "")
    *sentences, last = err.splitlines()
    assert sentences
    for sentence in sentences:
        assert sentence.startswith("batchnorm: nc 12x5 float32 nchw bn: ")
        assert "of the largest value, 1e-12 is allowed." in sentence
    assert last == "batchnorm: no times are shown while results disagree."
    assert not path.exists()


def test_memory_that_cannot_be_kept_is_said(capsys, small_shapes, monkeypatch):
    monkeypatch.setattr(measurement, "keep_freed_memory", lambda: "the C library is not glibc")
    _, _, err = run(capsys, "--only", "nc,eval", "--seconds", "0", "--json")
    assert err == (
        "Freed memory is not kept, so large outputs cost page faults: the C library is not glibc.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "nc,vgg"], "--only expects words out of resnet50, lenet, nc, 1d, 3d, steps, "),
        (["--only", "nc,nhwc"], "separated by commas, got 'nc,nhwc'."),
        (["--only", ""], "separated by commas, got ''."),
        (["--seconds", "-1"], "Invalid value for '--seconds'"),
        (["--quick", "--all"], "--quick and --all exclude each other; choose one."),
        (["--only", "nc,channels_last"], "no row fits nc, channels_last; leave out a word"),
        (["--svg", "/nowhere/a.svg"], "--svg: there is no folder /nowhere."),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_2(capsys, arguments, sentence):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.startswith("batchnorm: ")
    assert err.count("\n") == 1


def test_compile_without_a_compiler_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, out, err = run(capsys, "--compile")
    assert (code, out) == (2, "")
    assert "needs a C++ compiler for torch.compile, and there is no no-such-compiler" in err


def test_compile_is_one_more_rival(capsys, small_shapes, monkeypatch):
    monkeypatch.setattr(measurement, "_demand_compiler", lambda: None)
    monkeypatch.setattr("torch.nn.Module.compile", lambda self, **options: None)
    code, out, _ = run(capsys, "--compile", "--only", "nc,both", "--seconds", "0", "--json")
    assert code == 0
    (row,) = json.loads(out)["rows"]
    assert set(row["speedup"]) == {"torch", "compile"}


def test_ctrl_c_is_no_traceback(capsys, small_shapes, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "interleaved", interrupt)
    code, out, err = run(capsys, "--only", "nc")
    assert (code, out, err) == (130, "", "Interrupted; an unfinished measurement is not shown.\n")
