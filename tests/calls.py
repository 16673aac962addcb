"""One call of batch_norm, ours or torch's, and all that comes of it."""

import torch
from torch.nn import functional as F

from batchnorm.nn.functional import batch_norm


def ours(arguments, case, training, backend=None):
    return batch_norm(
        arguments.x,
        arguments.running_mean,
        arguments.running_var,
        arguments.weight,
        arguments.bias,
        training,
        residual=arguments.residual,
        activation="relu" if case.relu else None,
        backend=backend,
    )


def torchs(arguments, case, training):
    y = F.batch_norm(
        arguments.x,
        arguments.running_mean,
        arguments.running_var,
        arguments.weight,
        arguments.bias,
        training,
    )
    y = y if arguments.residual is None else y + arguments.residual
    return y.relu() if case.relu else y


def results(compute, arguments, case, training):
    """Output, gradients and running statistics by name."""
    y = compute(arguments, case, training)
    leaves = arguments.leaves()
    grads = torch.autograd.grad(y, list(leaves.values()), arguments.grad_output)
    found = {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}
    if case.statistics:
        found |= {"mean": arguments.running_mean, "var": arguments.running_var}
    return found
