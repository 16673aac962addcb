"""The steps of inference: with moving statistics, with the data's own, and one example alone."""

import torch
from jaxtyping import Float
from torch import Tensor

from batchnorm.learn import arithmetic, notation
from batchnorm.learn.step import Layer, Step


def infer(P: Float[Tensor, "n c *spatial"], layer: Layer) -> list[Step]:
    """Go through inference on P; with several examples, the last step is the first one alone."""
    steps = [
        Step(
            name="P",
            topic="P",
            part="inference",
            formula=f"P: {notation.lay_out(P.dim())} = {tuple(P.shape)}",
            value=P,
            facts={"examples": P.shape[0]},
        ),
        _predict_with_moving_statistics(P, layer),
        *_predict_with_own_statistics(P, layer),
    ]
    return steps if P.shape[0] == 1 else [*steps, _predict_alone(P[:1], layer)]


def _predict_with_moving_statistics(P: Tensor, layer: Layer) -> Step:
    mean, var = layer.moving_mean, layer.moving_var
    X_hat = (P - mean) / torch.sqrt(var + layer.eps)
    Y = layer.gamma * X_hat + layer.beta
    return Step(
        name="Y_moving",
        topic="Y_moving",
        part="inference",
        formula="y = γ · (x - μ_moving) / √(σ²_moving + ε) + β",
        code="X_hat = (P - moving_mean) / torch.sqrt(moving_var + eps)\n"
        "Y_moving = gamma * X_hat + beta",
        worked=_work_out(P, mean, var, layer, Y),
        inputs={"P": P, "moving_mean": mean, "moving_var": var} | _learned(layer),
        value=Y,
    )


def _predict_with_own_statistics(P: Tensor, layer: Layer) -> list[Step]:
    rank, axes, dims = P.dim(), notation.reduce_axes(P.dim()), notation.dims(P.dim())
    mean = P.mean(dim=axes, keepdim=True)
    var = ((P - mean) ** 2).mean(dim=axes, keepdim=True)
    X_hat = (P - mean) / torch.sqrt(var + layer.eps)
    Y = layer.gamma * X_hat + layer.beta
    entry = notation.index("P", rank)
    return [
        Step(
            name="own_mean",
            topic="own_mean",
            part="inference",
            formula=f"μ_P[c] = {notation.average(entry, rank, axes)}",
            code=f"own_mean = P.mean(dim={dims}, keepdim=True)",
            worked=arithmetic.conclude(arithmetic.average(P, axes), mean),
            inputs={"P": P},
            value=mean,
            facts={"count": P.numel() // P.shape[1]},
        ),
        Step(
            name="own_var",
            topic="own_var",
            part="inference",
            formula=f"σ²_P[c] = {notation.average(f'({entry} - μ_P[c])²', rank, axes)}",
            code=f"own_var = ((P - own_mean) ** 2).mean(dim={dims}, keepdim=True)",
            worked=arithmetic.conclude(arithmetic.spread(P, mean, axes), var),
            inputs={"P": P, "own_mean": mean},
            value=var,
        ),
        Step(
            name="Y_own",
            topic="Y_own",
            part="inference",
            formula="y = γ · (x - μ_P) / √(σ²_P + ε) + β",
            code="X_hat = (P - own_mean) / torch.sqrt(own_var + eps)\nY_own = gamma * X_hat + beta",
            worked=_work_out(P, mean, var, layer, Y),
            inputs={"P": P, "own_mean": mean, "own_var": var} | _learned(layer),
            value=Y,
        ),
    ]


def _predict_alone(alone: Tensor, layer: Layer) -> Step:
    axes, dims = notation.reduce_axes(alone.dim()), notation.dims(alone.dim())
    mean = alone.mean(dim=axes, keepdim=True)
    var = ((alone - mean) ** 2).mean(dim=axes, keepdim=True)
    X_hat = (alone - mean) / torch.sqrt(var + layer.eps)
    Y = layer.gamma * X_hat + layer.beta
    count = alone.numel() // alone.shape[1]
    return Step(
        name="Y_alone",
        topic="Y_alone_is_beta" if count == 1 else "Y_alone",
        part="inference",
        formula="y = γ · (x - μ_P[0]) / √(σ²_P[0] + ε) + β",
        code="alone = P[:1]\n"
        f"mean = alone.mean(dim={dims}, keepdim=True)\n"
        f"var = ((alone - mean) ** 2).mean(dim={dims}, keepdim=True)\n"
        "X_hat = (alone - mean) / torch.sqrt(var + eps)\n"
        "Y_alone = gamma * X_hat + beta",
        worked=_work_out(alone, mean, var, layer, Y),
        inputs={"alone": alone, "mean": mean, "var": var} | _learned(layer),
        value=Y,
        facts={"count": count},
    )


def _learned(layer: Layer) -> dict[str, Tensor]:
    return {"gamma": layer.gamma, "beta": layer.beta}


def _work_out(data: Tensor, mean: Tensor, var: Tensor, layer: Layer, result: Tensor) -> str:
    x_hat = arithmetic.standardize(data, mean, var, layer.eps)
    return arithmetic.conclude(arithmetic.stretch(layer.gamma, x_hat, layer.beta), result)
