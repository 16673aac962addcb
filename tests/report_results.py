"""Made-up but plausible results of a training comparison, in the shape the training code gives."""

import random

LAYERS = {"conv1": 6, "conv2": 16, "fc1": 120, "fc2": 84}
NORMED = {
    "loss": [0.729, 0.486, 0.418, 0.383, 0.359, 0.341, 0.327, 0.317, 0.308, 0.299],
    "train_accuracy": [0.737, 0.823, 0.848, 0.861, 0.869, 0.876, 0.88, 0.884, 0.887, 0.891],
    "test_accuracy_running": [0.72, 0.8, 0.71, 0.83, 0.81, 0.695, 0.843, 0.875, 0.792, 0.742],
    "test_accuracy_population": [0.8, 0.83, 0.845, 0.862, 0.855, 0.849, 0.868, 0.883, 0.877, 0.853],
}
PLAIN = {
    "loss": [2.305, 2.287, 1.62, 1.09, 0.914, 0.812, 0.741, 0.687, 0.646, 0.613],
    "train_accuracy": [0.104, 0.13, 0.371, 0.563, 0.636, 0.678, 0.709, 0.734, 0.75, 0.764],
    "test_accuracy_running": [0.1, 0.162, 0.489, 0.6, 0.655, 0.69, 0.716, 0.729, 0.749, 0.757],
    "test_accuracy_population": [0.1, 0.162, 0.489, 0.6, 0.655, 0.69, 0.716, 0.729, 0.749, 0.757],
}


def results(norms=("batchnorm", "none"), epochs=10, layers=None, seed=0):
    """Results with one run per norm, each of so many epochs (up to 10)."""
    chance = random.Random(seed)
    layers = layers or LAYERS
    return {
        "schema": 1,
        "data": {
            "name": "Fashion-MNIST",
            "source": "dataset-fashion-mnist (Debian)",
            "train_examples": 60000,
            "test_examples": 10000,
        },
        "settings": {
            "norms": list(norms),
            "epochs": 10,
            "batch_size": 256,
            "seed": 0,
            "threads": 2,
            "device": "cpu",
            "population_examples": 2560,
            "torch": "2.13.0",
            "batchnorm": "0.1.0",
        },
        "runs": [run(norm, epochs, layers, chance) for norm in norms],
    }


def run(norm, epochs, layers, chance):
    curves = PLAIN if norm == "none" else NORMED
    speed = {"none": 14200, "torch": 10900, "batchnorm": 11800, "scratch": 7300}[norm]
    return {
        "norm": norm,
        "learning_rate": 1.0,
        "complete": epochs == 10,
        "epochs": [
            {
                "epoch": at + 1,
                **{
                    field: values[at] * (1 + chance.gauss(0, 0.004))
                    for field, values in curves.items()
                },
                "examples_per_second": speed * chance.uniform(0.96, 1.03),
            }
            for at in range(epochs)
        ],
        "pre_activations": [
            {"layer": layer, "points": points(norm, depth, epochs, chance)}
            for depth, layer in enumerate(layers)
        ],
        "norm_layers": []
        if norm == "none"
        else [norm_layer(layer, channels, chance) for layer, channels in layers.items()],
    }


def points(norm, depth, epochs, chance):
    bands = []
    for epoch in range(epochs + 1):
        if norm == "none":
            width, center = 0.4 + 0.25 * epoch * (depth + 1) ** 0.5, -0.2 * epoch * (depth - 1.2)
        else:
            width, center = 1.0 + 0.12 * epoch / (depth + 1), 0.15 * epoch / (depth + 2)
        width *= chance.uniform(0.94, 1.06)
        quantiles = [center + width * z for z in (-1.62, -0.68, 0.03, 0.7, 1.7)]
        bands.append({"epoch": epoch, "quantiles": quantiles})
    return bands


def norm_layer(layer, channels, chance):
    population_mean = [chance.gauss(0, 1) for _ in range(channels)]
    population_var = [chance.lognormvariate(0, 0.8) for _ in range(channels)]
    return {
        "layer": layer,
        "gamma": [chance.gauss(1.6, 0.45) for _ in range(channels)],
        "beta": [chance.gauss(0.1, 0.6) for _ in range(channels)],
        "population_mean": population_mean,
        "population_var": population_var,
        "running_mean": [
            mean + chance.gauss(0.05, 0.25) * var**0.5
            for mean, var in zip(population_mean, population_var, strict=True)
        ],
        "running_var": [var * chance.lognormvariate(0.1, 0.3) for var in population_var],
    }
