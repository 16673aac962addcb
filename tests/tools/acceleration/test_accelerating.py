"""accelerate and restore: what is replaced and kept, and how it fits into torch."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import batchnorm
import model_nets as nets
from batchnorm.tools.acceleration import restore
from everywhere import accelerate
from model_cases import (
    accelerated,
    anatomy,
    assert_same_function,
    images,
    is_ours,
    relus_and_additions,
    restored,
    varied,
)

networks = pytest.mark.parametrize(
    ("network", "layers", "relus", "additions"),
    [
        (nets.LeNet, 3, ("bn1", "bn3"), ()),
        (nets.VGG, 2, ("features.1", "features.5"), ()),
        (
            nets.ResNet,
            8,
            ("bn1", "layer1.0.bn1", "layer1.1.bn1", "layer2.0.bn1"),
            ("layer1.0.bn2", "layer1.1.bn2", "layer2.0.bn2"),
        ),
        (nets.DenseNet, 4, ("norm", "layers.0.norm", "layers.1.norm", "layers.2.norm"), ()),
    ],
)


@networks
def test_networks(network, layers, relus, additions):
    model = varied(network())
    original = copy.deepcopy(model)
    before = relus_and_additions(model)

    result = accelerate(model, images())

    assert len(result.replaced) == layers
    assert all(is_ours(model.get_submodule(name)) for name in result.replaced)
    assert list(map(type, model.modules())) == list(map(type, original.modules()))
    assert (result.relus, result.additions, result.left) == (relus, additions, {})
    assert result.verified
    assert result.differences.output < 1e-12
    assert_same_function(model, original)
    assert_same_function(model, original, images(7))
    if network is not nets.DenseNet:  # its first layer takes a list and is fused all the same
        fused = len(relus) + len(additions)
        assert relus_and_additions(model) == (before[0] - fused, before[1] - len(additions))
    else:
        assert relus_and_additions(model)[0] == 0


@networks
def test_restore_is_exact(network, layers, relus, additions):
    model = varied(network())
    before = anatomy(model)

    accelerate(model)
    assert anatomy(model) != before
    done = restore(model)

    assert done.layers == layers
    assert anatomy(model) == before
    assert str(restore(model)) == "Nothing to restore: the model is not accelerated."


# What the replaced layers keep.


def test_layers_stay_the_same_objects():
    model = nets.ResNet()
    model.bn1.momentum, model.bn1.eps, model.bn1.note = None, 0.5, "kept"
    model.bn1.weight.requires_grad_(False)
    model.layer1[0].bn1.eval()
    model.alias = model.bn1
    model.layer2[0].bn1 = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
    state, keys = model.state_dict(keep_vars=True), list(model.state_dict())
    layers = dict(model.named_modules(remove_duplicate=False))
    attributes = {name: set(vars(layer)) for name, layer in layers.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    result = accelerate(model)

    assert "alias" not in result.replaced
    assert list(model.state_dict()) == keys
    now = model.state_dict(keep_vars=True)
    assert all(now[name] is value for name, value in state.items())
    assert all(
        a is b for a, b in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True)
    )
    for name, module in model.named_modules(remove_duplicate=False):
        assert module is layers[name]
        assert set(vars(module)) - attributes[name] <= {"forward", "_batchnorm_accelerated"}
    bn = model.bn1
    assert (bn.momentum, bn.eps, bn.note, bn.weight.requires_grad) == (None, 0.5, "kept", False)
    assert model.alias is bn
    assert type(bn) is nn.BatchNorm2d
    assert not model.layer1[0].bn1.training
    assert type(model.layer1[0]) is nets.BasicBlock
    assert model.layer1[0].expansion == 1


def test_training_goes_on_and_restore_keeps_what_was_learned():
    model = varied(nets.ResNet())
    original = copy.deepcopy(model)
    accelerate(model, images())
    for each in (model, original):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        for count in (4, 6, 8):
            each.train()(images(count)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_close(dict(model.state_dict()), dict(original.state_dict()))

    fresh = varied(nets.ResNet())
    accelerate(fresh)
    fresh.load_state_dict(model.state_dict())
    for each in (fresh, model):
        restore(each)
        assert_close(dict(each.state_dict()), dict(original.state_dict()))
        assert_same_function(each, copy.deepcopy(original))


def test_moving_and_casting():
    model = accelerated(nets.ResNet())
    model.float().train().eval().to(torch.bfloat16).double()
    assert_same_function(model, restored(model))
    model.to(memory_format=torch.channels_last)
    assert_same_function(model, restored(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize(
    "network", [nets.ResNet, nets.VGG, lambda: nets.ConvNormAct(nets.BatchNormAct2d(4))]
)
def test_copies_stay_accelerated(network, duplicate):
    model = accelerated(network())
    original = restored(model)
    twin = duplicate(model)
    assert relus_and_additions(twin) == relus_and_additions(model)
    assert_same_function(twin, original)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    restore(twin)
    plain = network()
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
    assert not any(map(is_ours, twin.modules()))
    assert relus_and_additions(twin)[0] == relus_and_additions(plain.double())[0]


def test_shallow_copies_share_the_state():
    block = accelerated(nets.BasicBlock(3, 3))
    twin = copy.copy(block)
    assert type(twin) is nets.BasicBlock
    assert twin.bn1 is block.bn1
    assert relus_and_additions(twin) == (0, 0)


@pytest.mark.untyped  # beartype remembers nested functions, and with them what they hold
def test_an_accelerated_model_can_be_freed():
    block = accelerated(nets.BasicBlock())
    freed = [weakref.ref(block), weakref.ref(block.bn1), weakref.ref(block.conv1.weight)]
    del block
    gc.collect()
    assert [reference() for reference in freed] == [None, None, None]


# Layers that are not torch's own.


class Scaled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class CopiesItself(nn.BatchNorm2d):
    def __deepcopy__(self, memo):
        return self


class Own(nn.BatchNorm2d):
    """A user's subclass that computes as torch's class does."""


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.SyncBatchNorm(4), "SyncBatchNorm, which takes its statistics over all processes"),
        (nn.LazyBatchNorm2d(), "lazy and has not seen an input yet"),
        (Scaled(4), "a Scaled, which has a forward of its own"),
        (CopiesItself(4), "a CopiesItself, which has a __deepcopy__ of its own"),
    ],
)
def test_layers_that_are_left(layer, reason):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.ReLU())
    kind = type(layer)
    result = accelerate(model)
    assert result.replaced == ()
    assert reason in result.left["1"]
    assert type(layer) is kind


def test_a_subclass_with_the_forward_of_torch_is_accelerated():
    model = varied(nn.Sequential(nn.Conv2d(3, 4, 1), Own(4), nn.ReLU()))
    original = copy.deepcopy(model)
    result = accelerate(model, images())
    assert (result.replaced, result.relus, result.left) == (("1",), ("1",), {})
    assert type(model[1]) is Own
    assert_same_function(model, original)


def test_a_layer_whose_forward_was_replaced_is_left():
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: x
    assert accelerate(layer).left == {"": "its forward was replaced on this object"}
    block = nets.BasicBlock()
    block.forward = lambda x: x
    assert accelerate(block).left == {"": "its forward was replaced on this object"}


def test_a_lazy_layer_that_has_seen_an_input_is_replaced():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyBatchNorm2d(), nn.ReLU())
    with pytest.raises(ValueError, match=r"1\.weight is lazy .* call the model once before"):
        accelerate(model, images().float())
    model(images().float())
    assert accelerate(model).relus == ("1",)


def test_our_own_layers_are_fused_and_never_restored():
    model = varied(nn.Sequential(nn.Conv2d(3, 4, 1), batchnorm.BatchNorm2d(4), nn.ReLU()))
    original = copy.deepcopy(model)
    result = accelerate(model, images())
    assert (result.replaced, result.relus) == ((), ("1",))
    assert_same_function(model, original)
    assert restore(model).layers == 0
    assert type(model[1]) is batchnorm.BatchNorm2d
    active = nn.Sequential(batchnorm.BatchNorm2d(4, activation="relu"), nn.ReLU())
    assert accelerate(active).relus == ()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_timm_layers_keep_their_class_and_fuse_their_own_relu(momentum):
    layer = nets.BatchNormAct2d(4)
    layer.momentum = momentum
    model = varied(nets.ConvNormAct(layer))
    original = copy.deepcopy(model)

    result = accelerate(model, images())

    assert (result.replaced, result.relus, result.left) == (("bn",), ("bn",), {})
    assert type(layer) is nets.BatchNormAct2d
    assert list(model.state_dict()) == list(original.state_dict())
    assert_same_function(model, original)
    assert relus_and_additions(model) == (0, 0)
    model.load_state_dict(original.state_dict())
    layer.act = nn.SiLU()
    assert_same_function(model, restored(model))


@pytest.mark.parametrize(("act", "drop"), [(nn.SiLU(), None), (nn.ReLU(), nn.Dropout(0.5))])
def test_timm_layers_with_something_else_behind(act, drop):
    model = varied(nets.ConvNormAct(nets.BatchNormAct2d(4, act, drop)))
    original = copy.deepcopy(model)
    result = accelerate(model, images())
    assert (result.replaced, result.relus) == (("bn",), ())
    assert_same_function(model, original)


class DropAfterAct(nets.BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.act(nn.BatchNorm2d.forward(self, x)))


class WithoutCounter(nets.BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1
        )
        return self.act(self.drop(x))


class Failing(nets.BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError


@pytest.mark.parametrize("kind", [DropAfterAct, WithoutCounter, Failing])
def test_layers_that_only_look_like_timms_are_left(kind):
    model = nets.ConvNormAct(kind(4))
    before = anatomy(model)
    left = accelerate(model).left
    assert left == {"bn": f"it is a {kind.__name__}, and does not compute act(drop(batch_norm(x)))"}
    assert anatomy(model) == before


# Blocks with ways of their own.


class OwnPickle(nets.BasicBlock):
    def __getstate__(self):
        return self.__dict__


def test_blocks_that_copy_themselves_are_left():
    block = OwnPickle()
    assert accelerate(block).left == {
        "": "its forward belongs to a class with a __getstate__ of its own"
    }
    traced = torch.fx.symbolic_trace(nets.BasicBlock())
    assert "of its own" in accelerate(traced).left[""]


def test_a_second_time_is_harmless():
    model = varied(nets.ResNet())
    accelerate(model)
    before = anatomy(model)
    again = accelerate(model, images())
    assert (again.replaced, again.relus, again.additions, again.left) == ((), (), (), {})
    assert str(again) == "Nothing new to accelerate."
    assert anatomy(model) == before


def test_the_summary():
    model = nets.ResNet()
    model.layer1[1].bn2 = nn.SyncBatchNorm(4)
    model.layer1[0].bn1.register_forward_hook(lambda *_: None)
    text = str(accelerate(model))
    assert max(map(len, text.splitlines())) <= 80
    assert text == (
        "Replaced 7 batch norm layers.\n"
        "Fused 3 ReLUs into the layer before, and 2 additions with the ReLU after it.\n"
        "Not verified: give accelerate an example_input to compare with the original.\n"
        "Left as they are:\n"
        "  layer1.1.bn2: it is a SyncBatchNorm, which takes its statistics over all\n"
        "    processes\n"
        "  layer1.0.bn1: the ReLU after it stays, because of bn1: it has hooks"
    )
    assert str(restore(model)) == "Restored 7 layers and the forward of 4 blocks."
    verified = str(accelerate(nn.BatchNorm1d(3), torch.randn(8, 3)))
    assert verified.startswith("Replaced 1 batch norm layer.\nFused 0 ReLUs")
    assert "Verified in training and in evaluation" in verified
    assert max(map(len, verified.splitlines())) <= 80


# Inside what torch offers.


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.untyped
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile_in_one_graph():
    model = accelerated(nets.ResNet())
    original = restored(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        model.train(training)
        original.train(training)
        for count in (4, 6):
            assert_close(compiled(images(count)), original(images(count)))
        assert_close(dict(model.state_dict()), dict(original.state_dict()))


@pytest.mark.untyped
@pytest.mark.usefixtures("fresh_compiler")
def test_export():
    model = accelerated(nets.ResNet()).eval()
    program = torch.export.export(model, (images(),))
    assert_close(program.module()(images()), model(images()))


class LeafTracer(torch.fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return not isinstance(m, nets.BasicBlock)


def test_tracing_an_accelerated_model_gives_the_original_operations():
    model = accelerated(nets.BasicBlock())
    graph = LeafTracer().trace(model)
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    assert called == ["conv1", "bn1", "relu", "conv2", "bn2", "relu"]


def test_conversion_to_synchronized_layers_afterwards():
    model = accelerated(nets.ResNet()).eval()
    expected = restored(model)(images())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(model.layer1[0].bn1, nn.SyncBatchNorm)
    assert_close(model(images()), expected)


@pytest.mark.parametrize("inside", [False, True])
def test_data_parallel_is_refused(inside):
    model = nn.DataParallel(nets.BasicBlock())
    model, name = (nn.Sequential(nn.Identity(), model), "1") if inside else (model, "the model")
    before = anatomy(model)
    message = rf"accelerate: {name}.* is a DataParallel, which copies .* use DistributedDataPara"
    with pytest.raises(ValueError, match=message):
        accelerate(model)
    assert anatomy(model) == before


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("accelerated_first", [True, False])
def test_distributed_data_parallel_around_or_inside(accelerated_first):
    model = varied(nets.ResNet())
    original = copy.deepcopy(model)
    if accelerated_first:
        accelerate(model)
        wrapped = DistributedDataParallel(model)
    else:
        wrapped = DistributedDataParallel(model)
        assert len(accelerate(wrapped).replaced) == 8
    assert relus_and_additions(wrapped) == (0, 0)
    for each in (wrapped, original):
        each.train()(images()).square().sum().backward()
    grads = [[p.grad for p in each.parameters()] for each in (model, original)]
    assert_close(*grads)
    assert restore(wrapped).blocks == 4


def test_functional_calls_swap_the_state():
    model = accelerated(nets.ResNet()).eval()
    state = {name: value * 0.5 for name, value in model.state_dict().items() if value.dim()}
    expected = torch.func.functional_call(restored(model), state, (images(),))
    assert_close(torch.func.functional_call(model, state, (images(),)), expected)
