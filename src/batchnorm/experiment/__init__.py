"""The training experiment: LeNet on Fashion-MNIST with and without batch norm, and its report."""
