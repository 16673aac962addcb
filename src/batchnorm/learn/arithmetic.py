"""The first number of a step worked by hand: the arithmetic written out with the real numbers.

Each function takes the tensors of a step and looks at the first number of each.
"""

from collections.abc import Collection

from torch import Tensor

LONGEST_SUM = 4


def average(data: Tensor, axes: Collection[int]) -> str:
    """`(a + b + ... + z) / n`; a long sum shows its first two terms and its last."""
    first, *others = _group(data, axes)
    terms = [_plain(first), *map(_in_brackets, others)]
    count = len(terms)
    if count > LONGEST_SUM:
        terms = [*terms[:2], "...", terms[-1]]
    return f"({' + '.join(terms)}) / {count}"


def spread(data: Tensor, mean: Tensor, axes: Collection[int]) -> str:
    """`((a - μ)² + ... + (z - μ)²) / n`: the biased variance."""
    terms = [f"({_plain(value)} - {number(mean)})²" for value in _group(data, axes)]
    count = len(terms)
    if count > 2:
        terms = [terms[0], "...", terms[-1]]
    return f"({' + '.join(terms)}) / {count}"


def standardize(data: Tensor, mean: Tensor, var: Tensor, eps: float) -> str:
    """`(x - μ) / √(σ² + ε)`."""
    return f"({_plain(_first(data))} - {number(mean)}) / √({number(var)} + {eps:g})"


def stretch(gamma: Tensor, x_hat: str, beta: Tensor) -> str:
    """`γ × x̂ + β`, where x̂ is a number or what it is worked out from."""
    return f"{_plain(_first(gamma))} × {x_hat} + {number(beta)}"


def blend(momentum: float, old: Tensor, new: Tensor) -> str:
    """`momentum × old + (1 - momentum) × new`."""
    return f"{momentum:g} × {number(old)} + {1.0 - momentum:g} × {number(new)}"


def conclude(expression: str, result: Tensor) -> str:
    """`expression ≈ result`, the result to four decimals."""
    return f"{expression} ≈ {_four_decimals(_first(result))}"


def number(tensor: Tensor) -> str:
    """The first number of a tensor to at most four decimals, in brackets if it is negative."""
    return _in_brackets(_first(tensor))


def _first(tensor: Tensor) -> float:
    return tensor.flatten()[0].item()


def _group(data: Tensor, axes: Collection[int]) -> list[float]:
    """The numbers that belong to the first result of a reduction over `axes`."""
    for axis in reversed(range(data.dim())):
        if axis not in axes:
            data = data.select(axis, 0)
    return data.flatten().tolist()


def _in_brackets(value: float) -> str:
    text = _plain(value)
    return f"({text})" if text.startswith("-") else text


def _plain(value: float) -> str:
    return _four_decimals(value).rstrip("0").rstrip(".")


def _four_decimals(value: float) -> str:
    text = f"{value:.4f}"
    return text.removeprefix("-") if float(text) == 0 else text
