"""The catalogue-parallel loss: formulas of rows and reductions, on statistics that every rank has alike."""

import math

import torch
from torch import Tensor

from ..torch import _ops
from ..torch._functional import Correction, Pools, Reduction, RowStatistics, Similarity
from ._problem import Options
from ._statistics import Found, statistics


def catalog_parallel_softmax_loss(
    queries: Tensor,
    table_shard: Tensor,
    positives: Tensor,
    *,
    group=None,
    similarity: Similarity = "cosine",
    temperature: float | Tensor = 0.05,
    correction: Correction = "none",
    log_q: Pools | None = None,
    positive_log_q: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    table_ids: Tensor | None = None,
    candidate_rows: Pools | None = None,
    row_negatives: Tensor | None = None,
    row_negatives_log_q: Tensor | None = None,
    positive_offsets: Tensor | None = None,
    positive_weight: Tensor | None = None,
    false_negative_margin: float | None = None,
    false_negative_ratio: float | None = None,
    sparse_gradient: bool = False,
) -> Tensor:
    """`softmax_loss` over a table whose rows are on several processes, each with a contiguous part, in the order of the ranks.

    Every rank calls it with the same queries, positives and options, and with its own shard. Every rank gets the same loss, which is that
    of one process with the whole table, and on ``backward`` the same, whole gradient of queries and temperature; the shard's gradient stays
    with its rank, and the table is nowhere whole. Call ``backward`` on every rank, too: it sums over them.

        shard = torch.nn.Parameter(torch.randn(rows_of_this_rank, dim))
        queries = gather_queries(tower(users), averaged=True)            # (B, D): those of all ranks, here under DDP
        loss = catalog_parallel_softmax_loss(queries, shard, items)
        loss.backward()

    Do not multiply the loss by the number of ranks: queries' and shard's gradients are those of one process already. Where a tower under
    DDP or FSDP made the queries, which averages its gradients over the ranks, `gather_queries` with ``averaged=True`` makes up for it.

    Args:
        queries: (B, D), the same on every rank, a CPU tensor or on the rank's device.
        table_shard: (M_r, D), the type of ``queries``; 0 rows are allowed. Or a DTensor with ``Shard(0)`` on a mesh of one axis, whose
            group is taken; its gradient is such a DTensor.
        positives: (B), or (P) with ``positive_offsets``: rows of the whole table, the same on every rank.
        group: the `ProcessGroup`, by default all ranks.
        log_q: without ``candidate_rows``, (M_r): the shard's. Then positives have the log_q of their rows, unless ``positive_log_q`` is
            given. With ``candidate_rows`` (N) for each pool, the same on every rank, and ``positive_log_q`` is needed by "logq" and
            "corrected_logq".
        table_ids: (M_r), the ids of the shard's rows, where they are not their rows in the whole table.
        excluded: ids, the same on every rank.
        candidate_rows: rows of the whole table, the same on every rank, which each rank reads its own of.
        row_negatives: (B, K) rows of the whole table, -1 for none, the same on every rank.
        sparse_gradient: the shard's gradient is a sparse tensor of the shard's rows that the batch names; with ``candidate_rows`` or
            ``row_negatives``, and not of a DTensor.
        others: those of `softmax_loss`, the same on every rank. Pools of embeddings of their own (``candidates``) are not here, because
            each rank would count them: put them into the table. The symmetric loss is not here, because its other direction would need
            all queries' softmax over each item's queries, which no shard of the items changes: call `softmax_loss` for it.

    Returns:
        float32, () or with ``reduction="none"`` (B), the same on every rank.

    Raises:
        ValueError: names the argument, its value and the rule that it breaks. What one rank finds wrong before or in its forward pass is
            an error on every rank, and so are queries, positives or options that differ between ranks.
        RuntimeError: of torch.distributed, on the ranks that are left where one died or did not come within the group's timeout.

    Bytes that a rank hands to collectives in a step, with float32 or 16-bit embeddings of s bytes: 48 (agreement) and 8 (2 B + P + 1)
    (statistics; 8 P more where log_q of positives is the shards') to gathers; in the backward 4 (B D + 1) to a sum, which runs while the
    shard's gradient is computed. None of them depends on M. Only with ``table_ids`` or a filter of false negatives, 8 P and
    4 P ceil(D s / 4) more to a sum. docs/python.md has what that is on the wire.

    On a GPU the host waits for the agreement and for what ranks compare in it.
    """
    given = Options(
        similarity, temperature, correction, reduction, positive_log_q, log_q, excluded, row_weight, table_ids, candidate_rows,
        row_negatives, row_negatives_log_q, positive_offsets, positive_weight, false_negative_margin, false_negative_ratio, sparse_gradient,
    )
    return loss_of(statistics(queries, table_shard, positives, group, given))


def catalog_parallel_row_statistics(
    queries: Tensor,
    table_shard: Tensor,
    positives: Tensor,
    *,
    group=None,
    similarity: Similarity = "cosine",
    temperature: float | Tensor = 0.05,
    log_q: Pools | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
    table_ids: Tensor | None = None,
    candidate_rows: Pools | None = None,
    row_negatives: Tensor | None = None,
    row_negatives_log_q: Tensor | None = None,
    positive_offsets: Tensor | None = None,
    false_negative_margin: float | None = None,
    false_negative_ratio: float | None = None,
    sparse_gradient: bool = False,
) -> RowStatistics:
    """`row_statistics` over a table in shards, for a loss of your own. Arguments and errors are those of `catalog_parallel_softmax_loss`.

    All ranks get the same statistics, and compute the same loss of them; ``backward`` of it on every rank gives what
    `catalog_parallel_softmax_loss` gives."""
    given = Options(
        similarity, temperature, "none" if log_q is None and row_negatives_log_q is None else "logq_negatives_only", "sum", None, log_q,
        excluded, None, table_ids, candidate_rows, row_negatives, row_negatives_log_q, positive_offsets, None, false_negative_margin,
        false_negative_ratio, sparse_gradient,
    )
    found = statistics(queries, table_shard, positives, group, given)
    return RowStatistics(found.lse, found.positive, found.num_negatives)


def loss_of(found: Found) -> Tensor:
    """Weights and reduction, of all rows: those that were left out are 0."""
    problem = found.problem
    _, correction, reduction = problem.options
    rows, of_row = len(found.lse), None
    if problem.offsets is not None:
        counts = problem.offsets.diff()
        of_row = torch.repeat_interleave(torch.arange(rows, device=counts.device), counts, output_size=problem.num_pairs)
    pairs = _pairs(found, correction, of_row)
    if of_row is not None:
        weight = 1.0 / counts[of_row].to(torch.float64) if problem.positive_weight is None else problem.positive_weight.to(torch.float64)
        losses = pairs.new_zeros(rows).index_add(0, of_row, _times(weight, pairs))
    else:
        losses = pairs
    weight = problem.row_weight
    if weight is not None:
        losses = _times(weight.to(torch.float64), losses)
    if reduction == "none":
        if problem.kept is not None:
            losses = losses.new_zeros(problem.num_rows).index_copy(0, problem.kept, losses)
        return losses.to(_ops._LOSS)
    if reduction == "weighted_mean":
        total = float(weight.to(torch.float64).sum())
        if total <= 0.0:
            raise ValueError(f'the sum of row_weight is {total}; rule: > 0 with reduction="weighted_mean"')
    divisor = {"mean": problem.num_rows, "sum": 1.0, "weighted_mean": total if reduction == "weighted_mean" else 1.0}[reduction]
    return (losses.sum() / divisor).to(_ops._LOSS)


def _pairs(found: Found, correction: str, of_row: Tensor | None) -> Tensor:
    """The loss of each positive (P), float64, by the table of `softmax_loss`."""
    of = (lambda rows: rows) if of_row is None else (lambda rows: rows[of_row])
    n = of(found.num_negatives)
    # Of a row without negatives lse is -inf and the loss 0: it has no part in the formulas, and in their derivatives.
    lse, positive = of(torch.where(found.num_negatives > 0, found.lse, 0.0)), torch.where(n > 0, found.positive, 0.0)
    shift = 0.0
    if correction == "logq":
        shift = found.positive_log_q.to(torch.float64)
    elif correction == "corrected_logq":
        shift = _log1m_exp(found.positive_log_q.to(torch.float64))
    margin = lse + shift - positive
    if correction == "corrected_logq":
        losses = _times(torch.sigmoid(margin.detach() - n.clamp_min(1).to(torch.float64).log()), margin)
    else:
        # torch.nn.functional.softplus is linear above 20.
        losses = torch.logaddexp(margin, torch.zeros_like(margin))
    return torch.where(n > 0, losses, 0.0)


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """The product, and 0 where the weight is: 0 times NaN must not enter a sum."""
    return torch.where(weight == 0.0, 0.0, weight * torch.where(weight == 0.0, 0.0, x))


def _log1m_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation near either end (Maechler 2012)."""
    return torch.where(x > -math.log(2.0), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
