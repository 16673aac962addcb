"""What recalibrating changed, as plain data and as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_WIDTH = 80
_NAME = 34
_HEAD = f"{'':<{_NAME}}{'mean shift':>18}{'variance ratio':>18}{'values':>10}"
_COLUMNS = f"{'layer':<{_NAME}}{'mean':>9}{'max':>9}{'min':>9}{'max':>9}{'/channel':>10}"


@dataclass(frozen=True)
class LayerChange:
    """How the running statistics of one layer changed.

    Shifts and ratios are as the layer sees them: its variance is ``running_var + eps``.

    Attributes:
        name: Dotted name of the layer.
        mean_shift: How far ``running_mean`` moved, in old standard deviations; mean over channels.
        mean_shift_max: The largest of a channel.
        var_ratio_min: The smallest ratio of the new to the old variance.
        var_ratio_max: The largest.
        values: How many values a channel are behind the new statistics.
        calls: How many calls of the layer; several a batch if it is used several times.
        standard_error: The largest relative standard error of a mean or a variance, from the spread
            between the batches of this process; None for fewer than 8.
    """

    name: str
    mean_shift: float
    mean_shift_max: float
    var_ratio_min: float
    var_ratio_max: float
    values: int
    calls: int
    standard_error: float | None


@dataclass(frozen=True)
class Recalibration:
    """What `recalibrate` did; ``str()`` of it is a table.

    Attributes:
        layers: Layers with new statistics.
        left: Layers that were left alone, by name, and why.
        unreached: Layers that no batch reached; they were left alone, too.
        samples: How many samples one pass over the data took, on all ranks together.
        batches: In how many batches.
        seconds: How long it took.
        stopped: What ended the pass on this rank before the data did: ``"max_samples"``,
            ``"tolerance"``, or None.
        sequential: Whether each layer was recalibrated under recalibrated ones.
    """

    layers: tuple[LayerChange, ...]
    left: Mapping[str, str]
    unreached: tuple[str, ...]
    samples: int
    batches: int
    seconds: float
    stopped: str | None
    sequential: bool

    @property
    def standard_error(self) -> float | None:
        """The largest of a layer; None if there is none."""
        known = [c.standard_error for c in self.layers if c.standard_error is not None]
        return max(known, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Everything as lists, dictionaries, numbers and strings."""
        return {
            **asdict(self),
            "layers": [asdict(change) for change in self.layers],
            "unreached": list(self.unreached),
            "left": dict(self.left),
            "standard_error": self.standard_error,
        }

    def __str__(self) -> str:
        lines = [self._summary()]
        if self.layers:
            lines += ["", _HEAD, _COLUMNS, *map(_row, self.layers), ""]
            lines.append("Shifts in old standard deviations, ratios new / old, both with eps.")
        lines += self._left()
        return "\n".join(
            line if len(line) <= _WIDTH else textwrap.fill(line, _WIDTH, subsequent_indent="  ")
            for line in lines
        )

    def _summary(self) -> str:
        if not self.layers:
            return "Nothing was recalibrated."
        how = ", layer by layer" if self.sequential else ""
        early = "" if self.stopped is None else f", stopped early by {self.stopped}"
        error = self.standard_error
        precise = "" if error is None else f"; relative standard error at most {error:.1e}"
        return (
            f"Recalibrated {_count(len(self.layers), 'layer')} on "
            f"{_count(self.samples, 'sample')} in {_count(self.batches, 'batch')} and "
            f"{self.seconds:.1f} s{how}{early}{precise}."
        )

    def _left(self) -> Iterator[str]:
        for name, reason in self.left.items():
            yield f"Left alone: {_shown(name)}: {reason}."
        for name in self.unreached:
            yield f"Left alone: {_shown(name)}: no batch reached it."


def _row(change: LayerChange) -> str:
    name = _shown(change.name)
    if len(name) >= _NAME:
        name = "…" + name[-(_NAME - 2) :]
    numbers = (
        change.mean_shift,
        change.mean_shift_max,
        change.var_ratio_min,
        change.var_ratio_max,
    )
    values = f"{change.values:,}" if change.values < 10**7 else f"{change.values:.2e}"
    return f"{name:<{_NAME}}" + "".join(f"{number:>9.3g}" for number in numbers) + f"{values:>10}"


def _shown(name: str) -> str:
    return name or "the model itself"


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number:,} {noun if number == 1 else plural}"
