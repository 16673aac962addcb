"""Imports and calls what a user names as ``module:function``; errors in it become one sentence."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typer.exceptions import TyperException


def returned(option: str, spec: str) -> Any:
    """Calls ``module:function`` without arguments, and returns its result.

    Modules are also imported from the working folder.

    Args:
        option: The option on the command line, for messages.
        spec: Value of the option; the part after the colon may have dots.

    Raises:
        TyperException: There is no such function, or it fails.
    """
    module, separator, name = spec.partition(":")
    if not (module and separator and name):
        raise TyperException(f"{option} expects module:function, got {spec!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    with blamed(f"{option} {spec}: importing {module} failed with"):
        found: Any = _imported(option, spec, module)
    for part in name.split("."):
        if not hasattr(found, part):
            raise TyperException(f"{option} {spec}: module {module} has no {name}")
        found = getattr(found, part)
    if not isinstance(found, Callable):
        raise TyperException(f"{option} {spec}: {name} is a {type(found).__name__}, no function")
    with blamed(f"{option} {spec}: calling it without arguments failed with"):
        return found()


def _imported(option: str, spec: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise TyperException(
            f"{option} {spec}: there is no module {error.name} in this folder, and none installed"
        ) from error


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Turns any error in the user's code into one sentence with the file and the line.

    Args:
        what: Beginning of the sentence.
    """
    try:
        yield
    except TyperException:
        raise
    except Exception as error:
        message = " ".join(str(error).split()).rstrip(".")
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}, line {last.lineno}"
        text = f"{type(error).__name__}: {message}" if message else type(error).__name__
        raise TyperException(f"{what} {text} ({place})") from error
