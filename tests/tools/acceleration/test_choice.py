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
from batchnorm.tools.acceleration.replacement import NOWHERE, USUAL, LayerForward
from model_cases import EXACT, anatomy, images, varied

CHANNELS = 8
LARGE = (128, CHANNELS, 32, 32)  # 2**20 values
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
    monkeypatch.setattr(timing.Race, "run", lambda race: (ran.append(race), seconds(race))[1])
    return ran


@each_model
@pytest.mark.parametrize("wins", [(), (True,), (False,), (True, False)])
def test_a_race_decides_for_each_mode(kind, wins, monkeypatch, ours):
    raced = wins

    def clock(race):
        return (2.0, 1.0) if race.input.training in raced else (1.0, 2.0)

    ran = races(monkeypatch, clock)
    model = made(kind)
    before = anatomy(model)

    report = batchnorm.accelerate(model, values(*SMALL))

    if kind == "alone":
        wins = tuple(mode for mode in wins if mode)
    assert {race.input.training for race in ran} == {True, False}
    name = "bn" if kind == "addition" else "0"
    assert report.replaced == ((name,) if wins else ())
    assert report.left == ({} if wins else {name: "torch's kernels are faster"})
    assert (anatomy(model) == before) == (not wins)
    assert [(t.calls, t.ours) for t in report.timings] == [(1, True in wins), (1, False in wins)]
    for mode, timing_ in zip((True, False), report.timings, strict=True):
        torchs = clock(ran[0]._replace(input=ran[0].input._replace(training=mode)))[0]
        assert (timing_.before, timing_.after) == (torchs, 1.0 if mode in wins else torchs)
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
    race = timing.Race.of(nn.BatchNorm2d(8), input_of(values(*LARGE)), True, False)
    lost, won = timing.Raced(race, 1, 1.0, 2.0), timing.Raced(race, 1, 2.0, 1.0)
    assert timing._best(USUAL.training, [lost]) == large + 1
    assert timing._best(USUAL.training, [won]) == USUAL.training
    assert timing._best(0.0, [won]) == 0.0


@pytest.mark.parametrize(
    ("raced", "least"),
    [
        ([(100, 2.0, 1.0), (1000, 2.0, 1.0)], 100),
        ([(100, 1.0, 2.0), (1000, 2.0, 1.0)], 1000),
        ([(100, 1.0, 2.0), (1000, 1.0, 2.0)], USUAL.training),
        ([(100, 2.0, 1.0), (1000, 1.0, 9.0)], USUAL.training),
        ([(100, 9.0, 1.0), (1000, 1.0, 2.0)], 100),
        ([(1000, 9.0, 1.0), (1000, 1.0, 2.0)], 1000),
        ([(1000, 1.03, 1.0)], USUAL.training),
    ],
)
def test_the_bound_is_the_one_by_which_all_calls_are_fastest(raced, least):
    layer = nn.BatchNorm2d(1)
    found = [
        timing.Raced(timing.Race.of(layer, input_of(values(1, 1, 1, n)), False, False), 1, *seconds)
        for n, *seconds in raced
    ]
    assert timing._best(USUAL.training, found) == least


@pytest.mark.parametrize(("backward", "least_gain"), [(True, 200e-6), (False, 100e-6)])
def test_a_win_must_exceed_what_a_call_takes_longer_in_a_network(backward, least_gain):
    layer = nn.BatchNorm2d(8)
    race = timing.Race.of(layer, input_of(values(*SMALL), backward=backward), False, False)

    def bound(gain):
        return timing._best(USUAL.training, [timing.Raced(race, 1, 1e-4 + gain, 1e-4)])

    assert bound(1.1 * least_gain) == race.size
    assert bound(0.9 * least_gain) == USUAL.training


def input_of(x: Tensor, *, training: bool = True, backward: bool | None = None) -> timing.Input:
    follows = training if backward is None else backward
    return timing.Input(training, follows, x.shape, x.stride(), x.dtype)


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
    race = timing.Race.of(nn.BatchNorm2d(8), input_of(x, training=training), relu, addition)
    torchs, by_ours = race.run()
    assert 0 < torchs < 10
    assert 0 < by_ours < 10
    rounds = timing._ROUNDS
    assert rounds.start < len(ours) <= rounds.stop
    assert set(ours) == {x.shape}


def test_what_a_race_depends_on():
    layer = nn.BatchNorm2d(8)
    race = timing.Race.of(layer, input_of(values(*SMALL)), False, False)
    others = [
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, momentum=None),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.BatchNorm2d(8).bfloat16(),
        nn.BatchNorm2d(8).requires_grad_(False),
    ]
    assert len({timing.Race.of(x, race.input, False, False) for x in (layer, *others)}) == 6
    short = race.input._replace(dtype=torch.bfloat16)
    for other in others:
        assert len(timing.Race.of(other, short, False, False).run()) == 2


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
    model = varied(nets.BasicBlock(3, 3)).float().train(training)
    plain = copy.deepcopy(model)
    assert batchnorm.accelerate(model).additions
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
        "In training our kernels are faster for 8 of 8 calls: batch norm takes 8 ms, and\n"
        "took 32 ms.\n"
        "In evaluation our kernels are faster for 0 of 8 calls; torch's go on computing.\n"
    ) in text
    races(monkeypatch, lambda race: (1e-3, 2e-3))
    text = str(batchnorm.accelerate(varied(nets.ResNet()), images()))
    assert text == (
        "Nothing was accelerated: torch's kernels are faster.\n"
        "In training our kernels are faster for 0 of 8 calls; torch's go on computing.\n"
        "In evaluation our kernels are faster for 0 of 8 calls; torch's go on computing.\n"
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
    elif how == "averaging":
        layer.momentum = None
    elif how == "without counter":
        layer.num_batches_tracked = None
    elif how == "in float64":
        layer = layer.double()
    return layer


CHANGES = ("parametrized", "a buffer that is no buffer", "statistics taken away", "in float64")
KINDS = (
    "as it is",
    "without affine",
    "without statistics",
    "averaging",
    "without counter",
    *CHANGES,
)


@pytest.mark.parametrize(
    ("how", "before"), [*((how, False) for how in KINDS), *((how, True) for how in CHANGES)]
)
@pytest.mark.parametrize("shape", [SMALL, (1, CHANNELS, 1, 1), (2, CHANNELS, 3), (2, 5, 4, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_left_to_torch_is_torchs_to_the_bit(training, how, shape, before):
    def outcome(layer: nn.Module) -> Tensor | str:
        try:
            return layer(values(*shape).to(next(layer.parameters(), torch.empty(0)).dtype))
        except (RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    layer = made("alone")[0]
    plain = changed(copy.deepcopy(layer), how).train(training)
    expected = outcome(plain)
    model = nn.Sequential(layer) if before else nn.Sequential(changed(layer, how))
    batchnorm.accelerate(model)
    if before:
        changed(model[0], how)
    found = outcome(model.train(training)[0])
    assert_close(dict(model[0].state_dict()), dict(plain.state_dict()), **EXACT)
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


def test_a_layer_with_two_names_is_found_under_both(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    model.add_module("again", nn.Sequential(model[1], nn.ReLU()))
    races(monkeypatch, lambda race: (2.0, 1.0))
    plain = copy.deepcopy(model)
    report = batchnorm.accelerate(model, values(2, 3, 4, 4))
    assert report.replaced == ("1",)
    assert report.relus == ("1", "again.0")
    assert_close(model(values(2, 3, 4, 4)), plain(values(2, 3, 4, 4)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_race_is_run_on_the_cpu_whatever_the_default(device):
    race = timing.Race.of(nn.BatchNorm2d(8), input_of(values(*SMALL)), True, True)
    try:
        torch.set_default_device(device)
        torch.set_default_dtype(torch.float64)
        assert min(race.run()) > 0
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_a_race_of_slow_calls_has_two_rounds(monkeypatch):
    clock = iter(map(float, range(100)))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    race = timing.Race.of(nn.BatchNorm2d(8), input_of(values(*SMALL)), False, False)
    assert race.run() == (1, 1)
    assert next(clock) == 8  # two rounds of two calls


WIDENING = {
    "a transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(100, 8, 16), nn.BatchNorm2d(8), nn.ReLU()),
        (1024, 100, 1, 1),
    ),
    "many channels": (
        lambda: nn.Sequential(nn.Conv2d(1, 64, 1), nn.BatchNorm2d(64), nn.ReLU()),
        (8, 1, 64, 64),
    ),
    "a function": (lambda: Upsampling(), (16, 8, 16, 16)),
}


class Upsampling(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(F.interpolate(x, scale_factor=8)))


@pytest.mark.parametrize("kind", WIDENING)
def test_a_block_that_widens_its_input_is_fused_all_the_same(kind, ours):
    make, shape = WIDENING[kind]
    model = make()
    assert len(batchnorm.accelerate(model).relus) == 1
    model(values(*shape))
    assert ours[0].numel() >= USUAL.training > values(*shape).numel()


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("sequential", [True, False])
def test_recalibrate_takes_layers_whoever_computes_them(shape, sequential):
    model = made("relu")
    plain = copy.deepcopy(model)
    batchnorm.accelerate(model)
    batches = [values(*shape), 2 * values(*shape)]
    for each in (model, plain):
        batchnorm.recalibrate(each, batches, sequential=sequential)
    assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=1e-4, atol=1e-5)


class Clamping(nn.BatchNorm2d):
    def __getattr__(self, name):
        value = super().__getattr__(name)
        return value.clamp_min(2) if name == "running_var" else value


class Computing(nn.BatchNorm2d):
    @property
    def weight(self):
        return torch.full((CHANNELS,), 3.0)


def computing(layer):
    layer.__class__ = Computing


class Listening(nn.Parameter):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.batch_norm:
            return args[0] * 5
        return super().__torch_function__(function, types, args, kwargs or {})


def own_attribute(layer):
    vars(layer)["running_mean"] = torch.full((CHANNELS,), 7.0)


def listening(layer):
    layer.weight = Listening(torch.ones(CHANNELS))


def negative(layer):
    layer.eps = -1.0


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (Clamping, None),
        (nn.BatchNorm2d, computing),
        (nn.BatchNorm2d, own_attribute),
        (nn.BatchNorm2d, listening),
        (nn.BatchNorm2d, negative),
    ],
)
def test_evaluation_asks_whoever_computes_an_attribute(kind, change):
    layer = kind(CHANNELS).eval()
    plain = copy.deepcopy(layer)
    batchnorm.accelerate(nn.Sequential(layer))
    for each in (layer, plain):
        if change is not None:
            change(each)
    outcomes = []
    for each in (layer, plain):
        try:
            outcomes.append(each(values(*SMALL)))
        except ValueError as error:
            outcomes.append(str(error))
    if change is negative:
        assert outcomes[0] == outcomes[1]
    else:
        assert_close(*outcomes, **EXACT)


def test_who_replaces_the_function_of_torch_is_heard(monkeypatch):
    layer = made("alone")[0].eval()
    batchnorm.accelerate(nn.Sequential(layer))
    counted = []
    original = F.batch_norm
    monkeypatch.setattr(F, "batch_norm", lambda *a, **k: (counted.append(1), original(*a, **k))[1])
    layer(values(*SMALL))
    assert counted == [1]


@pytest.mark.parametrize("shape", [(1, CHANNELS, 4, 4), (8, CHANNELS, 64, 64)])
def test_a_residual_may_be_mapped_alone(shape):
    model, plain = made("addition").eval(), made("addition").eval()
    batchnorm.accelerate(model)
    x = values(*shape)
    residuals = torch.stack([x, 2 * x])

    def call(residual):
        return replacement.with_residual(model.bn, x, residual, "y + r")

    expected = [F.relu(plain.bn(x) + residual) for residual in residuals]
    assert_close(torch.vmap(call)(residuals), torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_transforms_in_evaluation_leave_large_inputs_to_torch(training, ours):
    model = made("relu").train(training)
    batchnorm.accelerate(model)
    x = values(*LARGE)
    torch.func.grad(lambda x: model(x).square().sum())(x)
    assert len(ours) == training


def test_a_second_call_says_what_to_do():
    model = made("relu")
    batchnorm.accelerate(model)
    report = batchnorm.accelerate(model, everywhere=True)
    assert str(report) == "Nothing new to accelerate; restore(model) first to choose anew."


def test_frozen_layers_race_with_their_backward_pass(monkeypatch):
    ran = races(monkeypatch, lambda race: (3.0, 1.0) if race.input.backward else (1.0, 2.0))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    batchnorm.freeze(model)
    report = batchnorm.accelerate(model, values(2, 3, 4, 4))
    assert {(race.input.training, race.input.backward) for race in ran} == {
        (False, True),
        (False, False),
    }
    assert [(t.training, t.ours, t.after) for t in report.timings] == [
        (True, 1, 1.0),
        (False, 1, 2.0),
    ]


def test_a_race_takes_statistics_as_they_are():
    layer = nn.BatchNorm2d(8).eval()
    layer.track_running_stats = False
    race = timing.Race.of(layer, input_of(values(1, 8, 1, 1), training=False), False, False)
    assert min(race.run()) > 0


def test_a_race_is_run_in_inference_mode_too():
    race = timing.Race.of(nn.BatchNorm2d(8), input_of(values(*SMALL)), True, False)
    with torch.inference_mode():
        assert min(race.run()) > 0


def test_every_call_of_a_layer_counts(monkeypatch):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.bn(self.bn(x))

    races(monkeypatch, lambda race: (2.0, 1.0))
    report = batchnorm.accelerate(Twice(), values(*SMALL))
    assert [(t.calls, t.before, t.after) for t in report.timings] == [(2, 4.0, 2.0), (2, 4.0, 4.0)]


def test_timms_layer_takes_its_input_by_name():
    class Named(ActingLayer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    layer = Named(CHANNELS)
    assert batchnorm.accelerate(nn.Sequential(layer)).replaced
    assert_close(layer(x=values(*SMALL)), Named(CHANNELS)(values(*SMALL)), **EXACT)


@pytest.mark.untyped
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_sizes_do_not_compile_anew():
    torch.compiler.reset()
    model = nn.Sequential(*[MODELS["relu"]() for _ in range(6)])
    for index, block in enumerate(model):
        batchnorm.accelerate(block)
        LayerForward.find(block[0]).smallest = USUAL._replace(training=100.0 * index)
        vars(block)["forward"].expect([block[0]])
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
        for count in (9, 7, 5, 4, 3, 2):
            compiled(values(count, CHANNELS, 4, 4))
