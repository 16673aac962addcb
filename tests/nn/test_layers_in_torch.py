"""The layers inside what torch offers: compilers, checkpointing, autocast, many processes."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim import swa_utils
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import batchnorm
from ranks import on_two_ranks

EXACT = {"rtol": 0, "atol": 0}
each_momentum = pytest.mark.parametrize("momentum", [0.1, None])
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def images(seed: int = 0, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 6, 5, generator=generator) * 2 + 1


def network(layer_class: type[nn.Module] = batchnorm.BatchNorm2d, **options) -> nn.Sequential:
    torch.manual_seed(0)
    norm = layer_class(4, **options)
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(48, 2))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def step(call, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one call of a model, perhaps through something else."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    output = call(x)
    output.float().square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"output": output.detach(), "input": x.grad, **gradients}


# torch's compiler does to an autograd.Function what torch itself deprecates.
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.untyped
@pytest.mark.usefixtures("fresh_compiler")
@compiles
@pytest.mark.parametrize(
    ("momentum", "training", "activation"),
    [(0.1, True, None), (None, True, "relu"), (0.1, False, "relu"), (None, False, None)],
)
def test_compile_in_one_graph(momentum, training, activation):
    eager = network(momentum=momentum, activation=activation).train(training)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    for seed in range(3):
        x = images(seed)
        assert_close(step(compiled, model, x), step(eager, eager, x))
        assert_close(state(model), state(eager))

    assert model[1].num_batches_tracked == (3 if training else 0)


@pytest.mark.untyped
@pytest.mark.usefixtures("fresh_compiler")
@compiles
def test_compile_with_a_residual():
    eager = batchnorm.BatchNorm2d(3, activation="relu")
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, residual = images(0), images(1)

    assert_close(compiled(x, residual), eager(x, residual))
    assert_close(state(layer), state(eager))


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.untyped
@pytest.mark.usefixtures("fresh_compiler")
@compiles
@pytest.mark.parametrize("training", [True, False])
def test_compile_with_the_input_as_the_residual(training):
    layer = batchnorm.BatchNorm2d(3, activation="relu").train(training)
    compiled = torch.compile(lambda x: layer(x, x), fullgraph=True, backend="aot_eager")
    x, y = (torch.ones(2, 3, 4, 4).uniform_(-1).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    compiled(x).square().sum().backward()
    layer(y, y).square().sum().backward()
    assert_close(x.grad, y.grad)


@pytest.mark.untyped
@pytest.mark.usefixtures("fresh_compiler")
@each_momentum
def test_export_in_training_moves_the_statistics(momentum):
    eager = network(momentum=momentum).train()
    program = torch.export.export(copy.deepcopy(eager), (images(),))
    exported = program.module()

    for seed in range(3):
        x = images(seed)
        assert_close(exported(x), eager(x))
        assert_close(state(exported), state(eager))

    assert eager[1].num_batches_tracked == 3
    assert not any("batchnorm." in name for name in operators(program))


@pytest.mark.untyped
@pytest.mark.usefixtures("fresh_compiler")
@each_momentum
def test_export_in_evaluation_is_plain_torch(momentum):
    eager = network(momentum=momentum, activation="relu").eval()
    before = state(eager)
    program = torch.export.export(eager, (images(),))
    exported = program.module()

    assert_close(exported(images(1)), eager(images(1)))
    assert_close(state(exported), before, **EXACT)
    assert "aten.batch_norm.default" in operators(program)
    assert "aten.relu.default" in operators(program)
    assert not any("batchnorm." in name for name in operators(program))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved_tensors"])
def test_activation_checkpointing(reentrant):
    plain = network(activation="relu")
    kept, torchs = copy.deepcopy(plain), network(nn.BatchNorm2d)
    x = images()

    def through(model):
        return lambda x: checkpoint(model, x, use_reentrant=reentrant)

    assert_close(step(through(kept), kept, x), step(plain, plain, x), **EXACT)

    # The second pass counts again, for torch's layers too.
    step(through(torchs), torchs, x)
    assert kept[1].num_batches_tracked == torchs[1].num_batches_tracked == 2
    assert_close(state(kept[1]), state(torchs[1]))


@each_mode
def test_autocast(training):
    ours, torchs = network().train(training), network(nn.BatchNorm2d).train(training)
    seen = []
    for model in (ours, torchs):
        model[1].register_forward_hook(lambda _, inputs, y: seen.append((inputs[0].dtype, y.dtype)))

    with torch.autocast("cpu", torch.bfloat16):
        outputs = [model(images()) for model in (ours, torchs)]

    assert seen[0] == seen[1] == (torch.bfloat16, torch.bfloat16)
    assert_close(outputs[0], outputs[1], rtol=0.02, atol=0.05)
    assert_close(state(ours), state(torchs))


def test_functional_call_changes_only_the_state_it_is_given():
    ours, torchs = network(), network(nn.BatchNorm2d)
    before = state(ours)
    given = {name: value * 2 for name, value in before.items()}
    given_torchs = {name: value.clone() for name, value in given.items()}

    output = torch.func.functional_call(ours, given, (images(),))
    expected = torch.func.functional_call(torchs, given_torchs, (images(),))

    assert_close(output, expected)
    assert_close(given, given_torchs)
    assert_close(state(ours), before, **EXACT)
    assert given["1.num_batches_tracked"] == 1


@each_momentum
@each_mode
@pytest.mark.parametrize("activation", [None, "relu"])
def test_functionalize(momentum, training, activation):
    plain = network(momentum=momentum, activation=activation).train(training)
    model = copy.deepcopy(plain)

    for seed in range(3):
        x = images(seed)
        assert_close(torch.func.functionalize(model)(x), plain(x))
        assert_close(state(model), state(plain))


def test_functionalize_around_other_transforms():
    plain = network(track_running_stats=True)
    model = copy.deepcopy(plain)
    x = images()

    def loss(module):
        return lambda x: module(x).square().sum()

    got = torch.func.functionalize(torch.func.grad(loss(model)))(x)
    assert_close(got, torch.func.grad(loss(plain))(x))
    assert_close(state(model), state(plain))
    mapped = torch.func.functionalize(torch.func.vmap(model.eval()))(x[None])
    assert_close(mapped[0], plain.eval()(x))


def test_averaged_model_and_update_bn():
    ours, torchs = network(), network(nn.BatchNorm2d)
    averaged, expected = swa_utils.AveragedModel(ours), swa_utils.AveragedModel(torchs)
    batches = [images(seed) for seed in range(3)]

    for model, average in ((ours, averaged), (torchs, expected)):
        average.update_parameters(model)
        swa_utils.update_bn(batches, average)

    norm = averaged.module[1]
    assert_close(state(averaged), state(expected))
    assert norm.momentum == 0.1
    assert norm.num_batches_tracked == 3
    assert not torch.equal(norm.running_mean, ours[1].running_mean)


def test_fuse_conv_bn_eval():
    model = network().eval()
    conv, norm = model[0], model[1]

    with torch.no_grad():
        fused = fuse_conv_bn_eval(conv, norm)
        assert_close(fused(images()), norm(conv(images())))


def test_convert_sync_batchnorm_takes_the_state_and_loses_the_activation():
    """Torch builds its own layer, which knows nothing of an activation; but not in silence."""
    model = network(momentum=0.3, activation="relu")
    before = state(model)

    with pytest.warns(UserWarning, match="reads eps of a BatchNorm2d with activation='relu'"):
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)

    assert type(converted[1]) is nn.SyncBatchNorm
    assert converted[1].momentum == 0.3
    assert_close(state(converted), before, **EXACT)
    assert not hasattr(converted[1], "activation")


def distributed_step(model: nn.Module, rank: int, seed: int) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    output = model(images(10 * seed + rank))
    output.square().mean().backward()
    gradients = {name: full(p.grad).clone() for name, p in model.named_parameters()}
    optimizer.step()
    optimizer.zero_grad()
    return gradients


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def data_parallel(layer_class: type[nn.Module]) -> nn.Module:
    return DistributedDataParallel(network(layer_class))


def fully_sharded(layer_class: type[nn.Module]) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(network(layer_class), mesh=init_device_mesh("cpu", (2,)))


WRAPPERS = {"ddp": data_parallel, "fsdp2": fully_sharded}


def trained(rank: int) -> dict:
    """Gradients and state after two steps with our layers and with torch's."""
    results = {}
    for name, wrapper in WRAPPERS.items():
        for kind, layer_class in (("ours", batchnorm.BatchNorm2d), ("torchs", nn.BatchNorm2d)):
            model = wrapper(layer_class)
            gradients = [distributed_step(model, rank, seed) for seed in range(2)]
            values = {key: full(value).clone() for key, value in model.state_dict().items()}
            results[name, kind] = {"gradients": gradients, "state": values}
    return results


@pytest.fixture(scope="module")
def both_processes(tmp_path_factory) -> list[dict]:
    return on_two_ranks(trained, tmp_path=tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_get_what_torchs_layers_get(both_processes, wrapper):
    for results in both_processes:
        assert_close(results[wrapper, "ours"], results[wrapper, "torchs"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_of_two_processes_are_averaged(both_processes, wrapper):
    local = [distributed_step(network(), rank, seed=0) for rank in range(2)]
    mean = {name: (local[0][name] + local[1][name]) / 2 for name in local[0]}

    first, second = (results[wrapper, "ours"]["gradients"] for results in both_processes)
    assert_close(first, second, **EXACT)
    got = {name.removeprefix("module."): value for name, value in first[0].items()}
    assert_close(got, mean, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(local[0]["1.weight"], local[1]["1.weight"])


def test_ddp_sends_the_buffers_of_the_first_process(both_processes):
    """Each step starts from rank 0's statistics and then moves them by the rank's own batch."""
    replicas = [network(), network()]
    for seed in range(2):
        for buffer, first in zip(replicas[1].buffers(), replicas[0].buffers(), strict=True):
            buffer.copy_(first)
        for rank, model in enumerate(replicas):
            model.zero_grad()
            model(images(10 * seed + rank)).square().mean().backward()
        for pair in zip(*(model.parameters() for model in replicas), strict=True):
            mean = (pair[0].grad + pair[1].grad) / 2
            for parameter in pair:
                parameter.data -= 0.01 * mean

    for results, model in zip(both_processes, replicas, strict=True):
        got = results["ddp", "ours"]["state"]
        got = {name.removeprefix("module."): value for name, value in got.items()}
        assert_close(got, state(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(replicas[0][1].running_mean, replicas[1][1].running_mean)
