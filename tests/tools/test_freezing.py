"""freeze, unfreeze, is_frozen: what stops, what stays, and what comes back."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import batchnorm
import model_nets as nets
from batchnorm.tools.acceleration import restore
from batchnorm.tools.freezing import Freezing, freeze, is_frozen, unfreeze
from everywhere import accelerate
from layer_kinds import KINDS, built, everything, layers_of, statistics
from model_cases import EXACT, assert_same_function, images, relus_and_additions, varied

kinds = pytest.mark.parametrize("kind", KINDS)


def train_steps(model, batches, **options):
    """Like most loops: ``train()`` at the start of each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for batch in batches:
        model.train()
        optimizer.zero_grad(**options)
        model(batch).square().mean().backward()
        optimizer.step()


def test_without_freeze_train_thaws_what_eval_froze():
    model, batches = built("torch 1d")
    layer = model[1]
    layer.eval()
    layer.requires_grad_(False)
    before = statistics(layer)

    model.train()
    assert layer.training
    model(batches[0])
    assert statistics(layer) != before


@kinds
def test_frozen_layers_stay_through_training(kind):
    model, batches = built(kind)
    freeze(model)
    assert is_frozen(model)
    before = everything(model)["tensors"]
    keys = list(model.state_dict())

    train_steps(model, batches * 17)

    after = everything(model)["tensors"]
    held = {id(t) for layer in layers_of(model) for t in (*layer.parameters(), *layer.buffers())}
    assert len(held) == 5 * len(layers_of(model))
    moved = {name for name in before if before[name] != after[name]}
    assert moved == {name for name, (identity, *_) in before.items() if identity not in held}
    assert moved
    assert list(model.state_dict()) == keys


@kinds
def test_frozen_layers_compute_as_in_evaluation(kind):
    model, (batch, *_) = built(kind)
    expected = copy.deepcopy(model).eval()(batch)
    freeze(model)
    for mode in (True, False):
        model.train(mode)
        assert not any(layer.training for layer in layers_of(model))
        assert_close(model(batch), expected, **EXACT)


@kinds
@pytest.mark.parametrize("affine", [True, False])
def test_the_round_trip_leaves_nothing(kind, affine):
    model, batches = built(kind)
    first = layers_of(model)[0]
    first.register_forward_hook(lambda *_: None)
    first.weight.requires_grad_(False)
    first.momentum, first.note = 0.3, "kept"
    layers_of(model)[-1].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = list(optimizer.param_groups[0]["params"])
    before = everything(model)

    frozen = freeze(model, affine=affine)
    assert everything(model) != before
    assert frozen.affine is affine
    unfrozen = unfreeze(model)

    assert everything(model) == before
    assert unfrozen.layers == frozen.layers
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    assert not is_frozen(model)
    model.train()
    was = statistics(model)
    model(batches[0])
    assert statistics(model) != was


def test_weight_and_bias_can_go_on_training():
    model, batches = built("ours")
    freeze(model, affine=False)
    weight, buffers = model[1].weight.detach().clone(), statistics(model)
    train_steps(model, batches)
    assert not torch.equal(model[1].weight, weight)
    assert statistics(model) == buffers


def test_a_gradient_from_before_does_not_move_a_frozen_weight():
    ends = {}
    for name in ("by hand", "frozen"):
        model, batches = built("torch 1d")
        model(batches[0]).square().mean().backward()
        assert model[1].weight.grad.abs().min() > 0
        if name == "frozen":
            freeze(model)
            assert model[1].weight.grad is None
        else:
            model[1].requires_grad_(False)
        train_steps(model, batches, set_to_none=False)
        ends[name] = model[1].weight.detach()
    assert torch.equal(ends["frozen"], torch.ones(4))
    assert not torch.equal(ends["by hand"], torch.ones(4))  # by weight decay, with a gradient of 0


def test_the_mode_that_was_asked_for_meanwhile_comes_with_unfreezing():
    model, _ = built("torch 1d")
    freeze(model)
    model.eval()
    unfreeze(model)
    assert not model[1].training
    freeze(model)
    assert model.train() is model
    assert model[1].train() is model[1]
    unfreeze(model)
    assert model[1].training
    freeze(model)
    with pytest.raises(ValueError, match="training mode is expected to be boolean"):
        model.train("yes")
    assert not model[1].training


def test_freezing_twice_is_freezing_once_and_the_last_affine_counts():
    model, _ = built("torch 1d")
    before = everything(model)
    freeze(model)
    once = everything(model)
    freeze(model)
    assert everything(model) == once
    freeze(model, affine=False)
    assert [p.requires_grad for p in model[1].parameters()] == [True, True]
    freeze(model)
    assert [p.requires_grad for p in model[1].parameters()] == [False, False]
    assert unfreeze(model).layers == ("1",)
    assert unfreeze(model).layers == ()
    assert everything(model) == before


def test_unfreezing_what_is_not_frozen_changes_nothing():
    model, _ = built("ours")
    model[1].eval()
    before = everything(model)
    assert str(unfreeze(model)) == "Nothing to unfreeze: no batch norm layer is frozen."
    assert everything(model) == before


def test_requires_grad_set_by_somebody_meanwhile_stays():
    model, _ = built("torch 1d")
    model[1].bias.requires_grad_(False)
    freeze(model)
    model.requires_grad_(True)
    unfreeze(model)
    assert model[1].bias.requires_grad
    assert model[1].weight.requires_grad


def test_only_chosen_layers():
    model, _ = built("accelerated")
    result = freeze(model, ["layer1", "bn1"])
    frozen = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and is_frozen(m)}
    assert set(result.layers) == frozen
    assert frozen == {n for n in frozen if n.startswith("layer1") or n == "bn1"} != set()
    assert not is_frozen(model)
    assert is_frozen(model.layer1)
    assert is_frozen(model.bn1)
    assert unfreeze(model, ["bn1"]).layers == ("bn1",)
    assert is_frozen(model.layer1)
    assert not is_frozen(model.bn1)
    assert not is_frozen(nn.Linear(2, 2))


def test_a_layer_alone():
    layer = batchnorm.BatchNorm1d(4)
    assert freeze(layer) == Freezing(("",), affine=True)
    assert is_frozen(layer)
    assert vars(layer)["_batchnorm_frozen"] is True
    assert not layer.train().training


def test_what_it_says():
    model, _ = built("torch 1d")
    assert str(freeze(model)) == "Froze 1 batch norm layer: statistics, weight and bias."
    assert str(unfreeze(model)) == "Unfroze 1 batch norm layer."
    resnet = nets.ResNet()
    assert str(freeze(resnet, affine=False)) == "Froze 8 batch norm layers: statistics only."


# Refusals.


def test_layers_without_statistics_cannot_be_frozen():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False))
    before = everything(model)
    message = (
        r"freeze: layer '1' \(BatchNorm1d\) keeps no running statistics, so in evaluation it "
        r"normalizes by the batch too; leave it out of layers, or build it with "
        r"track_running_stats=True\."
    )
    with pytest.raises(ValueError, match=message):
        freeze(model)
    assert everything(model) == before
    assert freeze(model, ["0"]).layers == ("0",)


@pytest.mark.untyped
def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"freeze: layer '' \(LazyBatchNorm1d\) is lazy"):
        freeze(nn.LazyBatchNorm1d())
    with pytest.raises(TypeError, match=r"unfreeze: model must be a torch\.nn\.Module, got int"):
        unfreeze(3)
    with pytest.raises(ValueError, match="freeze: no batch norm layer fits 'bn'; the model"):
        freeze(nn.Sequential(nn.BatchNorm1d(2)), ["bn"])


@pytest.mark.parametrize("tool", [freeze, unfreeze])
def test_a_train_replaced_by_somebody_is_not_lost(tool):
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    freeze(model)
    model[1].train = lambda mode=True: model[1]
    before = everything(model)
    message = rf"{tool.__name__}: layer '1' \(BatchNorm1d\) is frozen, but its train\(\) was repla"
    with pytest.raises(RuntimeError, match=message):
        tool(model)
    assert everything(model) == before


def test_a_train_of_the_layers_own_is_asked_and_comes_back():
    asked = []
    layer = nn.BatchNorm1d(2)
    layer.train = own = asked.append
    freeze(layer)
    layer.eval()
    assert asked == [False]
    unfreeze(layer)
    assert layer.train is own


# Copies.


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved],
    ids=["deepcopy", "pickle", "torch.save"],
)
@kinds
def test_copies_stay_frozen_and_can_be_unfrozen(kind, duplicate, affine):
    model, (batch, *_) = built(kind)
    freeze(model, affine=affine)
    twin = duplicate(model).train()
    assert is_frozen(twin)
    before = statistics(twin)
    twin(batch)
    assert statistics(twin) == before

    unfreeze(twin)
    assert all(layer.training for layer in layers_of(twin))
    assert all(p.requires_grad for layer in layers_of(twin) for p in layer.parameters())
    assert is_frozen(model.train())
    assert not any(layer.training for layer in layers_of(model))
    twin(batch)
    assert statistics(twin) != before


def test_a_shallow_copy_is_frozen_too():
    layer = freeze_and_return(nn.BatchNorm1d(2))
    twin = copy.copy(layer)
    assert twin.train() is layer  # as the docstring says: nothing tells whose train was called
    assert is_frozen(twin)
    assert not twin.training
    unfreeze(twin)
    assert twin.training
    assert is_frozen(layer)
    assert not layer.train().training


def freeze_and_return(model):
    freeze(model)
    return model


def test_state_dicts_go_both_ways():
    model, batches = built("ours")
    frozen = freeze_and_return(built("torch 1d")[0])
    train_steps(model, batches)
    frozen.load_state_dict(model.state_dict())
    assert is_frozen(frozen)
    assert statistics(frozen) == statistics(model)
    model.load_state_dict(frozen.state_dict())
    assert not is_frozen(model)


def test_moving_and_casting():
    model = freeze_and_return(built("torch 1d")[0]).to(torch.float64).train()
    x = torch.randn(6, 4, dtype=torch.float64)
    before = statistics(model)
    model(x)
    assert statistics(model) == before
    unfreeze(model)
    assert model[1].weight.requires_grad


# With the rest of torch, and with accelerate.


def test_a_dropout_inside_of_a_layer_follows_the_mode():
    layer = nets.BatchNormAct2d(4, drop=nn.Dropout(0.5))
    freeze(layer)
    layer.eval()
    assert not layer.drop.training
    layer.train()
    assert layer.drop.training
    assert not layer.training


@pytest.mark.parametrize("accelerated_first", [True, False])
def test_an_accelerated_model_stays_fused(accelerated_first):
    model = varied(nets.ResNet())
    original = copy.deepcopy(model)
    if accelerated_first:
        accelerate(model, images())
        freeze(model, affine=False)
    else:
        freeze(model, affine=False)
        assert len(accelerate(model, images()).replaced) == 8
    assert relus_and_additions(model) == (0, 0)
    freeze(original, affine=False)
    assert_same_function(model, original)
    restore(model)
    assert is_frozen(model.train())
    assert_same_function(model, original)
    unfreeze(model)
    unfreeze(original)
    assert_same_function(model, original)


def test_a_frozen_layer_of_timm_is_accelerated():
    model = varied(nets.ConvNormAct(nets.BatchNormAct2d(4)))
    freeze(model, affine=False)
    original = copy.deepcopy(model)
    model.train()
    assert accelerate(model, images()).replaced == ("bn",)
    unfreeze(model)
    assert model.bn.training
    unfreeze(original)
    assert_same_function(model, original)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["torch 1d", "ours"])
@pytest.mark.untyped
def test_compiled(kind):
    model, (batch, *_) = built(kind)
    freeze(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = statistics(model)
    for mode in (True, False):
        model.train(mode)
        y = compiled(batch)
        y.sum().backward()
        assert_close(y, model(batch))
    assert statistics(model) == before
    unfreeze(model)
    model.train()
    compiled(batch)
    assert statistics(model) != before


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("affine_inside", [True, False])
def test_distributed_data_parallel(affine_inside):
    model, batches = built("torch 1d")
    if affine_inside:
        freeze(model)
        wrapped = DistributedDataParallel(model)
    else:
        wrapped = DistributedDataParallel(model)
        freeze(wrapped, affine=False)
    before, weight = statistics(model), model[0].weight.detach().clone()
    train_steps(wrapped, batches)
    assert statistics(model) == before
    assert not torch.equal(model[0].weight, weight)
    assert is_frozen(wrapped)


@pytest.mark.untyped
def test_importing_freeze_loads_neither_a_tracer_nor_numba():
    code = "import sys; from batchnorm import freeze; print(*sorted(sys.modules))"
    run = [sys.executable, "-c", code]
    loaded = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    assert "batchnorm.tools.freezing" in loaded
    unwanted = {"numba", "batchnorm.tools.flow", "batchnorm.tools.acceleration", "batchnorm.nn"}
    assert unwanted & set(loaded) == set()


class Split(nn.BatchNorm2d):
    """A layer with another one inside, as timm's ``SplitBatchNorm2d``."""

    def __init__(self, channels):
        super().__init__(channels)
        self.aux = nn.ModuleList([nn.BatchNorm2d(channels)])


def test_a_layer_inside_a_layer_is_frozen_on_its_own():
    model = nn.Sequential(Split(3))
    freeze(model)
    assert unfreeze(model, ["0.aux.0"]).layers == ("0.aux.0",)
    assert not is_frozen(model)
    assert unfreeze(model).layers == ("0",)
    assert model.train()[0].training


def test_an_outer_layer_is_frozen_once():
    model = nn.Sequential(Split(3))
    for _ in range(2):
        freeze(model, lambda name, layer: name == "0")
    assert unfreeze(model).layers == ("0",)
    assert "train" not in vars(model[0])


def test_freezing_again_returns_to_evaluation():
    model = nn.Sequential(nn.BatchNorm1d(3))
    freeze(model)
    model[0].training = True
    freeze(model)
    assert not model[0].training
