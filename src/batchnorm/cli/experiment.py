"""``batchnorm train`` and ``batchnorm report``: the experiment and its page."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from batchnorm.allocation import keep_freed_memory
from batchnorm.cli.options import (
    INTERRUPTED,
    Json,
    Lang,
    Threads,
    announce_compilation,
    one_sentence,
    print_json,
    say,
)
from batchnorm.nets import NORMS, Norm

if TYPE_CHECKING:
    from batchnorm.cli.progress import Bar
    from batchnorm.experiment.data import Dataset
    from batchnorm.experiment.results import Epoch, Results, Settings
    from batchnorm.experiment.run_directory import RunDirectory
    from batchnorm.experiment.training import Comparison


def train(
    context: typer.Context,
    norm: Annotated[
        str, typer.Option(help=f"What to compare: {', '.join(NORMS)}, separated by commas.")
    ] = "batchnorm,none",
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over the training images.", show_default="10"),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate.", show_default="1.0; 0.9 for none")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, help="Images per step.", show_default="256")
    ] = None,
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
        typer.Option(min=2, help="Use only the first training images.", show_default="all"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with Fashion-MNIST.", show_default="found or downloaded"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="runs/<time>")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    lang: Lang = "en",
    as_json: Json = False,
) -> None:
    """Train LeNet on Fashion-MNIST with and without batch norm, and write a report.

    Without Fashion-MNIST, scikit-learn's digits stand in, with other defaults.
    """
    from batchnorm.experiment.run_directory import RunDirectory
    from batchnorm.experiment.training import Comparison

    if resume is None:
        directory = RunDirectory(out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S"))
        chosen = {
            "norms": _norms(norm),
            "epochs": epochs,
            "batch_size": batch_size,
            "seed": seed,
            "threads": threads,
            "device": _device(device),
            "population_examples": population,
            "learning_rate": _positive(lr),
            "train_examples": examples,
        }
        dataset = _dataset(data)
        settings = _settings(chosen, dataset.name)
    else:
        _refuse_options_with_resume(context)
        directory = RunDirectory(resume)
        with one_sentence():
            config = directory.config()
        settings = config.settings
        dataset = _dataset(data)
        if dataset.name != config.data.name:
            raise TyperException(
                f"the run in {resume} was trained on {config.data.name}, but only {dataset.name} "
                "was found; name the folder of the images with --data DIR"
            )
    with one_sentence():
        comparison = Comparison(settings, dataset, directory)
        if resume is None:
            directory.create(comparison.results)
    finished = _train(comparison)
    _report(comparison.results, directory, lang, as_json=as_json)
    if not finished:
        say(f"Interrupted; go on with: batchnorm train --resume {directory.path}")
        raise typer.Exit(INTERRUPTED)


def report(
    directory: Annotated[Path, typer.Argument(help="Folder of a run of batchnorm train.")],
    lang: Lang = "en",
) -> None:
    """Write the page of a finished or interrupted run again, in either language."""
    from batchnorm.experiment.report import page
    from batchnorm.experiment.run_directory import RunDirectory

    with one_sentence():
        page.write(RunDirectory(directory).results(), directory / "report.html", lang)
    say(f"Report: {directory / 'report.html'}")


def _norms(text: str) -> list[Norm]:
    wanted = [name.strip() for name in text.split(",")]
    norms: list[Norm] = [known for name in wanted for known in NORMS if known == name]
    if len(set(norms)) != len(wanted):
        raise TyperException(
            f"--norm expects different names out of {', '.join(NORMS)}, separated by commas, "
            f"got {text!r}"
        )
    return norms


def _positive(rate: float | None) -> float | None:
    if rate is not None and not 0 < rate < float("inf"):
        raise TyperException(f"--lr expects a positive number, got {rate}")
    return rate


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise TyperException(
            f"--device {name} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    return name


def _dataset(folder: Path | None) -> Dataset:
    from batchnorm.cli.progress import Bar
    from batchnorm.experiment import data

    def bar(name: str) -> Bar:
        return Bar("bytes", text=name)

    with one_sentence():
        return data.load(folder, announce=say, progress=bar)


def _settings(chosen: dict[str, Any], data_name: str) -> Settings:
    """Fills in what the user has not chosen."""
    import torch

    from batchnorm.experiment.defaults import defaults_for
    from batchnorm.experiment.results import Settings

    defaults = defaults_for(data_name)
    chosen["epochs"] = chosen["epochs"] or defaults.epochs
    chosen["batch_size"] = chosen["batch_size"] or defaults.batch_size
    chosen["threads"] = chosen["threads"] or torch.get_num_threads()
    return Settings(**chosen)


def _train(comparison: Comparison) -> bool:
    """Trains with progress on stderr; False if the user stopped it."""
    from batchnorm.cli.progress import Bar

    keep_freed_memory()
    announce_compilation()
    data, epochs = comparison.results.data, comparison.results.settings.epochs
    say(
        f"{data.name} ({data.source}): {data.train_examples:,} images to train, "
        f"{data.test_examples:,} to test."
    )
    with Bar("images", total=epochs * data.train_examples) as bar:
        try:
            with one_sentence():
                comparison.train(_Follower(bar, epochs, data.train_examples))
        except KeyboardInterrupt:
            return False
    return True


class _Follower:
    """Draws the training of one norm after the other with a bar, and prints a line per epoch."""

    def __init__(self, bar: Bar, epochs: int, examples: int) -> None:
        self._bar, self._epochs, self._examples = bar, epochs, examples

    def start(self, norm: Norm, done: int) -> None:
        self._bar.reset()
        self._bar.done = done * self._examples
        self._name(norm, done + 1)

    def step(self, examples: int) -> None:
        self._bar.update(examples)

    def epoch(self, norm: Norm, record: Epoch) -> None:
        from batchnorm.charts.numerals import decimal, percent

        self._name(norm, record.epoch + 1)
        self._bar.line(
            f"{norm} {record.epoch}/{self._epochs}: loss {decimal(record.loss)}, "
            f"train {percent(record.train_accuracy)}, "
            f"test {percent(record.test_accuracy_running)} running / "
            f"{percent(record.test_accuracy_population)} population"
        )

    def _name(self, norm: Norm, epoch: int) -> None:
        self._bar.text = f"{norm} {min(epoch, self._epochs)}/{self._epochs}"


def _report(results: Results, directory: RunDirectory, lang: str, *, as_json: bool) -> None:
    from rich.console import Console

    from batchnorm.experiment.report import page, terminal

    path = directory.path / "report.html"
    directory.write_results(results)
    page.write(results, path, lang)
    if as_json:
        left_out = {"pre_activations", "norm_layers"}
        content = results.model_dump(by_alias=True, exclude={"runs": {"__all__": left_out}})
        print_json({**content, "report": str(path)})
    else:
        Console().print(terminal.table(results, lang))
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
