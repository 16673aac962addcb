"""The steps of one training pass: means, variance, x̂, scale and shift, moving statistics."""

import torch
from jaxtyping import Float
from torch import Tensor

from batchnorm.learn import arithmetic, notation
from batchnorm.learn.step import Layer, Step


def train(X: Float[Tensor, "n c *spatial"], layer: Layer) -> list[Step]:
    """Go through one training pass over X; the last two steps are the new moving statistics."""
    averages = _average_axis_by_axis(X)
    mean = averages[-1].value
    spread = _spread(X, mean)
    normalized = _normalize(X, mean, spread.value, layer.eps)
    return [
        Step(
            name="X",
            topic="X",
            part="training",
            formula=f"X: {notation.lay_out(X.dim())} = {tuple(X.shape)}",
            value=X,
            facts={"examples": X.shape[0], "channels": X.shape[1]},
        ),
        *averages,
        spread,
        normalized,
        _scale_and_shift(normalized.value, layer),
        _move_mean(mean, layer),
        _move_var(spread.value, layer, X.numel() // X.shape[1]),
    ]


def _average_axis_by_axis(X: Tensor) -> list[Step]:
    rank, axes = X.dim(), notation.reduce_axes(X.dim())
    steps: list[Step] = []
    source, value = "X", X
    for position, axis in enumerate(axes):
        done = axes[: position + 1]
        name = "mean" if done == axes else f"mean_over_{'_'.join(map(str, done))}"
        result = notation.index("μ" if done == axes else name, rank, done)
        term = notation.index(source, rank, axes[:position])
        reduced = value.mean(dim=axis, keepdim=True)
        steps.append(
            Step(
                name=name,
                topic="mean_at_once" if axes == (0,) else name,
                part="training",
                formula=f"{result} = {notation.average(term, rank, (axis,))}",
                code=f"{name} = {source}.mean(dim={axis}, keepdim=True)",
                worked=arithmetic.conclude(arithmetic.average(value, (axis,)), reduced),
                inputs={source: value},
                value=reduced,
                facts={
                    "size": value.shape[axis],
                    "count": X.numel() // X.shape[1],
                    "dims": notation.dims(rank),
                },
            )
        )
        source, value = name, reduced
    return steps


def _spread(X: Tensor, mean: Tensor) -> Step:
    rank, axes = X.dim(), notation.reduce_axes(X.dim())
    var = ((X - mean) ** 2).mean(dim=axes, keepdim=True)
    term = f"({notation.index('X', rank)} - μ[c])²"
    return Step(
        name="var",
        topic="var",
        part="training",
        formula=f"σ²[c] = {notation.average(term, rank, axes)}",
        code=f"var = ((X - mean) ** 2).mean(dim={notation.dims(rank)}, keepdim=True)",
        worked=arithmetic.conclude(arithmetic.spread(X, mean, axes), var),
        inputs={"X": X, "mean": mean},
        value=var,
        facts={"count": X.numel() // X.shape[1]},
    )


def _normalize(X: Tensor, mean: Tensor, var: Tensor, eps: float) -> Step:
    X_hat = (X - mean) / torch.sqrt(var + eps)
    return Step(
        name="X_hat",
        topic="X_hat",
        part="training",
        formula="x̂ = (x - μ) / √(σ² + ε)",
        code="X_hat = (X - mean) / torch.sqrt(var + eps)",
        worked=arithmetic.conclude(arithmetic.standardize(X, mean, var, eps), X_hat),
        inputs={"X": X, "mean": mean, "var": var},
        value=X_hat,
        facts={"eps": eps},
    )


def _scale_and_shift(X_hat: Tensor, layer: Layer) -> Step:
    Y = layer.gamma * X_hat + layer.beta
    expression = arithmetic.stretch(layer.gamma, arithmetic.number(X_hat), layer.beta)
    return Step(
        name="Y",
        topic="Y",
        part="training",
        formula="y = γ · x̂ + β",
        code="Y = gamma * X_hat + beta",
        worked=arithmetic.conclude(expression, Y),
        inputs={"X_hat": X_hat, "gamma": layer.gamma, "beta": layer.beta},
        value=Y,
    )


def _move_mean(mean: Tensor, layer: Layer) -> Step:
    old, momentum = layer.moving_mean, layer.momentum
    moved = momentum * old + (1.0 - momentum) * mean
    return Step(
        name="moving_mean",
        topic="moving_mean",
        part="training",
        formula="μ_moving ← m · μ_moving + (1 - m) · μ",
        code="moving_mean = momentum * moving_mean + (1.0 - momentum) * mean",
        worked=arithmetic.conclude(arithmetic.blend(momentum, old, mean), moved),
        inputs={"moving_mean": old, "mean": mean},
        value=moved,
        facts={"momentum": momentum, "rest": 1.0 - momentum},
    )


def _move_var(var: Tensor, layer: Layer, count: int) -> Step:
    old, momentum = layer.moving_var, layer.momentum
    moved = momentum * old + (1.0 - momentum) * var
    return Step(
        name="moving_var",
        topic="moving_var",
        part="training",
        formula="σ²_moving ← m · σ²_moving + (1 - m) · σ²",
        code="moving_var = momentum * moving_var + (1.0 - momentum) * var",
        worked=arithmetic.conclude(arithmetic.blend(momentum, old, var), moved),
        inputs={"moving_var": old, "var": var},
        value=moved,
        facts={"count": count, "count_less_one": count - 1},
    )
