"""``batchnorm bench``: times our layers against others on this machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from batchnorm.allocation import keep_freed_memory
from batchnorm.cli.options import INTERRUPTED, Json, Threads, one_sentence, print_json, say

if TYPE_CHECKING:
    from batchnorm.bench.cases import Plan, Word
    from batchnorm.bench.clock import Effort

DISAGREEMENT = 1


def bench(
    only: Annotated[
        str | None,
        typer.Option(
            help="Rows with these words, separated by commas. Groups: resnet50, lenet, nc, 1d, 3d, "
            "steps. Layouts: nchw, channels_last. Types: float32, bfloat16. Layers: bn, relu, "
            "add-relu. Passes: forward, backward, both, eval. Words of one sort are alternatives.",
            show_default="all",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes, few rounds.")] = False,
    everything: Annotated[
        bool,
        typer.Option("--all", help="All shapes in every layout, dtype and variant; half an hour."),
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

    Without options: ResNet-50's layers in several ways, others in one, and training steps of LeNet
    and ResNet-18; two or three minutes.
    """
    from batchnorm.bench import cases, clock

    if quick and everything:
        raise TyperException("--quick and --all exclude each other; choose one")
    if compiled:
        _demand_compiler()
    if svg is not None and not svg.parent.is_dir():
        raise TyperException(f"--svg: there is no folder {svg.parent}")
    extent: cases.Extent = "quick" if quick else "all" if everything else "usual"
    with one_sentence():
        plan = cases.plan(extent, () if only is None else _words(only))
    effort = clock.Effort(seconds / 3, 5) if quick else clock.Effort(seconds, 9)
    results = _measure(plan, effort, threads, compiled=compiled)
    if svg is not None:
        _draw(results, svg)
    _show(results, as_json=as_json)


def _words(only: str) -> tuple[Word, ...]:
    from batchnorm.bench.cases import WORDS

    names = [name.strip() for name in only.split(",")]
    words: tuple[Word, ...] = tuple(word for name in names for word in WORDS if word == name)
    if len(words) != len(names):
        raise TyperException(
            f"--only expects words out of {', '.join(WORDS)}, separated by commas, got {only!r}"
        )
    return words


def _demand_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise TyperException(
            f"--compile needs a C++ compiler for torch.compile, and there is no {compiler}; "
            "install g++, name another one in CXX, or leave out --compile"
        )


def _measure(plan: Plan, effort: Effort, threads: int | None, *, compiled: bool) -> dict[str, Any]:
    from batchnorm.bench.expected import Disagreement
    from batchnorm.bench.measure import measure
    from batchnorm.cli.progress import Bar

    reason = keep_freed_memory()
    if reason is not None:
        say(f"Freed memory is not kept, so large outputs cost page faults: {reason}.")
    try:
        with one_sentence(), Bar("rows", total=len(plan.cases) + len(plan.nets)) as bar:

            def announce(name: str) -> None:
                bar.text = name
                bar.update(1)

            return measure(plan, effort, threads=threads, compiled=compiled, announce=announce)
    except Disagreement as disagreement:
        for sentence in disagreement.sentences:
            say(f"batchnorm: {sentence}")
        say("batchnorm: no times are shown while results disagree.")
        raise typer.Exit(DISAGREEMENT) from disagreement
    except KeyboardInterrupt:
        say("Interrupted; an unfinished measurement is not shown.")
        raise typer.Exit(INTERRUPTED) from None


def _draw(results: dict[str, Any], path: Path) -> None:
    from batchnorm.bench import chart
    from batchnorm.files import write_text

    with one_sentence():
        write_text(path, chart.chart(results))
    say(f"Chart: {path}")


def _show(results: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(results)
        return
    from rich.console import Console

    from batchnorm.bench import machine, table

    Console().print(table.tables(results, machine.warning(results["machine"])))
