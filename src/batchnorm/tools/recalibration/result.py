"""Results of `recalibrate`, as data and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from batchnorm.tools.wording import Printed, counted, passed_over, shortened, wrapped

_NAME = 34
_HEAD = f"{'':<{_NAME}}{'mean shift':>18}{'variance ratio':>18}{'values':>10}"
_COLUMNS = f"{'layer':<{_NAME}}{'mean':>9}{'max':>9}{'min':>9}{'max':>9}{'/channel':>10}"


@dataclass(frozen=True)
class LayerChange:
    """Change of the running statistics of one layer.

    Shifts and ratios are as the layer sees them: its variance is ``running_var + eps``.

    Attributes:
        name: Dotted name of the layer.
        mean_shift: Change of ``running_mean`` in old standard deviations, mean over the channels.
        mean_shift_max: The largest change of a channel.
        var_ratio_min: The smallest ratio of the new to the old variance.
        var_ratio_max: The largest such ratio.
        values: Number of values a channel that the new statistics come from.
        calls: Number of calls of the layer; several a batch if it is used several times.
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


@dataclass(frozen=True, repr=False)
class Recalibration(Printed):
    """Report of `recalibrate`; ``str()`` of it is a table.

    Attributes:
        layers: Layers with new statistics.
        left: Layers that were left alone: the reason by name.
        unreached: Layers that no batch reached; they were left alone, too.
        samples: Samples of one pass over the data, on all ranks together.
        batches: Batches of one pass, on all ranks together.
        seconds: Duration of the call.
        stopped: What ended the pass on this rank before the data did: ``"max_samples"``,
            ``"tolerance"``, or None.
        sequential: True if each layer was recalibrated under recalibrated ones.
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
        """The largest standard error of a layer; None if no layer has one."""
        known = [c.standard_error for c in self.layers if c.standard_error is not None]
        return max(known, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as lists, dictionaries, numbers and strings."""
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
            names = shortened([change.name for change in self.layers], _NAME - 1)
            rows = [_row(names[change.name], change) for change in self.layers]
            lines += ["", _HEAD, _COLUMNS, *rows, ""]
            lines.append("Shifts in old standard deviations, ratios new / old, both with eps.")
        lines += passed_over({**self.left, **dict.fromkeys(self.unreached, "no batch reached it")})
        return "\n".join(wrapped(line, "  ") for line in lines)

    def _summary(self) -> str:
        if not self.layers:
            return "Nothing was recalibrated."
        how = ", layer by layer" if self.sequential else ""
        early = "" if self.stopped is None else f", stopped early by {self.stopped}"
        error = self.standard_error
        precise = "" if error is None else f"; relative standard error at most {error:.1e}"
        return (
            f"Recalibrated {counted(len(self.layers), 'layer')} on "
            f"{counted(self.samples, 'sample')} in {counted(self.batches, 'batch')} and "
            f"{self.seconds:.1f} s{how}{early}{precise}."
        )


def _row(name: str, change: LayerChange) -> str:
    numbers = (
        change.mean_shift,
        change.mean_shift_max,
        change.var_ratio_min,
        change.var_ratio_max,
    )
    values = f"{change.values:,}" if change.values < 10**7 else f"{change.values:.2e}"
    return f"{name:<{_NAME}}" + "".join(f"{number:>9.3g}" for number in numbers) + f"{values:>10}"
