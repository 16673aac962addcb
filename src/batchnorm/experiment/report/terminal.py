"""The results as a table for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from batchnorm.charts import numerals
from batchnorm.experiment.report.words import Say, speak
from batchnorm.experiment.results import Results, Run

LAST = 5


def table(results: Results, lang: str = "en") -> Table:
    """Makes a table of the last epochs, one row per norm.

    Args:
        results: Results of a run, finished or not; numbers may be NaN.
        lang: ``en`` or ``zh``.

    Returns:
        A rich table that fits 80 columns. A test accuracy has its range over the last five epochs
        below it, because one epoch says little at a high learning rate.

    Raises:
        ValueError: There is no such language.
    """
    say = speak(lang)
    title = say("terminal.title", data=results.data.name, seed=results.settings.seed).unescape()
    if results.data.stand_in:
        title = f"{say('notice.stand_in', data=results.data.name).striptags()}\n\n{title}"
    drawn = Table(
        box=SIMPLE,
        title=Text(title),
        caption=Text(say("terminal.caption", n=LAST)),
        title_justify="left",
        caption_justify="left",
        show_edge=False,
        pad_edge=False,
    )
    drawn.add_column(Text(say("terminal.norm")), no_wrap=True)
    for header in (
        say("terminal.rate"),
        say("terminal.epoch"),
        say("terminal.loss"),
        say("terminal.train"),
        say("terminal.running"),
        say("terminal.population"),
        say("terminal.speed"),
    ):
        drawn.add_column(Text(header), justify="right", no_wrap=True)
    for run in results.runs:
        drawn.add_row(*_cells(run, results.settings.epochs, say))
    return drawn


def _cells(run: Run, planned: int, say: Say) -> list[Text]:
    name = Text(run.norm)
    if run.diverged_in is not None:
        name.append(f"\n{say('terminal.diverged')}", style="red")
    elif not run.complete:
        name.append(f"\n{say('terminal.interrupted')}", style="yellow")
    rate = Text(numerals.short(run.learning_rate))
    if not run.epochs:
        return [name, rate, Text(f"0/{planned}"), *[Text("—")] * 5]
    last = run.epochs[-1]
    population = run.series("test_accuracy_population") if run.normalized else ()
    return [
        name,
        rate,
        Text(f"{last.epoch}/{planned}"),
        Text(numerals.decimal(last.loss)),
        Text(numerals.percent(last.train_accuracy)),
        _accuracy(run.series("test_accuracy_running")),
        _accuracy(population),
        Text(numerals.count(last.examples_per_second)),
    ]


def _accuracy(fractions: Sequence[float]) -> Text:
    if not fractions:
        return Text("—")
    cell = Text(numerals.percent(fractions[-1]))
    return cell.append(f"\n{numerals.span(fractions[-LAST:])}", style="dim")
