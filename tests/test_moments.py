"""Moments: merging, the two variances, the two momenta, running statistics."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.moments import (
    Moments,
    empty,
    merge_moments,
    unbiased_var,
)
from batchnorm.nn.functional import moments as moments_of

settings.register_profile("core", deadline=None, max_examples=60, derandomize=True)
CORE = settings.get_profile("core")
# Checks at run time look at a random item of a tuple, and Hypothesis owns all randomness.
RANDOMLY_CHECKED = pytest.mark.untyped


def data(values, channels=3, mean=0.0, std=1.0, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(values, channels, generator=chance, dtype=torch.float64)


def exact(x):
    return Moments(x.shape[0], x.mean(0), x.var(0, correction=0))


def assert_same(got, expected, scale=1.0, rtol=1e-10):
    """Equal up to float64 rounding of values as large as ``scale``."""
    assert torch.as_tensor(got.count).broadcast_to(got.mean.shape).tolist() == (
        torch.as_tensor(expected.count).broadcast_to(got.mean.shape).tolist()
    )
    torch.testing.assert_close(got.mean, expected.mean, rtol=rtol, atol=1e-14 * scale)
    torch.testing.assert_close(got.var, expected.var, rtol=rtol, atol=1e-14 * scale)


@st.composite
def splits(draw):
    """Data, and the sizes of parts that make it up, some of them empty."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda s: sum(s) > 0))
    mean = draw(st.sampled_from([0.0, -3.0, 1e3, 1e6]))
    std = draw(st.sampled_from([1e-2, 1.0, 50.0]))
    x = data(sum(sizes), mean=mean, std=std, seed=draw(st.integers(0, 2**31)))
    return x, [moments_of(part) for part in x.split(sizes)], abs(mean) + std


@RANDOMLY_CHECKED
@CORE
@given(splits())
def test_any_split_merges_to_the_moments_of_the_whole(split):
    x, parts, scale = split
    assert_same(merge_moments(*parts), exact(x), scale, rtol=1e-7)


@RANDOMLY_CHECKED
@CORE
@given(splits(), st.randoms(use_true_random=False))
def test_the_order_of_the_parts_does_not_matter(split, chance):
    _, parts, scale = split
    shuffled = parts.copy()
    chance.shuffle(shuffled)
    assert_same(merge_moments(*shuffled), merge_moments(*parts), scale, rtol=1e-7)


@RANDOMLY_CHECKED
@CORE
@given(splits(), st.integers(0, 8))
def test_merging_is_associative(split, cut):
    _, parts, scale = split
    cut %= len(parts)
    left, right = [merge_moments(empty(3), *half) for half in (parts[:cut], parts[cut:])]
    assert_same(merge_moments(left, right), merge_moments(*parts), scale, rtol=1e-7)


def test_counts_may_differ_from_channel_to_channel():
    x, y = data(5, seed=1), data(7, seed=2)
    first = exact(x)
    first = Moments(torch.tensor([5, 5, 0]), first.mean, first.var)
    second = exact(y)
    second = Moments(torch.tensor([7, 0, 0]), second.mean, second.var)
    merged = merge_moments(first, second)
    assert merged.count.tolist() == [12, 5, 0]
    whole = exact(torch.cat([x, y]))
    torch.testing.assert_close(merged.mean[0], whole.mean[0])
    torch.testing.assert_close(merged.var[0], whole.var[0])
    assert torch.equal(merged.mean[1], x.mean(0)[1])
    assert torch.isfinite(merged.mean).all()
    assert torch.isfinite(merged.var).all()


@pytest.mark.parametrize("count", [5, torch.tensor([5, 2, 9])], ids=["int", "tensor"])
def test_nothing_is_neutral_to_the_last_bit(count):
    some = Moments(count, data(3)[0], data(3)[1].abs())
    for merged in (
        merge_moments(empty(3), some),
        merge_moments(some, empty(3)),
        merge_moments(empty(3), some, empty(3)),
    ):
        assert torch.equal(merged.mean, some.mean)
        assert torch.equal(merged.var, some.var)
        assert torch.equal(torch.as_tensor(merged.count), torch.as_tensor(count))


def test_nothing_and_nothing_is_nothing():
    merged = merge_moments(empty(2), empty(2))
    assert merged.count == 0
    assert merged.mean.tolist() == merged.var.tolist() == [0, 0]
    assert merged.mean.dtype == torch.float64


def test_a_large_mean_costs_no_accuracy():
    x = data(4000, mean=1e8, std=1.0)
    merged = merge_moments(*(moments_of(part) for part in x.split(37)))
    torch.testing.assert_close(merged.var, exact(x - 1e8).var, rtol=1e-7, atol=0)


def merged_exactly(parts):
    """Mean and variance of the union, in rational arithmetic."""
    counts = [Fraction(part.count) for part in parts]
    means, variances = (
        [Fraction(getattr(p, key).item()) for p in parts] for key in ("mean", "var")
    )
    mean = sum(n * m for n, m in zip(counts, means, strict=True)) / sum(counts)
    squares = (n * (v + (m - mean) ** 2) for n, m, v in zip(counts, means, variances, strict=True))
    return mean, sum(squares) / sum(counts)


@pytest.mark.parametrize("std", [1.0, 1e-3])
@pytest.mark.parametrize("far", [0.0, 1e8, -1e8])
def test_many_parts_merge_without_loss(far, std):
    """The sequential merge of these parts has a relative error of up to 4e-9."""
    chance = torch.Generator().manual_seed(0)
    parts = [moments_of(data(4 + k % 9, 1, far, std, seed=k)) for k in range(1024)]
    order = torch.randperm(len(parts), generator=chance).tolist()
    mean, var = merged_exactly(parts)
    for found in (merge_moments(*parts), merge_moments(*(parts[k] for k in order))):
        assert abs(Fraction(found.mean.item()) - mean) <= Fraction(2.0**-52) * max(
            abs(mean), Fraction(std)
        )
        assert abs(Fraction(found.var.item()) - var) <= Fraction(2.0**-52) * var


def test_merged_moments_pass_the_gradient_of_the_union():
    x = data(60, mean=3.0).requires_grad_()
    weight = data(2, seed=1)
    merged = merge_moments(
        *(Moments(len(p), p.mean(0), p.var(0, correction=0)) for p in x.split(7))
    )
    (got,) = torch.autograd.grad((merged.mean * weight[0] + merged.var * weight[1]).sum(), x)
    (expected,) = torch.autograd.grad(
        (x.mean(0) * weight[0] + x.var(0, correction=0) * weight[1]).sum(), x
    )
    torch.testing.assert_close(got, expected)


def test_merged_moments_are_float64_and_the_parts_stay():
    part = Moments(4, torch.tensor([1.0]), torch.tensor([2.0]))
    merged = merge_moments(part, part)
    assert merged.mean.dtype == merged.var.dtype == torch.float64
    assert part.mean.dtype == torch.float32
    assert (merged.count, merged.mean.item(), merged.var.item()) == (8, 1.0, 2.0)


def test_empty_knows_its_channels():
    nothing = empty(4)
    assert (nothing.count, nothing.mean.shape, nothing.var.shape) == (0, (4,), (4,))
    assert nothing.mean.data_ptr() != nothing.var.data_ptr()


def test_unbiased_var_of_a_number():
    x = data(7)
    torch.testing.assert_close(unbiased_var(exact(x)), x.var(0))
    single = Moments(4, torch.zeros(2), torch.tensor([3.0, 6.0]))
    assert unbiased_var(single).dtype == torch.float32
    assert unbiased_var(single).tolist() == [4.0, 8.0]


def test_unbiased_var_of_a_count_a_channel():
    got = unbiased_var(Moments(torch.tensor([4, 2, 1, 0]), torch.zeros(4), torch.full((4,), 3.0)))
    assert got.dtype == torch.float32
    assert got[:2].tolist() == [4.0, 6.0]
    assert got[2:].isnan().all()


@pytest.mark.parametrize("count", [0, 1])
def test_unbiased_var_needs_two_values(count):
    got = unbiased_var(Moments(count, torch.zeros(2), torch.zeros(2)))
    assert got.shape == (2,)
    assert got.isnan().all()


def test_two_parts_merge_as_many_do():
    """A count for each channel takes the way of many parts; two whole numbers a shorter one."""
    first, second = exact(data(5, seed=1, mean=3.0)), exact(data(9, seed=2, std=2.0))
    short = merge_moments(first, second)
    counts = torch.full((3,), 5), torch.full((3,), 9)
    long = merge_moments(
        *(Moments(n, m.mean, m.var) for n, m in zip(counts, (first, second), strict=True))
    )
    torch.testing.assert_close(short.mean, long.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(short.var, long.var, rtol=1e-14, atol=0)
    assert short.count == 14
