"""The walkthrough ends with a comparison: a wrong line of its code is an error."""

from dataclasses import replace

import pytest
import torch

from batchnorm import scratch
from batchnorm.learn import recipes, walkthrough


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def misprint(monkeypatch: pytest.MonkeyPatch, name: str, right: str, wrong: str) -> None:
    """Changes a piece of code of one step."""

    def changed(recipe: recipes.Recipe) -> recipes.Recipe:
        if recipe.name != name:
            return recipe
        assert right in recipe.code
        return replace(recipe, code=recipe.code.replace(right, wrong))

    training, inference, alone = recipes.training, recipes.inference, recipes.alone
    monkeypatch.setattr(recipes, "training", lambda rank: list(map(changed, training(rank))))
    monkeypatch.setattr(recipes, "inference", lambda rank: list(map(changed, inference(rank))))
    monkeypatch.setattr(recipes, "alone", lambda *args, **named: changed(alone(*args, **named)))


@pytest.mark.parametrize(
    ("name", "right", "wrong", "noticed"),
    [
        ("mean", ".mean(", ".amax(", "Y"),
        ("var", "** 2", ".abs()", "Y"),
        ("var", "keepdim=True)", "keepdim=True) * 1.001", "Y"),
        ("X_hat", "torch.sqrt(var + eps)", "(torch.sqrt(var) + eps)", "Y"),
        ("Y", "+ beta", "- beta", "Y"),
        ("moving_mean", "(1 - momentum)", "momentum", "moving_mean"),
        ("moving_var", "* var", "* var * 20 / 19", "moving_var"),
        ("Y_moving", "P - moving_mean", "P - mean", "Y_moving"),
        ("own_mean", "P.mean", "X.mean", "Y_own"),
        ("Y_own", "own_var + eps", "own_var - eps", "Y_own"),
        ("Y_alone", "P[:1]", "P[1:2]", "Y_alone"),
    ],
)
def test_a_wrong_line_of_code_is_an_error(
    name: str, right: str, wrong: str, noticed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"X": draw(4, 3, 5), "beta": torch.ones(3), "prediction": draw(6, 3, 5)}
    walkthrough.walkthrough(**arguments, eps=0.01)
    misprint(monkeypatch, name, right, wrong)
    with pytest.raises(
        RuntimeError,
        match=rf"^walkthrough: {noticed} must be that of batchnorm\.scratch\.batch_norm, got "
        r"numbers that differ by up to \d.*; a line of the lesson's code is wrong\.$",
    ):
        walkthrough.walkthrough(**arguments, eps=0.01)


def test_a_result_that_is_nan_on_one_side_only_is_an_error(monkeypatch) -> None:
    misprint(monkeypatch, "Y", "+ beta", "+ beta / 0 * 0")
    with pytest.raises(RuntimeError, match=r"^walkthrough: Y must be that of.*up to nan; a line"):
        walkthrough.walkthrough(draw(4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("mean", "spread"), [(0, 1), (100, 1), (0, 1e4), (1e8, 1), (5, 0), (1e6, 1e-3), (0, 1e-6)]
)
def test_rounding_is_no_error(mean: float, spread: float, dtype: torch.dtype) -> None:
    for shape in [(64, 30), (4, 3, 5), (5, 2, 30, 30), (2, 3, 2, 3, 4)]:
        X = (mean + spread * draw(*shape).double()).to(dtype)
        walkthrough.walkthrough(X, prediction=X[:2] * 2)


def test_the_lines_of_the_lesson_are_those_of_the_function(monkeypatch) -> None:
    """X_hat and Y, and the old moving averages, are computed by the very lines of scratch.py."""
    with open(scratch.__file__, encoding="utf-8") as file:
        function = file.read().replace(".detach()", "")
    lines = {recipe.name: recipe.code for recipe in recipes.training(4)}
    for name in ("X_hat", "Y", "moving_mean", "moving_var"):
        assert f"    {lines[name]}\n" in function
    assert lines["var"].replace("(0, 2, 3)", "axes") in function
