"""``batchnorm recalibrate``: gives a user's checkpoint the statistics that the user's data have."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from batchnorm.allocation import keep_freed_memory
from batchnorm.cli.options import INTERRUPTED, Json, Threads, one_sentence, print_json, say

if TYPE_CHECKING:
    from torch import Tensor, nn

    from batchnorm.tools.recalibration import Recalibration

BATCH_SIZE = 64
FILES = (".pt", ".pth", ".safetensors", ".npy")


def recalibrate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A .pt, .pth, .ckpt or .safetensors file with a state_dict.")
    ],
    model: Annotated[str, typer.Option(help="module:function that returns the model.")],
    data: Annotated[
        str,
        typer.Option(
            help="module:function that returns batches, or a .pt, .safetensors or .npy file with "
            "a tensor of inputs."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="File for the result.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would change, write nothing.")
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Batch size for a file of inputs.", show_default=str(BATCH_SIZE)),
    ] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Stop at this number.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Stop at this standard error of the statistics, relative to their scale."
        ),
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Name or pattern of layers; may be repeated.")
    ] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Layer by layer: exact, with a pass for each.")
    ] = False,
    prefix: Annotated[
        str | None,
        typer.Option(help="Prefix of the model's names in the file, such as model.; else found."),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Give a model's batch norm layers the statistics that the data have.

    Dropout is off. Layers that the function freezes keep their statistics, and everything else in
    the checkpoint stays as it is. Modules are also imported from the working folder.
    """
    from batchnorm.cli import checkpoint as checkpoints

    _check_files(checkpoint, out, force=force or dry_run)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    keep_freed_memory()
    with one_sentence():
        stored = checkpoints.read(checkpoint)
    network = _network(model)
    with one_sentence():
        stored = stored.with_prefix(prefix, network)
        stored.load_into(network)
    if stored.prefix:
        others = len(stored.state) - len(stored.names_in(network))
        rest = f"; {others} other entries stay as they are" if others else ""
        say(f"Names in {checkpoint} are read without {stored.prefix!r}{rest}.")
    batches = _batches(data, batch_size, network)
    passes = _passes(network, layers or None) if sequential else 1
    with _progress(batches, max_samples, passes) as progress:
        result = _recalibrated(
            network,
            batches,
            max_samples=max_samples,
            tolerance=tolerance,
            layers=layers or None,
            sequential=sequential,
            progress=progress,
        )
    with one_sentence():
        stored.check_statistics(network, [change.name for change in result.layers])
    target = None if dry_run else out
    if target is not None:
        with one_sentence():
            stored.take_statistics(network, [change.name for change in result.layers])
            stored.write(target)
    _show(result, checkpoint, target, as_json=as_json)


def _check_files(checkpoint: Path, out: Path | None, *, force: bool) -> None:
    if out is None:
        if not force:
            raise TyperException("name a file for the result with --out, or use --dry-run")
        return
    if _format(out) != _format(checkpoint):
        raise TyperException(
            f"--out {out} must be of the same format as {checkpoint}, so that nothing in it is "
            "lost; use the same ending"
        )
    if not out.parent.is_dir():
        raise TyperException(f"--out: there is no folder {out.parent}")
    if out.exists() and not force:
        raise TyperException(f"--out {out} exists; --force replaces it")


def _format(path: Path) -> str:
    return ".pt" if path.suffix in (".pth", ".ckpt") else path.suffix


def _network(spec: str) -> nn.Module:
    from torch import nn

    from batchnorm.cli import user_code

    network = user_code.returned("--model", spec)
    if not isinstance(network, nn.Module):
        raise TyperException(
            f"--model {spec} must return a torch.nn.Module, got a {type(network).__name__}"
        )
    if network.training:
        _freeze_in_evaluation(network)  # Survives the eval() of everything.
    return network.eval()


def _freeze_in_evaluation(network: nn.Module) -> None:
    """Freezes the layers that the factory put into evaluation mode.

    One whose own code moves its statistics there cannot be frozen. It is only marked, which is
    enough for them to stay.
    """
    from batchnorm.tools.freezing import freeze
    from batchnorm.tools.patching import (
        FROZEN_MARK,
        has_frozen_mark,
        has_running_statistics,
        is_batch_norm,
    )

    for layer in network.modules():
        if layer.training or has_frozen_mark(layer):
            continue
        if not (is_batch_norm(layer) and has_running_statistics(layer)):
            continue
        try:
            freeze(layer, lambda name, _: not name, affine=False)
        except ValueError:
            setattr(layer, FROZEN_MARK, True)


def _batches(spec: str, batch_size: int | None, network: nn.Module) -> Iterable[Any]:
    from batchnorm.cli import user_code

    if not spec.endswith(FILES):
        if batch_size is not None:
            raise TyperException(
                f"--batch-size is for files of inputs; the batches of {spec} have their size"
            )
        return user_code.returned("--data", spec)
    inputs = _inputs(Path(spec))
    if inputs.dim() < 2:
        raise TyperException(
            f"{spec} must hold inputs of shape (N, ...), got shape {tuple(inputs.shape)}"
        )
    first = next(network.parameters(), inputs)
    if inputs.is_floating_point() and first.is_floating_point():
        inputs = inputs.to(first.dtype)
    return inputs.split(batch_size or BATCH_SIZE)


def _inputs(path: Path) -> Tensor:
    import numpy as np
    import torch

    from batchnorm.cli import checkpoint as checkpoints

    with one_sentence():
        if path.suffix == ".npy":
            try:
                return torch.from_numpy(np.load(path, allow_pickle=False))
            except (ValueError, TypeError, EOFError) as error:
                raise checkpoints.CheckpointError(
                    f"{path} holds no array of numbers: {error}."
                ) from error
        content, _ = checkpoints.read_tensors(path)
    if isinstance(content, dict) and len(content) == 1:
        (content,) = content.values()
    if not isinstance(content, torch.Tensor):
        raise TyperException(f"{path} must hold one tensor of inputs, got a {_described(content)}")
    return content


def _described(content: object) -> str:
    kind = type(content).__name__
    return f"{kind} of {len(content)}" if isinstance(content, (dict, list, tuple)) else kind


def _recalibrated(network: nn.Module, batches: Iterable[Any], **options: Any) -> Recalibration:
    try:
        result = _call(network, batches, options)
    except KeyboardInterrupt:
        say("Interrupted; nothing is written.")
        raise typer.Exit(INTERRUPTED) from None
    if not result.layers:
        reasons = [f"{name!r}: {reason}" for name, reason in result.left.items()]
        reasons += [f"{name!r}: no batch reached it" for name in result.unreached]
        raise TyperException(
            "the model has no batch norm layer to recalibrate"
            + (f" ({'; '.join(reasons[:3])})" if reasons else "")
        )
    return result


def _call(network: nn.Module, batches: Iterable[Any], options: dict[str, Any]) -> Recalibration:
    """Recalibrates; an error in the user's code is reported with its place there."""
    from batchnorm.cli import user_code
    from batchnorm.tools.recalibration import recalibrate

    with user_code.blamed("recalibrating failed with"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "recalibrate: ")  # The result says the same.
        try:
            return recalibrate(network, batches, **options)
        except (TypeError, ValueError) as error:
            if not str(error).startswith("recalibrate: "):
                raise
            raise TyperException(str(error).removeprefix("recalibrate: ")) from error


@contextmanager
def _progress(
    batches: Iterable[Any], max_samples: int | None, passes: int
) -> Iterator[Callable[[int], None]]:
    """Draws a bar on stderr; the function that it gives is called after each batch.

    Args:
        batches: The batches of one pass; if their number is known, so is the end of the bar.
        max_samples: The same holds for this number. Whichever is reached first ends a pass.
        passes: The largest number of passes.
    """
    from batchnorm.cli.progress import Bar

    length, seen = _length(batches), 0

    def tell(samples: int) -> None:
        nonlocal seen
        seen += 1
        done = max(seen / length if length else 0, samples / max_samples if max_samples else 0)
        if done:
            bar.total = samples / min(done / passes, 1)
        bar.done = samples

    with Bar("samples") as bar:
        yield tell


def _length(batches: Iterable[Any]) -> int | None:
    """Returns the number of batches; None if it is unknown, as for a loader of a stream."""
    try:
        return len(batches)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


def _passes(network: nn.Module, layers: list[str] | None) -> int:
    """Returns the largest number of passes that `recalibrate` makes with sequential=True."""
    from batchnorm.tools.patching import batch_norms, has_frozen_mark, has_running_statistics

    with one_sentence(), warnings.catch_warnings(action="ignore"):  # The tool itself will warn.
        chosen = batch_norms(network, layers, caller="recalibrate").values()
    return 1 + sum(has_running_statistics(layer) and not has_frozen_mark(layer) for layer in chosen)


def _show(result: Recalibration, checkpoint: Path, out: Path | None, *, as_json: bool) -> None:
    if as_json:
        written = None if out is None else str(out)
        print_json({"schema": 1, "checkpoint": str(checkpoint), "out": written, **result.to_dict()})
    else:
        print(result)
    say("Nothing is written: --dry-run." if out is None else f"Written: {out}")
