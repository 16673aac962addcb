"""An accelerated model among torch's converters, tracers and compilers, in every order."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental import optimization
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import batchnorm
import batchnorm.scratch
import model_nets as nets
from batchnorm.tools.acceleration import restore
from batchnorm.tools.acceleration.fusion import BlockForward
from batchnorm.tools.acceleration.replacement import LayerForward
from everywhere import accelerate
from model_cases import (
    accelerated,
    anatomy,
    assert_same_function,
    images,
    is_ours,
    relus_and_additions,
    restored,
    tail,
    varied,
)
from real_networks import import_torchvision

pytestmark = [
    pytest.mark.untyped,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*torch.jit.trace(_method)?. is deprecated:DeprecationWarning"
    ),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def triples(count: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    layers = []
    for c_in in (3, 4, 4)[:count]:
        layers += [nn.Conv2d(c_in, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    return varied(nn.Sequential(*layers))


def counts(model: nn.Module) -> list[int]:
    return [int(m.num_batches_tracked) for m in model.modules() if hasattr(m, "running_mean")]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Compiled code sees what is done to the layers of a fused block.

BACKENDS = ["none", "eager", "aot_eager"]


def compiled(model: nn.Module, backend: str) -> nn.Module:
    return model if backend == "none" else torch.compile(model, backend=backend, fullgraph=True)


def poisoned() -> Tensor:
    x = images()
    x[0] = torch.inf
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_guard_works_before_and_after_the_first_step(backend, when):
    model = triples()
    accelerate(model, images())
    call = compiled(model, backend)
    if when == "after":
        call(images())
    before = counts(model)
    with batchnorm.guard(model) as guarded:
        call(poisoned())
        assert guarded.skipped == {"1": 1}
        assert model[1].running_mean.isfinite().all()
        assert counts(model) == before
        call(images())
    call(poisoned())
    assert not model[1].running_mean.isfinite().all()


def doubled(model: nn.Module) -> None:
    inner = model[1].forward
    model[1].forward = lambda x: 2 * inner(x)


def without_batch_norm(model: nn.Module) -> None:
    model[1].forward = lambda x: x


def leaky(model: nn.Module) -> None:
    model[2].forward = lambda x: torch.where(x > 0, x, 0.1 * x)


def of_the_block(model: nn.Module) -> None:
    model.forward = lambda x: model[0](x)


def another_layer(model: nn.Module) -> None:
    model[1] = nn.GroupNorm(2, 4).double()


def another_activation(model: nn.Module) -> None:
    model[2] = nn.Tanh()


def frozen(model: nn.Module) -> None:
    batchnorm.freeze(model)


CHANGES = [
    *(doubled, without_batch_norm, leaky, of_the_block, another_layer, another_activation, frozen),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_users_change_by_hand_counts_also_in_compiled_code(backend, change):
    model, plain = triples(), triples()
    accelerate(model)
    call = compiled(model, backend)
    for each in (call, plain):
        each(images())
    for each in (model, plain):
        change(each)
    for count in (4, 6):
        assert_close(call(images(count)), plain(images(count)))
    assert_close(dict(model.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("name", ["0", "1", "2", ""])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_before_the_first_step_see_what_they_see_of_torchs_layers(name, kind):
    seen = []
    for model in (triples(), triples()):
        if seen:
            accelerate(model)
        calls = []
        getattr(model.get_submodule(name), f"register_{kind}")(
            lambda module, given, *_, calls=calls: calls.append(given[0].detach().clone())
        )
        torch.compiler.reset()
        torch.compile(model, backend="aot_eager")(images().requires_grad_()).sum().backward()
        seen.append(calls)
    expected, calls = seen
    assert len(calls) == 1
    assert_close(calls, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_watch_before_the_first_step_sees_the_layers(backend):
    model = triples()
    accelerate(model)
    with batchnorm.watch(model) as watching:
        torch.compile(model, backend=backend)(images())
        watching.step()
        assert "1" in str(watching)


def relus_in_graphs(model: nn.Module, *args: Tensor) -> int:
    """How many a compiled call computes on their own; no mode may be active while it compiles."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    torch.compile(model, backend=backend, fullgraph=True)(*args)
    nodes = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert nodes
    return sum("relu" in name for name in nodes)


@pytest.mark.parametrize("network", [triples, nets.ResNet, nets.VGG])
def test_the_fusion_itself_is_compiled(network):
    model = accelerated(network())
    plain = restored(model)
    assert relus_in_graphs(model, images()) == 0 < relus_in_graphs(plain, images())


# Slices, and recomputation.


@pytest.mark.parametrize("part", [slice(3), slice(1, 6), slice(2, None), slice(None)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_are_torchs_own(part, backend):
    model = triples(3)
    plain = copy.deepcopy(model)
    accelerate(model)
    x = images() if part.start in (None, 0) else torch.randn(4, 4, 8, 8, dtype=torch.float64)

    def forward(x, model=model):
        return model[part](x)

    call = forward if backend == "none" else torch.compile(forward, backend=backend, fullgraph=True)
    assert type(model[part]) is nn.Sequential
    assert_close(call(x), plain[part](x))
    assert counts(model) == counts(plain)


@pytest.mark.parametrize(
    ("backend", "reentrant"), [("none", False), ("none", True), ("aot_eager", False)]
)
def test_a_checkpointed_slice_counts_as_torchs(backend, reentrant):
    model = triples(3)
    plain = copy.deepcopy(model)
    accelerate(model)

    def forward(x, model):
        return checkpoint(model[:3], x, use_reentrant=reentrant)

    for each in (plain, model):
        torch.compiler.reset()
        call = forward if backend == "none" else torch.compile(forward, backend=backend)
        call(images().requires_grad_(), each).sum().backward()
    assert counts(model) == counts(plain)
    assert_close(model[0].weight.grad, plain[0].weight.grad)


# Converters, in both orders.


def weight_normed(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model[1], "weight", dim=None)
    return model


def parametrized(model: nn.Module) -> nn.Module:
    parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    return model


def weight_normed_by_hooks(model: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm. is deprecated"):
        nn.utils.weight_norm(model[1], "weight", dim=None)
    return model


def pruned(model: nn.Module) -> nn.Module:
    prune.random_unstructured(model[1], "weight", amount=2)
    return model


CONVERTERS = [weight_normed, parametrized, weight_normed_by_hooks, pruned]


@pytest.mark.parametrize("convert", CONVERTERS, ids=lambda convert: convert.__name__)
@pytest.mark.parametrize("order", ["accelerated first", "converted first"])
def test_converters_that_change_a_layer_or_a_block(convert, order):
    model = triples(2)
    plain = copy.deepcopy(model)
    if order == "accelerated first":
        accelerate(model)
    for each in (model, plain):
        torch.manual_seed(0)
        convert(each)
    if order == "converted first":
        assert accelerate(model, images()).left.keys() <= {"", "1"}
    kinds = [type(m).__name__ for m in plain.modules()]

    assert_same_function(model, plain)
    assert is_ours(model[1])
    assert [type(m).__name__ for m in model.modules()] == kinds
    done = restore(model)

    assert done.layers == 2
    assert not any(map(is_ours, model.modules()))
    assert [type(m).__name__ for m in model.modules()] == kinds
    assert_same_function(model, plain)


@pytest.mark.parametrize("convert", CONVERTERS, ids=lambda convert: convert.__name__)
@pytest.mark.parametrize("order", ["accelerated first", "converted first", "not accelerated"])
def test_converters_that_change_a_layer_built_as_ours(convert, order):
    plain = triples(2)
    model = copy.deepcopy(plain)
    model[1] = batchnorm.BatchNorm2d(4).double()
    model[1].load_state_dict(plain[1].state_dict())
    if order == "accelerated first":
        accelerate(model)
    for each in (model, plain):
        torch.manual_seed(0)
        convert(each)
    if order == "converted first":
        accelerate(model, images())
    assert_same_function(model, plain)
    batchnorm.to_torch(model)
    assert [type(m).__name__ for m in model.modules()] == [
        type(m).__name__ for m in plain.modules()
    ]
    assert not any(map(is_ours, model.modules()))
    assert_same_function(model, plain)


class WithScale(nets.Tail):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.relu(self.bn(self.conv(x)))


@pytest.mark.parametrize("order", ["accelerated first", "converted first"])
def test_a_parametrized_block(order):
    model = varied(WithScale())
    plain = copy.deepcopy(model)
    if order == "accelerated first":
        accelerate(model)
    for each in (model, plain):
        parametrize.register_parametrization(each, "scale", nn.Softplus())
    if order == "converted first":
        left = accelerate(model, images()).left
        assert left == {"": "its forward reads 'scale', which is computed"}
    assert_same_function(model, plain)
    assert restore(model).layers == 1
    assert type(model) is not WithScale
    assert_same_function(model, plain)


def by_script(module: nn.Module) -> nn.Module:
    return torch.jit.script(module)


def by_trace(module: nn.Module) -> nn.Module:
    return torch.jit.trace(module, images(), check_trace=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("compile_", [by_script, by_trace])
@pytest.mark.parametrize("part", ["0", "0.conv1", "0.downsample", "1"])
def test_parts_that_torchscript_compiled_are_called_as_before(compile_, part):
    model = varied(nn.Sequential(nets.BasicBlock(3, 3), nets.BasicBlock(3, 3)))
    model[0].downsample = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).double()
    model.eval()
    model.set_submodule(part, compile_(model.get_submodule(part)))
    plain = copy.deepcopy(model)
    result = accelerate(model, images())
    assert result.verified
    assert len(result.replaced) == {"0": 2, "0.conv1": 5, "0.downsample": 4, "1": 3}[part]
    assert len(result.relus) + len(result.additions) == (2 if part in "01" else 4)
    assert_close(model(images()), plain(images()))
    restore(model)
    assert_close(model(images()), plain(images()))


def test_a_conversion_that_is_undone_gives_the_fusion_back():
    model = triples()
    accelerate(model)
    parametrized(model)
    parametrize.remove_parametrizations(model[1], "weight")
    assert type(model[1]) is nn.BatchNorm2d
    assert relus_and_additions(model) == (0, 0)


@pytest.mark.parametrize("network", [triples, nets.ResNet, nets.DenseNet])
def test_synchronized_layers_before_and_after(network):
    model = accelerated(network()).eval()
    expected = restored(model)(images())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert not any(map(is_ours, model.modules()))
    assert_close(model(images()), expected)
    result = accelerate(model)
    assert result.replaced == ()
    assert all("is a SyncBatchNorm" in reason for reason in result.left.values())
    assert len(result.left) == result.found


def test_a_lazy_layer_in_both_orders():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyBatchNorm2d(), nn.ReLU())
    assert "lazy" in accelerate(model).left["1"]
    model(images().float())
    assert accelerate(model).relus == ("1",)
    assert type(model[1]) is nn.BatchNorm2d


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("order", ["accelerated first", "sharded first"])
@pytest.mark.parametrize("parts", [(), ("layer1.0", "layer2"), ("bn1", "layer1.0.bn2")])
def test_fully_sharded(order, parts):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model = varied(nets.ResNet()).float()
    plain = copy.deepcopy(model)
    if order == "accelerated first":
        accelerate(model)
    for name in (*parts, ""):
        fully_shard(model.get_submodule(name), mesh=mesh)
    if order == "sharded first":
        assert len(accelerate(model).replaced) == 8
    x = images().float()
    for training in (True, False):
        assert_close(model.train(training)(x), plain.train(training)(x))
    model.train()(x).square().sum().backward()
    plain.train()(x).square().sum().backward()
    assert_close(model.conv1.weight.grad.full_tensor(), plain.conv1.weight.grad)
    assert restore(model).layers == 8
    assert_close(model(x), plain(x))


@pytest.mark.parametrize("order", ["accelerated first", "compiled first", "after a call"])
@pytest.mark.parametrize("network", [triples, lambda: varied(nets.ResNet())])
def test_compiled_models(order, network):
    model = network()
    plain = copy.deepcopy(model)
    if order == "accelerated first":
        accelerate(model, images())
    wrapped = torch.compile(model, backend="aot_eager", fullgraph=True)
    if order == "after a call":
        for each in (wrapped, plain):
            each(images())
    if order != "accelerated first":
        result = accelerate(wrapped, images())
        assert result.verified
        assert all(name.startswith("_orig_mod.") for name in result.replaced)
        assert result.left == {}
    assert_same_function(wrapped, torch.compile(plain, backend="aot_eager"))
    assert BlockForward.find(model) is not None
    assert restore(wrapped).layers == len(counts(model))
    assert BlockForward.find(model) is None
    plain.load_state_dict(model.state_dict())
    torch.compiler.reset()
    again = [torch.compile(each, backend="aot_eager") for each in (model, plain)]
    assert_same_function(*again)


def test_a_model_compiled_in_place():
    model = triples()
    model.compile(backend="aot_eager")
    model(images())
    assert accelerate(model, images()).verified
    assert BlockForward.find(model) is not None


def residual_block() -> nn.Module:
    return varied(nets.BasicBlock(3, 3))


def block_with_relu() -> nn.Module:
    return tail(lambda self, out, residual: self.relu(out))


def block_with_addition() -> nn.Module:
    return tail(lambda self, out, residual: torch.relu(residual.add(out)))


def graphs(blocks: list[nn.Module]) -> int:
    """Number of graphs that dynamo makes if each block is compiled on its own."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for training in (True, False):
        for block in blocks:
            block.train(training).compile(backend="aot_eager", fullgraph=True)
            block(images()).sum().backward()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("block", "accelerated_first"),
    [
        (residual_block, False),
        (residual_block, True),
        (block_with_relu, False),
        (block_with_addition, False),
    ],
)
def test_equal_blocks_that_are_compiled_one_by_one_share_their_graphs(block, accelerated_first):
    first = block()
    expected = graphs([copy.deepcopy(first) for _ in range(12)])
    if accelerated_first:
        accelerate(first)
    blocks = [copy.deepcopy(first) for _ in range(12)]
    if not accelerated_first:
        assert accelerate(nn.Sequential(*blocks)).found >= 12
    assert graphs(blocks) == expected
    runs = {BlockForward.find(block)._rewritten for block in blocks}
    assert len(runs) == 1


def test_blocks_that_differ_in_what_was_read_share_nothing():
    blocks = [residual_block() for _ in range(3)]
    blocks[1].downsample = nn.Identity()
    blocks[2].bn1 = batchnorm.BatchNorm2d(3).double()
    plain = copy.deepcopy(blocks)
    for block, original in zip(blocks, plain, strict=True):
        accelerate(block)
        assert relus_and_additions(block) == (0, 0)
        assert_same_function(block, original)
    assert len({BlockForward.find(block)._rewritten for block in blocks}) == 3


def test_rewritten_forwards_are_freed_with_their_blocks():
    block = block_with_relu()
    accelerate(block)
    freed = weakref.ref(BlockForward.find(block)._rewritten)
    del block
    gc.collect()
    assert freed() is None


def test_replicas_of_layers_built_as_ours_use_their_own_state():
    layer = batchnorm.BatchNorm2d(3).double().eval()
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = 2 * layer.weight.detach(), layer.bias.detach()
    assert_close(replica(images()), 2 * layer(images()))


# Tools of ours, and strangers.


def test_layers_under_a_guard_are_accelerated_behind_it():
    model = triples()
    plain = copy.deepcopy(model)
    with batchnorm.guard(model) as guarded:
        result = accelerate(model, images())
        assert result.replaced == ("1",)
        assert "was replaced on this object" in result.left["1"]
        assert is_ours(model[1])
        model(poisoned())
        assert guarded.skipped == {"1": 1}
        assert restore(model).layers == 1
        assert not is_ours(model[1])
        model(poisoned())
        assert guarded.skipped == {"1": 2}
        accelerate(model)
    assert is_ours(model[1])
    assert restore(model).layers == 1
    assert anatomy(model).keys() == anatomy(plain).keys()
    assert "forward" not in vars(model[1])
    assert_same_function(model, plain)


def test_a_failed_verification_under_a_guard_leaves_the_chain_as_it_was(monkeypatch):
    from batchnorm.tools.acceleration import replacement

    right = replacement.forward_of
    model = triples()
    with batchnorm.guard(model) as guarded:
        before = model[1].forward
        monkeypatch.setattr(replacement, "forward_of", lambda *a: right(*a) * 1.001)
        with pytest.raises(RuntimeError, match="the output in evaluation differs"):
            accelerate(model, images())
        assert model[1].forward is before
        assert not is_ours(model[1])
        monkeypatch.undo()
        model(poisoned())
        assert guarded.skipped == {"1": 1}
    assert "forward" not in vars(model[1])


def cover(module: nn.Module) -> None:
    inner = module.forward
    module.forward = lambda *args: inner(*args)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("layer1.0.bn1", r"layer1\.0\.bn1"), ("layer1.0", r"layer1\.0"), ("", "the")],
)
def test_restore_refuses_by_name_where_strangers_cover(name, shown):
    model = accelerated(nets.ResNet())
    plain = restored(model)
    cover(model.get_submodule(name))
    before = anatomy(model)
    message = rf"restore: the forward of {shown}.* was replaced by other code since accelerate; un"
    with pytest.raises(RuntimeError, match=message):
        restore(model)
    assert anatomy(model) == before
    assert_same_function(model, plain)
    module = model.get_submodule(name)
    module.forward = module.forward.__closure__[0].cell_contents
    assert restore(model).layers == 8


@pytest.mark.parametrize("name", ["1", ""])
def test_a_forward_that_somebody_deleted_is_no_obstacle(name):
    model = triples()
    plain = copy.deepcopy(model)
    accelerate(model)
    del model.get_submodule(name).forward
    assert_same_function(model, plain)
    assert str(restore(copy.deepcopy(model))).startswith("Restored ")
    again = accelerate(model, images())
    assert (again.replaced, again.relus) == (((name,), ()) if name else ((), ("1",)))
    assert relus_and_additions(model) == (0, 0)
    assert restore(model) == batchnorm.tools.acceleration.Restoration(1, 1)


def test_a_stranger_behind_our_tools_is_named():
    model = triples()
    model[1].forward = lambda x: x
    with batchnorm.count_recomputation_once(model):
        assert accelerate(model).left == {"1": "its forward was replaced on this object"}


# torch.fx and TorchScript.


@pytest.mark.parametrize("network", [triples, nets.ResNet, nets.DenseNet, nets.VGG])
@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace(network, training):
    if network is nets.DenseNet:  # torch.fx cannot trace the original either
        network = nets.LeNet
    model = accelerated(network()).train(training)
    plain = restored(model)
    kinds = [node.target for node in fx.symbolic_trace(plain).graph.nodes]
    traced = fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes] == kinds
    torch.manual_seed(0)
    expected = plain(images())
    torch.manual_seed(0)
    assert_close(traced(images()), expected)
    assert_close(dict(model.state_dict()), dict(plain.state_dict()))


class AnyRank(nn.BatchNorm2d):
    """torch.fx looks into it, because it is no class of torch's."""

    def _check_input_dim(self, input):
        pass


def timms(**options) -> nn.Module:
    import_torchvision()
    return pytest.importorskip("timm.layers").BatchNormAct2d(4, **options)


OPEN_LAYERS = {
    "subclass": lambda: AnyRank(4),
    "act": lambda: nets.BatchNormAct2d(4),
    "other act": lambda: nets.BatchNormAct2d(4, nn.SiLU(), nn.Dropout(0.0)),
    "timm": timms,
    "timm, SiLU": lambda: timms(act_layer=nn.SiLU),
}


@pytest.mark.parametrize("layer", OPEN_LAYERS.values(), ids=OPEN_LAYERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("around", [nets.ConvNormAct, lambda layer: layer])
def test_symbolic_trace_looks_into_layers_as_before(layer, training, around):
    model = varied(around(layer())).train(training)
    plain = copy.deepcopy(model)
    assert accelerate(model).found == 1
    graph, expected = fx.symbolic_trace(model), fx.symbolic_trace(plain)
    assert graph.code == expected.code
    assert counts(model) == counts(plain)
    x = images() if isinstance(model, nets.ConvNormAct) else images(4).repeat(1, 2, 1, 1)[:, :4]
    assert_close(graph(x), expected(x))


def test_folding_and_fusing_by_torch():
    model = accelerated(nets.ResNet()).eval()
    expected = restored(model)(images())
    folded = optimization.fuse(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert_close(folded(images()), expected)
    conv = nn.utils.fuse_conv_bn_eval(model.conv1, model.bn1)
    assert_close(conv(images()), restored(model).bn1(model.conv1(images())))


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("training", [True, False])
def test_fusing_for_quantization(training):
    fuse = (
        torch.ao.quantization.fuse_modules_qat if training else torch.ao.quantization.fuse_modules
    )
    model = accelerated(triples(2)).train(training)
    plain = restored(model)
    names = [["0", "1", "2"], ["3", "4", "5"]]
    fused, expected = fuse(model, names), fuse(plain, names)
    assert [type(m) for m in fused] == [type(m) for m in expected]
    assert_close(fused(images()), expected(images()))


@pytest.mark.parametrize("network", [triples, nets.ResNet, lambda: nn.BatchNorm2d(3)])
def test_script_says_what_to_do(network):
    model = accelerated(network()).eval()
    with pytest.raises(
        AttributeError,
        match=r"cannot compile .*\.forward while a tool .*; call batchnorm\.restore\(model\) first",
    ):
        torch.jit.script(model)
    expected = model(images())
    restore(model)
    assert_close(torch.jit.script(model)(images()), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("network", [triples, nets.ResNet])
def test_trace_of_torchscript(network):
    model = accelerated(network()).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, images())
        assert_close(traced(images(6)), model(images(6)))


def test_signatures_are_those_of_the_class():
    import inspect

    model = accelerated(nets.ResNet())
    for module in (model, model.bn1, model.layer1[0]):
        assert inspect.signature(module.forward) == inspect.signature(restored(module).forward)
        assert module.forward.__name__ == "forward"
        with pytest.raises(AttributeError, match="has no attribute '__func__'"):
            module.forward.__func__  # noqa: B018


@pytest.mark.parametrize("network", [triples, nets.ResNet])
@pytest.mark.parametrize("training", [True, False])
def test_captures_hold_the_original_operations(network, training):
    model = accelerated(network()).train(training)
    plain = restored(model)
    programs = [torch.export.export(each, (images(),)) for each in (model, plain)]
    ours, torchs = (
        [
            (str(node.target), [kind for _, kind in node.meta["nn_module_stack"].values()])
            for node in program.graph.nodes
            if node.op == "call_function"
        ]
        for program in programs
    )
    assert sorted(ours) == sorted(torchs)  # Torch's layer counts the batch before it normalizes.
    assert_close(programs[0].module()(images()), plain(images()))


# Pickles.


def test_an_unpickled_block_is_traced_at_its_first_call_that_is_not_compiled():
    import pickle

    model = triples()
    accelerate(model)
    twin = pickle.loads(pickle.dumps(model))
    forward = BlockForward.find(twin)
    assert forward._rewritten is None
    torch.compile(twin, backend="eager", fullgraph=True)(images())
    fx.symbolic_trace(nn.Sequential(twin))
    assert forward._rewritten is None
    twin(images())
    assert forward._rewritten is not None
    assert relus_and_additions(twin) == (0, 0)
    assert isinstance(twin[1].forward, LayerForward)
    assert twin[1].forward.module is twin[1]


def test_a_deep_copy_shares_the_code_and_nothing_else():
    import gc
    import weakref

    model = triples()
    accelerate(model)
    twin = copy.deepcopy(model)
    assert BlockForward.find(twin)._rewritten is BlockForward.find(model)._rewritten
    freed = [weakref.ref(model), weakref.ref(model[1]), weakref.ref(model[0].weight)]
    del model
    gc.collect()
    assert [reference() for reference in freed] == [None, None, None]
    assert relus_and_additions(twin) == (0, 0)


# Nothing to do is said.


class LooksLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.running_mean


class OfTheBook(nn.Module):
    def __init__(self):
        super().__init__()
        self.moving_mean, self.moving_var = torch.zeros(1, 3), torch.ones(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.moving_mean


@pytest.mark.parametrize(
    "network",
    [
        lambda: nn.Linear(3, 3),
        lambda: nn.Sequential(LooksLike()),
        lambda: nn.Sequential(OfTheBook()),
        lambda: nn.Sequential(batchnorm.scratch.BatchNorm(3, 4)),
        lambda: nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True)),
        lambda: nn.GroupNorm(1, 3),
    ],
)
def test_a_model_without_batch_norm(network):
    with pytest.warns(RuntimeWarning, match=r"^accelerate: nothing is done, the model \("):
        result = accelerate(network())
    assert result.found == 0
    text = str(result)
    assert text.startswith("Nothing was accelerated: the model has no batch norm layer of torch's")
    assert len(result.left) == (isinstance(network(), nn.Sequential))
    for reason in result.left.values():
        assert "which is no batch norm layer of torch's" in reason
