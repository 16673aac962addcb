"""The top of the page: the result in one sentence, the last numbers, and what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchnorm.charts import numerals
from batchnorm.experiment.report.edition import Edition, Shown, Swatch


@dataclass(frozen=True)
class Reading:
    """One number of a tile, with the picture of its run."""

    swatch: Swatch
    value: str


@dataclass(frozen=True)
class Tile:
    """One measure with its last value in each run."""

    title: str
    readings: Sequence[Reading]


@dataclass(frozen=True)
class Headline:
    """Everything above the first section."""

    title: str
    lead: str
    tiles: Sequence[Tile]
    settings: str
    notices: Sequence[str]


def headline(edition: Edition) -> Headline:
    """Says the result, the settings, and which runs did not end well."""
    results, data = edition.results, edition.results.data
    compared = results.baseline is not None and bool(edition.normalized)
    key = "page.title_compared" if compared else "page.title"
    return Headline(
        title=edition.say(key, data=data.name),
        lead=_lead(edition),
        tiles=_tiles(edition),
        settings=_settings(edition),
        notices=[
            *([edition.say("notice.stand_in", data=data.name)] if data.stand_in else []),
            *(notice for shown in edition.shown for notice in _notices(edition, shown)),
        ],
    )


def _lead(edition: Edition) -> str:
    """Compares the one run with batch norm to the one without, if both ended well."""
    say, runs = edition.say, edition.results.runs
    sound = all(run.complete and run.epochs and run.diverged_in is None for run in runs)
    baseline = edition.results.baseline
    if baseline is None or len(runs) != 2 or not sound:
        return say("lead.runs", n=len(runs))
    normed, last = edition.normalized[0].run.epochs[-1], baseline.epochs[-1]
    return say(
        "lead.pair",
        epochs=last.epoch,
        loss_with=numerals.decimal(normed.loss),
        loss_without=numerals.decimal(last.loss),
        running=numerals.percent(normed.test_accuracy_running),
        population=numerals.percent(normed.test_accuracy_population),
        without=numerals.percent(last.test_accuracy_running),
    )


def _tiles(edition: Edition) -> list[Tile]:
    say = edition.say
    ended = [(shown, shown.run.epochs[-1]) for shown in edition.shown if shown.run.epochs]
    tests = []
    for shown, last in ended:
        if not shown.run.normalized:
            value = numerals.percent(last.test_accuracy_running)
            tests.append(Reading(shown.swatch, value))
            continue
        for kind, label, accuracy in (
            ("running", say("tile.running", run=shown.label), last.test_accuracy_running),
            ("population", say("tile.population", run=shown.label), last.test_accuracy_population),
        ):
            swatch = Swatch(kind, label, shown.position)
            tests.append(Reading(swatch, numerals.percent(accuracy)))
    losses = [Reading(shown.swatch, numerals.decimal(last.loss)) for shown, last in ended]
    trains = [Reading(shown.swatch, numerals.percent(last.train_accuracy)) for shown, last in ended]
    return [
        Tile(say("curves.loss"), losses),
        Tile(say("curves.train"), trains),
        Tile(say("tile.test"), tests),
    ]


def _settings(edition: Edition) -> str:
    data, settings = edition.results.data, edition.results.settings
    rates = sorted({run.learning_rate for run in edition.results.runs})
    return edition.say(
        "page.settings",
        data=data.name,
        source=data.source,
        train=numerals.count(data.train_examples),
        test=numerals.count(data.test_examples),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        rate=edition.say("list.comma").join(numerals.short(rate) for rate in rates),
        seed=settings.seed,
        device=settings.device,
        threads=settings.threads,
        torch=settings.torch,
        batchnorm=settings.batchnorm,
    )


def _notices(edition: Edition, shown: Shown) -> list[str]:
    run, say = shown.run, edition.say
    if not run.epochs:
        return [say("notice.nothing", run=shown.label)]
    notices = []
    if run.diverged_in is not None:
        notices.append(say("notice.diverged", run=shown.label, epoch=run.diverged_in))
    if not run.complete:
        done, planned = run.epochs[-1].epoch, edition.results.settings.epochs
        notices.append(say("notice.interrupted", run=shown.label, done=done, planned=planned))
    return notices
