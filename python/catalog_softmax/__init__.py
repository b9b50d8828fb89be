"""Softmax losses over large item catalogues, without the B x N logits.

Here: losses, statistics and searches of numpy arrays or of arrays in a CUDA device's memory, and what is around a loss, samplers with
their log_q, frequency estimators, metrics, schedules. `catalog_softmax.torch` has the losses as PyTorch operators with gradients, and
`catalog_softmax.distributed` over several processes; only these two modules need PyTorch.
"""

from ._core import (
    CountMin,
    DeviceArray,
    DeviceUnavailable,
    Distribution,
    ExactCounts,
    GapEstimator,
    LogUniform,
    Mixture,
    RandomStream,
    Ranking,
    Recommended,
    Sample,
    TemperatureSchedule,
    Uniform,
    Unigram,
    union_gradient_weight,
    union_log_q,
)
from ._numpy import (
    Gradients,
    Output,
    Statistics,
    TopK,
    alignment,
    check_device,
    gradients,
    hardest_negatives,
    statistics,
    top_k,
    uniformity,
    value_and_grad,
)
from ._optimizer import Optimizer, update
from ._queue import NegativeQueue, Queued

__all__ = [
    "CountMin", "DeviceArray", "DeviceUnavailable", "Distribution", "ExactCounts", "GapEstimator", "Gradients", "LogUniform", "Mixture",
    "NegativeQueue", "Optimizer", "Output", "Queued", "RandomStream", "Ranking", "Recommended", "Sample", "Statistics",
    "TemperatureSchedule", "TopK", "Uniform", "Unigram",
    "alignment", "check_device", "gradients", "hardest_negatives", "statistics", "top_k", "uniformity", "union_gradient_weight",
    "union_log_q", "update", "value_and_grad",
]
