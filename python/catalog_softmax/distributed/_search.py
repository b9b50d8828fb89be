"""Exact top-K over a table in shards."""

import torch
from torch import Tensor

from ..torch._functional import Similarity, TopK, _pair, top_k
from ..torch._ops import outside_of_graphs
from ._agreement import agree, attempt, checksum, fingerprint
from ._collectives import all_gather
from ._shards import Shards, own_part


@outside_of_graphs
def catalog_parallel_top_k(
    queries: Tensor,
    table_shard: Tensor,
    k: int,
    *,
    group=None,
    similarity: Similarity = "cosine",
    table_ids: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
) -> TopK:
    """`top_k` over a table whose rows are on several processes: each searches its shard, and all merge what they found. No gradient.

    Args:
        queries, excluded: the same on every rank.
        table_shard, table_ids, group: as those of `catalog_parallel_softmax_loss`.
        k: from 1 to 1024, and at most the number of rows of the whole table; a shard may have fewer.

    Returns:
        The same on every rank: similarities, and rows of the whole table, as `top_k` of the whole table returns them. Of equal similarities
        the smaller row comes first.

    A rank hands 48 bytes (agreements) and 12 B min(k, largest shard) bytes to gathers.
    """
    shard, group = own_part(table_shard, group)
    shard = shard.detach()
    offsets, ids = _pair(excluded)
    sums, error = attempt(lambda: (checksum(queries), checksum(offsets, ids)))
    options = fingerprint(k, similarity, table_ids is not None, excluded is not None, queries.dtype, tuple(queries.shape))
    names = ("options", "queries", "excluded ids")
    alike = dict(zip(names, (options, *(sums or (0, 0)))))
    sizes = [size for (size,) in agree(group, queries.device, error, alike, (len(shard),))]
    shards = Shards(group, sizes)
    if not 1 <= k <= min(1024, shards.total):
        most = min(1024, shards.total)
        raise ValueError(f"k is {k}; rule: from 1 to {most}, at most 1024 and the {shards.total} rows of the whole table")
    width = min(k, max(sizes))
    found, error = attempt(lambda: _of_shard(queries, shard, min(width, len(shard)), similarity, table_ids, excluded, shards))
    b = queries.shape[0]
    values = torch.full((b, width), -torch.inf, device=queries.device)
    rows = torch.full((b, width), -1, dtype=torch.int64, device=queries.device)
    if found is not None:
        values[:, : found.values.shape[1]], rows[:, : found.values.shape[1]] = found
    agree(group, queries.device, error, {})
    # (B, ranks times width), one rank's behind the other's: so equal values are in the order of their rows, and a stable sort keeps it.
    values, rows = (all_gather(x, group).transpose(0, 1).reshape(b, -1) for x in (values, rows))
    best, places = torch.sort(values, dim=1, descending=True, stable=True)
    return TopK(best[:, :k].contiguous(), rows.gather(1, places)[:, :k].contiguous())


def _of_shard(queries, shard, k, similarity, table_ids, excluded, shards) -> TopK | None:
    if k == 0:
        return None
    ids = table_ids
    if ids is None and excluded is not None:
        ids = torch.arange(shards.start, shards.end, device=shard.device)
    found = top_k(queries, shard, k, similarity=similarity, candidate_ids=ids, excluded=excluded)
    return TopK(found.values, torch.where(found.indices < 0, -1, found.indices + shards.start))
