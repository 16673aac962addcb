"""Shared by the commands: options, one sentence for bad input, JSON on standard output."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer
from typer.exceptions import TyperException

INTERRUPTED = 130


Lang = Annotated[Literal["en", "zh"], typer.Option("--lang", help="Language of the text.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")
]


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turns the errors that our functions raise for bad input into a usage error."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise TyperException(
            f"this command needs {error.name}, which is not installed; "
            "install it with pip install 'batchnorm[cli]'"
        ) from error
    except ValueError as error:
        raise TyperException(str(error)) from error
    except OSError as error:
        told = error.filename is not None and error.strerror is not None
        text = f"{error.filename}: {str(error.strerror).lower()}" if told else str(error)
        raise TyperException(text) from error


def print_json(value: Any) -> None:
    """Prints one JSON document on standard output."""
    from batchnorm.files import as_json

    print(as_json(value))


class _CompilationNotice(logging.Handler):
    """Prints one line at the first compilation of a kernel; the kernels log each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints the line, then removes this handler."""
        logging.getLogger("batchnorm.kernels").removeHandler(self)
        say("Compiling the CPU kernels for this machine (once; about half a minute).")


def announce_compilation() -> None:
    """Announces the first compilation of a CPU kernel on standard error."""
    logger = logging.getLogger("batchnorm.kernels")
    logger.setLevel(logging.INFO)
    logger.handlers = [_CompilationNotice()]


def say(line: str) -> None:
    """Prints one line on standard error, where it is no part of the result."""
    print(line, file=sys.stderr)
