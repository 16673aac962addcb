"""Enters our layers into registries of other libraries that go by the exact class of a module.

A privacy validator and a counter of operations look up ``type(module)``, so they would pass over a
layer of ours in silence. An entry is made when the library is imported, before or after this one;
nothing is imported for it. Libraries that are not here get torch's classes by
`batchnorm.to_torch` (``docs/compatibility.md``).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn


def _classes() -> Iterator[tuple[type[nn.Module], type[nn.Module]]]:
    """Yields each class of ours with torch's class."""
    from batchnorm.nn.layers import LAYERS

    return zip(LAYERS, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), strict=True)


def _enter_validators(module: Any) -> None:
    """Opacus: batch norm mixes the samples of a batch, so it is refused, or replaced."""
    registry = module.ModuleValidator
    for ours, torchs in _classes():
        registry.VALIDATORS[ours] = registry.VALIDATORS[torchs]
        registry.FIXERS[ours] = _with_activation(registry.FIXERS[torchs])


def _with_activation(fix: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def fix_ours(layer: Any, **options: Any) -> nn.Module:
        fixed = fix(layer, **options)
        return fixed if layer.activation is None else nn.Sequential(fixed, nn.ReLU())

    return fix_ours


def _enter_counters(module: Any) -> None:
    """THOP: operations of a layer."""
    for ours, torchs in _classes():
        module.register_hooks[ours] = module.register_hooks[torchs]


_ENTRIES: dict[str, Callable[[ModuleType], None]] = {
    "opacus.validators": _enter_validators,
    "thop.profile": _enter_counters,
}


def _enter(module: ModuleType) -> None:
    try:
        _ENTRIES[module.__name__](module)
    except (AttributeError, KeyError) as error:
        warnings.warn(
            f"batchnorm: {module.__name__} has no registry where it is looked for ({error!r}), so "
            "it may pass over layers of batchnorm; call batchnorm.to_torch(model) before you use "
            "it.",
            RuntimeWarning,
            stacklevel=2,
        )


class _Finder(MetaPathFinder):
    """Finds the modules of `_ENTRIES` as all others are found, and has a loader make the entry."""

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _ENTRIES:
            return None
        for finder in sys.meta_path:
            spec = None if _is_ours(finder) else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _EnteringLoader(spec.loader)
                return spec
        return None


class _EnteringLoader(Loader):
    """Loads a module by its own loader, then makes the entry."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _enter(module)


def enter() -> None:
    """Makes the entries, now or when a library is imported."""
    for name in _ENTRIES:
        if name in sys.modules:
            _enter(sys.modules[name])
    # If this module is imported anew, its finder takes the place of the earlier one.
    sys.meta_path[:] = [_Finder(), *(finder for finder in sys.meta_path if not _is_ours(finder))]


def _is_ours(finder: object) -> bool:
    return (type(finder).__module__, type(finder).__name__) == (__name__, _Finder.__name__)
