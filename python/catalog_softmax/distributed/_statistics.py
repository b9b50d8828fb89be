"""Row statistics over a table whose rows are on many ranks, and their gradients: what every catalogue-parallel loss is made of.

    forward     each rank: lse_r (B), n_r (B) over its shard, and the scores of the positives that it has
                all ranks: one gather of these; lse = log sum_r exp(lse_r), n = sum n_r, a positive's score from its owner
    backward    each rank: the local gradient for d_lse_r = d_lse exp(lse_r - lse), and d_positive of the positives that it has
                all ranks: one sum, of d_queries and d_temperature; the shard's gradient stays where it is

Since p_ij = exp(z_ij - lse) = exp(z_ij - lse_r) exp(lse_r - lse), the expected negatives of other ranks are not needed: the gradient of a
query is a plain sum over ranks. The sum runs while the gradient of the shard, which takes longer, is computed.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..torch._ops import outside_of_graphs
from ..torch._tables import _stays_coalesced, sparse_rows
from ._agreement import agree, attempt
from ._collectives import all_gather
from ._local import Local
from ._problem import ALIKE, Options, Problem
from ._shards import Shards, is_dtensor, own_part


class Found(NamedTuple):
    """Of the rows that count: what `RowStatistics` has, and what a loss needs beside it."""

    lse: Tensor
    positive: Tensor
    num_negatives: Tensor
    positive_log_q: Tensor | None
    problem: Problem


@outside_of_graphs
def statistics(queries: Tensor, table_shard: Tensor, positives: Tensor, group, given: Options, sink: list | None = None) -> Found:
    """``sink``: gets the shard's gradient, in float32, in place of autograd."""
    if is_dtensor(table_shard) and given.sparse_gradient:
        raise ValueError("sparse_gradient is True; rule: False for a DTensor, whose gradient is a dense DTensor")
    shard, group = own_part(table_shard, group)
    problem, error = attempt(lambda: Problem(queries, shard, positives, given))
    sizes = agree(group, queries.device, error, dict.fromkeys(ALIKE, 0) if problem is None else problem.alike, (shard.shape[0],))
    shards = Shards(group, [size for (size,) in sizes])
    problem.check_rows(shards)
    if problem.kept is not None:
        queries = queries[problem.kept]
    with torch.no_grad():
        local = Local(problem, shards, shard.detach(), *_share_positives(problem, shards, shard.detach()))
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (queries, shard, problem.temperature))
    found = _RowStatistics.apply(local, sink, gradients, queries, shard, problem.temperature)
    lse, positive, num_negatives, positive_log_q = found
    if problem.shares_log_q:
        problem.check_positive_log_q(positive_log_q)
    return Found(lse, positive, num_negatives, positive_log_q if problem.shares_log_q else problem.positive_log_q, problem)


def _share_positives(problem: Problem, shards: Shards, shard: Tensor) -> tuple[Tensor, Tensor | None]:
    """(ids (P), embeddings (P, D) or None): what masks and filters of every rank compare with. Ids are rows, which all ranks know, or those
    of `table_ids`; embeddings are needed by the filter of false negatives alone. One sum for both, of their bits: of each positive one
    rank adds something to zeros, so it is exact in every type.
    """
    rows, owned = problem.positives, shards.owned(problem.positives)
    words = []
    if problem.table_ids is not None:
        words.append(_words(problem.table_ids[rows[owned] - shards.start][:, None]))
    if problem.filtered:
        words.append(_words(shard[rows[owned] - shards.start]))
    if not words:
        return rows, None
    mine = torch.cat(words, 1)
    bucket = mine.new_zeros((len(rows), mine.shape[1]))
    bucket[owned] = mine
    dist.all_reduce(bucket, group=shards.group)
    ids, rest = rows, bucket
    if problem.table_ids is not None:
        ids, rest = bucket[:, :2].contiguous().view(torch.int64)[:, 0], bucket[:, 2:]
    if not problem.filtered:
        return ids, None
    return ids, rest.contiguous().view(shard.dtype)[:, : shard.shape[1]]


def _words(values: Tensor) -> Tensor:
    """The bits of each row as int32: a type that every backend adds, and one term beside zeros has no carry."""
    if values.element_size() == 2 and values.shape[1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values.contiguous().view(torch.int32)


class _RowStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, sink, gradients, queries, shard, temperature):
        mine, error = attempt(lambda: local.statistics(queries, shard, temperature, gradients))
        lse, num_negatives, positive, positive_log_q = _merge(local, mine, error, queries)
        ctx.local, ctx.sink = local, sink
        if gradients:
            ctx.save_for_backward(lse, *mine, queries, shard, temperature)
        ctx.mark_non_differentiable(num_negatives, positive_log_q)
        ctx.set_materialize_grads(False)
        return lse, positive, num_negatives, positive_log_q

    @staticmethod
    @once_differentiable
    def backward(ctx, d_lse, d_positive, *_):
        lse, *mine, queries, shard, temperature = ctx.saved_tensors
        local, lse_here, positive = ctx.local, mine[0], mine[2]
        if d_lse is None and d_positive is None:
            return (None,) * 6
        # A rank without negatives of a row has no part in it, and one that has all of them has the whole.
        d_lse = torch.zeros_like(lse_here) if d_lse is None else torch.where(lse_here == -torch.inf, 0.0, d_lse * (lse_here - lse).exp())
        d_positive = torch.zeros_like(positive) if d_positive is None else torch.where(local.owned, d_positive, 0.0)
        of = lambda *wanted: local.gradients(mine, d_lse, d_positive, queries, shard, temperature, wanted)
        of_queries, of_shard, of_temperature = ctx.needs_input_grad[3:]
        bucket = work = d_shard = None
        if of_queries or of_temperature:
            found = of(of_queries, of_temperature, False)[:2] if local.computes else (None, None)
            bucket = _bucket(queries if of_queries else None, temperature if of_temperature else None, *found)
            work = dist.all_reduce(bucket, group=local.shards.group, async_op=True)
        if of_shard and local.computes:
            d_shard = of(False, False, True)[2]
        if ctx.sink is not None:
            ctx.sink.append(d_shard)
        elif of_shard:
            d_shard = _of_autograd(d_shard, shard, local.problem.given.sparse_gradient)
        if work is not None:
            work.wait()
        d_queries, d_temperature = _unpacked(bucket, queries, temperature, of_queries, of_temperature)
        return None, None, None, d_queries, None if ctx.sink is not None else d_shard, d_temperature


def _merge(local: Local, mine, error: Exception | None, queries: Tensor) -> tuple[Tensor, ...]:
    """One gather of (lse (B), n (B), positive (P), log_q of positives (P) where shards have it, whether this rank failed)."""
    problem, shards, pairs = local.problem, local.shards, local.problem.num_pairs
    b, shared = queries.shape[0], problem.shares_log_q
    packed = torch.zeros(2 * b + pairs * (2 if shared else 1) + 1, dtype=torch.float64, device=queries.device)
    if error is None:
        packed[:b], packed[b : 2 * b], packed[2 * b : 2 * b + pairs] = mine[:3]
    if shared and error is None:
        packed[2 * b + pairs : -1][local.owned] = problem.log_q[0][local.own_rows].to(torch.float64)
    packed[-1] = error is not None
    every = all_gather(packed, shards.group)
    if error is not None:
        raise error
    if queries.device.type == "cpu" and every[:, -1].any():
        # A device's host does not wait here; there, values that break a rule are what `check_device` asks for.
        rank = int(every[:, -1].nonzero()[0])
        raise ValueError(f"rank {rank} of the group refused its shard or what belongs to it; rule: see that rank's error")
    lse, num_negatives = torch.logsumexp(every[:, :b], 0), every[:, b : 2 * b].sum(0)
    of_owner = lambda columns: columns.gather(0, shards.owner(problem.positives)[None])[0]
    positive = of_owner(every[:, 2 * b : 2 * b + pairs])
    positive_log_q = of_owner(every[:, 2 * b + pairs : -1]) if shared else every.new_empty(0)
    return lse, num_negatives.to(torch.int64), positive, positive_log_q


def _bucket(queries, temperature, d_queries, d_temperature) -> Tensor:
    """d_queries and d_temperature side by side, in float32: ranks that compute nothing have zeros."""
    beside = queries if queries is not None else temperature
    dtype = torch.promote_types(beside.dtype, torch.float32)
    parts = []
    for tensor, found in ((queries, d_queries), (temperature, d_temperature)):
        if tensor is not None:
            zeros = lambda: torch.zeros(tensor.numel(), dtype=dtype, device=beside.device)
            parts.append(zeros() if found is None else found.reshape(-1).to(dtype))
    return parts[0].clone() if len(parts) == 1 else torch.cat(parts)


def _unpacked(bucket, queries, temperature, of_queries: bool, of_temperature: bool):
    n = queries.numel() if of_queries else 0
    d_queries = bucket[:n].reshape(queries.shape).to(queries.dtype) if of_queries else None
    d_temperature = bucket[n:].reshape(temperature.shape).to(temperature.dtype) if of_temperature else None
    return d_queries, d_temperature


def _of_autograd(d_shard, shard: Tensor, sparse: bool) -> Tensor:
    """In the shard's type; of an empty shard, or of one without a row that counts, zeros or no row."""
    if not sparse:
        return torch.zeros_like(shard) if d_shard is None else d_shard.to(shard.dtype)
    rows, values = (torch.empty(0, dtype=torch.int64), shard[:0]) if d_shard is None else d_shard
    gradient = sparse_rows(rows, values.to(shard.dtype), shard)
    _stays_coalesced(shard, gradient)
    return gradient
