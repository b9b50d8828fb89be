"""Softmax losses for PyTorch, as operators with gradients. See `softmax_loss`."""

from ._functional import RowStatistics, TopK, check_device, row_statistics, softmax_loss, top_k
from ._modules import FullSoftmaxLoss, InfoNCELoss, SampledSoftmaxLoss
from ._queue import NegativeQueue

__all__ = [
    "FullSoftmaxLoss", "InfoNCELoss", "NegativeQueue", "RowStatistics", "SampledSoftmaxLoss",
    "TopK", "check_device", "row_statistics", "softmax_loss", "top_k",
]
