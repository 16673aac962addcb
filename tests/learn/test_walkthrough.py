"""The steps: their order, numbers, formulas and code, and the arguments that are refused."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from torch.nn import functional

from batchnorm.learn import examples
from batchnorm.learn.walkthrough import Step, walkthrough

SHAPES = {2: (7, 3), 3: (4, 3, 5), 4: (3, 2, 4, 5), 5: (2, 3, 2, 3, 4)}

# Every number that the study notes print, copied from there (four decimals).
NOTES_FULLY_CONNECTED_X = [
    [0.2182, 0.9085],
    [0.3319, 0.3531],
    [0.3642, 0.6632],
    [0.3902, 0.5621],
    [0.3267, 0.0696],
    [0.1570, 0.3461],
    [0.4564, 1.0000],
    [0.5459, 0.1419],
    [0.0855, 0.2092],
    [0.5688, 0.2629],
]
NOTES_FULLY_CONNECTED_MEAN = [0.3445, 0.4517]
NOTES_FULLY_CONNECTED_VAR = [0.0224, 0.0924]
NOTES_CONVOLUTION_X = [
    [
        [[0.3377, 0.0040, 0.1068], [0.8988, 0.8476, 0.4406]],
        [[0.2373, 0.8555, 0.5407], [0.0875, 0.8951, 0.0701]],
        [[0.9436, 0.8168, 0.6496], [0.9063, 0.3542, 0.3073]],
    ],
    [
        [[0.5269, 0.7035, 0.4117], [0.2906, 0.5506, 0.3359]],
        [[0.9111, 0.6993, 0.8829], [0.9526, 0.2769, 0.9301]],
        [[0.2550, 0.0682, 0.5667], [0.2577, 0.5471, 0.3435]],
    ],
]
NOTES_CONVOLUTION_MEAN = [[[[0.4546]], [[0.6116]], [[0.5013]]]]
NOTES_MEAN_OVER_0 = [
    [
        [[0.3743, 0.6863, 0.5956], [0.7442, 0.5927, 0.2910]],
        [[0.5139, 0.9126, 0.3580], [0.8266, 0.9070, 0.7208]],
        [[0.7736, 0.8704, 0.1138], [0.3995, 0.3889, 0.5261]],
    ]
]
NOTES_MEAN_OVER_0_2 = [
    [[[0.5593, 0.6395, 0.4433]], [[0.6703, 0.9098, 0.5394]], [[0.5865, 0.6297, 0.3200]]]
]


def by_name(steps: list[Step]) -> dict[str, Step]:
    assert len({step.name for step in steps}) == len(steps)
    return {step.name: step for step in steps}


def assert_close(step: Step, expected: object, tolerance: float = 1e-4) -> None:
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    torch.testing.assert_close(step.value.double(), expected, atol=tolerance, rtol=0)


def make_arguments(rank: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shape = SHAPES[rank]

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    channels = shape[1]
    return {
        "X": 3 * draw(*shape) + 1,
        "gamma": draw(channels),
        "beta": draw(channels),
        "moving_mean": draw(channels),
        "moving_var": draw(channels).abs() + 0.1,
        "prediction": 2 * draw(5, *shape[1:]) - 1,
    }


def as_rows(tensor: torch.Tensor) -> np.ndarray:
    """All values of each channel in one row, without torch."""
    return np.stack([tensor.numpy()[:, channel].ravel() for channel in range(tensor.shape[1])])


def per_channel(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor.reshape(1, -1, *[1] * (rank - 2))


# The numbers of the notes


def test_the_fully_connected_numbers_of_the_notes() -> None:
    steps = by_name(walkthrough(torch.tensor(NOTES_FULLY_CONNECTED_X)))
    assert_close(steps["X"], NOTES_FULLY_CONNECTED_X)
    assert_close(steps["mean"], [NOTES_FULLY_CONNECTED_MEAN])
    assert_close(steps["var"], [NOTES_FULLY_CONNECTED_VAR])


def test_the_convolution_numbers_of_the_notes() -> None:
    steps = by_name(walkthrough(torch.tensor(NOTES_CONVOLUTION_X)))
    assert_close(steps["X"], NOTES_CONVOLUTION_X)
    assert_close(steps["mean"], NOTES_CONVOLUTION_MEAN)
    assert steps["mean"].shape == (1, 3, 1, 1)


def test_the_notes_reduction_one_axis_at_a_time() -> None:
    """A mini-batch of one: its mean over axis 0 is itself, so the notes' second number follows."""
    steps = by_name(walkthrough(torch.tensor(NOTES_MEAN_OVER_0)))
    assert_close(steps["mean_over_0"], NOTES_MEAN_OVER_0)
    assert_close(steps["mean_over_0_2"], NOTES_MEAN_OVER_0_2)


def test_the_examples_start_from_the_numbers_of_the_notes() -> None:
    fully_connected, convolution = map(examples.load, examples.NAMES)
    assert torch.equal(fully_connected.X, torch.tensor(NOTES_FULLY_CONNECTED_X))
    assert torch.equal(convolution.X, torch.tensor(NOTES_CONVOLUTION_X))


# The steps and their order


@pytest.mark.parametrize(
    ("rank", "means"),
    [
        (2, ["mean"]),
        (3, ["mean_over_0", "mean"]),
        (4, ["mean_over_0", "mean_over_0_2", "mean"]),
        (5, ["mean_over_0", "mean_over_0_2", "mean_over_0_2_3", "mean"]),
    ],
)
def test_the_steps_come_in_the_order_of_the_story(rank: int, means: list[str]) -> None:
    steps = walkthrough(**make_arguments(rank))
    training = ["X", *means, "var", "X_hat", "Y", "moving_mean", "moving_var"]
    inference = ["P", "Y_moving", "own_mean", "own_var", "Y_own", "Y_alone"]
    assert [step.name for step in steps if step.part == "training"] == training
    assert [step.name for step in steps if step.part == "inference"] == inference
    assert [step.name for step in steps] == training + inference


def test_each_axis_is_averaged_by_itself_and_kept_with_length_1() -> None:
    X = make_arguments(4)["X"]
    steps = by_name(walkthrough(X))
    assert steps["mean_over_0"].shape == (1, 2, 4, 5)
    assert steps["mean_over_0_2"].shape == (1, 2, 1, 5)
    assert steps["mean"].shape == (1, 2, 1, 1)
    assert steps["mean_over_0_2"].input_shapes == {"mean_over_0": (1, 2, 4, 5)}
    assert_close(steps["mean_over_0"], X.numpy().mean(axis=0, keepdims=True), 1e-12)
    assert_close(steps["mean_over_0_2"], X.numpy().mean(axis=(0, 2), keepdims=True), 1e-12)


@pytest.mark.parametrize("rank", SHAPES)
def test_every_step_keeps_the_axes_of_X(rank: int) -> None:
    for step in walkthrough(**make_arguments(rank)):
        assert len(step.shape) == rank
        assert all(len(shape) == rank for shape in step.input_shapes.values())


# The numbers, against computations that share nothing with ours


@pytest.mark.parametrize("rank", SHAPES)
def test_training_agrees_with_numpy(rank: int) -> None:
    given = make_arguments(rank)
    steps = by_name(walkthrough(**given, eps=1e-3, momentum=0.7))
    rows = as_rows(given["X"])
    mean = rows.sum(axis=1) / rows.shape[1]
    var = np.square(rows - mean[:, None]).sum(axis=1) / rows.shape[1]
    x_hat = (rows - mean[:, None]) / np.sqrt(var + 1e-3)[:, None]
    y = given["gamma"].numpy()[:, None] * x_hat + given["beta"].numpy()[:, None]
    moving_mean = 0.7 * given["moving_mean"].numpy() + 0.3 * mean
    moving_var = 0.7 * given["moving_var"].numpy() + 0.3 * var
    expected = {"mean": mean, "var": var, "moving_mean": moving_mean, "moving_var": moving_var}
    for name, numbers in expected.items():
        np.testing.assert_allclose(steps[name].value.flatten().numpy(), numbers, rtol=1e-12)
    np.testing.assert_allclose(as_rows(steps["X_hat"].value), x_hat, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(as_rows(steps["Y"].value), y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rank", SHAPES)
def test_training_agrees_with_torch_up_to_its_conventions(rank: int) -> None:
    given = make_arguments(rank)
    steps = by_name(walkthrough(**given))
    running_mean, running_var = given["moving_mean"].clone(), given["moving_var"].clone()
    Y = functional.batch_norm(
        given["X"],
        running_mean,
        running_var,
        given["gamma"],
        given["beta"],
        training=True,
        momentum=1 - 0.9,
        eps=1e-5,
    )
    torch.testing.assert_close(steps["Y"].value, Y)
    torch.testing.assert_close(steps["moving_mean"].value.flatten(), running_mean)
    facts = steps["moving_var"].facts
    unbiased = steps["var"].value.flatten() * facts["count"] / facts["count_less_one"]
    torch.testing.assert_close(running_var, 0.9 * given["moving_var"] + 0.1 * unbiased)


@pytest.mark.parametrize("rank", SHAPES)
def test_inference_agrees_with_torch(rank: int) -> None:
    given = make_arguments(rank)
    steps = by_name(walkthrough(**given))
    P, gamma, beta = given["prediction"], given["gamma"], given["beta"]
    moving = [steps[name].value.flatten() for name in ("moving_mean", "moving_var")]
    with_moving = functional.batch_norm(P, *moving, gamma, beta)
    torch.testing.assert_close(steps["Y_moving"].value, with_moving)
    with_own = functional.batch_norm(P, None, None, gamma, beta, training=True)
    torch.testing.assert_close(steps["Y_own"].value, with_own)
    if rank > 2:
        alone = functional.batch_norm(P[:1], None, None, gamma, beta, training=True)
        torch.testing.assert_close(steps["Y_alone"].value, alone)


# What is printed is what was computed


@pytest.mark.parametrize("rank", SHAPES)
def test_the_code_of_each_step_gives_its_value(rank: int) -> None:
    given = make_arguments(rank)
    names = ("gamma", "beta", "moving_mean", "moving_var")
    scope = {name: per_channel(given[name], rank) for name in names}
    scope |= {"torch": torch, "eps": 1e-5, "momentum": 0.9, "X": given["X"]}
    scope |= {"P": given["prediction"]}
    for step in walkthrough(**given):
        if step.code:
            exec(step.code, scope)
            torch.testing.assert_close(scope[step.name], step.value, msg=step.code)
        else:
            assert step.name in ("X", "P")
            assert step.inputs == {}


def test_the_formulas_of_the_convolution_example() -> None:
    steps = by_name(examples.walk("convolution"))
    assert steps["X"].formula == "X: (N, C, H, W) = (2, 3, 2, 3)"
    assert steps["mean_over_0"].formula == "mean_over_0[c,h,w] = 1/N · Σ_n X[n,c,h,w]"
    assert steps["mean_over_0_2"].formula == "mean_over_0_2[c,w] = 1/H · Σ_h mean_over_0[c,h,w]"
    assert steps["mean"].formula == "μ[c] = 1/W · Σ_w mean_over_0_2[c,w]"
    assert steps["var"].formula == "σ²[c] = 1/(N·H·W) · Σ_n,h,w (X[n,c,h,w] - μ[c])²"


# Inference in both ways


def test_a_neighbor_changes_a_prediction_only_with_the_datas_own_statistics() -> None:
    given = make_arguments(4)
    before = by_name(walkthrough(**given))
    given["prediction"] = given["prediction"].clone()
    given["prediction"][1] += 10
    after = by_name(walkthrough(**given))
    assert torch.equal(before["Y_moving"].value[0], after["Y_moving"].value[0])
    assert (before["Y_own"].value[0] - after["Y_own"].value[0]).abs().max() > 0.5
    assert torch.equal(before["Y_alone"].value, after["Y_alone"].value)


def test_a_fully_connected_example_alone_is_predicted_as_beta() -> None:
    given = make_arguments(2)
    alone = by_name(walkthrough(**given))["Y_alone"]
    assert alone.topic == "Y_alone_is_beta"
    assert torch.equal(alone.value[0], given["beta"])
    assert by_name(walkthrough(**make_arguments(3)))["Y_alone"].topic == "Y_alone"


def test_half_the_light_drops_out_with_the_datas_own_statistics() -> None:
    steps = by_name(examples.walk("convolution"))
    torch.testing.assert_close(steps["P"].value, steps["X"].value / 2)
    torch.testing.assert_close(steps["Y_own"].value, steps["Y"].value, atol=2e-3, rtol=0)
    assert (steps["Y_moving"].value - steps["Y"].value).abs().max() > 1


def test_one_example_to_predict_needs_no_step_alone() -> None:
    given = make_arguments(2)
    given["prediction"] = given["prediction"][:1]
    steps = by_name(walkthrough(**given))
    assert "Y_alone" not in steps
    assert torch.equal(steps["Y_own"].value[0], given["beta"])


def test_the_images_to_predict_may_have_another_size() -> None:
    given = make_arguments(4)
    given["prediction"] = given["prediction"][..., :2, :3]
    assert by_name(walkthrough(**given))["Y_own"].shape == (5, 2, 2, 3)


# What is left out, and what must not happen


def test_what_is_left_out_is_d2ls_start() -> None:
    X = make_arguments(3)["X"]
    ones, zeros = torch.ones(3), torch.zeros(3)
    spelled_out = walkthrough(X, ones, zeros, zeros, ones, 1e-5, 0.9, X)
    for left_out, step in zip(walkthrough(X), spelled_out, strict=True):
        assert torch.equal(left_out.value, step.value)


def test_X_itself_is_predicted_by_default_so_that_outputs_can_be_compared() -> None:
    steps = by_name(walkthrough(make_arguments(2)["X"]))
    assert torch.equal(steps["P"].value, steps["X"].value)
    torch.testing.assert_close(steps["Y_own"].value, steps["Y"].value)


def test_numbers_per_channel_may_come_in_d2ls_shape() -> None:
    given = make_arguments(4)
    names = ("gamma", "beta", "moving_mean", "moving_var")
    shaped = given | {name: per_channel(given[name], 4) for name in names}
    for flat, step in zip(walkthrough(**given), walkthrough(**shaped), strict=True):
        assert torch.equal(flat.value, step.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_is_in_the_dtype_of_X(dtype: torch.dtype) -> None:
    given = make_arguments(4) | {"X": make_arguments(4)["X"].to(dtype)}
    for step in walkthrough(**given):
        assert {tensor.dtype for tensor in (step.value, *step.inputs.values())} == {dtype}


def test_nothing_that_came_in_is_changed_or_shared() -> None:
    given = {name: tensor.requires_grad_() for name, tensor in make_arguments(4).items()}
    before = {name: tensor.detach().clone() for name, tensor in given.items()}
    steps = walkthrough(**given)
    for step in steps:
        for tensor in (step.value, *step.inputs.values()):
            assert not tensor.requires_grad
            tensor.fill_(0)
    for name, tensor in given.items():
        assert torch.equal(tensor, before[name])


def test_a_step_prints_its_code_and_the_first_number() -> None:
    data, mean, *_ = walkthrough(torch.tensor([[1.0], [3.0]]))
    assert str(data) == "# X: (N, C) = (2, 1)"
    assert str(mean) == "mean = X.mean(dim=0, keepdim=True)  # (1 + 3) / 2 ≈ 2.0000"


def test_the_code_of_a_step_leaves_only_its_result_behind() -> None:
    steps = by_name(walkthrough(**make_arguments(4)))
    assert steps["Y_alone"].inputs.keys() == {"P", "gamma", "beta"}
    assert list(steps["Y_alone"].intermediates) == ["alone", "mean", "var", "X_hat"]
    assert steps["moving_mean"].inputs.keys() == {"moving_mean", "mean"}
    old = make_arguments(4)["moving_mean"]
    assert torch.equal(steps["moving_mean"].inputs["moving_mean"].flatten(), old)
    assert torch.equal(steps["Y_moving"].inputs["moving_mean"], steps["moving_mean"].value)


def test_a_step_cannot_be_changed() -> None:
    step = examples.walk("convolution")[0]
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'name'"):
        step.name = "Z"


# Wrong input


def refuse(message: str, **arguments: object) -> None:
    given: dict[str, object] = {"X": torch.arange(6.0).reshape(3, 2)} | arguments
    with pytest.raises(ValueError, match=message) as caught:
        walkthrough(**given)
    text = str(caught.value)
    assert text.startswith("walkthrough: ")
    assert "\n" not in text
    assert text.endswith(".")


@pytest.mark.parametrize("shape", [(), (4,), (2, 1, 2, 1, 2, 1), (0, 2), (2, 0)])
def test_X_with_axes_that_do_not_fit(shape: tuple[int, ...]) -> None:
    refuse(r"X needs 2 to 5 axes.*got shape \(.*\)\.$", X=torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bool])
def test_X_of_a_dtype_that_does_not_fit(dtype: torch.dtype) -> None:
    refuse(f"X must be float32 or float64, got {dtype}; use", X=torch.ones(3, 2, dtype=dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["X", "prediction"])
def test_data_that_is_not_finite(name: str, value: float) -> None:
    refuse(f"{name} contains nan or infinity", **{name: torch.tensor([[1.0, 2.0], [value, 1.0]])})


def test_a_batch_of_one_value_per_channel() -> None:
    refuse(r"more than one value per channel, got X of shape \(1, 2\)", X=torch.ones(1, 2))
    refuse(r"more than one value per channel.*\(1, 2, 1, 1\)", X=torch.ones(1, 2, 1, 1))


@pytest.mark.parametrize("name", ["gamma", "beta", "moving_mean", "moving_var"])
def test_numbers_per_channel_that_do_not_fit(name: str) -> None:
    refuse(
        rf"{name} needs one number for each of the 2 channels of X, shape \(2,\) or \(1, 2\), "
        r"got shape \(3,\)",
        **{name: torch.ones(3)},
    )
    refuse(f"{name} contains nan or infinity", **{name: torch.tensor([1.0, math.nan])})


def test_a_negative_variance() -> None:
    refuse("moving_var must not be negative, got -0.5", moving_var=torch.tensor([1.0, -0.5]))


@pytest.mark.parametrize("shape", [(3, 3), (3, 2, 1)])
def test_data_to_predict_that_are_not_like_X(shape: tuple[int, ...]) -> None:
    refuse("prediction needs the axes and channels of X", prediction=torch.ones(shape))


@pytest.mark.parametrize("eps", [0.0, -1e-5, math.nan])
def test_eps_must_be_above_0(eps: float) -> None:
    refuse(f"eps must be above 0, got {eps:g}", eps=eps)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan])
def test_momentum_must_be_a_weight(momentum: float) -> None:
    refuse(
        f"momentum is the weight of the old moving value, from 0 to 1, got {momentum:g}",
        momentum=momentum,
    )


@pytest.mark.parametrize("name", ["X", "gamma", "prediction"])
def test_what_is_no_tensor(name: str) -> None:
    given = {"X": torch.ones(3, 2)} | {name: [[1.0, 2.0]]}
    # With run-time type checks on, the checker is first to say so, and it names the function too.
    with pytest.raises(TypeError, match=rf"walkthrough: {name} must be|learn\.walkthrough\.walk"):
        walkthrough(**given)
