"""What our kernels compute of an accelerated model, and what is left to torch's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import batchnorm
import model_nets as nets
from batchnorm.kernels import dispatch
from batchnorm.tools.acceleration import fusion, replacement, timing
from batchnorm.tools.acceleration.replacement import EVERYWHERE, NOWHERE, USUAL, LayerForward
from model_cases import EXACT, anatomy, images, varied

CHANNELS = 8
LARGE = (64, CHANNELS, 32, 32)  # 2**19 values
SMALL = (2, CHANNELS, 4, 4)


class ActingLayer(nn.BatchNorm2d):
    """timm's ``BatchNormAct2d``, as far as it matters."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        training = self.training
        counter = self.num_batches_tracked
        if training and counter is not None:
            counter.add_(1)
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, 0.1, self.eps
        )
        return self.act(self.drop(y))


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x) + x)


MODELS = {
    "alone": lambda: nn.Sequential(nn.BatchNorm2d(CHANNELS)),
    "relu": lambda: nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU()),
    "addition": lambda: Residual(CHANNELS),
    "timm's": lambda: nn.Sequential(ActingLayer(CHANNELS)),
}
each_model = pytest.mark.parametrize("kind", MODELS)


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind]()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return model


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ours(monkeypatch) -> list[torch.Size]:
    """Shapes of the inputs that our kernels computed for replaced forwards."""
    computed = []
    forward_of = replacement.forward_of

    def recorded(layer, input, *rest):
        computed.append(input.shape)
        return forward_of(layer, input, *rest)

    monkeypatch.setattr(replacement, "forward_of", recorded)
    return computed


@each_model
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("training", [True, False])
def test_the_size_decides_where_nothing_was_timed(kind, shape, training, ours):
    model = made(kind).train(training)
    plain = copy.deepcopy(model)
    report = batchnorm.accelerate(model)
    assert (len(report.replaced), report.timings) == (1, ())

    with torch.no_grad():
        y, expected = model(values(*shape)), plain(values(*shape))

    is_ours = shape == LARGE and (training or kind != "alone")
    assert ours == [torch.Size(shape)] * is_ours
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if is_ours else EXACT
    assert_close(y, expected, **tolerance)
    assert_close(dict(model.state_dict()), dict(plain.state_dict()), **tolerance)


@each_model
@pytest.mark.parametrize("training", [True, False])
def test_everywhere_means_everywhere(kind, training, ours):
    model = made(kind).train(training)
    batchnorm.accelerate(model, everywhere=True)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied(values(*SMALL))
    assert ours == [torch.Size(SMALL)] * 3


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(0, CHANNELS, 4, 4),
        values(*LARGE).to("meta"),
        torch.ones(LARGE, dtype=torch.complex64),
    ],
    ids=["empty", "on another device", "another dtype"],
)
def test_what_no_kernel_takes_is_what_torch_makes_of_it(x, ours):
    model = made("relu").eval()
    batchnorm.accelerate(model)
    plain = made("relu").eval().to(x.device)
    outcomes = []
    for tried in (model.to(x.device), plain):
        try:
            outcomes.append(tried(x).shape)
        except RuntimeError as error:
            outcomes.append(str(error))
    assert len(set(outcomes)) == 1
    assert ours == []


def races(monkeypatch, seconds) -> list:
    """Lets ``seconds`` stand for the clock: it gets a race and returns torch's time and ours."""
    ran = []
    monkeypatch.setattr(timing._Race, "run", lambda race: (ran.append(race), seconds(race))[1])
    return ran


@each_model
@pytest.mark.parametrize("wins", [(), (True,), (False,), (True, False)])
def test_a_race_decides_for_each_mode(kind, wins, monkeypatch, ours):
    ran = races(monkeypatch, lambda race: (2.0, 1.0) if race.input.training in wins else (1.0, 2.0))
    model = made(kind)
    before = anatomy(model)

    report = batchnorm.accelerate(model, values(*SMALL))

    assert {race.input.training for race in ran} == {True, False}
    name = "bn" if kind == "addition" else "0"
    assert report.replaced == ((name,) if wins else ())
    assert report.left == ({} if wins else {name: "torch's kernels are faster"})
    assert (anatomy(model) == before) == (not wins)
    assert [(t.calls, t.ours) for t in report.timings] == [(1, True in wins), (1, False in wins)]
    assert [t.before for t in report.timings] == [2.0 if m in wins else 1.0 for m in (True, False)]
    assert [t.after for t in report.timings] == [1.0, 1.0]
    for training in (True, False):
        ours.clear()
        model.train(training)(values(*SMALL))
        assert len(ours) == (training in wins)


def test_a_race_moves_the_bound_to_the_size_that_it_saw(monkeypatch):
    def bounds(shape, seconds):
        races(monkeypatch, lambda race: seconds)
        model = made("relu")
        batchnorm.accelerate(model, values(*shape))
        forward = LayerForward.find(model[0])
        return forward and forward.smallest

    small, large = values(*SMALL).numel(), values(*LARGE).numel()
    assert bounds(SMALL, (2.0, 1.0)) == USUAL._replace(training=small, fused=small)
    assert bounds(LARGE, (2.0, 1.0)) == USUAL
    assert bounds(LARGE, (1.0, 2.0)) is None
    race = timing._Race.of(nn.BatchNorm2d(8), input_of(values(*LARGE)), True, False)
    assert race.learn(USUAL, wins=False) == USUAL._replace(training=large + 1)
    assert race.learn(EVERYWHERE, wins=True) == EVERYWHERE


def input_of(x: Tensor, *, training: bool = True) -> timing.Input:
    return timing.Input(training, x.shape, x.stride(), x.dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("addition", [True, False])
@pytest.mark.parametrize(
    "x",
    [
        values(*SMALL),
        values(6, CHANNELS),
        values(2, CHANNELS, 5),
        values(*SMALL).to(memory_format=torch.channels_last),
        values(2, CHANNELS, 2, 3, 3).bfloat16(),
        values(*SMALL)[:, :, ::2],
        values(2, CHANNELS, 1, 1).expand(*SMALL),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype} {x.stride()}",
)
def test_a_race_is_run_by_both(x, addition, relu, training, ours):
    race = timing._Race.of(nn.BatchNorm2d(8), input_of(x, training=training), relu, addition)
    torchs, by_ours = race.run()
    assert 0 < torchs < 10
    assert 0 < by_ours < 10
    rounds = timing._ROUNDS
    assert rounds.start < len(ours) <= rounds.stop
    assert set(ours) == {x.shape}


def test_what_a_race_depends_on():
    layer = nn.BatchNorm2d(8)
    race = timing._Race.of(layer, input_of(values(*SMALL)), False, False)
    others = [
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, momentum=None),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.BatchNorm2d(8).bfloat16(),
        nn.BatchNorm2d(8).requires_grad_(False),
    ]
    assert len({timing._Race.of(x, race.input, False, False) for x in (layer, *others)}) == 6
    short = race.input._replace(dtype=torch.bfloat16)
    for other in others:
        assert len(timing._Race.of(other, short, False, False).run()) == 2


def test_equal_layers_are_timed_once(monkeypatch):
    ran = races(monkeypatch, lambda race: (2.0, 1.0))
    report = batchnorm.accelerate(varied(nets.ResNet()), images())
    assert len(ran) == len(set(ran)) < 2 * len(report.replaced)
    assert [t.calls for t in report.timings] == [len(report.replaced)] * 2


def test_a_block_stays_fused_while_one_of_its_layers_wins(monkeypatch):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.pool = nn.BatchNorm2d(8), nn.MaxPool2d(2)
            self.second = nn.BatchNorm2d(8)

        def forward(self, x):
            return F.relu(self.second(self.pool(F.relu(self.first(x)))))

    large = torch.Size((2, 8, 8, 8))
    races(monkeypatch, lambda race: (2.0, 1.0) if race.input.shape == large else (1.0, 2.0))
    model = Block()
    report = batchnorm.accelerate(model, values(*large))
    assert report.replaced == report.relus == ("first", "second")
    assert report.left == {}
    races(monkeypatch, lambda race: (1.0, 2.0))
    report = batchnorm.accelerate(Block(), values(*large))
    assert report.replaced == report.relus == ()
    assert set(report.left) == {"first", "second"}


@pytest.mark.parametrize("training", [True, False])
def test_a_block_of_small_inputs_runs_as_it_was_written(training, monkeypatch):
    model = varied(nets.ResNet()).float().train(training)
    plain = copy.deepcopy(model)
    batchnorm.accelerate(model)
    monkeypatch.setattr(fusion._Rewritten, "fits", None)  # Not even asked.
    assert_close(model(images().float()), plain(images().float()), **EXACT)


def test_layers_of_ours_in_a_block_are_fused_for_inputs_of_any_size(monkeypatch):
    model = nn.Sequential(batchnorm.BatchNorm2d(CHANNELS), nn.ReLU())
    asked = []
    fits = fusion._Rewritten.fits
    monkeypatch.setattr(
        fusion._Rewritten, "fits", lambda *given: (asked.append(1), fits(*given))[1]
    )
    assert batchnorm.accelerate(model).relus == ("0",)
    model(values(*SMALL))
    assert asked == [1]


def test_without_numba_nothing_is_replaced_and_a_warning_says_why(monkeypatch):
    monkeypatch.setattr(dispatch, "numba_cpu", None)
    monkeypatch.setattr(dispatch, "_missing", "numba is not installed")
    model = varied(nets.ResNet())
    before = anatomy(model)
    with pytest.warns(
        RuntimeWarning, match=r"torch's kernels go on computing 8 layers, such as 'bn1'"
    ):
        report = batchnorm.accelerate(model, images())
    assert (report.replaced, report.relus, report.additions, report.verified) == ((), (), (), False)
    assert set(report.left.values()) == {"numba is not installed"}
    assert len(report.left) == 8
    assert "bn1, layer1.0.bn1, and 6 others: numba is not installed" in str(report)
    assert anatomy(model) == before


@pytest.mark.parametrize("everywhere", [True, False])
def test_layers_on_another_device_are_left_with_a_warning(everywhere):
    model = nn.Sequential(nn.BatchNorm2d(4, device="meta"), nn.ReLU(), nn.BatchNorm2d(4))
    with pytest.warns(RuntimeWarning, match=r"computing 1 layer, such as '0': it is on meta, and"):
        report = batchnorm.accelerate(model, everywhere=everywhere)
    assert report.replaced == ("2",)
    assert "0" in report.left


def test_a_process_without_numba_uses_torchs_kernels_for_an_accelerated_model(monkeypatch, ours):
    model = made("relu")
    batchnorm.accelerate(model)
    plain = made("relu")
    monkeypatch.setattr(dispatch, "numba_cpu", None)
    monkeypatch.setattr(dispatch, "_missing", "numba is not installed")
    assert_close(model(values(*LARGE)), plain(values(*LARGE)), **EXACT)
    assert ours == []


@pytest.mark.untyped
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_programs_for_others_do_not_depend_on_the_size(kind, training):
    model = made(kind).train(training)
    plain = copy.deepcopy(model)
    batchnorm.accelerate(model)
    batch = torch.export.Dim("batch", min=2, max=4096)
    codes = []
    for exported in (plain, model):
        program = torch.export.export(exported, (values(*LARGE),), dynamic_shapes=({0: batch},))
        codes.append(str(program.graph))
    assert codes[0] == codes[1]
    trace = torch.jit.trace(model.eval(), values(*LARGE))
    assert_close(trace(values(*SMALL)), plain.eval()(values(*SMALL)), rtol=1e-4, atol=1e-5)


@pytest.mark.untyped
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dynamic", [True, None])
def test_compiled_code_chooses_too(kind, dynamic):
    model = made(kind)
    plain = copy.deepcopy(model)
    batchnorm.accelerate(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for training in (True, False):
        for x in (values(*SMALL), values(*LARGE)):
            model.train(training)
            plain.train(training)
            assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)


def test_the_report_says_what_was_gained(monkeypatch):
    races(monkeypatch, lambda race: (4e-3, 1e-3) if race.input.training else (1e-3, 2e-3))
    text = str(batchnorm.accelerate(varied(nets.ResNet()), images()))
    assert (
        "In training our kernels are faster for 8 of 8 layers: batch norm takes 8 ms, and\n"
        "took 32 ms.\n"
        "In evaluation torch's kernels are faster, and compute all layers.\n"
    ) in text
    races(monkeypatch, lambda race: (1e-3, 2e-3))
    text = str(batchnorm.accelerate(varied(nets.ResNet()), images()))
    assert text == (
        "Nothing was accelerated: torch's kernels are faster.\n"
        "In training torch's kernels are faster, and compute all layers.\n"
        "In evaluation torch's kernels are faster, and compute all layers.\n"
        "Left as they are:\n"
        "  bn1, layer1.0.bn1, and 6 others: torch's kernels are faster"
    )


def test_nowhere_is_torchs_layer(ours):
    model = made("relu")
    batchnorm.accelerate(model, everywhere=True)
    LayerForward.find(model[0]).smallest = NOWHERE
    assert_close(model(values(*LARGE)), made("relu")(values(*LARGE)), **EXACT)
    assert ours == []


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def changed(layer: nn.BatchNorm2d, how: str) -> nn.BatchNorm2d:
    if how == "parametrized":
        nn.utils.parametrize.register_parametrization(layer, "weight", Halved())
    elif how == "a buffer that is no buffer":
        del layer.running_mean
        layer.running_mean = torch.full((CHANNELS,), 0.5)
    elif how == "without affine":
        layer = nn.BatchNorm2d(CHANNELS, affine=False)
    elif how == "without statistics":
        layer = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
    elif how == "statistics taken away":
        layer.running_mean = layer.running_var = None
    elif how == "in float64":
        layer = layer.double()
    return layer.eval()


CHANGES = ("parametrized", "a buffer that is no buffer", "statistics taken away", "in float64")
KINDS = ("as it is", "without affine", "without statistics", *CHANGES)


@pytest.mark.parametrize(
    ("how", "before"), [*((how, False) for how in KINDS), *((how, True) for how in CHANGES)]
)
@pytest.mark.parametrize("shape", [SMALL, LARGE, (2, CHANNELS, 3), (2, 5, 4, 4)])
def test_evaluation_is_torchs_to_the_bit(how, shape, before):
    def outcome(layer: nn.Module) -> Tensor | str:
        try:
            return layer(values(*shape).to(next(layer.parameters(), torch.empty(0)).dtype))
        except (RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    layer = made("alone")[0]
    expected = outcome(changed(copy.deepcopy(layer), how))
    model = nn.Sequential(layer) if before else nn.Sequential(changed(layer, how))
    batchnorm.accelerate(model)
    if before:
        changed(model[0], how)
    found = outcome(model.eval()[0])
    if isinstance(expected, str):
        assert found == expected
    else:
        assert_close(found, expected, **EXACT)


def test_evaluation_asks_tensors_that_know_better():
    class Tagged(Tensor):
        pass

    layer = made("alone")[0].eval()
    batchnorm.accelerate(nn.Sequential(layer))
    found = layer(values(*SMALL).as_subclass(Tagged))
    assert type(found) is Tagged
    assert_close(found.as_subclass(Tensor), made("alone")[0].eval()(values(*SMALL)), **EXACT)


def test_a_guard_sees_the_evaluation_of_a_small_input():
    model = nn.Sequential(made("alone")[0]).train()
    plain = copy.deepcopy(model)
    with batchnorm.guard(model):
        batchnorm.accelerate(model)
        model(torch.full(SMALL, torch.inf))
    model.eval(), plain.eval()
    assert_close(model(values(*SMALL)), plain(values(*SMALL)), **EXACT)
