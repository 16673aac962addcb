"""Names the rows of a benchmark and formats their times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GROUPS = {
    "resnet50": "ResNet-50, 32 images",
    "lenet": "LeNet, 256 images",
    "nc": "Other ranks",
    "1d": "Other ranks",
    "3d": "Other ranks",
}
_SHORT_GROUPS = {"lenet": "LeNet", "nc": "(N, C)", "1d": "1d", "3d": "3d"}
LAYOUTS = {"nchw": "NCHW", "channels_last": "channels_last"}
VARIANTS = {"bn": "BN", "relu": "BN + ReLU", "add-relu": "BN + add + ReLU"}
PASSES = {
    "forward": "forward",
    "backward": "backward",
    "both": "forward and backward",
    "eval": "evaluation",
}
NETS = {"lenet": "LeNet", "resnet18": "ResNet-18", "resnet50": "ResNet-50"}
RIVALS = {
    "batchnorm": "ours",
    "torch": "torch",
    "compile": "compile",
    "onednn": "oneDNN",
    "none": "no norm",
}


def title(kind: Mapping[str, Any]) -> str:
    """Names all that rows of one kind have in common: group, dtype, layout, variant, pass."""
    return (
        f"{GROUPS[kind['group']]} · {kind['dtype']} {LAYOUTS[kind['layout']]} · "
        f"{VARIANTS[kind['variant']]} · {PASSES[kind['pass']]}"
    )


def short_title(kind: Mapping[str, Any]) -> str:
    """Names a kind of rows without the defaults: ResNet-50, NCHW, float32."""
    words = [] if kind["group"] == "resnet50" else [_SHORT_GROUPS[kind["group"]]]
    words.append(VARIANTS[kind["variant"]])
    words.append({"both": "fwd + bwd"}.get(kind["pass"], PASSES[kind["pass"]]))
    if kind["layout"] != "nchw":
        words.append(LAYOUTS[kind["layout"]])
    if kind["dtype"] != "float32":
        words.append(kind["dtype"])
    return ", ".join(words)


def shape(sizes: list[int]) -> str:
    """Formats the sizes of an input: 32×64×56×56."""
    return "×".join(map(str, sizes))


def milliseconds(seconds: float) -> str:
    """Formats a time with three digits: 0.0123, 1.23, 123."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def ratio(value: float) -> str:
    """Formats a ratio of speeds with two decimals, from 10 on with one: 0.92, 2.31, 14.5."""
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
