"""The lesson as tables: name, formula and code of every step, for an input of two to five axes.

The data ``X`` and ``P``, the parameters and the old moving statistics are given; every other name
that a line of code reads is the name of an earlier step, or is set on a line above.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.learn import notation


@dataclass(frozen=True)
class Recipe:
    """One step before it is run.

    Attributes:
        name: The variable that the code assigns last: the result of the step.
        formula: The formula in the notation of the book; empty for data that are given.
        code: The same in PyTorch; empty for data that are given.
        topic: Key of the title and the explanation, where it is not ``name``.
    """

    name: str
    formula: str = ""
    code: str = ""
    topic: str = ""


def training(rank: int) -> list[Recipe]:
    """Returns the steps of one training pass over ``X``."""
    dims = notation.dims(rank)
    squares = f"({notation.index('X', rank)} - μ[c])²"
    return [
        Recipe("X"),
        *_means(rank),
        Recipe(
            "var",
            f"σ²[c] = {notation.average(squares, rank, notation.reduce_axes(rank))}",
            f"var = ((X - mean) ** 2).mean(dim={dims}, keepdim=True)",
        ),
        Recipe(
            "X_hat",
            "x̂ = (x - μ) / √(σ² + ε)",
            "X_hat = (X - mean) / torch.sqrt(var + eps)",
        ),
        Recipe("Y", "y = γ · x̂ + β", "Y = gamma * X_hat + beta"),
        Recipe(
            "moving_mean",
            "μ_moving ← m · μ_moving + (1 - m) · μ",
            "moving_mean = momentum * moving_mean + (1 - momentum) * mean",
        ),
        Recipe(
            "moving_var",
            "σ²_moving ← m · σ²_moving + (1 - m) · σ²",
            "moving_var = momentum * moving_var + (1 - momentum) * var",
        ),
    ]


def inference(rank: int) -> list[Recipe]:
    """Returns the steps of inference on ``P``: by the moving statistics, and by its own."""
    dims, axes = notation.dims(rank), notation.reduce_axes(rank)
    entry = notation.index("P", rank)
    return [
        Recipe("P"),
        Recipe(
            "Y_moving",
            "y = γ · (x - μ_moving) / √(σ²_moving + ε) + β",
            "X_hat = (P - moving_mean) / torch.sqrt(moving_var + eps)\n"
            "Y_moving = gamma * X_hat + beta",
        ),
        Recipe(
            "own_mean",
            f"μ_P[c] = {notation.average(entry, rank, axes)}",
            f"own_mean = P.mean(dim={dims}, keepdim=True)",
        ),
        Recipe(
            "own_var",
            f"σ²_P[c] = {notation.average(f'({entry} - μ_P[c])²', rank, axes)}",
            f"own_var = ((P - own_mean) ** 2).mean(dim={dims}, keepdim=True)",
        ),
        Recipe(
            "Y_own",
            "y = γ · (x - μ_P) / √(σ²_P + ε) + β",
            "X_hat = (P - own_mean) / torch.sqrt(own_var + eps)\nY_own = gamma * X_hat + beta",
        ),
    ]


def alone(rank: int, *, is_own_mean: bool) -> Recipe:
    """Returns the last step: the first example of ``P``, by the statistics of itself alone.

    Args:
        rank: Number of axes of the input, 2 to 5.
        is_own_mean: The example has one value per channel, which therefore is the mean.
    """
    dims = notation.dims(rank)
    return Recipe(
        "Y_alone",
        "y = γ · (x - μ_P[0]) / √(σ²_P[0] + ε) + β",
        "alone = P[:1]\n"
        f"mean = alone.mean(dim={dims}, keepdim=True)\n"
        f"var = ((alone - mean) ** 2).mean(dim={dims}, keepdim=True)\n"
        "X_hat = (alone - mean) / torch.sqrt(var + eps)\n"
        "Y_alone = gamma * X_hat + beta",
        topic="Y_alone_is_beta" if is_own_mean else "Y_alone",
    )


def _means(rank: int) -> list[Recipe]:
    """Returns the mean of ``X``, one axis at a time."""
    axes = notation.reduce_axes(rank)
    recipes: list[Recipe] = []
    source = "X"
    for position, axis in enumerate(axes):
        done = axes[: position + 1]
        name = "mean" if done == axes else f"mean_over_{'_'.join(map(str, done))}"
        result = notation.index("μ" if done == axes else name, rank, done)
        term = notation.index(source, rank, axes[:position])
        recipes.append(
            Recipe(
                name,
                f"{result} = {notation.average(term, rank, (axis,))}",
                f"{name} = {source}.mean(dim={axis}, keepdim=True)",
                topic="mean_at_once" if axes == (0,) else name,
            )
        )
        source = name
    return recipes
