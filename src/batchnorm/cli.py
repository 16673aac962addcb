"""The command line: arguments, one call, a report. Exit codes stand in ``__main__.main``.

Heavy imports stand inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from batchnorm import __version__

if TYPE_CHECKING:
    from batchnorm.experiments.run_directory import RunDirectory
    from batchnorm.experiments.training import Comparison, Settings

INTERRUPTED = 130

app = typer.Typer(
    name="batchnorm",
    help="Batch normalization you can read, trust and run fast, for PyTorch.",
    epilog="Start with: batchnorm explain, then: batchnorm train",
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Language(StrEnum):
    """Languages of what people read."""

    en = "en"
    zh = "zh"


class Example(StrEnum):
    """What there is to explain."""

    all = "all"
    fully_connected = "fully-connected"
    convolution = "convolution"


Lang = Annotated[Language, typer.Option("--lang", help="Language of the text.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead.")]


def run(arguments: Sequence[str]) -> int:
    """Runs a command; wrong use is one sentence on stderr.

    Returns:
        The exit code.
    """
    try:
        return app(list(arguments) or ["--help"], prog_name="batchnorm", standalone_mode=False) or 0
    except TyperException as error:
        message = " ".join(error.format_message().split())
        print(f"batchnorm: {message.rstrip('.')}.", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("batchnorm: interrupted.", file=sys.stderr)
        return INTERRUPTED


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(__version__)
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Options of every command."""


@app.command()
def explain(
    example: Annotated[Example, typer.Argument(help="Which example of the notes.")] = Example.all,
    lang: Lang = Language.en,
    as_json: Json = False,
) -> None:
    """Walk through batch normalization step by step, with real numbers."""
    from batchnorm.learn import document, examples

    names = examples.NAMES if example is Example.all else (example.value,)
    if as_json:
        walked = [
            {"name": name, "steps": document.steps_as_json(examples.walk(name), lang.value)}
            for name in names
        ]
        _print_json({"schema": 1, "examples": walked})
        return
    from rich.console import Console

    from batchnorm.learn import terminal

    for name in names:
        Console().print(terminal.render(examples.walk(name), lang.value))


@app.command()
def train(
    context: typer.Context,
    norm: Annotated[
        str,
        typer.Option(help="What to compare: batchnorm, scratch, torch, none, separated by commas."),
    ] = "batchnorm,none",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 10,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate.", show_default="1.0; 0.9 for none")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Images a step.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and order.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...", show_default="cuda if there is one")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")
    ] = None,
    population: Annotated[
        int, typer.Option(min=2, help="Training images behind the population statistics.")
    ] = 2560,
    examples: Annotated[
        int | None,
        typer.Option(min=2, help="Use the first so many training images.", show_default="all"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with Fashion-MNIST.", show_default="found or downloaded"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="runs/<time>")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    lang: Lang = Language.en,
    as_json: Json = False,
) -> None:
    """Train LeNet on Fashion-MNIST with and without batch norm, and write a report."""
    from batchnorm.experiments.run_directory import RunDirectory

    if resume is not None:
        _refuse_options_with_resume(context)
        directory = RunDirectory(resume)
        settings, data_name = _stored_settings(directory)
    else:
        directory = RunDirectory(out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S"))
        settings = _settings(
            norm, epochs, lr, batch_size, seed, device, threads, population, examples
        )
        data_name = None
    comparison = _comparison(settings, data, data_name, directory)
    if resume is None:
        with _one_sentence():
            directory.create(
                {"settings": comparison.results()["settings"], "data": comparison.description}
            )
    finished = _train(comparison)
    _report(comparison, lang, as_json)
    if not finished:
        _say(f"Interrupted; go on with: batchnorm train --resume {directory.path}")
        raise typer.Exit(INTERRUPTED)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="Folder of a run of batchnorm train.")],
    lang: Lang = Language.en,
) -> None:
    """Write the page of a finished or interrupted run again, in either language."""
    from batchnorm.experiments.run_directory import RunDirectory
    from batchnorm.report import page

    with _one_sentence():
        page.write(RunDirectory(directory).results(), directory / "report.html", lang.value)
    _say(f"Report: {directory / 'report.html'}")


def _settings(
    norm: str,
    epochs: int,
    lr: float | None,
    batch_size: int,
    seed: int,
    device: str | None,
    threads: int | None,
    population: int,
    examples: int | None,
) -> Settings:
    import torch

    from batchnorm.experiments.models import NORMS, Norm
    from batchnorm.experiments.training import Settings

    wanted = [name.strip() for name in norm.split(",")]
    norms: tuple[Norm, ...] = tuple(known for name in wanted for known in NORMS if known == name)
    if len(set(norms)) != len(wanted):
        raise TyperException(
            f"--norm expects different names out of {', '.join(NORMS)}, separated by commas, "
            f"got {norm!r}"
        )
    if lr is not None and not 0 < lr < float("inf"):
        raise TyperException(f"--lr expects a positive number, got {lr}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TyperException(
            f"--device {device} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    return Settings(
        norms=norms,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=lr,
        seed=seed,
        threads=threads or torch.get_num_threads(),
        device=device,
        population_examples=population,
        train_examples=examples,
    )


def _stored_settings(directory: RunDirectory) -> tuple[Settings, str]:
    from batchnorm.experiments.training import Settings

    with _one_sentence():
        config = directory.config()
        return Settings.from_plain(config["settings"]), config["data"]["name"]


def _comparison(
    settings: Settings, folder: Path | None, expected: str | None, directory: RunDirectory
) -> Comparison:
    from batchnorm.experiments import data
    from batchnorm.experiments.training import Comparison

    with _one_sentence():
        found = data.load(folder, announce=_say, progress=data.TerminalBar)
        if expected is not None and found.name != expected:
            raise data.DataError(
                f"the run in {directory.path} was trained on {expected}, but only {found.name} was "
                "found; name the folder of the images with --data DIR."
            )
        return Comparison(settings, found, directory)


def _train(comparison: Comparison) -> bool:
    """Trains with progress on stderr; False if the user stopped it."""
    from rich.console import Console

    from batchnorm.report.progress import TrainingProgress

    described, settings = comparison.description, comparison.settings
    _say(
        f"{described['name']} ({described['source']}): {described['train_examples']:,} images to "
        f"train, {described['test_examples']:,} to test."
    )
    with TrainingProgress(
        Console(stderr=True), settings.epochs, described["train_examples"]
    ) as progress:
        try:
            with _one_sentence():
                comparison.train(progress)
        except KeyboardInterrupt:
            return False
    return True


def _report(comparison: Comparison, lang: Language, as_json: bool) -> None:
    from rich.console import Console

    from batchnorm.report import page, terminal

    results, directory = comparison.results(), comparison.directory
    path = directory.path / "report.html"
    directory.write_results(results)
    page.write(results, path, lang.value)
    if as_json:
        kept = ("norm", "learning_rate", "complete", "epochs")
        runs = [{key: run[key] for key in kept} for run in results["runs"]]
        _print_json({**results, "runs": runs, "report": str(path)})
    else:
        Console().print(terminal.table(results, lang.value))
    _say(f"Report: {path}")


def _refuse_options_with_resume(context: typer.Context) -> None:
    allowed = {"resume", "data", "lang", "as_json"}
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in allowed and source is not None and source.name == "COMMANDLINE":
            option = name.replace("_", "-")
            raise TyperException(
                f"--resume takes its settings from config.json in the run's folder; "
                f"leave out --{option}, or start a new run with --out"
            )


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turns the errors that our functions raise for bad input into a usage error."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise TyperException(str(error)) from error


def _print_json(value: Any) -> None:
    from batchnorm.experiments.run_directory import as_json

    print(as_json(value))


def _say(line: str) -> None:
    print(line, file=sys.stderr)
