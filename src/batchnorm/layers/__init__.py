"""Layers: torch's batch norm classes, computed by `batchnorm.functional.batch_norm`."""
