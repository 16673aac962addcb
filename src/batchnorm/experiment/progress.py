"""How far training is, on standard error: bars in a terminal, a line an epoch everywhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from batchnorm.charts import numerals


class SpeedColumn(ProgressColumn):
    """Examples a second."""

    def render(self, task: Task) -> Text:
        """The speed of the last seconds."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{numerals.count(speed)} examples/s")


class TrainingProgress:
    """Follows the training of several runs.

    Args:
        console: Where to draw.
        epochs: Epochs of a run.
        examples: Examples of an epoch.
    """

    def __init__(self, console: Console, epochs: int, examples: int) -> None:
        self._epochs = epochs
        self._examples = examples
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            SpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._run = ""
        self._task = self._progress.add_task("", total=epochs * examples, visible=False)

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def start(self, norm: str, done: int) -> None:
        """A run begins, or goes on after ``done`` epochs."""
        self._run = norm
        self._progress.reset(
            self._task,
            completed=done * self._examples,
            description=self._title(done + 1),
            visible=True,
        )

    def step(self, examples: int) -> None:
        """So many more examples were trained on."""
        self._progress.advance(self._task, examples)

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is finished: one line of its figures stays on the screen."""
        self._progress.update(self._task, description=self._title(record["epoch"] + 1))
        running, population = (
            numerals.percent(record[f"test_accuracy_{kind}"]) for kind in ("running", "population")
        )
        self._progress.console.print(
            Text(
                f"{self._run} {record['epoch']}/{self._epochs}: "
                f"loss {numerals.decimal(record['loss'])}, "
                f"train {numerals.percent(record['train_accuracy'])}, "
                f"test {running} running / {population} population"
            ),
            soft_wrap=True,
        )

    def _title(self, epoch: int) -> str:
        return f"{self._run} {min(epoch, self._epochs)}/{self._epochs}"
