"""Tools for models that exist already: each changes a model in place and can undo it."""
