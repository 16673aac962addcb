"""Quantization-aware training by torchao, which tests compare with and without our layers.

torchao exports the same 114 patterns anew for each program, which takes 20 seconds; here they are
exported once.
"""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch


@functools.cache
def torchao():
    """The modules of torchao that the tests use, with patterns that are made once."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import pt2e
        from torchao.quantization.pt2e import qat_utils, quantize_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer
    export, made = qat_utils._get_aten_graph_module_for_pattern, {}

    def export_once(pattern, example_inputs, *args, **kwargs):
        key = (pattern, *map(str, (*(x.shape for x in example_inputs), args, sorted(kwargs))))
        if key not in made:
            made[key] = export(pattern, example_inputs, *args, **kwargs)
        with warnings.catch_warnings():  # torch's own, of what it copies
            warnings.simplefilter("ignore", FutureWarning)
            return copy.deepcopy(made[key])

    for name, function in list(vars(qat_utils).items()):
        if name.startswith("_get_") and name.endswith(("bn_pattern", "pattern_no_conv_bias")):
            setattr(qat_utils, name, functools.cache(function))
    qat_utils._get_aten_graph_module_for_pattern = export_once
    return pt2e, quantize_pt2e, x86_inductor_quantizer


def quantized(model, example, batch):
    """The program after quantization-aware training on one batch, in evaluation."""
    pt2e, quantize, x86 = torchao()
    program = torch.export.export(model.train(), (example,)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    program = quantize.prepare_qat_pt2e(program, quantizer)
    program(batch)
    pt2e.move_exported_model_to_eval(program)
    return quantize.convert_pt2e(program)
