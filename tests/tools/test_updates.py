"""no_stats_update and transaction: statistics that stay, or come back, bit for bit."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.tools.statistics_updates import no_stats_update, transaction
from layer_kinds import KINDS, Stop, built, everything, layers_of, statistics
from model_cases import EXACT

kinds = pytest.mark.parametrize("kind", KINDS)
errors = pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])


def torchs_and_ours(test):
    classes = [nn.BatchNorm1d, batchnorm.BatchNorm1d]
    return pytest.mark.parametrize("layer_class", classes, ids=["torch's", "ours"])(test)


# What torch does.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@torchs_and_ours
def test_modes_without_gradients_update(layer_class, mode):
    layer = layer_class(4)
    with mode():
        layer(torch.randn(8, 4) + 3)
    assert layer.num_batches_tracked == 1
    assert layer.running_mean.min() > 0.1


@torchs_and_ours
def test_the_attribute_is_not_the_argument(layer_class):
    """Set to False later, the flag stops updates, and evaluation still uses the buffers."""
    torch.manual_seed(28)
    x = torch.randn(8, 4) + 5
    layer = layer_class(4)
    layer(x)
    before = statistics(layer)
    layer.track_running_stats = False
    layer(x)
    assert statistics(layer) == before
    assert layer.eval()(x).mean().item() == pytest.approx(4.42, abs=0.005)
    built_so = layer_class(4, track_running_stats=False).eval()
    assert built_so.running_mean is None
    assert abs(built_so(x).mean()) < 1e-5


def test_an_empty_batch_is_counted_by_torch_and_not_by_ours():
    counts = {}
    for layer in (nn.BatchNorm1d(4), batchnorm.BatchNorm1d(4)):
        layer(torch.randn(8, 4))
        layer(torch.empty(0, 4))
        counts[type(layer)] = layer.num_batches_tracked.item()
    assert counts == {nn.BatchNorm1d: 2, batchnorm.BatchNorm1d: 1}


def test_a_batch_that_is_refused_is_counted_by_torch_and_not_by_ours():
    counts = {}
    for layer in (nn.BatchNorm1d(4), batchnorm.BatchNorm1d(4)):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            layer(torch.randn(1, 4))
        counts[type(layer)] = layer.num_batches_tracked.item()
    assert counts == {nn.BatchNorm1d: 1, batchnorm.BatchNorm1d: 0}


def test_torchs_backward_in_evaluation_reads_statistics_that_moved_and_ours_does_not():
    gradients = {}
    for layer in (nn.BatchNorm1d(3), batchnorm.BatchNorm1d(3)):
        torch.manual_seed(0)
        layer.eval().running_var.fill_(4.0)
        x = torch.randn(8, 3, requires_grad=True)
        y = layer(x).sum()
        right = torch.autograd.grad(y, x, retain_graph=True)[0][0, 0].item()
        layer.train()
        for _ in range(5):
            layer(50 * torch.randn(64, 3))
        later = torch.autograd.grad(y, x)[0][0, 0].item()
        gradients[type(layer)] = (right, later)
    assert gradients[nn.BatchNorm1d] == pytest.approx((0.49999, 0.0304), abs=5e-4)
    right, later = gradients[batchnorm.BatchNorm1d]
    assert right == later == pytest.approx(0.49999, abs=1e-5)


def test_within_no_stats_update_torchs_backward_is_right_too():
    layer = nn.BatchNorm1d(3).eval()
    layer.running_var.fill_(4.0)
    x = torch.randn(8, 3, requires_grad=True)
    y = layer(x).sum()
    with no_stats_update(layer.train()):
        layer(50 * torch.randn(64, 3))
    assert torch.autograd.grad(y, x)[0][0, 0].item() == pytest.approx(0.49999, abs=1e-5)


# no_stats_update.


def run(model, batch):
    x = batch.clone().requires_grad_()
    y = model(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
    return [y.detach(), *grads]


@kinds
def test_outputs_and_gradients_are_those_of_training(kind):
    model, (batch, *_) = built(kind)
    expected = run(copy.deepcopy(model), batch)
    before = everything(model)
    with no_stats_update(model):
        assert_close(run(model, batch), expected, **EXACT)
        with torch.no_grad():
            model(batch)
        with torch.inference_mode():
            model(batch)
        assert_close(run(model, batch), expected, **EXACT)
    assert everything(model) == before
    model(batch)
    assert statistics(model) != before["tensors"]
    counts = {layer.num_batches_tracked.item() for layer in layers_of(model)}
    assert counts == {3 if kind == "lazy" else 2}


@kinds
def test_evaluation_is_as_always(kind):
    model, (batch, *_) = built(kind)
    model.eval()
    expected = model(batch)
    with no_stats_update(model):
        assert_close(model(batch), expected, **EXACT)


def test_nested_and_chosen():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    x = torch.randn(8, 4)
    with no_stats_update(model, ["0"]):
        with no_stats_update(model):
            model(x)
        model(x)
    model(x)
    assert [layer.num_batches_tracked.item() for layer in model] == [1, 2]


@errors
def test_an_error_inside_leaves_nothing(error):
    model, (batch, *_) = built("accelerated")
    before = everything(model)

    def step():
        with no_stats_update(model):
            model(batch)
            raise error("inside")

    with pytest.raises(error, match="inside"):
        step()
    assert everything(model) == before


def test_a_generator_that_is_closed_leaves_nothing():
    model, (batch, *_) = built("torch 1d")
    before = everything(model)

    def batches():
        with no_stats_update(model):
            while True:
                yield model(batch)

    going = batches()
    next(going)
    going.close()
    assert everything(model) == before


def test_two_threads_and_the_last_one_to_leave_brings_the_updates_back():
    model, (batch, *_) = built("torch 1d")
    before = everything(model)
    both_inside, first_left = threading.Barrier(2), threading.Event()
    seen = {}

    def first():
        with no_stats_update(model):
            both_inside.wait(10)
            model(batch)
        seen["first"] = everything(model)["tensors"]
        first_left.set()

    def second():
        with no_stats_update(model):
            both_inside.wait(10)
            first_left.wait(10)
            model(batch)
            seen["second"] = everything(model)["tensors"]

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": before["tensors"], "second": before["tensors"]}
    assert everything(model) == before
    model(batch)
    assert statistics(model) != before["tensors"]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["torch 1d", "ours"])
@pytest.mark.untyped
def test_compiled(kind):
    model, (batch, *_) = built(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(batch)
    before = statistics(model)
    expected = model(batch)
    model.load_state_dict({**model.state_dict(), **buffers_from(before, model)})
    with no_stats_update(compiled):
        assert_close(compiled(batch), expected)
        assert statistics(model) == before
    compiled(batch)
    assert statistics(model) != before


def buffers_from(kept, model):
    return {
        name: torch.frombuffer(bytearray(kept[name]), dtype=buffer.dtype).reshape(buffer.shape)
        for name, buffer in model.named_buffers()
    }


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", ["torch 1d", "ours"])
def test_distributed_data_parallel(kind):
    model, (batch, *_) = built(kind)
    expected = run(copy.deepcopy(model), batch)
    wrapped = DistributedDataParallel(model)
    before = statistics(model)
    with no_stats_update(wrapped):
        wrapped(batch).square().sum().backward()
    assert statistics(model) == before
    assert_close([p.grad for p in model.parameters()], expected[2:])
    with transaction(wrapped) as step:
        wrapped(batch).square().sum().backward()
        assert statistics(model) != before
        step.rollback()
    assert statistics(model) == before


def two_steps(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    model(torch.randn(6, 4) + rank).sum().backward()
    before = statistics(model)
    with no_stats_update(model):
        for _ in range(2):
            model(torch.randn(6, 4) + rank).square().sum().backward()
        copied = copy.deepcopy(model)
    results = {"held": statistics(model) == before, "before": model.module[1].running_mean.clone()}
    results["sends"] = model.broadcast_buffers is copied.broadcast_buffers is True
    with transaction(model) as step:
        model(torch.randn(6, 4) + rank).square().sum().backward()
        results["moved"] = statistics(model) != before
        step.rollback()
    results["back"] = statistics(model) == before
    results["grad"] = model.module[0].weight.grad
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # neither leaves while the other still talks to it
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(two_steps, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for results in (first, second):
        assert results["held"]
        assert results["sends"]
        assert results["moved"]
        assert results["back"]
    assert (first["before"] - second["before"]).abs().max() > 0.01
    assert_close(first["grad"], second["grad"], **EXACT)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_with_the_backward_inside(use_reentrant):
    model, (batch, *_) = built("torch 1d")
    before = statistics(model)
    expected = run(copy.deepcopy(model), batch)
    x = batch.clone().requires_grad_()
    with no_stats_update(model):
        y = checkpoint(model, x, use_reentrant=use_reentrant)
        y.square().sum().backward()
    assert statistics(model) == before
    assert_close([y, x.grad, *(p.grad for p in model.parameters())], expected)


DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
@kinds
def test_copies_that_are_made_inside_update(kind, duplicate):
    model, (batch, *_) = built(kind)
    with no_stats_update(model), no_stats_update(model):
        twin = duplicate(model)
        before = statistics(twin)
        twin(batch)
        assert statistics(twin) != before
    assert all(layer.track_running_stats is True for layer in layers_of(twin) + layers_of(model))


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_a_flag_that_was_off_before_stays_off_in_a_copy(duplicate):
    layer = nn.BatchNorm1d(4)
    layer.track_running_stats = False
    with no_stats_update(layer):
        twin = duplicate(layer)
    assert layer.track_running_stats is twin.track_running_stats is False


def test_a_shallow_copy_keeps_the_flag():
    """As its docstring says."""
    layer = nn.BatchNorm1d(4)
    with no_stats_update(layer):
        twin = copy.copy(layer)
        assert "track_running_stats=False" in repr(layer)
    assert not twin.track_running_stats
    assert layer.track_running_stats is True


def test_what_another_thread_trains_meanwhile_is_lost():
    """As its docstring says: the layers are shared."""
    model, (batch, *_) = built("torch 1d")
    before = statistics(model)
    with no_stats_update(model):
        assert in_thread(lambda: model(batch)) == []
    assert statistics(model) == before


def test_wrong_arguments_of_no_stats_update():
    with (
        pytest.raises(TypeError, match=r"no_stats_update: layers must be several names, got the s"),
        no_stats_update(nn.BatchNorm1d(2), "bn"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"no_stats_update: layer '' \(LazyBatchNorm1d\) is lazy"),
        no_stats_update(nn.LazyBatchNorm1d()),
    ):
        pass


def test_without_a_with_statement_it_lasts_until_it_is_removed():
    layer = nn.BatchNorm1d(4)
    handle = no_stats_update(layer)
    layer(torch.randn(8, 4))
    assert layer.num_batches_tracked == 0
    handle.remove()
    handle.remove()
    layer(torch.randn(8, 4))
    assert layer.num_batches_tracked == 1
    assert layer.track_running_stats is True


# transaction.


@pytest.mark.parametrize("keeps", [True, False])
def test_a_transaction_that_is_removed(keeps):
    model, (batch, *_) = built("ours")
    before = everything(model)["modules"]
    step = transaction(model)
    model(batch)
    if not keeps:
        step.rollback()
    in_thread(step.remove)
    step.remove()
    assert model[1].num_batches_tracked == (2 if keeps else 1)
    assert everything(model)["modules"] == before
    assert in_thread(lambda: transaction(model).remove()) == []


@kinds
def test_leaving_keeps_and_rollback_puts_back(kind):
    model, (batch, *_) = built(kind)
    before, values = everything(model), statistics(model)
    with transaction(model) as step:
        model(batch)
        step.rollback()
        assert statistics(model) == values
        model(batch)
    assert everything(model) == before

    expected = copy.deepcopy(model)
    expected(batch)
    with transaction(model):
        model(batch)
    assert statistics(model) == statistics(expected) != values
    assert everything(model)["modules"] == before["modules"]


@kinds
def test_backward_works_after_a_rollback(kind):
    """Torch's layers save the running statistics for backward, and would miss them."""
    model, (batch, *_) = built(kind)
    expected = run(copy.deepcopy(model), batch)
    x = batch.clone().requires_grad_()
    with transaction(model) as step:
        y = model(x)
        step.rollback()
    grads = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
    assert_close([y, *grads], expected, **EXACT)


@errors
def test_an_error_rolls_back(error):
    model, (batch, *_) = built("accelerated")
    before = everything(model)

    def step():
        with transaction(model):
            model(batch)
            assert everything(model) != before
            raise error("inside")

    with pytest.raises(error, match="inside"):
        step()
    assert everything(model) == before


def test_a_generator_that_is_closed_rolls_back():
    model, (batch, *_) = built("torch 1d")
    before = statistics(model)

    def batches():
        with transaction(model):
            while True:
                yield model(batch)

    going = batches()
    next(going)
    assert statistics(model) != before
    going.close()
    assert statistics(model) == before


def test_commit_keeps_what_moved_so_far():
    model, batches = built("ours")
    kept = {}

    def fails_later():
        with transaction(model) as step:
            model(batches[0])
            kept.update(statistics(model))
            step.rollback()
            model(batches[0])
            step.commit()
            model(batches[1])
            raise ValueError("later")

    with pytest.raises(ValueError, match="later"):
        fails_later()
    assert statistics(model) == kept
    with transaction(model) as step:
        step.rollback()
        model(batches[0])
        step.commit()
    assert statistics(model) != kept


def test_nested_transactions():
    model, batches = built("ours")
    before = statistics(model)

    def fails():
        with transaction(model, ["1"]):
            model(batches[2])
            raise ValueError("inner")

    with transaction(model) as outer:
        model(batches[0])
        between = statistics(model)
        with transaction(model) as inner:
            model(batches[1])
            inner.rollback()
        assert statistics(model) == between
        with transaction(model):
            model(batches[1])
        between = statistics(model)
        with pytest.raises(ValueError, match="inner"):
            fails()
        assert statistics(model) == between
        outer.rollback()
    assert statistics(model) == before


def test_only_chosen_layers_come_back():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    with transaction(model, ["1"]) as step:
        model(torch.randn(8, 4))
        step.rollback()
    assert [layer.num_batches_tracked.item() for layer in model] == [1, 0]


def test_the_model_may_be_moved_inside():
    model, (batch, *_) = built("torch 1d")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with transaction(model) as step:
        model.double()
        model(batch.double())
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
        step.rollback()
    assert model[1].running_var.dtype == torch.float64
    assert_close(dict(model.named_buffers()), before, check_dtype=False, **EXACT)


def test_buffers_taken_away_inside_come_back():
    layer = nn.BatchNorm1d(4)
    layer(torch.randn(8, 4))
    before = everything(layer)
    with transaction(layer) as step:
        layer.running_mean = layer.running_var = None
        layer(torch.randn(8, 4))
        step.rollback()
    assert everything(layer) == before


@pytest.mark.parametrize("what", ["commit", "rollback"])
def test_it_is_over_at_the_end(what):
    model, (batch, *_) = built("ours")
    with transaction(model) as step:
        model(batch)
    kept = statistics(model)
    with pytest.raises(RuntimeError, match=rf"transaction: {what}\(\) came after the end; call it"):
        getattr(step, what)()
    assert statistics(model) == kept


def in_thread(function):
    caught = []

    def target():
        try:
            function()
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return caught


def test_a_second_thread_is_refused_until_the_first_one_ends():
    model, (batch, *_) = built("torch 1d")
    before = everything(model)

    def second():
        with transaction(model):
            model(batch)

    with transaction(model) as step:
        with transaction(model):
            model(batch)
        inside = everything(model)
        (error,) = in_thread(second)
        assert everything(model) == inside
        step.rollback()
    assert isinstance(error, RuntimeError)
    assert str(error) == (
        "transaction: layer '1' (BatchNorm1d) is in a transaction of another thread, and a "
        "rollback would mix up the statistics of both; let that one end first."
    )
    assert everything(model) == before
    assert in_thread(second) == []
    assert statistics(model) != before["tensors"]


@pytest.mark.untyped
def test_wrong_arguments_of_transaction():
    with (
        pytest.raises(TypeError, match=r"transaction: model must be a torch\.nn\.Module, got dict"),
        transaction({}),
    ):
        pass
    with (
        pytest.raises(ValueError, match="transaction: no batch norm layer fits 'x'; the model has"),
        transaction(nn.BatchNorm1d(2), ["x"]),
    ):
        pass


# The stories of its docstring.


def test_a_step_that_the_scaler_skips():
    model, batches = built("torch 1d")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    batches[1][0, 0] = torch.inf
    scales, counters = [], []
    for batch in batches:
        optimizer.zero_grad()
        with transaction(model) as step:
            scaler.scale(model(batch).square().sum()).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() < before:
                step.rollback()
        scales.append(scaler.get_scale())
        counters.append(model[1].num_batches_tracked.item())
    assert scales == [2.0**10, 2.0**9, 2.0**9]
    assert counters == [2, 2, 3]
    assert model[1].running_var.isfinite().all()


@pytest.mark.parametrize("how", ["no_stats_update", "transaction"])
def test_the_second_pass_of_sam_does_not_count(how):
    model, batches = built("torch 1d")
    expected = copy.deepcopy(model)
    for each in (model, expected):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for batch in batches:
            each(batch).square().mean().backward()
            old = [p.detach().clone() for p in each.parameters()]
            with torch.no_grad():
                for p in each.parameters():
                    p.add_(p.grad, alpha=0.05)
            each.zero_grad()
            if each is expected:
                kept = [b.clone() for b in each.buffers()]
                each(batch).square().mean().backward()
                for buffer, value in zip(each.buffers(), kept, strict=True):
                    buffer.copy_(value)
            elif how == "transaction":
                with transaction(each) as second:
                    each(batch).square().mean().backward()
                    second.rollback()
            else:
                with no_stats_update(each):
                    each(batch).square().mean().backward()
            with torch.no_grad():
                for p, value in zip(each.parameters(), old, strict=True):
                    p.copy_(value)
            optimizer.step()
            optimizer.zero_grad()
    assert statistics(model) == statistics(expected)
    assert_close(list(model.parameters()), list(expected.parameters()), **EXACT)
    assert model[1].num_batches_tracked == 1 + len(batches)


def test_an_episode_of_meta_learning_leaves_nothing():
    learner, batches = built("ours")
    before = statistics(learner)
    for batch in batches:
        with transaction(learner) as episode:
            fast = dict(learner.named_parameters())
            for _ in range(3):
                loss = torch.func.functional_call(learner, fast, batch).square().mean()
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {n: p - 0.1 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            torch.func.functional_call(learner, fast, batch).square().mean().backward()
            assert statistics(learner) != before
            episode.rollback()
    assert statistics(learner) == before


def test_a_gans_discriminator_knows_only_what_it_was_trained_on():
    discriminator, (real, *_) = built("torch 1d")
    generator = nn.Linear(2, 4)
    expected = copy.deepcopy(discriminator)
    expected(real)
    discriminator(real).mean().backward()
    with no_stats_update(discriminator):
        discriminator(generator(torch.randn(6, 2))).mean().backward()
    assert statistics(discriminator) == statistics(expected)
    assert generator.weight.grad is not None


def test_a_policy_that_acts_in_training_mode_does_not_learn_from_it():
    policy, (states, *_) = built("torch 1d")
    before = statistics(policy)
    with torch.no_grad(), no_stats_update(policy):
        for _ in range(5):
            policy(states)
    assert statistics(policy) == before
    with torch.no_grad():
        policy(states)
    assert statistics(policy) != before
