"""Backends: who computes batch normalization, by one contract, and the choice among them."""
