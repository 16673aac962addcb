"""``batchnorm explain``: the walkthrough with real numbers."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from batchnorm.cli.options import Json, Lang, print_json

Example = Literal["all", "fully-connected", "convolution"]


def explain(
    example: Annotated[Example, typer.Argument(help="Which example of the notes.")] = "all",
    lang: Lang = "en",
    as_json: Json = False,
) -> None:
    """Walk through batch normalization step by step, with real numbers."""
    from batchnorm.learn import document, examples

    names = examples.NAMES if example == "all" else (example,)
    if as_json:
        walked = [
            {"name": name, "steps": document.steps_as_json(examples.walk(name), lang)}
            for name in names
        ]
        print_json({"schema": 1, "examples": walked})
        return
    from rich.console import Console

    from batchnorm.learn import terminal

    for name in names:
        Console().print(terminal.render(examples.walk(name), lang))
