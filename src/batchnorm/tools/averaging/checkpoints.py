"""``merge_state_dicts``: one checkpoint from several, for federated learning and model soups."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from batchnorm.moments import Moments, merge_moments, unbiased_var
from batchnorm.tools.patching import STATISTICS, by_unwrapped_name, count_in, is_counter
from batchnorm.torch_internals import is_real

State = Mapping[str, Tensor]
_AVERAGED = "n_averaged"
"""Counter of a ``torch.optim.swa_utils.AveragedModel``; its model is in ``module``."""


@torch.no_grad()
def merge_state_dicts(
    state_dicts: Sequence[State], counts: Sequence[float | int], *, base: State | None = None
) -> dict[str, Tensor]:
    """Merges checkpoints of one network: running statistics as moments, the rest as a mean.

    ``running_mean`` and ``running_var`` become those of all data together, with the variance
    between the parts, which a mean of variances loses. ``running_var`` is unbiased, of as many
    values as ``counts`` says, and so is the result: if each part's statistics are exact, so are the
    merged ones. ``moving_mean`` and ``moving_var``, the names of the d2l book, are merged in the
    same way, but with biased variances. ``num_batches_tracked`` is the counter of ``base`` plus the
    batches that each part has counted since. Every other tensor is the mean weighted by ``counts``,
    in float64 and rounded once to its dtype. Costs one pass over all tensors.

    Args:
        state_dicts: At least one; all with the same names, shapes and dtypes. Not changed. Names
            are compared without the parts that wrappers add (``module.``, ``_orig_mod.``).
            Counters may have the shape (1,) or be floats: they are taken as the number they are.
            ``n_averaged`` of an ``AveragedModel`` must be the same number in all.
        counts: Number of samples of each one; at least two, because a variance needs that many.
            For a soup of models that were trained on the same data give each the number of samples
            in it.
        base: The checkpoint from which all of them started: the server's of this federated round,
            or the one that a soup's models were fine-tuned from. Only its counters are read. None
            if each was trained from scratch; otherwise the batches of the base would count once for
            each part, and ten times more after every round of ten clients.

    Returns:
        A new dict of new tensors, with the names of the first, in its order and dtypes, and on its
        devices. A counter has an integer dtype and the shape (), so that models load it; or (1,),
        where it is an integer of that shape in all.

    Raises:
        ValueError: There is none, not one count for each, a count is less than two, names, shapes
            or dtypes differ, a tensor has no values, an integer that is no counter differs, a
            counter is not one whole number, less than in ``base`` or missing there, or the sum of
            counters is too large for their dtype.
        TypeError: An entry is not a tensor.

    Example:
        >>> import torch
        >>> from batchnorm import merge_state_dicts
        >>> parts = [
        ...     {"running_mean": torch.tensor([mean]), "running_var": torch.tensor([1.0])}
        ...     for mean in (0.0, 4.0)
        ... ]
        >>> merge_state_dicts(parts, [100, 100])["running_var"]  # a mean of the two would be 1
        tensor([5.0151])

    Source:
        `batchnorm.moments.merge_moments`; the mean of parameters is McMahan et al. (2017),
        "Communication-efficient learning of deep networks from decentralized data".
    """
    _check_counts(state_dicts, counts)
    first = state_dicts[0]
    state_dicts = [_named_like(first, state) for state in state_dicts]
    base = None if base is None else _named_like(first, base)
    counters = {n for n in first if is_counter(n) or (n == _AVERAGED and _is_averaged(first))}
    for number, state in enumerate(state_dicts):
        _check_state(first, state, number, counters)
    total = sum(counts)
    merged: dict[str, Tensor] = {}
    for name in first:
        tensors = [state[name] for state in state_dicts]
        prefix, _, kind = name.rpartition(".")
        names = next((names for names in STATISTICS if kind in names), ())
        if names and all(_join(prefix, each) in first for each in names):
            merged[name] = _together(state_dicts, counts, prefix, names)[kind].view_as(first[name])
        elif name in counters:
            merged[name] = _counted(name, tensors, base)
        elif tensors[0].is_floating_point() or tensors[0].is_complex():
            merged[name] = _mean(tensors, [count / total for count in counts])
        else:
            merged[name] = _agreed(name, tensors)
    return {
        name: tensor if name in counters else tensor.to(first[name].dtype)
        for name, tensor in merged.items()
    }


def _named_like(first: State, state: State) -> State:
    """Gives a state the names of the first one, which may be wrapped otherwise."""
    ours, theirs = by_unwrapped_name(first), by_unwrapped_name(state)
    renamed = {ours.get(short, name): state[name] for short, name in theirs.items()}
    if _is_averaged(first):
        renamed.setdefault(_AVERAGED, first[_AVERAGED])
    elif _AVERAGED not in first and _is_averaged(state):
        renamed.pop(_AVERAGED, None)
    return renamed


def _is_averaged(state: State) -> bool:
    """Tells if a state is of an ``AveragedModel``, whose counter no other wrapper has."""
    return _AVERAGED in state and all(n == _AVERAGED or n.startswith("module.") for n in state)


def _together(
    state_dicts: Sequence[State],
    counts: Sequence[float | int],
    prefix: str,
    names: tuple[str, str],
) -> dict[str, Tensor]:
    """Merges the statistics of one layer; torch stores unbiased variances, d2l biased ones."""
    device = state_dicts[0][_join(prefix, names[0])].device
    is_unbiased = names == STATISTICS[0]
    parts = []
    for state, count in zip(state_dicts, counts, strict=True):
        mean, var = (
            state[_join(prefix, name)].to(device, torch.float64).flatten() for name in names
        )
        biased = var * ((count - 1) / count) if is_unbiased else var
        parts.append(Moments(torch.tensor(count, dtype=torch.float64, device=device), mean, biased))
    merged = merge_moments(*parts)
    var = unbiased_var(merged) if is_unbiased else merged.var
    return dict(zip(names, (merged.mean, var), strict=True))


def _counted(name: str, tensors: Sequence[Tensor], base: State | None) -> Tensor:
    total = _averaged(tensors) if name == _AVERAGED else _sum(name, tensors, base)
    dtype = tensors[0].dtype
    if dtype.is_floating_point or dtype == torch.bool:
        dtype = torch.int64
    if total >= torch.iinfo(dtype).max:
        raise ValueError(
            f"merge_state_dicts: {name} would be {total:g}, more than {dtype} holds; give base, "
            "the checkpoint from which all of them went on."
        )
    merged = torch.tensor(total, dtype=dtype, device=tensors[0].device)
    share_shape = all(each.dim() and not each.is_floating_point() for each in tensors)
    return merged.view(1) if share_shape else merged


def _averaged(tensors: Sequence[Tensor]) -> int:
    """The number of models behind each of the checkpoints, which must be the same."""
    first, *others = (_count(_AVERAGED, t, f"checkpoint {n}") for n, t in enumerate(tensors))
    for number, other in enumerate(others, 1):
        if other != first:
            raise ValueError(
                f"merge_state_dicts: {_AVERAGED} must be the same in all, and it is {first} in "
                f"checkpoint 0 and {other} in checkpoint {number}; take it from one of them."
            )
    return first


def _sum(name: str, tensors: Sequence[Tensor], base: State | None) -> int:
    if base is not None and name not in base:
        raise ValueError(f"merge_state_dicts: {name} is missing in base.")
    start = 0 if base is None else _count(name, base[name], "base")
    total = start
    for number, tensor in enumerate(tensors):
        count = _count(name, tensor, f"checkpoint {number}")
        if count < start:
            raise ValueError(
                f"merge_state_dicts: {name} is {count} in checkpoint {number} and {start} in "
                "base, which must have come before it."
            )
        total += count - start
    return total


def _count(name: str, tensor: Tensor, where: str) -> int:
    try:
        return count_in(tensor)
    except ValueError as error:
        raise ValueError(f"merge_state_dicts: {name} in {where} {error}.") from None


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    device = tensors[0].device
    wide = torch.promote_types(tensors[0].dtype, torch.float64)
    total = torch.zeros_like(tensors[0], dtype=wide)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.to(device, wide)
    return total


def _agreed(name: str, tensors: Sequence[Tensor]) -> Tensor:
    for number, tensor in enumerate(tensors):
        if not torch.equal(tensor.to(tensors[0].device), tensors[0]):
            raise ValueError(
                f"merge_state_dicts: {name} is {tensors[0].dtype} and cannot be averaged, but it "
                f"differs between checkpoint 0 and {number}; take it from one of them."
            )
    return tensors[0].clone()


def _join(prefix: str, kind: str) -> str:
    return f"{prefix}.{kind}" if prefix else kind


def _check_counts(state_dicts: Sequence[State], counts: Sequence[float | int]) -> None:
    if not state_dicts:
        raise ValueError("merge_state_dicts: give at least one state_dict, got none.")
    if len(counts) != len(state_dicts):
        raise ValueError(
            f"merge_state_dicts: give one count for each state_dict, got {len(counts)} for "
            f"{len(state_dicts)}."
        )
    for number, count in enumerate(counts):
        if not 2 <= count < float("inf"):
            raise ValueError(
                "merge_state_dicts: counts are numbers of samples, at least two each, got "
                f"{count} for checkpoint {number}; for equal weights give each the same number of "
                "samples."
            )


def _check_state(first: State, state: State, number: int, counters: Collection[str]) -> None:
    for name in [*first, *state]:
        if name not in state or name not in first:
            lacking = number if name not in state else 0
            raise ValueError(f"merge_state_dicts: {name} is missing in checkpoint {lacking}.")
        for tensor in (first[name], state[name]):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"merge_state_dicts: {name} is a {type(tensor).__name__}, not a tensor; take "
                    "it out of the checkpoints first."
                )
        ours, theirs = first[name], state[name]
        if name in counters:
            continue
        if not is_real(theirs):
            raise ValueError(
                f"merge_state_dicts: {name} is on the meta device or fake in checkpoint {number} "
                "and has no values; load them first."
            )
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise ValueError(
                f"merge_state_dicts: {name} is {_described(ours)} in checkpoint 0 and "
                f"{_described(theirs)} in checkpoint {number}."
            )


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
