"""The step of a table in shards in place of its gradient."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._optimizer import Optimizer
from ..torch._arguments import raw, raw_embeddings
from ..torch._functional import Correction, Pools, Similarity
from ..torch._ops import outside_of_graphs
from ..torch._update import _check_writable
from ._agreement import agree, attempt
from ._loss import loss_of
from ._problem import Options
from ._shards import is_dtensor, own_part
from ._statistics import statistics


@outside_of_graphs
def catalog_parallel_update(
    queries: Tensor,
    table_shard: Tensor,
    optimizer: Optimizer,
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
    reduction: str = "mean",
    table_ids: Tensor | None = None,
    candidate_rows: Pools | None = None,
    row_negatives: Tensor | None = None,
    row_negatives_log_q: Tensor | None = None,
    positive_offsets: Tensor | None = None,
    positive_weight: Tensor | None = None,
    false_negative_margin: float | None = None,
    false_negative_ratio: float | None = None,
) -> Tensor:
    """`catalog_parallel_softmax_loss`, and the optimiser's step on this rank's shard, now and in place, as `update_table` takes it on a
    whole table. The loss's backward has the gradients of queries and temperature, with no further communication.

    Args:
        table_shard: (M_r, D), a CPU tensor, or a DTensor of such. It is not to be in another optimiser, and gets no ``grad``.
        optimizer: a `catalog_softmax.Optimizer` of this shard: made for M_r rows, of one rule on every rank.
        reduction: "mean", "weighted_mean" or "sum".
        others: those of `catalog_parallel_softmax_loss`. If every row has weight 0, no step is taken.

    Memory: without ``candidate_rows`` and ``row_negatives`` every row of the shard is stepped, and during the call a gradient (M_r, D) in
    float32 and a copy of it exist, which `update_table` of a whole table on one process does not need. With them the rows that the batch
    names are stepped, and their gradients alone exist.

    Raises:
        ValueError: as `catalog_parallel_softmax_loss`; no rank's shard has changed then. Of an optimiser that does not fit its shard every
            rank has an error, too, but shards of the others have been stepped.
    """
    if reduction == "none":
        raise ValueError('reduction is "none"; rule: mean, weighted_mean or sum, because the table is stepped by one loss')
    sparse = candidate_rows is not None or row_negatives is not None
    given = Options(
        similarity, temperature, correction, reduction, positive_log_q, log_q, excluded, row_weight, table_ids, candidate_rows,
        row_negatives, row_negatives_log_q, positive_offsets, positive_weight, false_negative_margin, false_negative_ratio, sparse,
    )
    shard, group = own_part(table_shard.detach() if is_dtensor(table_shard) else table_shard, group)
    agree(group, queries.device, attempt(lambda: _check(shard, optimizer))[1], {})
    held = [queries.detach().requires_grad_(queries.requires_grad), None]
    if isinstance(temperature, Tensor):
        given.temperature = held[1] = temperature.detach().requires_grad_(temperature.requires_grad)
    sink: list = []
    with torch.enable_grad():
        leaf = shard.detach().requires_grad_()
        found = statistics(held[0], leaf, positives, group, given, sink)
        loss = loss_of(found)
        wanted = [x for x in held if x is not None and x.requires_grad]
        gradients = iter(torch.autograd.grad(loss, [leaf, *wanted], allow_unused=True)[1:])
    if found.problem.kept is None or len(found.problem.kept) > 0:
        agree(group, queries.device, attempt(lambda: _step(optimizer, shard, sink[0], sparse))[1], {})
    gradients = [next(gradients) if x is not None and x.requires_grad else None for x in held]
    return _Stepped.apply(loss.detach(), gradients, queries, temperature if isinstance(temperature, Tensor) else None)


def _check(shard: Tensor, optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer is a {type(optimizer).__name__}; rule: a catalog_softmax.Optimizer")
    if shard.device.type != "cpu":
        raise ValueError(f"table_shard is on {shard.device}; rule: the CPU, where the optimiser steps it")
    if len(shard) > 0:
        _check_writable(shard)


@torch.no_grad()
def _step(optimizer: Optimizer, shard: Tensor, gradient, sparse: bool) -> None:
    if len(shard) == 0:
        return
    threads, table = torch.get_num_threads(), raw_embeddings(shard)
    if sparse:
        rows, values = gradient
        optimizer._core.step_rows(table, raw(rows.contiguous()), raw_embeddings(values.contiguous()), threads)
    else:
        optimizer._core.step(table, raw_embeddings(gradient.contiguous()), threads)
    torch.autograd.graph.increment_version(shard)


class _Stepped(torch.autograd.Function):
    """The loss, with the gradients that were computed with the step."""

    @staticmethod
    def forward(ctx, loss, gradients, queries, temperature):
        ctx.there = [d is not None for d in gradients]
        ctx.save_for_backward(*(d for d in gradients if d is not None))
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        kept = iter(ctx.saved_tensors)
        gradients = [next(kept) if there else None for there in ctx.there]
        return None, None, *(None if d is None else (d * d_loss).to(d.dtype) for d in gradients)
