"""The folder of a run: settings, results and checkpoints, each written whole or not at all.

Checkpoints are the only truth (docs/decisions/0005): each holds the model, the optimizer and all
that was measured so far. ``config.json`` says how to go on. ``metrics.jsonl`` and ``report.json``
repeat what the checkpoints hold.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from batchnorm.experiment.results import Config, Results, Run, first_fault
from batchnorm.files import as_json, whole_file, write_text

Model = TypeVar("Model", bound=BaseModel)


class RunError(ValueError):
    """A run folder that cannot be used; the message is a sentence for the user."""


class RunDirectory:
    """Reads and writes the files of a run.

    Args:
        path: The folder; `create` makes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, results: Results) -> None:
        """Starts a run: writes ``config.json``.

        Raises:
            RunError: The folder already holds one, or cannot be made.
        """
        path = self.path / "config.json"
        if path.exists():
            raise RunError(
                f"{self.path} already holds a run; continue it with --resume {self.path}, "
                "or choose another --out."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            config = Config(settings=results.settings, data=results.data)
            write_text(path, config.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error.strerror}.") from error

    def config(self) -> Config:
        """Reads ``config.json``.

        Raises:
            RunError: There is none, or it cannot be read.
        """
        return self._read(Config, "config.json", "run", "start a new run with --out")

    def write_results(self, results: Results) -> None:
        """Replaces ``report.json``, and ``metrics.jsonl``, which has one line per epoch."""
        lines = [
            {"norm": run.norm, **epoch.model_dump()} for run in results.runs for epoch in run.epochs
        ]
        text = "".join(as_json(line) + "\n" for line in lines)
        write_text(self.path / "metrics.jsonl", text)
        write_text(self.path / "report.json", as_json(results.model_dump(by_alias=True)) + "\n")

    def results(self) -> Results:
        """Reads ``report.json``.

        Raises:
            RunError: There is none, or it cannot be read.
        """
        repair = f"make it again with batchnorm train --resume {self.path}"
        return self._read(Results, "report.json", "results", repair)

    def _read(self, kind: type[Model], name: str, content: str, repair: str) -> Model:
        path = self.path / name
        try:
            return kind.model_validate(json.loads(path.read_text()))
        except FileNotFoundError as error:
            raise RunError(
                f"{self.path} holds no {content} ({name} is missing); {repair}."
            ) from error
        except ValidationError as error:
            raise RunError(f"{path}: {first_fault(error)}; {repair}.") from error
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read as JSON; {repair}.") from error

    def save_checkpoint(self, run: Run, state: Mapping[str, Any]) -> None:
        """Writes the state after an epoch; ``state`` has tensors, lists, text and numbers only."""
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        with whole_file(folder / f"{run.norm}-epoch-{len(run.epochs):02d}.pt") as file:
            torch.save({**state, "run": run.model_dump()}, file)

    def last_checkpoint(self, norm: str) -> dict[str, Any] | None:
        """Reads the state after the last finished epoch; None before the first.

        Raises:
            RunError: The file is damaged, or holds more than tensors, lists, text and numbers.
        """
        pattern = re.compile(rf"{re.escape(norm)}-epoch-(\d+)\.pt")
        found = [
            (int(match[1]), path)
            for path in (self.path / "checkpoints").glob("*.pt")
            if (match := pattern.fullmatch(path.name))
        ]
        if not found:
            return None
        path = max(found)[1]
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise RunError(
                f"{path} is damaged or not a checkpoint of this program; delete it, and --resume "
                "goes on from the epoch before."
            ) from error
