"""Softmax losses for PyTorch, as operators with gradients. See `softmax_loss`."""

from ._functional import RowStatistics, TopK, check_device, hardest_negatives, row_statistics, softmax_loss, top_k
from ._modules import FullSoftmaxLoss, InfoNCELoss, SampledSoftmaxLoss, TableSoftmaxLoss
from ._queue import NegativeQueue
from ._update import update_table

__all__ = [
    "FullSoftmaxLoss", "InfoNCELoss", "NegativeQueue", "RowStatistics", "SampledSoftmaxLoss",
    "TableSoftmaxLoss", "TopK", "check_device", "hardest_negatives", "row_statistics", "softmax_loss", "top_k", "update_table",
]
