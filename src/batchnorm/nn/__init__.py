"""Batch normalization as layers and as a function, with its gradients.

Nothing is computed here: `batchnorm.kernels` does that.
"""
