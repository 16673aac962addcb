"""Measurements against other batch norms: which rows, how they are timed, what they say."""
