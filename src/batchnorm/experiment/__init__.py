"""The training experiment: LeNet on Fashion-MNIST with and without batch norm, and its report.

Networks are in `batchnorm.nets`; nothing here is of use in a user's own training loop.
"""
