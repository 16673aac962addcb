"""The words of the walkthrough in English."""

TITLES = {
    "fully_connected": "Batch normalization after a fully connected layer, step by step",
    "convolution": "Batch normalization after a convolutional layer, step by step",
}

PARTS = {
    "training": "Training: with the statistics of the mini-batch",
    "inference": "Inference: the same layer, asked to predict",
}

LABELS = {
    "formula": "formula",
    "code": "code",
    "shapes": "shapes",
    "worked": "by hand",
    "legend": "by hand: how the first number of each result comes about",
    "feature": "feature",
    "channel": "channel",
    "old": "old",
}

TOPICS = {
    "X": (
        "The mini-batch X",
        "{examples} examples with {channels} {unit}s each. Batch norm treats every {unit} "
        "(axis 1) on its own: from here to the end, no {unit} looks at another.",
    ),
    "mean_at_once": (
        "The mean of each feature",
        "Each column is averaged over its {size} examples: one mean μ per feature. keepdim=True "
        "keeps axis 0 with length 1, so that the mean lines up with X and can be subtracted.",
    ),
    "mean_over_0": (
        "The mean, axis by axis: over the examples",
        "The {size} examples are laid on top of each other and averaged place by place. "
        "keepdim=True keeps axis 0 with length 1, so that the result still lines up with X.",
    ),
    "mean_over_0_2": (
        "... then along axis 2",
        "Within each channel, the {size} entries along axis 2 are averaged into one. Channels "
        "never mix: axis 1 keeps its length.",
    ),
    "mean_over_0_2_3": (
        "... then along axis 3",
        "The same once more: within each channel, the {size} entries along axis 3 become one.",
    ),
    "mean": (
        "... and along the last axis: the mean of each channel",
        "Only the channels are left: one mean μ for the {count} values of each. In one go it is "
        "X.mean(dim={dims}, keepdim=True). Axis by axis gives the same, because every group "
        "averaged in a step has the same size.",
    ),
    "var": (
        "The variance of each {unit}",
        "How far the values lie from their mean: the average of the {count} squared distances. It "
        "is divided by {count}, not by {count} - 1: this biased variance is what normalizes.",
    ),
    "X_hat": (
        "Normalize",
        "Subtract the mean, divide by the standard deviation: now each {unit} has mean 0 and "
        "variance 1 (a little less, because of ε). ε = {eps:g} keeps the divisor away from 0 "
        "where a {unit} is constant.",
    ),
    "Y": (
        "Scale and shift",
        "The scale γ and the shift β are learned like any weight, one pair per {unit}. They give "
        "the layer back its freedom: each {unit} now has mean β and standard deviation |γ|.",
    ),
    "moving_mean": (
        "Update the moving mean",
        "Inference will need a mean that does not depend on a single mini-batch, so training keeps "
        "a moving average: {momentum:g} of the old one plus {rest:g} of the new. Mind the name: "
        "momentum={momentum:g} is the weight of the old value here, as in d2l; PyTorch's momentum "
        "is the weight of the new one, so there it would be {rest:g}.",
    ),
    "moving_var": (
        "Update the moving variance",
        "The same for the variance. d2l averages the biased variance, as above; PyTorch's "
        "running_var averages the unbiased one, which is {count}/{count_less_one} times as large. "
        "Both normalize the mini-batch with the biased one.",
    ),
    "P": (
        "The data to predict, P",
        "Number of examples: {examples}. Nothing is learned any more: γ, β and the moving "
        "statistics stay as they are.",
    ),
    "Y_moving": (
        "Predict with the moving statistics",
        "The usual way, and what eval() does in PyTorch. Every example meets the same fixed "
        "numbers, so its prediction does not depend on its neighbours, and one example is enough. "
        "But after a few updates the moving statistics are still close to where they started "
        "(0 and 1 unless you passed others), and predictions come out wrong: train on first.",
    ),
    "own_mean": (
        "The other way: the mean of P itself",
        "The data to predict may also bring their own statistics, here over {count} values per "
        "{unit}.",
    ),
    "own_var": (
        "... and the variance of P itself",
        "The same formula as in training, with P in the place of X.",
    ),
    "Y_own": (
        "Predict with the statistics of P",
        "This makes sense when many examples arrive together and come from elsewhere than the "
        "training data, say from a darker camera: their own offset and scale drop out. The danger: "
        "each prediction now depends on the other examples in P.",
    ),
    "Y_alone": (
        "The danger: the first example of P, alone",
        "The same example and the same layer, but it arrives by itself: its statistics come from "
        "its own {count} values per channel, and it is not predicted as in Y_own[0] above.",
    ),
    "Y_alone_is_beta": (
        "The danger: the first example of P, alone",
        "The same example and the same layer, but it arrives by itself: it is its own mean, its "
        "variance is 0, and the output is β, whatever the example was. Compare Y_own[0] above.",
    ),
}
