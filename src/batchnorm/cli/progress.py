"""The one progress bar of all commands, on standard error.

It imports rich, so commands import it where they need it.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text


class _Figures(ProgressColumn):
    """``1,200/5,000 samples, 0:00:38 to go``, or the elapsed time if the total is unknown."""

    def render(self, task: Task) -> Text:
        """The figures as they are now."""
        total = "" if task.total is None else f"/{task.total:,.0f}"
        seconds, word = task.time_remaining, "to go"
        if seconds is None:
            seconds, word = task.elapsed or 0, "gone"
        time = timedelta(seconds=int(seconds))
        return Text(f"{task.completed:,.0f}{total} {task.fields['unit']}, {time} {word}")


class Bar(AbstractContextManager["Bar"]):
    """Progress bar on one line of standard error; it disappears when the command ends.

    Nothing is drawn where standard error is no terminal. ``total``, ``update``, ``reset`` and
    ``close`` work as in tqdm, so the bar can be handed to pooch.

    Args:
        unit: Name of the counted things, in the plural.
        total: Their number; None if unknown.
        text: The words before the bar.

    Example:
        >>> with Bar("rows", total=2) as bar:
        ...     for name in ("conv1", "conv2"):
        ...         bar.text = name
        ...         bar.update(1)
        >>> bar.done
        2
    """

    def __init__(self, unit: str, *, total: int | float | None = None, text: str = "") -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            _Figures(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(text, total=total, unit=unit)
        self._progress.start()

    @property
    def text(self) -> str:
        """The words before the bar."""
        return self._progress.tasks[0].description

    @text.setter
    def text(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    @property
    def total(self) -> int | float | None:
        """The number to reach; None, or 0 when set, if it is not known."""
        return self._progress.tasks[0].total

    @total.setter
    def total(self, total: int | float | None) -> None:
        self._progress.tasks[0].total = total or None

    @property
    def done(self) -> int | float:
        """The number reached."""
        return self._progress.tasks[0].completed

    @done.setter
    def done(self, done: int | float) -> None:
        self._progress.update(self._task, completed=done)

    def update(self, amount: int | float) -> None:
        """Counts ``amount`` more."""
        self._progress.advance(self._task, amount)

    def reset(self) -> None:
        """Counts from 0 again."""
        self._progress.reset(self._task)

    def line(self, text: str) -> None:
        """Prints a line that stays on standard error, also where no bar is drawn."""
        self._progress.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Removes the bar from the screen; a second call does nothing."""
        self._progress.stop()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
