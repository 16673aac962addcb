"""The command line: arguments, one call, a report. ``__main__.main`` lists the exit codes.

Commands import heavy libraries inside their functions, so that ``--help`` answers at once. What a
command does lives in the room that it calls.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from batchnorm.cli import experiment, measurement, recalibration, walkthrough
from batchnorm.cli.options import INTERRUPTED
from batchnorm.version import __version__

app = typer.Typer(
    name="batchnorm",
    help="Batch normalization you can read, trust and run fast, for PyTorch.",
    epilog="Start with: batchnorm explain, then: batchnorm train",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def run(arguments: Sequence[str]) -> int:
    """Runs a command; tells wrong use in one sentence on stderr.

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


app.command()(walkthrough.explain)
app.command()(experiment.train)
app.command()(experiment.report)
app.command()(measurement.bench)
app.command()(recalibration.recalibrate)
