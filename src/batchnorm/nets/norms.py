"""The two norms that are compared, with one call: ours fused, torch's as its users write it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.nn import layers as ours

_OURS = {2: ours.BatchNorm1d, 3: ours.BatchNorm1d, 4: ours.BatchNorm2d, 5: ours.BatchNorm3d}
_TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class NormThen(nn.Module):
    """``torch.nn``'s batch norm, then ``+ residual``, then ReLU, the last two in place.

    Args:
        features: Number of channels.
        dims: Rank of the input.
        relu: Whether ReLU follows.
    """

    def __init__(self, features: int, dims: int, *, relu: bool = False) -> None:
        super().__init__()
        self.norm = _TORCH[dims](features)
        self.relu = relu

    def forward(
        self,
        input: Float[Tensor, "n c *spatial"],
        residual: Float[Tensor, "n c *spatial"] | None = None,
    ) -> Float[Tensor, "n c *spatial"]:
        """Three operations on one buffer."""
        output = self.norm(input)
        if residual is not None:
            output += residual
        return F.relu(output, inplace=True) if self.relu else output


def fused(features: int, dims: int, *, relu: bool = False) -> nn.Module:
    """Our layer in the place of `NormThen`; it has the same call.

    Args:
        features: Number of channels.
        dims: Rank of the input.
        relu: Whether ReLU follows.
    """
    return _OURS[dims](features, activation="relu" if relu else None)
