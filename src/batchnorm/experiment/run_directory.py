"""The folder of a comparison: settings, metrics and checkpoints, each written whole or not at all.

Checkpoints are the only truth: each holds the model, the optimizer and all that was measured so
far. ``config.json`` says how to go on, ``metrics.jsonl`` is made from the checkpoints' history.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from batchnorm.files import as_json, whole_file, write_text


class RunError(ValueError):
    """A run folder that cannot be used; the message is a sentence for the user."""


class RunDirectory:
    """Reads and writes the files of one comparison.

    Args:
        path: The folder; made when something is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, config: Mapping[str, Any]) -> None:
        """Starts a comparison.

        Raises:
            RunError: The folder already holds one, or cannot be made.
        """
        if (self.path / "config.json").exists():
            raise RunError(
                f"{self.path} already holds a run; continue it with --resume {self.path}, "
                "or choose another --out."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "config.json", json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error.strerror}.") from error

    def config(self) -> dict[str, Any]:
        """What `create` was given.

        Raises:
            RunError: There is no readable ``config.json``.
        """
        path = self.path / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise RunError(
                f"{self.path} holds no run (config.json is missing); start one with --out."
            ) from error
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read as JSON; start a new run with --out.") from error
        if not isinstance(config, dict) or "settings" not in config or "data" not in config:
            raise RunError(f"{path} is not the configuration of a run; start a new one with --out.")
        return config

    def write_metrics(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replaces ``metrics.jsonl``: one line an epoch."""
        text = "".join(as_json(line) + "\n" for line in lines)
        write_text(self.path / "metrics.jsonl", text)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Replaces ``report.json``, from which the page is made."""
        write_text(self.path / "report.json", as_json(results) + "\n")

    def results(self) -> dict[str, Any]:
        """What `write_results` was given.

        Raises:
            RunError: There is no readable ``report.json``.
        """
        path = self.path / "report.json"
        try:
            return json.loads(path.read_text())
        except FileNotFoundError as error:
            raise RunError(
                f"{self.path} holds no results (report.json is missing); "
                f"make them with --resume {self.path}."
            ) from error
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path} cannot be read as JSON; make it again with --resume {self.path}."
            ) from error

    def save_checkpoint(self, norm: str, epoch: int, state: Mapping[str, Any]) -> None:
        """Keeps the state after an epoch; ``state`` holds tensors and plain data only."""
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        with whole_file(folder / f"{norm}-epoch-{epoch:02d}.pt") as file:
            torch.save(dict(state), file)

    def last_checkpoint(self, norm: str) -> dict[str, Any] | None:
        """The state after the last finished epoch, None before the first.

        Raises:
            RunError: The file is damaged, or holds more than tensors and plain data.
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
