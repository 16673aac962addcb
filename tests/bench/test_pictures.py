"""Pictures of the READMEs: their stamps, and what the statistics picture shows."""

import ast
import importlib.util
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from batchnorm.experiment.results import Results
from report_results import results

FOLDER = Path(__file__).parents[2] / "benchmarks"
PICTURES = ("bench.svg", "report.png", "statistics.svg", "statistics.zh.svg")
EPOCHS = [
    {"epoch": n, "test_accuracy_running": running, "test_accuracy_population": population}
    for n, (running, population) in enumerate([(0.7, 0.75), (0.6, 0.8), (0.85, 0.86)], start=1)
]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)

    def script(name):
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return script


@pytest.mark.parametrize("picture", PICTURES)
def test_a_picture_carries_the_version_of_the_code_that_draws_it(load, picture):
    stamps = load("stamps")
    script = "readme_table.py" if picture == "bench.svg" else "readme_pictures.py RUN"
    assert stamps.stamp_in(stamps.ROOT / "docs" / picture) == stamps.stamp(picture), (
        f"docs/{picture} was drawn by other code; draw it again: python benchmarks/{script}"
    )


def test_a_stamp_follows_code_and_words_but_not_comments(load, monkeypatch, tmp_path):
    stamps = load("stamps")
    monkeypatch.setattr(stamps, "ROOT", tmp_path)
    folder = tmp_path / "src/batchnorm/charts"
    folder.mkdir(parents=True)

    def stamp(code, words="{}"):
        (folder / "drawing.py").write_text(code)
        (folder / "words.json").write_text(words)
        return stamps.stamp("statistics.svg")

    first = stamp('"""Text."""\ndef f():\n    """Text."""\n    return 1\n')
    assert re.fullmatch(r"batchnorm \d+\.\d+\.\d+, drawn by [0-9a-f]{12}", first)
    assert stamp("def f():  # a comment\n\n    return 1\n") == first
    assert stamp("def f(): return 2\n") != first
    assert stamp("def f(): return 1\n", '{"a": "b"}') != first


def test_a_stamp_is_read_back_and_missing_ones_are_none(load, tmp_path):
    stamps = load("stamps")
    svg, png = tmp_path / "statistics.svg", tmp_path / "report.png"
    plain = '<svg xmlns="http://www.w3.org/2000/svg" width="1"><style>a</style></svg>'
    svg.write_text(plain)
    assert stamps.stamp_in(svg) is None
    stamps.write_svg(svg, plain)
    assert stamps.stamp_in(svg) == stamps.stamp("statistics.svg")
    stream = io.BytesIO()
    Image.new("RGB", (2, 3), "red").save(stream, "PNG")
    png.write_bytes(stream.getvalue())
    assert stamps.stamp_in(png) is None
    stamps.write_png(png, stream.getvalue())
    assert stamps.stamp_in(png) == stamps.stamp("report.png")
    assert Image.open(png).getpixel((1, 2)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("name", "gap"), [("statistics.svg", "20.0 points apart"), ("statistics.zh.svg", "20.0")]
)
def test_the_statistics_picture_names_both_lines_and_the_widest_gap(load, name, gap):
    pictures = load("readme_pictures")
    words = pictures.WORDS[name]
    root = ElementTree.fromstring(pictures.statistics_chart(EPOCHS, words))
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {words["title"], words["population"], words["running"], words["x"]} <= set(texts)
    (found,) = [text for text in texts if gap in text]
    assert found == words["gap"].format(points=20)
    assert "75.0%, 80.0%, 86.0%" in root.get("aria-label")
    assert "70.0%, 60.0%, 85.0%" in root.get("aria-label")


def test_a_run_without_batch_norm_is_refused(load, monkeypatch, tmp_path, capsys):
    from batchnorm.experiment.run_directory import RunDirectory

    pictures = load("readme_pictures")
    without = Results.model_validate(results(("none",)))
    monkeypatch.setattr(RunDirectory, "results", lambda self: without)
    monkeypatch.setattr("sys.argv", ["readme_pictures.py", str(tmp_path)])
    assert pictures.main() == 2
    assert f"{tmp_path}: there is no run of batchnorm; train one first." in capsys.readouterr().err


def test_a_run_gives_all_pictures_but_that_of_the_benchmark(load, monkeypatch, tmp_path):
    from batchnorm.experiment.run_directory import RunDirectory

    pictures = load("readme_pictures")
    (tmp_path / "report.json").write_text(json.dumps(results()))
    monkeypatch.setattr("sys.argv", ["readme_pictures.py", str(tmp_path)])
    monkeypatch.setattr(pictures, "DOCS", tmp_path)
    monkeypatch.setattr(pictures, "report_picture", lambda results: results.runs[0].norm.encode())
    monkeypatch.setattr(pictures.stamps, "write_png", lambda path, png: path.write_bytes(png))
    assert pictures.main() == 0
    assert RunDirectory(tmp_path).results().runs[0].norm == "batchnorm"
    assert (tmp_path / "report.png").read_bytes() == b"batchnorm"
    for name in pictures.WORDS:
        assert "<metadata>" in (tmp_path / name).read_text()


def test_every_script_says_how_it_is_used():
    for path in FOLDER.glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
