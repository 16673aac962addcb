"""The words of the steps, their JSON, and the walkthrough on a terminal of 80 columns."""

import dataclasses
import io
import json
import re
import subprocess
import sys

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from batchnorm import words as store
from batchnorm.learn import document, examples, terminal, words
from batchnorm.learn.step import Step
from batchnorm.learn.walkthrough import walkthrough

LANGUAGES = ("en", "zh")
SHAPES = [(5, 3), (4, 3, 5), (3, 2, 4, 5), (2, 3, 2, 3, 4)]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def show(steps: list[Step], lang: str, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(terminal.render(steps, lang))
    return console.file.getvalue()


def plain_lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


# Words


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_word_is_printed(lang: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: set[str] = set()

    def speak(section: str, lang: str, form: type[str]):
        say = store.speak(section, lang, form)
        return lambda key, **values: (said.add(key), say(key, **values))[1]

    monkeypatch.setattr(words, "speak", speak)
    for shape in SHAPES:
        show(walkthrough(draw(*shape)), lang)
    assert said == store.read_texts("walkthrough", lang).keys()


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_explanations_quote_the_numbers_of_the_example(
    lang: str, shape: tuple[int, ...]
) -> None:
    steps = {step.name: step for step in walkthrough(draw(*shape), momentum=0.75)}
    told = {name: words.explain(step, lang)[1] for name, step in steps.items()}
    count = draw(*shape).numel() // shape[1]
    assert str(shape[0]) in told["X"]
    assert str(shape[1]) in told["X"]
    assert str(count) in told["var"]
    assert f"{count}/{count - 1}" in told["moving_var"]
    assert "momentum=0.75" in told["moving_mean"]
    assert "0.25" in told["moving_mean"]
    assert "1e-05" in told["X_hat"]
    assert not any("{" in text or "}" in text for text in told.values())


def test_a_fully_connected_layer_has_features_and_a_convolution_channels() -> None:
    for shape, expected in ((5, 3), "特征"), ((4, 3, 5), "通道"):
        steps = walkthrough(draw(*shape))
        assert words.unit(steps[0], "zh") == expected
        assert expected in show(steps, "zh")
    assert words.headline(walkthrough(draw(5, 3)), "en").startswith(
        "Batch normalization after a fully connected layer"
    )
    assert words.headline(walkthrough(draw(4, 3, 5)), "zh").startswith("卷积层")


def test_the_chinese_words_are_the_fields() -> None:
    text = "".join(store.read_texts("walkthrough", "zh").values())
    for term in ("拉伸参数 γ", "偏移参数 β", "有偏方差", "训练集"):
        assert term in text


@pytest.mark.parametrize("call", [words.headline, terminal.render, document.steps_as_json])
def test_an_unknown_language_is_refused_in_one_sentence(call) -> None:
    with pytest.raises(ValueError, match="walkthrough: lang is one of en, zh, got 'fr'; pick one"):
        call(examples.walk("convolution"), "fr")


# The examples


@pytest.mark.parametrize("name", examples.NAMES)
def test_scale_and_shift_show_in_the_examples(name: str) -> None:
    steps = {step.name: step for step in examples.walk(name)}
    X_hat, Y = steps["X_hat"].value, steps["Y"].value
    assert (X_hat - Y).abs().max() > 0.5
    axes = tuple(axis for axis in range(Y.dim()) if axis != 1)
    example = examples.load(name)
    torch.testing.assert_close(Y.mean(dim=axes), example.beta, atol=1e-5, rtol=0)
    std = Y.std(dim=axes, correction=0)
    torch.testing.assert_close(std, example.gamma, atol=1e-3, rtol=1e-3)


def test_an_unknown_example_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="the names are fully-connected, convolution, got 'conv'"):
        examples.walk("conv")


# JSON


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("name", examples.NAMES)
def test_json_gives_every_step_back(name: str, lang: str) -> None:
    steps = examples.walk(name)
    text = json.dumps(document.steps_as_json(steps, lang), allow_nan=False, ensure_ascii=False)
    for step, read in zip(steps, json.loads(text), strict=True):
        assert torch.equal(torch.tensor(read["value"]), step.value)
        assert tuple(read["shape"]) == step.shape
        for field in ("inputs", "intermediates"):
            tensors = getattr(step, field)
            assert read[field].keys() == tensors.keys()
            for key, tensor in tensors.items():
                assert torch.equal(torch.tensor(read[field][key]["value"]), tensor)
                assert read[field][key]["shape"] == list(tensor.shape)
        assert (read["title"], read["explanation"]) == words.explain(step, lang)
        for field in ("name", "part", "formula", "code", "worked", "facts"):
            assert read[field] == getattr(step, field)


def test_json_leaves_out_no_field_but_the_topic() -> None:
    fields = {field.name for field in dataclasses.fields(Step)} - {"topic"}
    for record in document.steps_as_json(examples.walk("convolution")):
        assert record.keys() == fields | {"title", "explanation", "shape"}


# The terminal


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize(
    "steps",
    [
        *(examples.walk(name) for name in examples.NAMES),
        *(walkthrough(100 * draw(*shape)) for shape in SHAPES),
        walkthrough(draw(64, 300)),
        walkthrough(1e4 * draw(3, 40, 30, 30)),
        walkthrough(draw(40, 20, 50)),
        walkthrough(1e4 * draw(2, 2, 6)),
    ],
    ids=lambda steps: str(steps[0].shape),
)
def test_no_line_is_wider_than_80_cells(steps: list[Step], lang: str) -> None:
    for width in (80, 200):
        lines = show(steps, lang, width).splitlines()
        assert max(cell_len(line.rstrip()) for line in lines) <= 80
        assert not any("…" in line for line in lines if "……" not in line)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_fully_connected_example_shows_the_numbers_of_the_notes(lang: str) -> None:
    unit = {"en": "feature", "zh": "特征"}[lang]
    lines = plain_lines(show(examples.walk("fully-connected"), lang))
    assert f"{unit} 0 {unit} 1" in lines
    for expected in (
        "X[0] 0.2182 0.9085",
        "X[9] 0.5688 0.2629",
        "mean 0.3445 0.4517",
        "var 0.0225 0.0924",
        "X_hat[0] -0.8425 1.5032",
        "gamma 2.0000 0.5000",
        "Y[0] -0.6851 -0.2484",
        "moving_var 0.9022 0.9092",
        "Y_own[1] 1.0000 -1.0000",
        "Y_alone 1.0000 -1.0000",
    ):
        assert expected in lines


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_convolution_example_shows_the_numbers_of_the_notes(lang: str) -> None:
    channel = {"en": "channel", "zh": "通道"}[lang]
    lines = plain_lines(show(examples.walk("convolution"), lang))
    for expected in (
        "X[0] X[1]",
        f"{channel} 0 0.3377 0.0040 0.1068 0.5269 0.7035 0.4117",
        "0.8988 0.8476 0.4406 0.2906 0.5506 0.3359",
        f"{channel} 2 0.5907 0.4466 0.4668",
        "mean 0.4546 0.6116 0.5013",
    ):
        assert expected in lines
    text = " ".join(lines)
    assert "X (2, 3, 2, 3) → mean_over_0 (1, 3, 2, 3)" in text
    assert "mean_over_0_2 (1, 3, 1, 3) → mean (1, 3, 1, 1)" in text
    assert "X (2, 3, 2, 3); mean, var (1, 3, 1, 1) → X_hat (2, 3, 2, 3)" in text


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("name", examples.NAMES)
def test_every_step_tells_its_number_title_text_formula_and_code(name: str, lang: str) -> None:
    steps = examples.walk(name)
    text = show(steps, lang)
    lines = plain_lines(text)
    squeezed = "".join(text.split())
    for number, step in enumerate(steps, start=1):
        title, explanation = words.explain(step, lang)
        assert " ".join(f"{number} {title}".split()) in lines
        assert "".join(explanation.split()) in squeezed
        assert "".join(step.formula.split()) in squeezed
        assert "".join(step.worked.split()) in squeezed
        for line in step.code.splitlines():
            assert any(shown.endswith(line) for shown in lines)
    for step in (steps[0], steps[-1]):
        assert sum(line.startswith(words.part(step, lang)) for line in lines) == 1


def test_old_and_new_moving_values_are_told_apart() -> None:
    lines = plain_lines(show(examples.walk("fully-connected"), "zh"))
    assert lines.index("旧 moving_mean 0.0000 0.0000") < lines.index("moving_mean 0.0344 0.0452")


def test_a_large_mini_batch_is_cut_down_and_says_so() -> None:
    lines = plain_lines(show(walkthrough(draw(64, 300)), "en"))
    assert any(line.startswith("X[11]") and line.endswith("...") for line in lines)
    assert not any(line.startswith("X[12]") for line in lines)
    assert "... ... ... ..." in " ".join(lines)
    assert len(lines) < 300
    maps = plain_lines(show(walkthrough(draw(3, 40, 30, 30)), "en"))
    assert any(line.startswith("channel 5 ") for line in maps)
    assert not any(line.startswith("channel 6 ") for line in maps)
    assert len(maps) < 500


def test_columns_of_examples_fit_or_are_left_out() -> None:
    lines = plain_lines(show(walkthrough(draw(4, 3, 5)), "en"))
    assert "X[0]" in lines
    assert "Y[0]" in lines
    assert not any("X[1]" in line for line in lines)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_line_of_shapes_never_breaks_inside_a_shape(lang: str) -> None:
    for shape in SHAPES:
        lines = show(walkthrough(draw(*shape)), lang).splitlines()
        assert all(line.count("(") == line.count(")") for line in lines if " → " in line)
        assert terminal.NO_BREAK not in "".join(line for line in lines if " → " in line)


def test_numbers_of_a_map_stand_below_each_other() -> None:
    text = show(walkthrough(100 * draw(3, 2, 4, 5))[:1], "en")
    rows = [line for line in text.splitlines() if line.count(".") >= 5 and "axis" not in line]
    assert len(rows) == 8
    points = [[place for place, sign in enumerate(row) if sign == "."][:5] for row in rows]
    assert all(places == points[0] for places in points)


def test_zero_is_never_negative() -> None:
    X = torch.tensor([[-1e-6, 1.0], [1e-6, 2.0]])
    assert not re.search(r"-0\.0000(?!\d)", show(walkthrough(X), "en"))


def test_color_only_where_the_terminal_has_it() -> None:
    steps = examples.walk("convolution")
    assert "\x1b[" not in show(steps, "en")
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(terminal.render(steps, "en"))
    assert "\x1b[1;36mNormalize" in console.file.getvalue()


# Breaking lines


def test_english_lines_break_at_spaces() -> None:
    assert terminal.wrap("one two three four", 9) == "one two\nthree\nfour"


def test_chinese_lines_break_anywhere_but_before_a_closing_mark() -> None:
    assert terminal.wrap("减去均值，再除以标准差。", 8) == "减去均\n值，再除\n以标准\n差。"


def test_mixed_lines_keep_words_and_brackets_whole() -> None:
    assert terminal.wrap("也就是 eval() 做的事（推理）", 14) == "也就是 eval()\n做的事（推理）"
    assert terminal.wrap("长度为 1，可以相减", 8) == "长度为\n1，可以\n相减"


@pytest.mark.parametrize("lang", LANGUAGES)
def test_no_explanation_has_a_line_that_begins_with_a_closing_mark(lang: str) -> None:
    for name in examples.NAMES:
        for step in examples.walk(name):
            told = words.explain(step, lang)[1]
            wrapped = terminal.wrap(told, 30).split("\n")
            assert max(map(cell_len, wrapped)) <= max(30, *map(cell_len, told.split()))
            assert not any(line[0] in "，。；：、）？！" for line in wrapped)
            assert "".join(told.split()) == "".join("".join(wrapped).split())


# Imports


def test_the_walkthrough_itself_needs_no_rich() -> None:
    code = "import sys, batchnorm.learn.walkthrough as w; print('rich' in sys.modules, w.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "batchnorm.learn.walkthrough"]
