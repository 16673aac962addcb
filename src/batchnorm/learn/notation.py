"""Axes, sums and symbols in the notation of the book, for inputs of two to five axes."""

from __future__ import annotations

from collections.abc import Collection

LETTERS = {2: "nc", 3: "ncl", 4: "nchw", 5: "ncdhw"}

SYMBOLS = {
    "x̂": "X_hat",
    "μ": "mean",
    "σ²": "var",
    "γ": "gamma",
    "β": "beta",
    "ε": "eps",
    "m": "momentum",
    "μ_moving": "moving_mean",
    "σ²_moving": "moving_var",
    "μ_P": "own_mean",
    "σ²_P": "own_var",
    "μ_P[0]": "mean",
    "σ²_P[0]": "var",
}
"""The variable of the code that each symbol of the formulas names; ``x`` names the data."""


def lay_out(rank: int) -> str:
    """Returns the axes of an input by their letters: ``(N, C, H, W)`` for four of them."""
    return f"({', '.join(LETTERS[rank].upper())})"


def reduce_axes(rank: int) -> tuple[int, ...]:
    """Returns the axes that batch norm averages over: all but the channel axis 1."""
    return (0, *range(2, rank))


def dims(rank: int) -> str:
    """Returns those axes in the form of PyTorch's ``dim=``: ``0``, or ``(0, 2, 3)``."""
    return "0" if rank == 2 else str(reduce_axes(rank))


def index(symbol: str, rank: int, averaged: Collection[int] = ()) -> str:
    """Returns a symbol with the indices that are left.

    Args:
        symbol: The symbol, for example ``X``.
        rank: Number of axes of the input, 2 to 5.
        averaged: The axes that have been averaged away.

    Returns:
        For example ``X[n,c,h,w]``, or ``X[c,w]`` when axes 0 and 2 are gone.
    """
    left = [letter for axis, letter in enumerate(LETTERS[rank]) if axis not in averaged]
    return f"{symbol}[{','.join(left)}]"


def average(term: str, rank: int, axes: Collection[int]) -> str:
    """Returns the average of a term over some axes: ``1/(N·H·W) · Σ_n,h,w term``."""
    letters = [LETTERS[rank][axis] for axis in axes]
    sizes = "·".join(letters).upper()
    divisor = sizes if len(letters) == 1 else f"({sizes})"
    return f"1/{divisor} · Σ_{','.join(letters)} {term}"
