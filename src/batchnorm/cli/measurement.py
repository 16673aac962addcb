"""``batchnorm bench``: our layers against the others on this machine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from batchnorm.allocation import keep_freed_memory
from batchnorm.cli.options import INTERRUPTED, Json, Threads, one_sentence, print_json, say

if TYPE_CHECKING:
    from batchnorm.bench.cases import Plan
    from batchnorm.bench.clock import Effort

DISAGREEMENT = 1


class Only(StrEnum):
    """Groups of rows."""

    resnet50 = "resnet50"
    lenet = "lenet"
    nc = "nc"
    one_d = "1d"
    three_d = "3d"
    steps = "steps"


class Layout(StrEnum):
    """Memory layouts."""

    nchw = "nchw"
    channels_last = "channels_last"


class DType(StrEnum):
    """Of the input."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Variant(StrEnum):
    """What follows the normalization."""

    plain = "plain"
    relu = "relu"
    add_relu = "add-relu"


class Pass(StrEnum):
    """What is timed."""

    forward = "forward"
    backward = "backward"
    both = "both"
    eval = "eval"


def bench(
    only: Annotated[
        list[Only] | None,
        typer.Option(help="Rows of this group; may be repeated, like the next four."),
    ] = None,
    layout: Annotated[list[Layout] | None, typer.Option(help="Memory layout.")] = None,
    dtype: Annotated[list[DType] | None, typer.Option(help="Of the input.")] = None,
    variant: Annotated[list[Variant] | None, typer.Option(help="What is fused.")] = None,
    measured: Annotated[list[Pass] | None, typer.Option("--pass", help="What is timed.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes, few rounds.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Every layout, dtype and variant that is not named.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also torch.compile; half a minute a shape.")
    ] = False,
    threads: Threads = None,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="For each row, after at least 9 rounds.")
    ] = 0.3,
    svg: Annotated[Path | None, typer.Option(help="Also draw the speeds into this file.")] = None,
    as_json: Json = False,
) -> None:
    """Time our layers against torch's, after checking that they agree.

    Without options: ResNet-50's layers in several ways, others in one, and training steps; two or
    three minutes. An option that is named leaves only what it names, and of the rest plain float32
    in NCHW; training steps then have to be named too.
    """
    from batchnorm.bench import cases, clock

    if quick and everything:
        raise TyperException("--quick and --all exclude each other; choose one")
    if compiled:
        _demand_compiler()
    if svg is not None and not svg.parent.is_dir():
        raise TyperException(f"--svg: there is no folder {svg.parent}")
    selection = cases.Selection(
        only=tuple(choice.value for choice in only or ()),
        layouts=tuple(choice.value for choice in layout or ()),
        precisions=tuple(choice.value for choice in dtype or ()),
        variants=tuple(choice.value for choice in variant or ()),
        passes=tuple(choice.value for choice in measured or ()),
    )
    plan = cases.plan(selection, "quick" if quick else "all" if everything else "usual")
    if not plan.cases and not plan.nets:
        raise TyperException("no row fits all of these options; channels_last needs images")
    effort = clock.Effort(seconds / 3 if quick else seconds, 5 if quick else 9)
    results = _measure(plan, effort, threads, compiled=compiled)
    if svg is not None:
        _draw(results, svg)
    _show(results, as_json=as_json)


def _demand_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise TyperException(
            f"--compile needs a C++ compiler for torch.compile, and there is no {compiler}; "
            "install g++, name another one in CXX, or leave out --compile"
        )


def _measure(plan: Plan, effort: Effort, threads: int | None, *, compiled: bool) -> dict[str, Any]:
    from batchnorm.bench.measure import measure
    from batchnorm.bench.truth import Disagreement

    reason = keep_freed_memory()
    if reason is not None:
        say(f"Freed memory is not kept, so large outputs cost page faults: {reason}.")
    try:
        with one_sentence(), _progress(len(plan.cases) + len(plan.nets)) as announce:
            return measure(plan, effort, threads=threads, compiled=compiled, announce=announce)
    except Disagreement as disagreement:
        for sentence in disagreement.sentences:
            say(f"batchnorm: {sentence}")
        say("batchnorm: no times are shown while results disagree.")
        raise typer.Exit(DISAGREEMENT) from disagreement
    except KeyboardInterrupt:
        say("Interrupted; an unfinished measurement is not shown.")
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr that is told what is measured next."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task("", total=total + 1)

        def announce(name: str) -> None:
            bar.update(task, description=name, advance=1)

        yield announce


def _draw(results: dict[str, Any], path: Path) -> None:
    from batchnorm.bench import chart as bench_chart
    from batchnorm.files import write_text

    with one_sentence():
        write_text(path, bench_chart.chart(results))
    say(f"Chart: {path}")


def _show(results: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(results)
        return
    from rich.console import Console

    from batchnorm.bench import machine
    from batchnorm.bench import table as bench_table

    Console().print(bench_table.tables(results, machine.warning(results["machine"])))
