"""The backends that compute batch normalization, their common contract, and the choice among them.

Arguments are validated and gradients recorded in `batchnorm.nn`, not here.
"""
