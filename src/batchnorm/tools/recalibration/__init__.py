"""``recalibrate(model, batches)``: the running statistics that the data have under these weights.

Running statistics are an average over batches that each saw other weights. After averaging,
pruning, quantizing, merging or transferring weights, or with a momentum that was too small, they
describe no network at all. Here they are computed from data, with the weights as they are.
"""

from batchnorm.tools.recalibration.recalibrating import recalibrate
from batchnorm.tools.recalibration.result import LayerChange, Recalibration

__all__ = ["LayerChange", "Recalibration", "recalibrate"]
