"""Implementations of the stages of batch normalization, and the choice among them."""
