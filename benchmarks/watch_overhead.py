"""Measures a training step of ResNet-18 with and without `watch`, on 32 images of 64 x 64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from batchnorm.bench.clock import Effort, Timed, interleaved, summary
from batchnorm.bench.rivals import OURS, TORCH
from batchnorm.bench.steps import steps_of
from batchnorm.tools.monitoring import watch


def main() -> None:
    """Prints the medians, and the cost of one record on its own."""
    steps = steps_of("resnet18")
    for name in (OURS, TORCH):
        step = steps[name]
        unwatched = step.timed()
        with watch(step.model) as watched:
            rivals = {"unwatched": unwatched, "watched": Timed(_both(unwatched, watched))}
            samples = interleaved(rivals, Effort(20.0, 10))
            alone = interleaved({"record": Timed(lambda _, w=watched: w())}, Effort(1.0, 20))
        medians = {who: summary(times)["median"] for who, times in (samples | alone).items()}
        step_ms, watched_ms, record_ms = (1e3 * medians[who] for who in (*rivals, "record"))
        print(
            f"{name:<10} step {step_ms:.1f} ms, watched {watched_ms:.1f} ms "
            f"({watched_ms / step_ms - 1:+.2%}); a record alone {record_ms:.2f} ms "
            f"({record_ms / step_ms:.2%}); {torch.get_num_threads()} threads"
        )


def _both(step: Timed, watched: Callable[[], None]) -> Callable[[object], None]:
    def call(argument: object) -> None:
        step.call(argument)
        watched()

    return call


if __name__ == "__main__":
    main()
