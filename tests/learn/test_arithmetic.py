"""The first number of each step worked by hand: a calculator finds the printed result."""

import math
import re

import pytest
import torch

from batchnorm.learn import arithmetic, examples
from batchnorm.learn.step import Step
from batchnorm.learn.walkthrough import walkthrough

SHAPES = [(5, 3), (3, 2), (4, 3, 5), (3, 2, 4, 5), (2, 3, 2, 3, 4)]


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def calculate(expression: str) -> float:
    python = expression.replace("×", "*").replace("√", "math.sqrt").replace("²", "**2")
    return eval(python, {"math": math})


def worked(steps: list[Step]) -> dict[str, tuple[str, str]]:
    """Expression and result of each step that is worked by hand, by name."""
    return {step.name: tuple(step.worked.split(" ≈ ")) for step in steps if step.worked}


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_calculator_finds_the_result_from_the_printed_digits(
    shape: tuple[int, ...], scale: float
) -> None:
    steps = walkthrough(
        draw(*shape, scale=scale), gamma=draw(shape[1]), beta=draw(1, shape[1]).flatten()
    )
    complete = set()
    for name, (expression, result) in worked(steps).items():
        if "..." not in expression:
            assert calculate(expression) == pytest.approx(float(result), abs=0.5e-4), name
            complete.add(name)
    assert {"X_hat", "Y", "moving_mean", "moving_var", "Y_moving", "Y_own", "Y_alone"} <= complete


@pytest.mark.parametrize("name", examples.NAMES)
def test_long_sums_of_the_examples_come_out_from_the_digits_of_the_tables(name: str) -> None:
    """Everything a reader adds up has the four decimals of the tables."""
    steps = {step.name: step for step in examples.walk(name)}
    for data, mean, var in (("X", "mean", "var"), ("P", "own_mean", "own_var")):
        printed = [round(value, 4) for value in steps[data].value[:, 0].flatten().tolist()]
        shown = round(steps[mean].value.flatten()[0].item(), 4)
        assert sum(printed) / len(printed) == pytest.approx(shown, abs=0.5e-4)
        spread = sum((value - shown) ** 2 for value in printed) / len(printed)
        assert spread == pytest.approx(steps[var].value.flatten()[0].item(), abs=0.5e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_printed_result_is_the_value_of_the_step(shape: tuple[int, ...]) -> None:
    steps = walkthrough(draw(*shape))
    for step in steps:
        if step.name in ("X", "P"):
            assert step.worked == ""
        else:
            assert step.worked.endswith(f" ≈ {step.value.flatten()[0].item():.4f}")


def test_the_arithmetic_of_the_fully_connected_example() -> None:
    assert {step.name: step.worked for step in examples.walk("fully-connected")} == {
        "X": "",
        "mean": "(0.2182 + 0.3319 + ... + 0.5688) / 10 ≈ 0.3445",
        "var": "((0.2182 - 0.3445)² + ... + (0.5688 - 0.3445)²) / 10 ≈ 0.0225",
        "X_hat": "(0.2182 - 0.34448) / √(0.022454 + 1e-05) ≈ -0.8425",
        "Y": "2 × (-0.84255) + 1 ≈ -0.6851",
        "moving_mean": "0.9 × 0 + (1 - 0.9) × 0.34448 ≈ 0.0344",
        "moving_var": "0.9 × 1 + (1 - 0.9) × 0.02245 ≈ 0.9022",
        "P": "",
        "Y_moving": "2 × (0.2 - 0.03445) / √(0.90225 + 1e-05) + 1 ≈ 1.3486",
        "own_mean": "(0.2 + 0.4 + 0.6) / 3 ≈ 0.4000",
        "own_var": "((0.2 - 0.4)² + (0.4 - 0.4)² + (0.6 - 0.4)²) / 3 ≈ 0.0267",
        "Y_own": "2 × (0.2 - 0.4) / √(0.026667 + 1e-05) + 1 ≈ -1.4490",
        "Y_alone": "2 × (0.2 - 0.2) / √(0 + 1e-05) + 1 ≈ 1.0000",
    }


def test_negative_numbers_are_bracketed_and_never_a_negative_zero() -> None:
    X = torch.tensor([[-1.0], [-2.0], [3.0]])
    steps = walkthrough(X, gamma=torch.tensor([-1.0]), beta=torch.tensor([-1e-11]))
    hand = {step.name: step.worked for step in steps}
    assert hand["mean"] == "(-1 + (-2) + 3) / 3 ≈ 0.0000"
    assert hand["Y"] == "-1 × (-0.4629) + 0 ≈ 0.4629"
    assert not any("-0.0000" in text for text in hand.values())


def test_a_mean_takes_the_numbers_of_the_first_channel() -> None:
    X = torch.arange(12.0).reshape(2, 2, 3)
    hand = {step.name: step.worked for step in walkthrough(X)}
    assert hand["mean_over_0"] == "(0 + 6) / 2 ≈ 3.0000"
    assert hand["mean"] == "(3 + 4 + 5) / 3 ≈ 4.0000"
    assert hand["own_mean"] == "(0 + 1 + 2 + 6 + 7 + 8) / 6 ≈ 4.0000"


def test_long_sums_show_their_ends_and_fit_a_line() -> None:
    hand = {step.name: step.worked for step in walkthrough(1000 * draw(30, 2) - 5000)}
    number = r"\(?-\d{4}\.\d+\)?"
    assert re.fullmatch(rf"\({number} \+ {number} \+ ... \+ {number}\) / 30 ≈ .*", hand["mean"])
    square = rf"\({number} - {number}\)²"
    assert re.fullmatch(rf"\({square} \+ ... \+ {square}\) / 30 ≈ .*", hand["var"])
    short = walkthrough(torch.full((13, 1), 2.0))[1].worked
    assert short == "(2 + 2 + ... + 2) / 13 ≈ 2.0000"


@pytest.mark.parametrize("size", [1e30, 1e200, 1e308])
def test_numbers_beyond_the_calculator_are_written_all_the_same(size: float) -> None:
    X = torch.tensor([[size], [-size]], dtype=torch.float64)
    hand = {step.name: step.worked for step in walkthrough(X)}
    assert hand["X_hat"].endswith("≈ 0.0000" if size > 1e154 else "≈ 1.0000")


def test_four_decimals_are_shown_where_no_number_of_them_would_do() -> None:
    written = arithmetic.work_out("x̂ = x - μ", {"x": torch.ones(1), "mean": 0.5}, torch.ones(1))
    assert written == "1 - 0.5 ≈ 1.0000"
