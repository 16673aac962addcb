"""Plain results, JSON-able mappings and lists, checked once and given types."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from batchnorm.experiment.report.results import (
    QUANTILES,
    Band,
    Data,
    Epoch,
    NormLayer,
    Results,
    Run,
    Settings,
)

SCHEMA = 1
MAX_RUNS = 4
NORMS = ("batchnorm", "scratch", "torch", "none")

_DATA = {"name": str, "source": str, "train_examples": int, "test_examples": int}
_SETTINGS = {
    "epochs": int,
    "batch_size": int,
    "seed": int,
    "threads": int,
    "device": str,
    "population_examples": int,
    "torch": str,
    "batchnorm": str,
}


def read(results: Mapping) -> Results:
    """Check plain results and give them types.

    Args:
        results: what the training code produced, schema 1. Numbers may be NaN, infinite or null.

    Returns:
        The same values; null becomes NaN, and characters of names that cannot be printed become
        the replacement character.

    Raises:
        ValueError: another schema, no runs or too many, an unknown norm, a field that is missing
            or of another kind, quantiles or channels of another number.
    """
    schema = results.get("schema")
    if schema != SCHEMA:
        raise ValueError(
            f"results: expected schema {SCHEMA}, got {schema!r}; "
            "write them again with this version of batchnorm."
        )
    runs = _field(results, "runs", Sequence, "results")
    if not 1 <= len(runs) <= MAX_RUNS:
        raise ValueError(
            f"results: expected 1 to {MAX_RUNS} runs, got {len(runs)}; compare fewer at a time."
        )
    return Results(
        data=Data(**_record(results, "data", _DATA)),
        settings=Settings(**_record(results, "settings", _SETTINGS)),
        runs=tuple(_run(run, f"run {position}") for position, run in enumerate(runs, start=1)),
    )


def _record(results: Mapping, name: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    record = _field(results, name, Mapping, "results")
    return {key: _clean(_field(record, key, kind, name)) for key, kind in kinds.items()}


def _run(run: Any, where: str) -> Run:
    norm = _field(run, "norm", str, where)
    if norm not in NORMS:
        raise ValueError(f"{where}: expected norm to be one of {', '.join(NORMS)}, got {norm!r}.")
    return Run(
        norm=norm,
        learning_rate=_number(run, "learning_rate", where),
        complete=_field(run, "complete", bool, where),
        epochs=tuple(_epoch(e, where) for e in _field(run, "epochs", Sequence, where)),
        pre_activations=tuple(
            _band(b, where) for b in _field(run, "pre_activations", Sequence, where)
        ),
        norm_layers=tuple(_layer(x, where) for x in _field(run, "norm_layers", Sequence, where)),
    )


def _epoch(epoch: Any, where: str) -> Epoch:
    number = _field(epoch, "epoch", int, where)
    fields = list(Epoch.__dataclass_fields__)[1:]
    where = f"{where}, epoch {number}"
    return Epoch(number, **{field: _number(epoch, field, where) for field in fields})


def _band(band: Any, where: str) -> Band:
    layer = _clean(_field(band, "layer", str, where))
    where = f"{where}, layer {layer!r}"
    points = _field(band, "points", Sequence, where)
    quantiles = tuple(_numbers(point, "quantiles", where) for point in points)
    for values in quantiles:
        if len(values) != len(QUANTILES):
            raise ValueError(f"{where}: expected {len(QUANTILES)} quantiles, got {len(values)}.")
    return Band(layer, tuple(_field(point, "epoch", int, where) for point in points), quantiles)


def _layer(layer: Any, where: str) -> NormLayer:
    name = _clean(_field(layer, "layer", str, where))
    where = f"{where}, layer {name!r}"
    fields = list(NormLayer.__dataclass_fields__)[1:]
    values = {field: _numbers(layer, field, where) for field in fields}
    for field in fields:
        if len(values[field]) != len(values["gamma"]):
            raise ValueError(
                f"{where}: expected {field} to have {len(values['gamma'])} channels like gamma, "
                f"got {len(values[field])}."
            )
    return NormLayer(name, **values)


def _field(mapping: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(mapping, Mapping) or name not in mapping:
        raise ValueError(f"{where}: expected a field {name!r}, it is missing.")
    value = mapping[name]
    if not isinstance(value, kind) or (kind is Sequence and isinstance(value, str)):
        raise ValueError(
            f"{where}: expected {name!r} to be of type {kind.__name__}, got {value!r:.40}."
        )
    return value


def _number(mapping: Any, name: str, where: str) -> float:
    return _float(_field(mapping, name, object, where), name, where)


def _numbers(mapping: Any, name: str, where: str) -> tuple[float, ...]:
    return tuple(_float(v, name, where) for v in _field(mapping, name, Sequence, where))


def _float(value: Any, name: str, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: expected {name!r} to hold numbers, got {value!r:.40}.")
    return float(value)


def _clean(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)
