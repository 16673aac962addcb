"""Tensors as tables with four decimals, cut down to what fits into a terminal."""

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
    """One column per channel, one row per tensor: what is given above, the result below.

    Args:
        given: Labels and tensors of one number per channel; the labels are printed dim.
        result: The same, not dim; of more than a dozen, only the first are shown. One of the two
            may be empty.
        unit: What a channel is called.
        width: Cells there are for the table; only the first channels are shown where more do not
            fit.
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
    """One row per channel, one column per example, in each cell the map of that channel.

    Args:
        name: What the tensor is called.
        tensor: Three axes or more, (N, C, ...).
        unit: What a channel is called; of more than six, only the first are shown.
        width: Cells there are for the table; only the first examples are shown where more do not
            fit.
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
    """Put as many columns beside the labels as fit; `total` is how many there ought to be."""
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
    """One number, or a map in lines of padded numbers; only its edges if there are over `most`."""
    written = np.array2string(
        np.round(tensor.double().cpu().numpy(), 4) + 0.0,  # + 0.0 turns -0.0 into 0.0
        formatter={"float_kind": lambda number: f"{number:{length}.4f}"},
        max_line_width=1000,
        threshold=most,
        edgeitems=2,
    )
    return "\n".join(line.lstrip(" [").rstrip("]") for line in written.split("\n"))
