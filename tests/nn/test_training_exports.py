"""Programs that ``torch.export`` makes of models in training: they hold torch's batch norm."""

from __future__ import annotations

import copy
import io
import warnings
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm
from batchnorm import torch_internals

pytestmark = pytest.mark.untyped
each_strictness = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])


def images(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(4, 3, 9, 9, generator=generator) * 2 + 1).to(dtype)


def layer(library=batchnorm, **options):
    torch.manual_seed(0)
    made = library.BatchNorm2d(3, **options)
    with torch.no_grad():
        for tensor in made.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2)
    return made.train()


class Block(nn.Module):
    def __init__(self, activation=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), layer(activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), x)


def operators(program) -> Counter:
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    return Counter(str(node.target).removesuffix(".default") for node in nodes)


def reloaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def equal_steps(program, model, dtype=torch.float32, count=3, tolerance=1e-5):
    for seed in range(count):
        x = images(seed, dtype)
        assert_close(program(x), model(x), rtol=tolerance, atol=tolerance)
        states = dict(program.state_dict()), dict(model.state_dict())
        assert_close(*states, rtol=tolerance, atol=tolerance)


@each_strictness
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: nn.Sequential(layer()), {"aten.batch_norm": 1, "aten.add_.Tensor": 1}),
        (
            lambda: nn.Sequential(layer(activation="relu")),
            {"aten.batch_norm": 1, "aten.add_.Tensor": 1, "aten.relu": 1},
        ),
        (
            lambda: Block("relu"),
            {
                **{"aten.conv2d": 1, "aten.batch_norm": 1, "aten.add_.Tensor": 1},
                **{"aten.add.Tensor": 1, "aten.relu": 1},
            },
        ),
        (lambda: nn.Sequential(layer(track_running_stats=False)), {"aten.batch_norm": 1}),
        (
            lambda: nn.Sequential(layer(affine=False)),
            {"aten.batch_norm": 1, "aten.add_.Tensor": 1},
        ),
    ],
    ids=["layer", "activation", "residual", "tracks not", "no parameters"],
)
def test_a_training_program_holds_torchs_operator(model, expected, strict):
    made = model()
    program = torch.export.export(copy.deepcopy(made), (images(),), strict=strict)
    assert operators(program) == expected
    equal_steps(program.module(), made)


@pytest.mark.parametrize("momentum", [0.1, 1, None], ids=str)
def test_a_training_program_can_be_saved(momentum):
    model = nn.Sequential(layer(momentum=momentum, activation="relu"))
    program = torch.export.export(copy.deepcopy(model), (images(),))
    assert operators(program)["aten.batch_norm"] == 1
    equal_steps(reloaded(program).module(), model)


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dtypes_that_torch_takes_go_to_it(x_dtype, dtype, training):
    model = nn.Sequential(layer().to(dtype)).train(training)
    program = torch.export.export(copy.deepcopy(model), (images(dtype=x_dtype),))
    short = x_dtype in (torch.float16, torch.bfloat16)
    taken = dtype == x_dtype or (short and dtype == torch.float32)
    assert operators(program)["aten.batch_norm"] == taken
    rough = short or dtype == torch.bfloat16
    equal_steps(reloaded(program).module(), model, x_dtype, tolerance=3e-2 if rough else 1e-5)


def test_float32_statistics_beside_short_parameters_take_the_formula():
    model = nn.Sequential(layer()).bfloat16()
    model[0].running_mean, model[0].running_var = torch.zeros(3), torch.ones(3)
    program = torch.export.export(copy.deepcopy(model), (images(dtype=torch.bfloat16),))
    assert operators(program)["aten.batch_norm"] == 0
    equal_steps(program.module(), model, torch.bfloat16, tolerance=3e-2)


def test_gradients_of_a_training_program():
    model = nn.Sequential(layer(activation="relu"))
    program = torch.export.export(copy.deepcopy(model), (images(),)).module()
    gradients = []
    for module in (program, model):
        module(images()).square().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_a_function_is_exported_like_a_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x):
            return batchnorm.batch_norm(x, self.mean, self.var, training=True, momentum=0.3)

    model = Model()
    program = torch.export.export(copy.deepcopy(model), (images(),))
    assert operators(program) == {"aten.batch_norm": 1}
    equal_steps(program.module(), model)


def test_a_dynamic_batch_size():
    model = nn.Sequential(layer(activation="relu"))
    program = torch.export.export(
        copy.deepcopy(model),
        (images(),),
        dynamic_shapes=({0: torch.export.Dim("n", min=2)},),
    )
    x = images()[:3]
    assert_close(program.module()(x), model(x))


def module_classes(program, target):
    """The classes that the program's notes give for the nodes of an operator, innermost."""
    return [
        list(node.meta["nn_module_stack"].values())[-1]
        for node in program.graph.nodes
        if str(node.target) == target
    ]


def test_notes_name_torchs_classes():
    program = torch.export.export(nn.Sequential(Block("relu")), (images(),))
    names = {
        target: module_classes(program, target)
        for target in ("aten.batch_norm.default", "aten.add.Tensor", "aten.relu.default")
    }
    assert names == {
        "aten.batch_norm.default": [("0.norm", "torch.nn.modules.batchnorm.BatchNorm2d")],
        "aten.add.Tensor": [("0", f"{Block.__module__}.Block")],
        "aten.relu.default": [("0.norm.relu", "torch.nn.modules.activation.ReLU")],
    }


def test_notes_stay_as_they_are_outside_of_a_layer():
    stacks = []

    class Model(nn.Module):
        def forward(self, x):
            before = dict(torch_internals._exported_modules())
            y = batchnorm.batch_norm(x, None, None, training=True, activation="relu")
            stacks.append(dict(torch_internals._exported_modules()) == before)
            return y

    program = torch.export.export(Model(), (images(),))
    assert set(stacks) == {True}
    assert module_classes(program, "aten.relu.default")[0][1].endswith("Model")
    assert torch_internals._exported_modules() is None


# torchao


def torchao():
    pytest.importorskip("torchao", reason="torchao is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import pt2e
        from torchao.quantization.pt2e import quantize_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer
    return pt2e, quantize_pt2e, x86_inductor_quantizer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", [None, "relu"])
def test_an_exported_program_switches_to_evaluation(activation):
    pt2e, _, _ = torchao()
    model = nn.Sequential(layer(activation=activation))
    program = torch.export.export(copy.deepcopy(model), (images(),)).module()
    program(images(1))
    model(images(1))
    pt2e.move_exported_model_to_eval(program)
    model.eval()
    x = images(2)
    assert_close(program(x), model(x))
    others = torch.cat((x[:1], images(3)[1:]))
    assert_close(program(others)[0], program(x)[0])  # Its companions do not matter.
    pt2e.move_exported_model_to_train(program)
    model.train()
    assert_close(program(x), model(x))


def quantized(make):
    """Numbers and operators after quantization-aware training of a step."""
    pt2e, quantize, x86 = torchao()
    torch.manual_seed(0)
    program = torch.export.export(make().train(), (images(),)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    program = quantize.prepare_qat_pt2e(program, quantizer)
    program(images(1))
    pt2e.move_exported_model_to_eval(program)
    program = quantize.convert_pt2e(program)
    return program(images(2)), operators(program)


class Residual(nn.Module):
    def __init__(self, norm, relu):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 3, padding=1), norm, relu

    def forward(self, x):
        y = self.conv(x)
        if self.relu is None:
            return self.norm(y, x)
        return self.relu(self.norm(y) + x)


def conv():
    return nn.Conv2d(3, 8, 3)


CASES = {
    "layer": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(8)),
        lambda: nn.Sequential(conv(), batchnorm.BatchNorm2d(8)),
    ),
    "layer and ReLU": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU()),
        lambda: nn.Sequential(conv(), batchnorm.BatchNorm2d(8), nn.ReLU()),
    ),
    "activation": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU()),
        lambda: nn.Sequential(conv(), batchnorm.BatchNorm2d(8, activation="relu")),
    ),
    "residual": (
        lambda: Residual(nn.BatchNorm2d(3), nn.ReLU()),
        lambda: Residual(batchnorm.BatchNorm2d(3, activation="relu"), None),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_quantization_aware_training_gives_what_it_gives_with_torchs_layer(case):
    torchs, ours = (quantized(make) for make in CASES[case])
    assert ours[1] == torchs[1]
    assert torchs[1]["quantized_decomposed.quantize_per_tensor"] >= 2
    assert torchs[1]["aten.batch_norm"] == 0
    assert_close(ours[0], torchs[0])
