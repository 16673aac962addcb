"""Tensors as tables with four decimals, cut down to what fits into a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text
from torch import Tensor

GAP = 3
MOST_ROWS = 12
MOST_COLUMNS = 8
MOST_MAPS = 6
MOST_NUMBERS_IN_A_MAP = 36
OMITTED = "..."


def tabulate_rows(
    given: Sequence[tuple[str, Tensor]], result: Sequence[tuple[str, Tensor]], unit: str, width: int
) -> Table:
    """Lays out one column per channel and one row per tensor: inputs above, the result below.

    Args:
        given: Labels and tensors of one number per channel; the labels are printed dim.
        result: The same, not dim; of more than a dozen, only the first are shown. One of the two
            may be empty.
        unit: Name of a channel.
        width: Width of the table in cells; it shows as many channels as fit.
    """
    shown = result[:MOST_ROWS]
    labels = [Text(label, style="dim") for label, _ in given] + [Text(label) for label, _ in shown]
    tensors = [tensor.flatten() for _, tensor in [*given, *shown]]
    channels = tensors[0].numel()
    columns = {
        f"{unit} {channel}": [_write(tensor[channel]) for tensor in tensors]
        for channel in range(min(channels, MOST_COLUMNS))
    }
    table = _lay_out(labels, columns, channels, width)
    if len(shown) < len(result):
        table.add_row(*[OMITTED] * len(table.columns))
    return table


def tabulate_maps(name: str, tensor: Tensor, unit: str, width: int) -> Table:
    """Lays out one row per channel and one column per example; a cell is the map of a channel.

    Args:
        name: Name of the tensor.
        tensor: Three axes or more, (N, C, ...).
        unit: Name of a channel; of more than six, only the first are shown.
        width: Width of the table in cells; it shows as many examples as fit.
    """
    examples, channels = tensor.shape[:2]
    shown = range(min(channels, MOST_MAPS))
    labels = [Text(f"{unit} {channel}") for channel in shown]
    longest = max(len(_write(extreme)) for extreme in tensor.aminmax())
    room = width - labels[-1].cell_len - 2 * GAP - len(OMITTED)
    most = MOST_NUMBERS_IN_A_MAP if tensor.shape[-1] * (longest + 1) <= room else 0
    columns = {
        name if examples == 1 else f"{name}[{example}]": [
            _write(tensor[example, channel], longest, most) for channel in shown
        ]
        for example in range(min(examples, MOST_COLUMNS))
    }
    table = _lay_out(labels, columns, examples, width)
    if len(shown) < channels:
        table.add_row(*[OMITTED] * len(table.columns))
    return table


def _lay_out(labels: list[Text], columns: dict[str, list[str]], total: int, width: int) -> Table:
    """Lays out the labels and as many of the ``total`` columns as fit."""
    room = width - max(label.cell_len for label in labels)
    widths = [GAP + _widest(header, *cells) for header, cells in columns.items()]
    fitting = len(columns)
    while fitting > 1 and sum(widths[:fitting]) + (GAP + len(OMITTED)) * (fitting < total) > room:
        fitting -= 1
    table = Table(box=None, padding=(0, 0, 0, GAP), pad_edge=False, header_style="dim")
    table.add_column()
    for header in list(columns)[:fitting]:
        table.add_column(Text(header), justify="right", no_wrap=True)
    if fitting < total:
        table.add_column()
    for row, label in enumerate(labels):
        cells = [Text(column[row]) for column in list(columns.values())[:fitting]]
        table.add_row(label, *cells, *[OMITTED] * (fitting < total))
    return table


def _widest(*texts: str) -> int:
    return max(cell_len(line) for text in texts for line in text.split("\n"))


def _write(tensor: Tensor, length: int = 0, most: int = 0) -> str:
    """Writes one number, or a map in lines of padded numbers; only its edges above ``most``."""
    written = np.array2string(
        np.round(tensor.double().cpu().numpy(), 4) + 0.0,  # + 0.0 turns -0.0 into 0.0
        formatter={"float_kind": lambda number: f"{number:{length}.4f}"},
        max_line_width=1000,
        threshold=most,
        edgeitems=2,
    )
    return "\n".join(line.lstrip(" [").rstrip("]") for line in written.split("\n"))
