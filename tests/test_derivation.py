"""Every formula of docs/derivation.md, with numbers: by its own terms, by autograd, by our code."""

import pytest
import torch
from torch import Tensor

import batchnorm
from batchnorm import moments
from batchnorm.kernels import reference

EPS = 1e-2
N = 50


def draw(seed: int, n: int = N) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=[0.0, 3.0, -100.0])
def x(request: pytest.FixtureRequest) -> Tensor:
    return draw(1) * 2 + request.param


GAMMA, BETA, G = torch.tensor(1.7).double(), torch.tensor(-0.4).double(), draw(2)


def statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, variance, s and x_hat, as section 1 has them."""
    mean = x.sum() / len(x)
    var = ((x - mean) ** 2).sum() / len(x)
    s = (var + EPS) ** -0.5
    return mean, var, s, (x - mean) * s


def close(found: Tensor | float, expected: Tensor | float, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
    )


def channel(values: Tensor) -> Tensor:
    """One channel in the shape of the kernels' inputs."""
    return values.reshape(-1, 1)


def vector(value: Tensor) -> Tensor:
    return value.reshape(1)


# 1. Forward, training


def test_forward(x: Tensor) -> None:
    mean, var, _, x_hat = statistics(x)
    found = reference.moments(channel(x))
    close(found.mean, vector(mean))
    close(found.var, vector(var))
    y, _ = reference.normalize(channel(x), found.mean, found.var, EPS, vector(GAMMA), vector(BETA))
    close(y.flatten(), GAMMA * x_hat + BETA)


def test_two_facts_about_x_hat(x: Tensor) -> None:
    _, var, s, x_hat = statistics(x)
    close(x_hat.sum(), 0.0)
    close((x_hat**2).sum() / N, var / (var + EPS))
    close(var / (var + EPS), var * s**2)
    close(var * s**2, 1 - EPS * s**2)


# 2. The variance in two passes


def test_the_correction_of_a_wrong_mean(x: Tensor) -> None:
    mean, var, _, _ = statistics(x)
    m = mean + 0.3
    d = x - m
    rho = d.sum() / N
    close(rho, mean - m)
    close(m + rho, mean)
    close((d**2).sum() / N, var + rho**2)
    close((d**2).sum() / N - rho**2, var)


# 3. Merging moments


def test_merging_two_parts(x: Tensor) -> None:
    a, b = x[:11], x[11:]
    (mean_a, var_a, *_), (mean_b, var_b, *_) = statistics(a), statistics(b)
    mean, var, *_ = statistics(x)
    w, delta = len(b) / N, mean_b - mean_a
    close((1 - w) * mean_a + w * mean_b, mean)
    close(mean_a + w * delta, mean)
    close(((a - mean) ** 2).sum(), len(a) * var_a + len(a) * (mean_a - mean) ** 2)
    close((1 - w) * (var_a + (mean_a - mean) ** 2) + w * (var_b + (mean_b - mean) ** 2), var)
    close((1 - w) * var_a + w * var_b + w * (1 - w) * delta**2, var)


def test_merging_any_number_of_parts(x: Tensor) -> None:
    mean, var, *_ = statistics(x)
    parts = [x[:7], x[7:20], x[20:22], x[22:]]
    shares = [len(part) / N for part in parts]
    means, variances = zip(*(statistics(part)[:2] for part in parts), strict=True)
    close(sum(s * m for s, m in zip(shares, means, strict=True)), mean)
    terms = zip(shares, means, variances, strict=True)
    close(sum(s * (v + (m - mean) ** 2) for s, m, v in terms), var)
    merged = moments.merge_moments(*(reference.moments(channel(part)) for part in parts))
    close(merged.mean, vector(mean))
    close(merged.var, vector(var))


def test_the_mean_of_variances_is_too_small_by_the_variance_of_the_means(x: Tensor) -> None:
    _, var, *_ = statistics(x)
    means, variances = zip(*(statistics(part)[:2] for part in x.reshape(5, -1)), strict=True)
    lacking = torch.stack(means).var(correction=0)
    close(torch.stack(variances).mean(), var - lacking)
    assert lacking > 0.01


# 4. Running statistics


def test_running_statistics(x: Tensor) -> None:
    mean, var, *_ = statistics(x)
    m, old_mean, old_var = 0.2, torch.tensor([0.5]), torch.tensor([2.0])
    found = moments.moved_running(
        old_mean.double(), old_var.double(), reference.moments(channel(x)), m
    )
    close(found[0], vector((1 - m) * 0.5 + m * mean))
    close(found[1], vector((1 - m) * 2.0 + m * N / (N - 1) * var))
    counted = moments.weight_of_new_batch(None, torch.tensor(4))
    close(counted, 1 / 5)


# 5. Backward, training


def through(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """The loss as a function of x, mean and variance that know nothing of each other."""
    return (G * (GAMMA * (x - mean) * (var + EPS) ** -0.5 + BETA)).sum()


def test_the_chain_rule_line_by_line(x: Tensor) -> None:
    mean, var, s, x_hat = (value.requires_grad_() for value in statistics(x))
    (by_x_hat,) = torch.autograd.grad((G * (GAMMA * x_hat + BETA)).sum(), x_hat)
    close(by_x_hat, GAMMA * G)

    loss = through(x, mean, var)
    by_mean, by_var = torch.autograd.grad(loss, (mean, var))
    written = (GAMMA * G * (x - mean)).sum() * -0.5 * (var + EPS) ** -1.5
    close(by_var, written)
    close(by_var, -0.5 * GAMMA * s**2 * (G * x_hat).sum())
    close(by_mean, -GAMMA * s * G.sum())

    of_mean = ((x - mean) ** 2).sum() / N
    (var_by_mean,) = torch.autograd.grad(of_mean, mean)
    close(var_by_mean, -2 / N * (x - mean).sum())
    close(var_by_mean, 0.0)
    fixed = mean.detach() + 1
    assert abs(-2 / N * (x - fixed).sum()) > 1

    three_ways = GAMMA * G * s + by_var * 2 * (x - mean) / N + by_mean / N
    close(three_ways, gradient(x, G))


def gradient(x: Tensor, g: Tensor) -> Tensor:
    """The gradient of x by the formula at the end of section 5."""
    _, _, s, x_hat = statistics(x)
    return GAMMA * s * (g - g.mean() - x_hat * (g * x_hat).mean())


def test_the_gradients_are_those_of_autograd_and_of_the_kernels(x: Tensor) -> None:
    x, gamma, beta = (value.clone().requires_grad_() for value in (x, GAMMA, BETA))
    loss = (G * (gamma * statistics(x)[3] + beta)).sum()
    by_x, by_gamma, by_beta = torch.autograd.grad(loss, (x, gamma, beta))
    x_hat = statistics(x)[3]
    close(by_beta, G.sum())
    close(by_gamma, (G * x_hat).sum())
    close(by_x, gradient(x, G))
    batch = reference.moments(channel(x.detach()))
    arguments = (channel(G), channel(x.detach()), batch.mean, batch.var, EPS, vector(GAMMA))
    sums = reference.grad_sums(*arguments)
    close(torch.cat(sums), torch.stack((by_beta, by_gamma)))
    found = reference.backward(*arguments)
    close(found.x.flatten(), by_x)


def test_the_means_are_over_the_whole_pool(x: Tensor) -> None:
    """The statistics of all values, the gradient of the first ten."""
    _, _, s, x_hat = statistics(x)
    whole = gradient(x, G)
    part = slice(0, 10)
    mean_grad, mean_grad_x_hat = G.mean(), (G * x_hat).mean()
    close(GAMMA * s * (G[part] - mean_grad - x_hat[part] * mean_grad_x_hat), whole[part])


def test_two_checks_of_a_backward_pass(x: Tensor) -> None:
    _, _, s, x_hat = statistics(x)
    by_x = gradient(x, G)
    close(by_x.sum(), 0.0)
    close((by_x * x_hat).sum(), GAMMA * s * EPS * s**2 * (G * x_hat).sum())


# 6. Backward, inference


def test_inference(x: Tensor) -> None:
    mean, var = torch.tensor([0.7]).double(), torch.tensor([1.9]).double()
    s = (var + EPS) ** -0.5
    found = reference.backward(channel(G), channel(x), mean, var, EPS, vector(GAMMA), fixed=True)
    close(found.x.flatten(), GAMMA * s * G)
    close(found.bias, vector(G.sum()))
    close(found.weight, vector((G * (x - mean) * s).sum()))


# 7. Fused residual and ReLU


def test_residual_and_relu(x: Tensor) -> None:
    r, h = draw(3).requires_grad_(), draw(4)
    x = x.clone().requires_grad_()
    z = GAMMA * statistics(x)[3] + BETA + r
    y = z.clamp_min(0)
    by_x, by_r = torch.autograd.grad((h * y).sum(), (x, r))
    g = h * (y > 0)
    assert 10 < (y > 0).sum() < 40
    close(by_r, g)
    close(by_x, gradient(x, g))
    batch = reference.moments(channel(x))
    found, _ = reference.normalize(
        channel(x), batch.mean, batch.var, EPS, vector(GAMMA), vector(BETA), channel(r), relu=True
    )
    close(found.flatten(), y)


def test_the_relu_passes_nan_and_stops_zero() -> None:
    x = torch.tensor([0.0, torch.nan, 1.0, -1.0]).reshape(-1, 1).requires_grad_()
    y = batchnorm.batch_norm(x, torch.zeros(1), torch.ones(1), eps=0.0, activation="relu")
    y.backward(torch.ones_like(y))
    assert y.flatten().tolist()[::2] == [0, 1]
    assert x.grad.flatten().tolist() == [0, 1, 1, 0]


# 9. Why y.sum() is a bad test


def test_a_sum_has_no_gradient_and_a_sum_of_squares_hardly_any(x: Tensor) -> None:
    _, _, s, x_hat = statistics(x)
    close((GAMMA * x_hat + BETA).sum(), N * BETA)
    close(gradient(x, torch.ones(N).double()), torch.zeros(N).double())
    close(gradient(x, 2 * x_hat) / GAMMA, 2 * EPS * s**3 * x_hat)
    assert gradient(x, G).abs().max() > 0.1
