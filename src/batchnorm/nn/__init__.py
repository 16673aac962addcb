"""Batch normalization as layers and as a function, with its gradients.

Nothing is computed here: `batchnorm.kernels` does that. Importing it enters our layers into the
registries of other libraries.
"""

from batchnorm.nn.registries import enter

enter()
