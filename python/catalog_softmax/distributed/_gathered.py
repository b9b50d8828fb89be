"""Data-parallel loss with the candidates of all ranks as negatives."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..torch._arguments import _check_length, embeddings, integers, numbers
from ..torch._functional import Correction, Reduction, Similarity, _options, softmax_loss
from ..torch._ops import outside_of_graphs
from ._agreement import agree, attempt, fingerprint
from ._collectives import gather_rows, group_of
from ._gather import Gathered


@outside_of_graphs
def gathered_softmax_loss(
    queries: Tensor,
    candidates: Tensor,
    positives: Tensor | None = None,
    *,
    group=None,
    averaged: bool = False,
    similarity: Similarity = "cosine",
    temperature: float | Tensor = 0.05,
    correction: Correction = "none",
    log_q: Tensor | None = None,
    positive_log_q: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    positive_ids: Tensor | None = None,
    positive_embeddings: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    symmetric: bool = False,
    positive_offsets: Tensor | None = None,
    positive_weight: Tensor | None = None,
    false_negative_margin: float | None = None,
    false_negative_ratio: float | None = None,
) -> Tensor:
    """`softmax_loss` of the batch of all ranks: each rank's queries against the candidates of every rank.

    Each rank has its own queries and candidates, and sees those of the others as further negatives. The loss and the gradients are those of
    one process with the whole batch: queries of all ranks one after the other, and candidates, too.

    The scale of gradients. Each rank gets the loss of the whole batch, and its backward has its own part of the gradient: **summed over
    ranks** the gradient of every parameter is that of one big batch. Candidates' gradients are summed by a reduce-scatter to the rank that
    they came from. DDP and FSDP **average** over ranks, which is the big batch's gradient divided by the number of ranks: pass
    ``averaged=True``, which multiplies the gradients, and not the loss, by that number. Do not multiply the loss yourself then. OpenCLIP's
    `ClipLoss(gather_with_grad=True, local_loss=True)` returns the mean over the rank's own rows, whose average over ranks is the big
    batch's mean; so under DDP its gradients are those of this with ``averaged=True``. With ``local_loss=False`` every rank computes the
    whole loss, and the gathering's sum over ranks multiplies it by their number, which DDP's average takes back: the same again.

    Args:
        queries: (B_r, D), those of this rank; any number, 0 too.
        candidates: (N_r, D), those of this rank. With ``positives=None`` candidate i is the positive of query i of the same rank.
        positives: (B_r), indices into this rank's own candidates.
        group: the `ProcessGroup`, by default all ranks.
        averaged: whether what made queries and candidates is under DDP or FSDP, as said above.
        log_q, candidate_ids: (N_r), of this rank's candidates. log Q is the probability of one draw, whatever the number of ranks.
        positive_embeddings, positive_ids, positive_log_q, excluded, row_weight, positive_offsets, positive_weight: of this rank's rows.
        temperature: a number, or a tensor, which has this rank's part of the gradient, as parameters have.
        reduction: "mean" divides by the number of queries on all ranks, "weighted_mean" by their whole weight; "none" returns the (B_r)
            weighted losses of this rank.
        symmetric: both directions (CLIP). Queries are gathered, too.
        others: those of `softmax_loss`, the same on every rank.

    Returns:
        float32, (), the same on every rank; or with ``reduction="none"`` (B_r). Call backward on every rank.

    Raises:
        ValueError: names the argument, its value and the rule; on every rank, where ranks disagree, or where one has refused its arguments
            before or in the forward pass.
        RuntimeError: of torch.distributed, where a rank died or did not come within the group's timeout.

    Bytes that a rank hands to collectives, N the largest N_r on any of R ranks, embeddings of s bytes: 24 (agreement), N D s, 8 N for ids
    and 4 N for log_q to gathers, 32 to a sum; in the backward 4 R N D to a reduce-scatter. With ``symmetric`` the queries' as well. The
    host waits for the agreement and for the sum.
    """
    group = group_of(group)
    options = dict(
        similarity=similarity, temperature=temperature, correction=correction, reduction="none" if reduction == "none" else "sum",
        false_negative_margin=false_negative_margin, false_negative_ratio=false_negative_ratio,
    )
    of_rows = dict(
        positive_log_q=positive_log_q, positive_ids=positive_ids, positive_embeddings=positive_embeddings, excluded=excluded,
        positive_offsets=positive_offsets, positive_weight=positive_weight,
    )
    in_batch = positives is None and positive_embeddings is None
    own_positives = torch.arange(len(queries), device=queries.device) if in_batch else positives
    batch = _Batch(queries, candidates, own_positives, row_weight, of_rows)
    of_candidates = dict(log_q=log_q, candidate_ids=candidate_ids)
    _, error = attempt(lambda: _check(batch, of_candidates, reduction, symmetric and (in_batch, correction)))
    alike = fingerprint(
        {**options, "temperature": float(torch.as_tensor(temperature).detach())}, reduction, symmetric, averaged,
        sorted(name for name, tensor in of_candidates.items() if tensor is not None),
        queries.dtype, tuple(candidates.shape[1:]), torch.is_grad_enabled(), [x.requires_grad for x in (queries, candidates)],
    )
    sizes = [n for (n,) in agree(group, queries.device, error, {"options": alike}, (len(candidates) if error is None else 0,))]
    start = sum(sizes[: dist.get_rank(group)])

    every = Gathered.apply(candidates, sizes, group)
    of_every = {name: _gathered(tensor, sizes, group) for name, tensor in of_candidates.items()}
    every_query = Gathered.apply(queries, sizes, group) if symmetric else None

    def loss_of_own_rows():
        loss = _of_rows(batch, every, start, {**options, **of_every})
        if symmetric:
            swapped = _Batch(candidates, queries, batch.positives, row_weight, of_rows)
            loss = 0.5 * (loss + _of_rows(swapped, every_query, start, {**options, **of_every}))
        return loss

    own, error = attempt(loss_of_own_rows)
    total, rows, weight = _totals(own, error, batch, group)
    if rows == 0:
        raise ValueError("queries has 0 rows on every rank; rule: at least 1 row on one of them")
    factor = float(len(sizes)) if averaged else 1.0
    if reduction == "none":
        return _Whole.apply(own, own.detach(), factor)
    if reduction == "weighted_mean" and weight <= 0.0:
        raise ValueError(f'the sum of row_weight is {weight}; rule: > 0 with reduction="weighted_mean"')
    divisor = {"mean": rows, "sum": 1.0, "weighted_mean": weight}[reduction]
    return _Whole.apply(own, own.new_tensor(total / divisor), factor / divisor)


class _Batch(NamedTuple):
    queries: Tensor
    candidates: Tensor
    positives: Tensor | None
    row_weight: Tensor | None
    of_rows: dict


class _Whole(torch.autograd.Function):
    """The value of the whole batch, with the gradient of this rank's part."""

    @staticmethod
    def forward(ctx, own, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, d):
        return d * ctx.factor, None, None


def _check(batch: _Batch, of_candidates: dict, reduction: str, symmetric) -> None:
    """What this rank alone can see. The call on the gathered candidates checks the rest."""
    queries, candidates, positives, row_weight, of_rows = batch
    device = queries.device
    embeddings(queries, "queries", device), embeddings(candidates, "candidates", device)
    if queries.dtype != candidates.dtype or queries.shape[1] != candidates.shape[1]:
        found, rule = (f"{x.dtype} with {x.shape[1]} columns" for x in (candidates, queries))
        raise ValueError(f"candidates is {found}; rule: {rule}, as queries")
    for (name, tensor), convert in zip(of_candidates.items(), (numbers, integers)):
        if tensor is not None:
            _check_length(convert(tensor, name, device), name, len(candidates))
    _options(reduction=reduction)
    if row_weight is not None:
        _check_length(numbers(row_weight, "row_weight", device), "row_weight", len(queries))
    elif reduction == "weighted_mean":
        raise ValueError('row_weight is missing; rule: reduction="weighted_mean" divides by its sum')
    if positives is not None:
        counted = integers(positives, "positives", device)
        if of_rows["positive_offsets"] is None:
            _check_length(counted, "positives", len(queries))
            counted = counted if row_weight is None else counted[row_weight != 0.0]
        wrong = counted[(counted < 0) | (counted >= len(candidates))]
        if len(wrong):
            raise ValueError(f"positives has an element {int(wrong[0])}; rule: from 0 to {len(candidates) - 1}, a candidate of this rank")
    if symmetric:
        in_batch, correction = symmetric
        if not in_batch or len(candidates) != len(queries) or correction != "none" or any(x is not None for x in of_rows.values()):
            raise ValueError(
                f"symmetric is True with {len(queries)} queries and {len(candidates)} candidates; rule: as many of each, positives=None, "
                "and no correction, excluded ids or several positives"
            )


def _gathered(tensor: Tensor | None, sizes: list[int], group) -> Tensor | None:
    if tensor is None:
        return None
    return gather_rows(tensor.detach().to(torch.float32 if tensor.dtype.is_floating_point else torch.int64), sizes, group)


def _of_rows(batch: _Batch, every: Tensor, start: int, options: dict) -> Tensor:
    """The sum over this rank's rows, or their losses."""
    queries = batch.queries
    if len(queries) == 0:
        # Still a part of the graph: the other ranks' losses have gradients for this rank's candidates.
        nothing = queries.sum() + every[:0].sum()
        return (nothing + queries.sum(1) if options["reduction"] == "none" else nothing).to(torch.float32)
    positives = None if batch.positives is None else batch.positives.to(torch.int64) + start
    return softmax_loss(queries, every, positives, row_weight=batch.row_weight, **batch.of_rows, **options)


def _totals(own: Tensor | None, error: Exception | None, batch: _Batch, group) -> tuple[float, float, float]:
    """Loss, rows and weight of all ranks; the error of this rank, or that another has one."""
    rows = float(len(batch.queries))
    weight = rows if batch.row_weight is None else batch.row_weight.sum(dtype=torch.float64)
    loss = 0.0 if error is not None else own.detach().sum(dtype=torch.float64)
    device = batch.queries.device
    found = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in (loss, rows, weight, float(error is not None))])
    dist.all_reduce(found, group=group)
    if error is not None:
        raise error
    loss, rows, weight, failed = found.tolist()
    if failed:
        raise ValueError("another rank of the group refused its arguments; rule: see that rank's error")
    return loss, rows, weight
