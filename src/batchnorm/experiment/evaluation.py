"""Measurements of a network between epochs, which leave its training as it is."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from batchnorm.experiment import observation, population
from batchnorm.experiment.images import Images
from batchnorm.experiment.results import NormLayer, Point, Settings
from batchnorm.tools.patching import Handle, SavedBuffers

EVALUATION_BATCH = 1000
OBSERVED_IMAGES = 256


class Evaluation:
    """Measures networks, all of them on the same images.

    Args:
        train_set: Where the population statistics come from.
        test_set: Where accuracy is measured.
        settings: Seed, batch size and number of images of the population.
    """

    def __init__(self, train_set: Images, test_set: Images, settings: Settings) -> None:
        self._test_set = test_set
        self._train_set = train_set
        generator = torch.Generator().manual_seed(settings.seed)
        order = torch.randperm(len(train_set), generator=generator)
        chosen = order[: settings.population_examples]
        self._population = chosen.tensor_split(math.ceil(len(chosen) / settings.batch_size))

    def measure(self, model: nn.Sequential) -> tuple[float, float, list[NormLayer]]:
        """Evaluates the same weights with running and with population statistics.

        Returns:
            The two test accuracies, and the parameters and statistics of each norm layer.
        """
        running = self._accuracy(model)
        before = observation.norm_state(model)
        with Handle(SavedBuffers(model.modules()).restore):
            if _is_finite(model):
                population.use_population(model, self._population_batches())
                accuracy = self._accuracy(model)
            else:
                accuracy = math.nan  # `recalibrate` refuses statistics of a diverged network.
            after = observation.norm_state(model)
        layers = [
            NormLayer(
                **layer,
                population_mean=now["running_mean"],
                population_var=now["running_var"],
            )
            for layer, now in zip(before, after, strict=True)
        ]
        return running, accuracy, layers

    def pre_activations(self, model: nn.Sequential, epoch: int) -> dict[str, Point]:
        """Returns the quantiles of the inputs of each layer's sigmoids."""
        images, _ = self._test_set[:OBSERVED_IMAGES]
        return {
            name: Point(epoch=epoch, quantiles=quantiles)
            for name, quantiles in observation.pre_activations(model, images).items()
        }

    @torch.no_grad()
    def _accuracy(self, model: nn.Module) -> float:
        model.eval()
        order = torch.arange(len(self._test_set)).split(EVALUATION_BATCH)
        correct = sum(
            int((model(images).argmax(1) == labels).sum())
            for images, labels in self._test_set.batches(order)
        )
        return correct / len(self._test_set)

    def _population_batches(self) -> Iterator[Tensor]:
        return (images for images, _ in self._train_set.batches(self._population))


def _is_finite(model: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())
