"""Other libraries take an accelerated model as they take torch's; each needs to be installed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm
from everywhere import accelerate
from model_cases import is_ours, restored
from real_networks import import_torchvision

pytestmark = pytest.mark.untyped


def network(kind=nn.BatchNorm2d, **options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), kind(8, **options), nn.ReLU(), nn.Conv2d(8, 4, 3))


def images(count: int = 2):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max to specify:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_:UserWarning")
def test_quantization_fuses_as_it_does_torchs_layers():
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = torch.ao.quantization.get_default_qconfig_mapping("x86")
    results = []
    for model in (network().eval(), network().eval()):
        if results:
            accelerate(model)
        prepared = quantize_fx.prepare_fx(model, mapping, (images(),))
        prepared(images())
        converted = quantize_fx.convert_fx(prepared)
        results.append((converted.code, converted(images())))
    (code, expected), (ours, output) = results
    assert ours == code
    assert_close(output, expected)


@pytest.mark.parametrize("nodes", [["layer2"], {"layer1.0.relu_1": "a", "layer3": "b"}])
@pytest.mark.parametrize("training", [True, False])
def test_torchvisions_feature_extractor(nodes, training):
    import_torchvision()
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    resnet = pytest.importorskip("torchvision.models.resnet")
    torch.manual_seed(0)
    model = resnet.resnet18()
    plain = copy.deepcopy(model)
    accelerate(model)
    features = extraction.create_feature_extractor(model, nodes).train(training)
    expected = extraction.create_feature_extractor(plain, nodes).train(training)
    x = torch.randn(2, 3, 32, 32)
    assert_close(dict(features(x)), dict(expected(x)), rtol=1e-4, atol=1e-4)
    assert is_ours(features.get_submodule("layer1.0.bn1"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recording", [torch.no_grad, torch.enable_grad])
def test_fvcore_counts_as_it_does_torchs_layers(training, recording):
    counters = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    plain, fused = network(), network()
    accelerate(fused)
    with recording():
        expected, *counts = (
            counters.FlopCountAnalysis(model.train(training), images()).by_operator()
            for model in (plain, fused, network(batchnorm.BatchNorm2d))
        )
    assert counts == [expected, expected]


def test_timms_layers_stay_themselves():
    import_torchvision()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("densenet121", num_classes=2).eval()
    kinds = list(map(type, model.modules()))
    assert len(accelerate(model).relus) == 121
    assert list(map(type, model.modules())) == kinds
    frozen = timm.layers.freeze_batch_norm_2d(copy.deepcopy(model))
    expected = timm.layers.freeze_batch_norm_2d(restored(model))
    x = torch.randn(1, 3, 64, 64)
    assert_close(frozen(x), expected(x), rtol=1e-4, atol=1e-4)


def test_lightning_converts_to_synchronized_layers():
    import_torchvision()  # torchmetrics imports it
    plugins = pytest.importorskip("lightning.pytorch.plugins", reason="lightning is not installed")
    model = network()
    accelerate(model)
    model = plugins.TorchSyncBatchNorm().apply(model)
    assert type(model[1]) is nn.SyncBatchNorm
    assert not is_ours(model[1])


def test_hugging_faces_accelerate_wraps_and_unwraps():
    hugging_face = pytest.importorskip("accelerate", reason="Hugging Face's accelerate is missing")
    model = network()
    plain = copy.deepcopy(model)
    accelerate(model)
    wrapped = hugging_face.Accelerator(cpu=True).prepare(model)
    assert_close(wrapped(images()), plain(images()))
    hooks = hugging_face.hooks
    hooks.add_hook_to_module(model, hooks.ModelHook())
    with pytest.raises(RuntimeError, match="restore: the forward of the model itself"):
        batchnorm.restore(model)
    assert_close(model(images()), plain(images()))
    hooks.remove_hook_from_module(model)
    assert batchnorm.restore(model).blocks == 1


def test_hugging_faces_accelerate_takes_layers_built_as_ours():
    hugging_face = pytest.importorskip("accelerate", reason="Hugging Face's accelerate is missing")
    model = network(batchnorm.BatchNorm2d)
    plain = copy.deepcopy(model)
    wrapped = hugging_face.Accelerator(cpu=True).prepare(model)
    hugging_face.hooks.add_hook_to_module(model, hugging_face.hooks.ModelHook())
    assert_close(wrapped(images()), plain(images()))
    hugging_face.hooks.remove_hook_from_module(model, recurse=True)
    assert_close(model(images()), plain(images()))


def test_export_to_onnx():
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = network().eval()
    accelerate(model)
    program = torch.onnx.export(model, (images(),), dynamo=True)
    assert "BatchNormalization" in {node.op_type for node in program.model_proto.graph.node}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = (
            nn.Conv2d(3, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
        )

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)) + x)


NETWORKS = {
    "layer and ReLU": network,
    "layer": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
    "residual": Residual,
    "parts": lambda: nn.Sequential(Residual(), network()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_quantization_aware_training_as_with_torchs_layers(name):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import pt2e
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    results = []
    for is_accelerated in (False, True):
        torch.manual_seed(0)
        model = NETWORKS[name]().train()
        if is_accelerated:
            accelerate(model)
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
        program = torch.export.export(model, (images(),)).module()
        program = quantize_pt2e.prepare_qat_pt2e(program, quantizer)
        program(2 * images())
        pt2e.move_exported_model_to_eval(program)
        program = quantize_pt2e.convert_pt2e(program)
        nodes = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        results.append((nodes, program(images())))
    (nodes, expected), (ours, output) = results
    assert ours == nodes
    assert not any("batch_norm" in node for node in nodes)
    assert_close(output, expected)
