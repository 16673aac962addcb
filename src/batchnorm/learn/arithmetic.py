"""The first number of a step worked by hand: its formula with numbers in place of the symbols."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

from torch import Tensor

from batchnorm.learn import notation

LONGEST_SUM = 48
"""Characters that the terms of a sum may take, so that its line fits 80 columns."""

DECIMALS = range(4, 11)
"""Decimals to try: float32 has no more than 10 in numbers of the size of 0.01."""

HALF_A_DIGIT = 0.49999e-4
"""Distance within which a number is rounded to the four decimals of a result, in any convention."""

_AVERAGE = re.compile(r"1/\S+ · Σ_(\S+) (.*)")
_INDEXED = re.compile(r"(?<!\w)([A-Za-z]\w*)\[[a-z,]+\]")
_SYMBOL = re.compile(
    "|".join(map(re.escape, sorted([*notation.SYMBOLS, "x"], key=len, reverse=True)))
)
_NEGATIVE = re.compile(r"(?<=[-+×/] )-[\d.]+")


def work_out(formula: str, values: Mapping[str, Tensor | float], result: Tensor) -> str:
    """Works the first number of a step by hand.

    Args:
        formula: The formula of the step, in the notation of `batchnorm.learn.recipes`.
        values: The variables of the code by name, and the data as ``x``.
        result: The result of the step.

    Returns:
        ``expression ≈ result``, the result to four decimals. The expression has as few decimals,
        four or more, as it takes to find that result with a calculator. It has four where no
        number of decimals would do, because the result itself is rounded further than that, and
        in a sum too long to be printed, whose terms stand in the tables with four.
    """
    _, right = re.split(" = | ← ", formula, maxsplit=1)
    found = f"{result.flatten()[0].item():.4f}"
    for decimals in DECIMALS:
        text = _write(right, values, result.dim(), decimals)
        if "..." in text or abs(_calculate(text) - float(found)) < HALF_A_DIGIT:
            break
    else:
        text = _write(right, values, result.dim(), DECIMALS[0])
    return f"{text} ≈ {'0.0000' if float(found) == 0 else found}"


def _write(right: str, values: Mapping[str, Tensor | float], rank: int, decimals: int) -> str:
    """Writes the right side of a formula with numbers; an average becomes ``(a + b) / 2``."""
    average = _AVERAGE.fullmatch(right)
    if average is None:
        text = _substitute(right, values, decimals)
    else:
        axes = [notation.LETTERS[rank].index(letter) for letter in average[1].split(",")]
        text = _write_average(average[2], values, axes, decimals)
    return _NEGATIVE.sub(lambda number: f"({number[0]})", text)


def _write_average(
    term: str, values: Mapping[str, Tensor | float], axes: Collection[int], decimals: int
) -> str:
    """Writes the average of a term over some axes of the tensor that it indexes."""
    name = _INDEXED.findall(term)[0]
    source = values[name]
    assert isinstance(source, Tensor), name
    group = _group(source, axes)
    few = group[: LONGEST_SUM // 4]
    terms = [_substitute(term, {**values, name: value}, decimals) for value in few]
    last = _substitute(term, {**values, name: group[-1]}, decimals)
    text = " + ".join(terms)
    if len(group) > len(few) or (len(group) > 2 and len(text) > LONGEST_SUM):
        text = " + ".join([*terms[:2], "...", last])
        if len(text) > LONGEST_SUM:
            text = " + ".join([terms[0], "...", last])
    return f"({text}) / {len(group)}"


def _substitute(text: str, values: Mapping[str, Tensor | float], decimals: int) -> str:
    """Puts the first number of each variable in place of its symbol."""

    def number(name: str) -> str:
        value = values[name]
        if not isinstance(value, Tensor):
            return str(value)
        text = f"{value.flatten()[0].item():.{decimals}f}".rstrip("0").rstrip(".")
        return "0" if text == "-0" else text

    text = _INDEXED.sub(lambda match: number(match[1]), text).replace("[c]", "")
    text = _SYMBOL.sub(lambda match: number(notation.SYMBOLS.get(match[0], match[0])), text)
    return text.replace("·", "×")


def _group(data: Tensor, axes: Collection[int]) -> Tensor:
    """Returns the numbers that belong to the first result of an average over ``axes``."""
    for axis in reversed(range(data.dim())):
        if axis not in axes:
            data = data.select(axis, 0)
    return data.flatten()


def _calculate(expression: str) -> float:
    """Returns what a calculator finds for an expression of ours."""
    for sign, python in {"×": "*", "²": "**2", "√": "sqrt"}.items():
        expression = expression.replace(sign, python)
    try:
        return float(eval(expression, {"sqrt": math.sqrt, "inf": math.inf, "nan": math.nan}))
    except ArithmeticError:
        return math.nan
