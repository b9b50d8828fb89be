"""Losses over several processes of `torch.distributed`, on any `ProcessGroup`: a table in shards, or the candidates of all ranks.

* `catalog_parallel_softmax_loss`: each rank has a part of the table, all have the same queries. `catalog_parallel_row_statistics`,
  `catalog_parallel_top_k` and `catalog_parallel_update` are the same of what `catalog_softmax.torch` has.
* `gathered_softmax_loss`: each rank has its own queries and candidates, and sees all ranks' candidates.
* `gather_queries` and `sum_over_ranks` make what the first needs the same on every rank, of towers that compute in parts.

Every function here is a collective call: all ranks of the group call it in the same order.
"""

from ._gather import gather_queries, sum_over_ranks
from ._gathered import gathered_softmax_loss
from ._loss import catalog_parallel_row_statistics, catalog_parallel_softmax_loss
from ._search import catalog_parallel_top_k
from ._update import catalog_parallel_update

__all__ = [
    "catalog_parallel_row_statistics", "catalog_parallel_softmax_loss", "catalog_parallel_top_k", "catalog_parallel_update",
    "gather_queries", "gathered_softmax_loss", "sum_over_ranks",
]
