"""Images that a small network learns at once, and the fields of an epoch's record."""

import torch

EPOCH_FIELDS = [
    "epoch",
    "loss",
    "train_accuracy",
    "test_accuracy_running",
    "test_accuracy_population",
    "examples_per_second",
]


def pattern(count, seed):
    """Images of four classes that differ in where they are bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    images = torch.randint(0, 80, (count, 28, 28), generator=generator)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14] += 120
    return images.to(torch.uint8), labels
