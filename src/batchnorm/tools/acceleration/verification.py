"""Compares a changed model with the original: outputs, gradients and buffers.

Two right computations differ in their last digits, and a deep network in training can amplify such
a difference by many orders of magnitude, so no fixed tolerance would do. The amplification is
measured: the *original* model runs again with the input of every batch norm layer moved at random,
by up to 64 units in the last place of its largest value. A result may differ by four times as much
as it moved then, plus 64 units in the last place of its own largest value.

A ReLU whose input is almost zero may switch, and then a gradient jumps. If one jumped in the
changed model, it jumps in about every second of the runs that imitate rounding; so these are
repeated, up to 16 times, before a result is called wrong.

Models run in their own dtype. A comparison in float64 would need no tolerance, but would compare
other kernels than those that the user will run, and not every model can be converted.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.tools.patching import Handle, SavedTensors, is_batch_norm, listen, replacements

Results = dict[str, Tensor]

_CONTAINERS = (dict, OrderedDict, list, set)
_FIRST_SEEDS, _MORE_SEEDS = range(2), range(2, 18)


class Input(NamedTuple):
    """One input of a batch norm layer.

    Attributes:
        training: True if the layer was in training.
        shape: Shape of the input.
        stride: Its strides.
        dtype: Its dtype.
    """

    training: bool
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Snapshot:
    """Everything about a model that can be restored: attributes, and tensors if wanted.

    Replaced forwards are part of it, with their attributes, because each knows the one behind it.

    Args:
        model: The model.
        tensors: Also saves the values of parameters, buffers and gradients, and the state of the
            random number generators.
    """

    def __init__(self, model: nn.Module, *, tensors: bool) -> None:
        modules = list(model.modules())
        objects = [*modules, *(method for module in modules for method in replacements(module))]
        self._objects = [(changed, dict(vars(changed))) for changed in objects]
        scripts = [module for module in modules if isinstance(module, torch.jit.ScriptModule)]
        self._modes = [(module, module.training) for module in scripts]  # Not in their __dict__.
        values = [value for _, attributes in self._objects for value in attributes.values()]
        self._containers = [(v, v.copy()) for v in values if type(v) in _CONTAINERS]
        parameters = list(model.parameters()) if tensors else []
        self._grads = [(parameter, parameter.grad) for parameter in parameters]
        saved = [*parameters, *(grad for _, grad in self._grads if grad is not None)]
        if tensors:
            saved += [*model.buffers(), *(value for value in values if isinstance(value, Tensor))]
        self._tensors = SavedTensors(saved)
        self._random = _random_state() if tensors else {}

    def restore(self) -> None:
        """Makes the model what it was, bit for bit, with the same objects in the same places."""
        for changed, attributes in self._objects:
            changed.__dict__.clear()
            changed.__dict__.update(attributes)
        for container, content in self._containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for module, training in self._modes:
            module.training = training
        self._tensors.restore()
        for parameter, grad in self._grads:
            parameter.grad = grad
        self.rewind_random()

    def rewind_random(self) -> None:
        """Sets the random number generators back."""
        if not self._random:
            return
        torch.set_rng_state(self._random["torch"])
        random.setstate(self._random["python"])
        np.random.set_state(self._random["numpy"])
        if "cuda" in self._random:
            torch.cuda.set_rng_state_all(self._random["cuda"])


def _random_state() -> dict[str, Any]:
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


@dataclass(frozen=True)
class Differences:
    """Largest differences, as fractions of the largest output and of the largest gradient.

    Attributes:
        output: Difference of the outputs of the two models.
        gradient: Difference of their gradients.
        rounding_of_output: Difference of the original's outputs from those with imitated rounding.
        rounding_of_gradient: The same for the gradients.
    """

    output: float
    gradient: float
    rounding_of_output: float
    rounding_of_gradient: float


class Verification:
    """Results of the original model, to which those of the changed one are compared.

    Args:
        model: The original.
        example_input: One tensor, a tuple of arguments or a dict of keyword arguments.
        before: State from which every run starts.

    Attributes:
        inputs: What the batch norm layers of the original got, by name.

    Raises:
        TypeError: ``example_input`` is of another type.
    """

    def __init__(self, model: nn.Module, example_input: Any, before: Snapshot) -> None:
        self._example = _arguments(example_input)
        self._before = before
        self._modes: list[_Mode] = []
        self.inputs: dict[str, set[Input]] = {}
        for training in (False, True):
            with _recorded(model, self.inputs):
                mode = _Mode(training, self._run(model, training=training))
            self._modes.append(mode)
            for seed in _FIRST_SEEDS:
                self._imitate_rounding(model, mode, seed)

    def check(self, model: nn.Module) -> Differences:
        """Runs the changed model and restores its tensors and flags.

        Raises:
            RuntimeError: Something differs by more than rounding; the message names it.
        """
        changed = Snapshot(model, tensors=False)
        found: dict[str, list[float]] = {"output": [], "gradient": []}
        rounding: dict[str, list[float]] = {"output": [], "gradient": []}
        for mode in self._modes:
            distances = mode.distances(self._run(model, training=mode.training))
            seeds = iter(_MORE_SEEDS)
            while (wrong := mode.disagreement(distances)) is not None:
                seed = next(seeds, None)
                if seed is None:
                    raise RuntimeError(wrong)
                self._imitate_rounding(model, mode, seed)
            self._before.restore()
            changed.restore()
            for kind in found:
                found[kind].append(mode.relative(distances, kind))
                rounding[kind].append(mode.relative(mode.rounding, kind))
        return Differences(*(max(values) for values in (*found.values(), *rounding.values())))

    def _imitate_rounding(self, model: nn.Module, mode: _Mode, seed: int) -> None:
        """Runs the original with disturbed inputs, and records how far each result moves."""
        self._before.restore()
        with _disturbed(model, seed):
            results = self._run(model, training=mode.training)
        self._before.restore()
        for name, distance in mode.distances(results).items():
            mode.rounding[name] = max(mode.rounding.get(name, 0.0), distance)

    def _run(self, model: nn.Module, *, training: bool) -> Results:
        """Returns outputs, gradients and buffers of one call, which is not compiled."""
        self._before.rewind_random()
        model.train(training)
        leaves: Results = {}
        args, kwargs = (_with_leaves(part, "input", leaves) for part in self._example)
        leaves |= {n: p for n, p in model.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            with torch.compiler.set_stance("force_eager"):  # Compiled code would miss our hooks.
                outputs = dict(_tensors_in(model(*args, **kwargs), "the output"))
            results = {name: value.detach().clone() for name, value in outputs.items()}
            roots = [value for value in outputs.values() if value.requires_grad]
            generator = torch.Generator().manual_seed(0)
            weights = [
                torch.randn(root.shape, generator=generator).to(root.device, root.dtype)
                for root in roots
            ]
            inputs = list(leaves.values())
            grads = [None] * len(inputs)
            if roots and inputs:
                grads = torch.autograd.grad(roots, inputs, weights, allow_unused=True)
        for name, buffer in model.named_buffers():
            results[f"{name} after a call"] = buffer.detach().clone()
        for name, grad in zip(leaves, grads, strict=True):
            if grad is not None:
                results[f"the gradient of {name}"] = grad
        return results


@dataclass
class _Mode:
    """Results of the original in training or in evaluation.

    Attributes:
        training: The mode.
        expected: The results.
        rounding: How far each of them moved when rounding was imitated.
    """

    training: bool
    expected: Results
    rounding: dict[str, float] = field(default_factory=dict)

    def distances(self, actual: Results) -> dict[str, float]:
        missing = dict.fromkeys(sorted(self.expected.keys() ^ actual.keys()), math.inf)
        common = {n: _distance(actual[n], x) for n, x in self.expected.items() if n in actual}
        return missing | common

    def disagreement(self, distances: dict[str, float]) -> str | None:
        """Returns the message about the first wrong result, or None."""
        for name, distance in distances.items():
            expected = self.expected.get(name)
            allowed = 4 * self.rounding.get(name, 0.0)
            if expected is not None and expected.dtype.is_floating_point:
                allowed += 64 * torch.finfo(expected.dtype).eps * _size(expected)
            if not distance <= allowed:
                return (
                    f"accelerate: {name} in {'training' if self.training else 'evaluation'} "
                    f"differs by {distance:.1e}, and rounding explains {allowed:.1e}; the model is "
                    "as it was before, call accelerate without example_input only if that "
                    "difference is fine."
                )
        return None

    def relative(self, distances: dict[str, float], kind: str) -> float:
        """Returns the largest distance relative to the largest value of that kind."""
        names = [name for name in self.expected if name.startswith(f"the {kind}")]
        size = max((_size(self.expected[name]) for name in names), default=0.0)
        distance = max((distances[name] for name in names), default=0.0)
        return distance / size if size > 0 else distance


def _arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_input, Tensor):
        return (example_input,), {}
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, dict):
        return (), example_input
    raise TypeError(
        "accelerate: example_input must be a tensor, a tuple of arguments or a dict of keyword "
        f"arguments, got {type(example_input).__name__}."
    )


def _with_leaves(value: Any, name: str, leaves: Results) -> Any:
    """Copies the arguments, and makes a leaf in ``leaves`` for each floating tensor."""
    if isinstance(value, Tensor):
        copy = value.detach().clone()
        if not copy.is_floating_point():
            return copy
        leaves[name] = copy.requires_grad_()
        return copy.clone()
    if isinstance(value, dict):
        return {k: _with_leaves(v, f"{name}[{k!r}]", leaves) for k, v in value.items()}
    if type(value) in (tuple, list):
        items = [_with_leaves(v, f"{name}[{i}]", leaves) for i, v in enumerate(value)]
        return type(value)(items)
    return value


def _tensors_in(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors_in(item, f"{name}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _tensors_in(item, f"{name}[{index}]")
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        for key, item in vars(value).items():
            yield from _tensors_in(item, f"{name}.{key}")


def _disturbed(model: nn.Module, seed: int) -> Handle:
    """Moves the input of every batch norm layer at random, by a few units in the last place."""
    generator = torch.Generator().manual_seed(seed)

    def move(_: str, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator)
        if x.dim() > 1:
            channels = torch.rand(x.shape[1], generator=generator)
            noise = noise + channels.reshape(-1, *[1] * (x.dim() - 2))
        eps = torch.finfo(x.dtype).eps
        step = max(2 * eps, min(64 * eps, 4e-3)) * x.detach().abs().amax()
        return x + (noise - 1).to(x.device, x.dtype) * step

    return listen(_batch_norms(model), move, caller="accelerate")


def _recorded(model: nn.Module, inputs: dict[str, set[Input]]) -> Handle:
    """Records what the batch norm layers get."""
    layers = _batch_norms(model)

    def record(name: str, x: Tensor) -> None:
        seen = inputs.setdefault(name, set())
        seen.add(Input(layers[name].training, x.shape, x.stride(), x.dtype))

    return listen(layers, record, caller="accelerate")


def _batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_batch_norm(module)}


def _distance(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference; infinite if shapes, dtypes or infinities do not agree."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if a.numel() == 0:
        return 0.0
    wide_a, wide_b = _widened(a), _widened(b)
    distance = (wide_a - wide_b).abs()
    largest = distance.max().item()
    if math.isfinite(largest):
        return largest
    same = (wide_a == wide_b) | (wide_a.isnan() & wide_b.isnan())
    return distance.nan_to_num(math.inf, math.inf).masked_fill(same, 0).max().item()


def _size(value: Tensor) -> float:
    if value.numel() == 0:
        return 0.0
    size = _widened(value).abs().max().item()
    return size if math.isfinite(size) else _widened(value).abs().nan_to_num(0, 0).max().item()


def _widened(value: Tensor) -> Tensor:
    if value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value if value.is_floating_point() or value.is_complex() else value.cpu().double()
