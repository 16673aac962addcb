"""``batchnorm train`` and ``batchnorm report``: the experiment and its page."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import TyperException

from batchnorm.allocation import keep_freed_memory
from batchnorm.cli.options import (
    INTERRUPTED,
    Json,
    Lang,
    Language,
    Threads,
    one_sentence,
    print_json,
    say,
)

if TYPE_CHECKING:
    from batchnorm.experiment.run_directory import RunDirectory
    from batchnorm.experiment.training import Comparison, Settings


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
    threads: Threads = None,
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
    from batchnorm.experiment.run_directory import RunDirectory

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
        with one_sentence():
            directory.create(
                {"settings": comparison.results()["settings"], "data": comparison.description}
            )
    finished = _train(comparison)
    _report(comparison, lang, as_json)
    if not finished:
        say(f"Interrupted; go on with: batchnorm train --resume {directory.path}")
        raise typer.Exit(INTERRUPTED)


def report(
    directory: Annotated[Path, typer.Argument(help="Folder of a run of batchnorm train.")],
    lang: Lang = Language.en,
) -> None:
    """Write the page of a finished or interrupted run again, in either language."""
    from batchnorm.experiment.report import page
    from batchnorm.experiment.run_directory import RunDirectory

    with one_sentence():
        page.write(RunDirectory(directory).results(), directory / "report.html", lang.value)
    say(f"Report: {directory / 'report.html'}")


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

    from batchnorm.experiment.training import Settings
    from batchnorm.nets.lenet import NORMS, Norm

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
    from batchnorm.experiment.training import Settings

    with one_sentence():
        config = directory.config()
        return Settings.from_plain(config["settings"]), config["data"]["name"]


def _comparison(
    settings: Settings, folder: Path | None, expected: str | None, directory: RunDirectory
) -> Comparison:
    from batchnorm.experiment import data
    from batchnorm.experiment.training import Comparison

    with one_sentence():
        found = data.load(folder, announce=say, progress=data.TerminalBar)
        if expected is not None and found.name != expected:
            raise data.DataError(
                f"the run in {directory.path} was trained on {expected}, but only {found.name} was "
                "found; name the folder of the images with --data DIR."
            )
        return Comparison(settings, found, directory)


def _train(comparison: Comparison) -> bool:
    """Trains with progress on stderr; False if the user stopped it."""
    from rich.console import Console

    from batchnorm.experiment.progress import TrainingProgress

    keep_freed_memory()
    described, settings = comparison.description, comparison.settings
    say(
        f"{described['name']} ({described['source']}): {described['train_examples']:,} images to "
        f"train, {described['test_examples']:,} to test."
    )
    with TrainingProgress(
        Console(stderr=True), settings.epochs, described["train_examples"]
    ) as progress:
        try:
            with one_sentence():
                comparison.train(progress)
        except KeyboardInterrupt:
            return False
    return True


def _report(comparison: Comparison, lang: Language, as_json: bool) -> None:
    from rich.console import Console

    from batchnorm.experiment.report import page, terminal

    results, directory = comparison.results(), comparison.directory
    path = directory.path / "report.html"
    directory.write_results(results)
    page.write(results, path, lang.value)
    if as_json:
        kept = ("norm", "learning_rate", "complete", "epochs")
        runs = [{key: run[key] for key in kept} for run in results["runs"]]
        print_json({**results, "runs": runs, "report": str(path)})
    else:
        Console().print(terminal.table(results, lang.value))
    say(f"Report: {path}")


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
