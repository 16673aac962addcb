"""``merge_state_dicts``: one checkpoint from several, for federated learning and model soups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from batchnorm.moments import Moments, merge_moments, unbiased_var

State = Mapping[str, Tensor]
_MEAN, _VAR, _COUNTER = "running_mean", "running_var", "num_batches_tracked"


@torch.no_grad()
def merge_state_dicts(
    state_dicts: Sequence[State], counts: Sequence[float | int], *, base: State | None = None
) -> dict[str, Tensor]:
    """Merges checkpoints of one network: running statistics as moments, the rest as a mean.

    ``running_mean`` and ``running_var`` become those of all data together, with the variance
    between the parts, which a mean of variances loses. ``running_var`` is unbiased, of as many
    values as ``counts`` says, and so is the result: if each part's statistics are exact, so are the
    merged ones. ``num_batches_tracked`` is the counter of ``base`` plus the batches that each part
    has counted since. Every other tensor is the mean weighted by ``counts``, in float64 and rounded
    once to its dtype. Costs one pass over all tensors.

    Args:
        state_dicts: At least one; all with the same names, shapes and dtypes. Not changed.
        counts: Number of samples of each one; at least two, because a variance needs that many.
            For a soup of models that were trained on the same data give each the number of samples
            in it.
        base: The checkpoint from which all of them started: the server's of this federated round,
            or the one that a soup's models were fine-tuned from. Only its counters are read. None
            if each was trained from scratch; otherwise the batches of the base would count once for
            each part, and ten times more after every round of ten clients.

    Returns:
        A new dict of new tensors, in the order, the dtypes and on the devices of the first.

    Raises:
        ValueError: There is none, not one count for each, a count is less than two, names, shapes
            or dtypes differ, an integer that is no counter differs, a counter is less than in
            ``base`` or missing there, or the sum of counters is too large for their dtype.
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
    for number, state in enumerate(state_dicts):
        _check_state(first, state, number)
    total = sum(counts)
    merged: dict[str, Tensor] = {}
    for name in first:
        tensors = [state[name] for state in state_dicts]
        prefix, _, kind = name.rpartition(".")
        if kind in (_MEAN, _VAR) and all(_join(prefix, k) in first for k in (_MEAN, _VAR)):
            moments = _together(state_dicts, counts, prefix)
            merged[name] = moments.mean if kind == _MEAN else unbiased_var(moments)
        elif kind == _COUNTER:
            merged[name] = _counted(name, tensors, base)
        elif tensors[0].is_floating_point() or tensors[0].is_complex():
            merged[name] = _mean(tensors, [count / total for count in counts])
        else:
            merged[name] = _agreed(name, tensors)
    return {name: tensor.to(first[name].dtype) for name, tensor in merged.items()}


def _together(state_dicts: Sequence[State], counts: Sequence[float | int], prefix: str) -> Moments:
    device = state_dicts[0][_join(prefix, _MEAN)].device
    parts = []
    for state, count in zip(state_dicts, counts, strict=True):
        mean, var = (state[_join(prefix, k)].to(device, torch.float64) for k in (_MEAN, _VAR))
        biased = var * ((count - 1) / count)
        parts.append(Moments(torch.tensor(count, dtype=torch.float64, device=device), mean, biased))
    return merge_moments(*parts)


def _counted(name: str, tensors: Sequence[Tensor], base: State | None) -> Tensor:
    if base is None:
        start = torch.zeros_like(tensors[0])
    elif name in base:
        start = base[name].to(tensors[0].device)
    else:
        raise ValueError(f"merge_state_dicts: {name} is missing in base.")
    total, exact = start.clone(), start.double()
    for number, tensor in enumerate(tensors):
        new = tensor.to(start.device) - start
        if bool((new < 0).any()):
            raise ValueError(
                f"merge_state_dicts: {name} is {tensor.tolist()} in checkpoint {number} and "
                f"{start.tolist()} in base, which must have come before it."
            )
        total += new
        exact += new.double()
    if not total.is_floating_point() and bool((exact >= torch.iinfo(total.dtype).max).any()):
        raise ValueError(
            f"merge_state_dicts: {name} would be {exact.tolist():g}, more than {total.dtype} "
            "holds; give base, the checkpoint from which all of them went on."
        )
    return total


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


def _check_state(first: State, state: State, number: int) -> None:
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
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise ValueError(
                f"merge_state_dicts: {name} is {_described(ours)} in checkpoint 0 and "
                f"{_described(theirs)} in checkpoint {number}."
            )


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
