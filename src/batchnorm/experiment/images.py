"""Images as a network takes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Images as bytes, and their labels, on the device of the network."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Images:
        """Copies them to a device."""
        return Images(self.images.to(device), self.labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Returns floats in [0, 1] of shape (N, 1, 28, 28), and their labels."""
        return self.images[indices].unsqueeze(1).float() / 255, self.labels[indices]

    def batches(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates over batches; each element of ``order`` has the indices of one."""
        return (self[indices] for indices in order)
