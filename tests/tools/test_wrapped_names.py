"""Names with wrappers in them are followed wherever names are compared."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import batchnorm
from batchnorm import (
    ema_update,
    freeze,
    guard,
    merge_state_dicts,
    no_stats_update,
    recalibrate,
    unfreeze,
    watch,
)
from batchnorm.tools.patching import by_unwrapped_name, inside_wrappers, without_wrappers

pytestmark = pytest.mark.untyped


def net():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), body)


def compiled(model):
    return torch.compile(model, backend="eager")


def with_a_compiled_child(model):
    model[2] = compiled(model[2])
    return model


class Holder(nn.Module):
    """Wraps as ``DistributedDataParallel`` does, in the middle of the names."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def with_a_child_called_module(model):
    model[2] = Holder(model[2])
    return model


WRAPPERS = {
    "none": lambda m: m,
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "both": lambda m: compiled(nn.DataParallel(m)),
    "averaged compiled": lambda m: AveragedModel(compiled(m)),
    "a compiled child": with_a_compiled_child,
    "a child called module": with_a_child_called_module,
}
wrappers = pytest.mark.parametrize("wrapper", WRAPPERS)


def test_names():
    assert without_wrappers("module._orig_mod.body._orig_mod.0.weight") == "body.0.weight"
    assert without_wrappers("weight") == "weight"
    assert by_unwrapped_name(["module.a", "b"]) == {"a": "module.a", "b": "b"}
    assert by_unwrapped_name(["module.a", "a"]) == {"module.a": "module.a", "a": "a"}
    model = net()
    assert inside_wrappers(WRAPPERS["both"](model)) is model
    holder = Holder(model)
    assert inside_wrappers(holder) is holder


@pytest.mark.parametrize("policy", ["copy", "average", "merge"])
@pytest.mark.parametrize("of_target", ["none", "averaged", "a compiled child"])
@wrappers
def test_averages_of_models(wrapper, of_target, policy):
    teacher, student = net(), net()
    for parameter in student.parameters():
        parameter.data += 1
    student(torch.randn(8, 4))
    expected = copy.deepcopy(teacher)
    ema_update(expected, student, 0.75, policy)
    student = WRAPPERS[wrapper](student)
    target = WRAPPERS[of_target](copy.deepcopy(teacher))
    ema_update(target, student, 0.75, policy)
    assert_close(
        list(inside_wrappers(target).state_dict().values()), [*expected.state_dict().values()]
    )
    assert getattr(target, "n_averaged", 0) == 0


def test_models_that_differ_are_still_refused():
    message = r"ema_update: 2\.0\.weight is missing in the target; give two equal models\."
    with pytest.raises(ValueError, match=message):
        ema_update(net()[:2], compiled(net()), 0.9)


@wrappers
@pytest.mark.parametrize("first", [True, False])
def test_merged_checkpoints(wrapper, first):
    parts = [net(), net()]
    for number, part in enumerate(parts):
        part(torch.randn(8, 4) + number)
    expected = merge_state_dicts([part.state_dict() for part in parts], [8, 8])
    wrapped = WRAPPERS[wrapper](parts[0])
    states = [wrapped.state_dict(), parts[1].state_dict()]
    if not first:
        states.reverse()
    base = WRAPPERS[wrapper](net()).state_dict()
    merged = merge_state_dicts(states, [8, 8], base=base)
    assert list(merged) == list(states[0])
    assert_close([v for n, v in merged.items() if n != "n_averaged"], [*expected.values()])
    (wrapped if first else parts[1]).load_state_dict(merged)


@pytest.mark.parametrize("layers", [["2.1"], ["2"], ["2.*"], ["2._orig_mod.1"], ["module.2.1"]])
@pytest.mark.parametrize("wrapper", ["none", "compiled", "both", "averaged", "a compiled child"])
def test_selections(wrapper, layers):
    model = WRAPPERS[wrapper](net())
    assert [name.endswith("1") for name in freeze(model, layers).layers] == [True]
    assert (
        not inside_wrappers(model)
        .train()[2]
        .get_submodule("_orig_mod.1" if wrapper == "a compiled child" else "1")
        .training
    )
    assert len(unfreeze(model, layers).layers) == 1
    with guard(model, layers), no_stats_update(model, layers), watch(model, layers) as watched:
        watched.step()
    assert len(watched.records) == 1
    result = recalibrate(inside_wrappers(model), [torch.randn(8, 4)], layers=layers)
    assert len(result.layers) == 1


def test_a_name_that_fits_nothing_is_refused_with_what_there_is():
    model = compiled(net())
    message = "freeze: no batch norm layer fits '_orig_mod.3'; the model has '_orig_mod.1', '_orig"
    with pytest.raises(ValueError, match=message):
        batchnorm.freeze(model, ["_orig_mod.3"])


# Counters.

GOOD = {
    "one of shape (1,)": (torch.tensor([3]), 3),
    "float": (torch.tensor(3.0), 3),
    "float of shape (1,)": (torch.Tensor([3]), 3),
    "half": (torch.tensor(3.0, dtype=torch.float16), 3),
    "int32": (torch.tensor(3, dtype=torch.int32), 3),
    "true": (torch.tensor(True), 1),
}
BAD = {
    "shape (0,)": (torch.Tensor([]), r"has the shape \(0,\), and a counter is one number"),
    "shape (2,)": (torch.tensor([1, 2]), r"has the shape \(2,\), and a counter is one number"),
    "shape (1, 1)": (torch.ones(1, 1), r"has the shape \(1, 1\), and a counter is one number"),
    "nan": (torch.tensor(torch.nan), "is nan, and a counter is a whole number from 0"),
    "inf": (torch.tensor(torch.inf), "is inf, and a counter is a whole number from 0"),
    "negative": (torch.tensor(-1), "is -1, and a counter is a whole number from 0"),
    "a fraction": (torch.tensor(0.5), "is 0.5, and a counter is a whole number from 0"),
    "complex": (torch.tensor(1j), "is torch.complex64, and a counter is a whole number"),
    "meta": (torch.zeros((), device="meta"), "is on the meta device and has no value"),
}


def counting(counter):
    return {**nn.BatchNorm1d(2).state_dict(), "num_batches_tracked": counter}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("place", [0, 1])
def test_counters_are_taken_as_the_number_they_are(name, place):
    counter, value = GOOD[name]
    states = [counting(torch.tensor(4)), counting(torch.tensor(4))]
    states[place] = counting(counter)
    merged = merge_state_dicts(states, [8, 8])
    layer = nn.BatchNorm1d(2)
    layer.load_state_dict(merged)
    assert layer.num_batches_tracked.item() == 4 + value
    assert merged["num_batches_tracked"].shape == ()
    assert not merged["num_batches_tracked"].is_floating_point()
    merged = merge_state_dicts([counting(torch.tensor(9))], [8], base=counting(counter))
    assert merged["num_batches_tracked"].item() == 9


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("place", [0, 1])
def test_counters_that_are_no_number_are_refused(name, place):
    counter, reason = BAD[name]
    states = [counting(torch.tensor(4)), counting(torch.tensor(4))]
    states[place] = counting(counter)
    where = f"merge_state_dicts: num_batches_tracked in checkpoint {place} {reason}"
    with pytest.raises(ValueError, match=where):
        merge_state_dicts(states, [8, 8])
    where = f"merge_state_dicts: num_batches_tracked in base {reason}"
    with pytest.raises(ValueError, match=where):
        merge_state_dicts([counting(torch.tensor(9))], [8], base=counting(counter))


def test_a_missing_counter_is_named():
    states = [counting(torch.tensor(4)), counting(torch.tensor(4))]
    del states[1]["num_batches_tracked"]
    with pytest.raises(ValueError, match="num_batches_tracked is missing in checkpoint 1"):
        merge_state_dicts(states, [8, 8])
    with pytest.raises(ValueError, match="num_batches_tracked is missing in base"):
        merge_state_dicts(states[:1], [8], base=states[1])


class OwnCounter(nn.Module):
    """Counts in a buffer of its own, of any shape."""

    def __init__(self, shape, **buffers):
        super().__init__()
        self.register_buffer("num_batches_tracked", torch.full(shape, 4))
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("wrapper", [lambda m: m, AveragedModel, nn.DataParallel, compiled])
def test_counters_keep_the_shape_that_all_have(wrapper, shape):
    model = wrapper(OwnCounter(shape, table=torch.tensor([3])))
    merged = merge_state_dicts(
        [model.state_dict(), OwnCounter(shape, table=torch.tensor([3])).state_dict()], [8, 8]
    )
    assert merged.keys() == model.state_dict().keys()
    model.load_state_dict(merged)
    (counter,) = (value for name, value in merged.items() if name.endswith("tracked"))
    assert (counter.tolist(), counter.shape) == (torch.full(shape, 8).tolist(), shape)


def test_torch_loads_counters_of_shape_1():
    merged = merge_state_dicts([counting(torch.tensor([3])), counting(torch.tensor([4]))], [8, 8])
    layer = nn.BatchNorm1d(2)
    layer.load_state_dict(merged)
    assert layer.num_batches_tracked.tolist() == 7


def averaging(n_averaged):
    return {**AveragedModel(nn.BatchNorm1d(2)).state_dict(), "n_averaged": n_averaged}


@pytest.mark.parametrize("name", sorted(GOOD.keys() - {"true"}))
@pytest.mark.parametrize("place", [0, 1])
def test_numbers_of_averaged_models_are_taken_as_the_number_they_are(name, place):
    states = [averaging(torch.tensor(3)), averaging(torch.tensor(3))]
    states[place] = averaging(GOOD[name][0])
    merged = merge_state_dicts(states, [8, 8])
    averaged = AveragedModel(nn.BatchNorm1d(2))
    averaged.load_state_dict(merged)
    assert averaged.n_averaged.tolist() == 3


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("place", [0, 1])
def test_numbers_of_averaged_models_that_are_none_are_refused(name, place):
    states = [averaging(torch.tensor(3)), averaging(torch.tensor(3))]
    states[place] = averaging(BAD[name][0])
    message = f"merge_state_dicts: n_averaged in checkpoint {place} {BAD[name][1]}"
    with pytest.raises(ValueError, match=message):
        merge_state_dicts(states, [8, 8])


def test_averaged_models_of_different_numbers_are_refused():
    message = (
        "n_averaged must be the same in all, and it is 3 in checkpoint 0 and 4 in checkpoint 1"
    )
    with pytest.raises(ValueError, match=message):
        merge_state_dicts([averaging(torch.tensor(3)), averaging(torch.tensor(4))], [8, 8])


def test_a_buffer_of_the_models_own_called_n_averaged_is_any_buffer():
    states = [OwnCounter((), n_averaged=torch.tensor([value])).state_dict() for value in (0.5, 1.5)]
    assert merge_state_dicts(states, [8, 8])["n_averaged"].tolist() == [1]
    del states[1]["n_averaged"]
    with pytest.raises(ValueError, match="n_averaged is missing in checkpoint 1"):
        merge_state_dicts(states, [8, 8])
