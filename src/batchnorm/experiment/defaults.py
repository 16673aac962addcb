"""The defaults of ``batchnorm train``, which depend on the data."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.experiment.data import DIGITS
from batchnorm.nets import Norm


@dataclass(frozen=True)
class Defaults:
    """How networks are trained unless the user says otherwise.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per step.
        rate: Learning rate with a norm.
        rate_without_norm: Learning rate without.
    """

    epochs: int
    batch_size: int
    rate: float
    rate_without_norm: float

    def rate_of(self, norm: Norm) -> float:
        """Returns the learning rate of a network with ``norm``."""
        return self.rate_without_norm if norm == "none" else self.rate


D2L = Defaults(epochs=10, batch_size=256, rate=1.0, rate_without_norm=0.9)
"""As in "Dive into Deep Learning", sections 7.6 and 8.5."""

FOR_DIGITS = Defaults(epochs=80, batch_size=32, rate=0.2, rate_without_norm=0.2)


def defaults_for(data_name: str) -> Defaults:
    """Returns the defaults for a data set by its name."""
    return FOR_DIGITS if data_name == DIGITS else D2L
