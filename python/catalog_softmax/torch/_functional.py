"""What a training loop calls."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import _core
from . import _cuda, _ops, _tables  # the last two register the operators
from ._table_arguments import NAMES as _EXTRA

Similarity = Literal["cosine", "dot"]
Correction = Literal["none", "logq", "logq_negatives_only", "corrected_logq"]
Reduction = Literal["none", "mean", "sum", "weighted_mean"]
Pools = Tensor | Sequence[Tensor]


def softmax_loss(
    queries: Tensor,
    candidates: Pools | None = None,
    positives: Tensor | None = None,
    *,
    similarity: Similarity = "cosine",
    temperature: float | Tensor = 0.05,
    correction: Correction = "none",
    log_q: Pools | None = None,
    positive_log_q: Tensor | None = None,
    candidate_ids: Pools | None = None,
    positive_ids: Tensor | None = None,
    positive_embeddings: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    symmetric: bool = False,
    table: Tensor | None = None,
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
    """Softmax cross-entropy of each query's positive against its negatives, without the B x N logits.

    With ``s = sim / temperature`` and per row ``lse = log sum over negatives of exp(s - log_q)``, the loss of a row is

    ====================== ==================================================================== ==========================
    correction             loss of a row                                                        source
    ====================== ==================================================================== ==========================
    "none"                 softplus(lse - s_positive): full softmax, InfoNCE, sampled softmax   van den Oord et al. 2018
    "logq"                 softplus(lse + positive_log_q - s_positive)                          Yi et al., RecSys 2019
    "logq_negatives_only"  softplus(lse - s_positive)                                           Bengio and Senecal 2008
    "corrected_logq"       w (lse + log(1 - Q_positive) - s_positive), w held constant          RecSys 2025
    ====================== ==================================================================== ==========================

    A candidate is a negative of a row unless it is the row's positive, has its positive's id, or an id that the row excludes. A
    row without negatives has loss 0.

    Args:
        queries: (B, D), float32, float16 or bfloat16, contiguous or with rows at any distance: then nothing is copied. Not
            normalised: under "cosine" that happens inside, with its chain rule.
        candidates: (N, D), the type of ``queries``; or a list of such pools, of one loss together. A pool that requires no
            gradient (a queue, a frozen table) costs no backward.
        positives: (B) int32 or int64, the index of each row's positive, counted over all pools. None: in-batch, candidate i of the
            first pool is the positive of query i.
        similarity: "cosine" or "dot".
        temperature: a number > 0, or a tensor of one, which gets a gradient where it requires one. Of a logit scale s, it is 1/s.
        correction: how the sampling probability Q of the candidates is corrected for.
        log_q: (N) for each pool: natural logarithm of Q, finite, a constant. Needed by every correction, refused without one.
        positive_log_q: (B), of ``positive_embeddings``; positives that are candidates have the log_q of these.
        candidate_ids: (N) int32 or int64 for each pool: accidental hits, candidates that are a row's positive item, are masked.
        positive_ids: (B), of ``positive_embeddings``, where candidates have ids.
        positive_embeddings: (B, D), positives apart from the candidates, in place of ``positives``.
        excluded: (offsets (B + 1), ids) int32 or int64: row i has no negatives with ids ``ids[offsets[i]:offsets[i + 1]]``.
        row_weight: (B), finite and >= 0, a constant. A row of weight 0 is left out before anything is scored, and its positive
            (an ignore index), ids and embeddings are not looked at; as a candidate it stays, unless ids mask it. With
            ``symmetric`` such rows are computed and weigh nothing.
        reduction: "mean" is sum(weight loss) / B, "weighted_mean" sum(weight loss) / sum(weight), "sum" the sum, and "none" the B
            weighted losses.
        symmetric: the mean of the loss and of the loss with both sides exchanged (CLIP, Radford et al. 2021).
        table: (M, D), all items' embeddings, the type of ``queries``, rows at any distance. A batch over a table names rows of it and
            copies none: ``positives`` are rows of the table, and its candidates are all rows, unless ``candidates``,
            ``candidate_rows`` or ``row_negatives`` say which. An item's id is its row, which masks compare.
        table_ids: (M) int32 or int64, the items' ids where they are not their rows.
        candidate_rows: (N) int32 or int64 for each pool, a tensor or a list of them: candidate j is ``table[candidate_rows[j]]``. Each
            repeat counts. ``candidates`` may stand beside them, with candidate_ids. log_q is then a list with that of every pool of
            ``candidates``, and after it that of every pool of ``candidate_rows``; of the whole table it is (M).
        row_negatives: (B, K) int32 or int64 with K up to 4096: negatives of each row's own, rows of the table, -1 for none. int64 is
            read where it is. They are in one lse with the pools, where there are any.
        row_negatives_log_q: (B, K), the log_q of each.
        positive_offsets: (B + 1) int32 or int64: several positives for a row. Those of row i are
            ``positives[positive_offsets[i]:positive_offsets[i + 1]]`` (or rows of ``positive_embeddings``), none of which is a
            negative of the row; a row may have none, and has loss 0 then. A row's loss is the sum over its P_i positives of
            positive_weight times the loss above. What is (B) of positives is (P) then, and the scores are computed once for a row.
        positive_weight: (P), finite and >= 0, a constant. 1 / P_i by default.
        false_negative_margin: a candidate whose score, before log_q, is above its row's best positive's by more than that is no
            negative of the row. In units of scores, after the division by the temperature.
        false_negative_ratio: a candidate whose cosine is above that of its row's best positive times this is no negative of the row,
            where the positive's is above 0. The bounds are constants: no gradient flows through them.
        sparse_gradient: the table's gradient is a coalesced sparse COO tensor of the rows that the batch names, as that of
            ``nn.Embedding(sparse=True)``, for torch.optim.SparseAdam, SGD or Adagrad; no (M, D) memory is used. By default it is dense.
            torch.compile leaves a call with it out of its graph, which fullgraph=True refuses.

    Returns:
        float32, () or with ``reduction="none"`` (B). Gradients of queries, candidates, positive_embeddings, temperature and table,
        those that are asked for. There is no double backward.

    Raises:
        ValueError: names the argument, its value and the rule that it breaks.
        catalog_softmax.DeviceUnavailable: tensors are on a device that this build or this machine cannot compute on.

    CUDA tensors are computed on their device, in the order of its current stream, in memory of PyTorch's allocator. The host does not
    wait, but for a ``temperature`` that is a tensor there. So values that break a rule are not seen: `check_device` asks for them.
    Rows of weight 0 cost there what others do.
    """
    extra = _Extra(
        (table, table_ids, candidate_rows, row_negatives, row_negatives_log_q, positive_offsets, positive_weight),
        (false_negative_margin, false_negative_ratio), sparse_gradient,
    )
    pools, log_q, candidate_ids = _pools(candidates, log_q, candidate_ids, extra)
    temperature, tau = _temperature(temperature)
    _check_constants(
        log_q=log_q, positive_log_q=positive_log_q, row_weight=row_weight, row_negatives_log_q=row_negatives_log_q,
        positive_weight=positive_weight,
    )
    offsets, excluded_ids = _pair(excluded)
    gradients = _wanted(queries, *pools, positive_embeddings, temperature, table)

    options = _options(similarity=similarity, correction=correction, reduction=reduction) + (" symmetric" if symmetric else "")

    def direction(queries, pools, positives, candidate_ids, row_weight):
        if extra.given:
            args = (
                queries, pools, positives, positive_embeddings, candidate_ids, log_q, positive_ids, positive_log_q, offsets,
                excluded_ids, row_weight, *extra.tensors, *extra.filter, temperature, tau, options, sparse_gradient, gradients,
            )
            _ops.refuse_transforms(*args)
            return _run("table_softmax_loss", args, sparse_gradient)[0]
        operator, pools, ids, of_pools = _operator("softmax_loss", pools, candidate_ids, log_q)
        args = (
            queries, pools, positives, positive_embeddings, ids, of_pools, positive_ids, positive_log_q, offsets, excluded_ids,
            row_weight, temperature, tau, options, gradients,
        )
        if isinstance(pools, Tensor) and _ops.is_plain(*args):
            return _ops.direct_loss(*args)
        _ops.refuse_transforms(*args)
        return operator(*args)[0]

    loss = direction(queries, pools, positives, candidate_ids, row_weight)
    if not symmetric:
        return loss
    # The operator has checked that there is one pool and that `positives` is a permutation.
    if positives is None:
        return 0.5 * (loss + direction(pools[0], [queries], None, candidate_ids, row_weight))
    positives = positives.to(torch.int64)
    query_of = torch.argsort(positives)
    ids = [ids[positives] for ids in candidate_ids]
    swapped = direction(pools[0], [queries], query_of, ids, None if row_weight is None else row_weight[query_of])
    return 0.5 * (loss + (swapped[positives] if reduction == "none" else swapped))


class RowStatistics(NamedTuple):
    """Statistics of each row's scores, all (B); with ``positive_offsets``, ``positive`` is (P)."""

    lse: Tensor
    """float64: log of the sum over negatives of exp(s - log_q); -inf of a row with none. Differentiable."""
    positive: Tensor
    """float64: the score s of the positive. Differentiable."""
    num_negatives: Tensor
    """int64."""


def row_statistics(
    queries: Tensor,
    candidates: Pools | None = None,
    positives: Tensor | None = None,
    *,
    similarity: Similarity = "cosine",
    temperature: float | Tensor = 0.05,
    log_q: Pools | None = None,
    candidate_ids: Pools | None = None,
    positive_ids: Tensor | None = None,
    positive_embeddings: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
    table: Tensor | None = None,
    table_ids: Tensor | None = None,
    candidate_rows: Pools | None = None,
    row_negatives: Tensor | None = None,
    row_negatives_log_q: Tensor | None = None,
    positive_offsets: Tensor | None = None,
    false_negative_margin: float | None = None,
    false_negative_ratio: float | None = None,
    sparse_gradient: bool = False,
) -> RowStatistics:
    """For a loss of your own: any function of ``lse`` and ``positive`` of each row has its gradients through these two.

    InfoNCE is ``softplus(lse - positive).mean()``; a z-loss adds ``1e-4 * lse.square().mean()``. Arguments and errors as those of
    `softmax_loss`; ``log_q`` is subtracted from the negatives' scores alone, the positive's is up to you. Mask rows by weights in
    your own sum, and a row without negatives (``num_negatives == 0``), whose lse is -inf, by ``torch.where``.
    """
    extra = _Extra(
        (table, table_ids, candidate_rows, row_negatives, row_negatives_log_q, positive_offsets, None),
        (false_negative_margin, false_negative_ratio), sparse_gradient,
    )
    pools, log_q, candidate_ids = _pools(candidates, log_q, candidate_ids, extra)
    temperature, tau = _temperature(temperature)
    _check_constants(log_q=log_q, row_negatives_log_q=row_negatives_log_q)
    offsets, excluded_ids = _pair(excluded)
    has_log_q = bool(log_q) or row_negatives_log_q is not None
    options = _options(similarity=similarity, correction="logq_negatives_only" if has_log_q else "none")
    gradients = _wanted(queries, *pools, positive_embeddings, temperature, table)
    _ops.refuse_transforms(queries, pools, positive_embeddings, temperature, table)
    if extra.given:
        args = (
            queries, pools, positives, positive_embeddings, candidate_ids, log_q, positive_ids, None, offsets, excluded_ids, None,
            *extra.tensors, *extra.filter, temperature, tau, options, sparse_gradient, gradients,
        )
        rows, positive, _ = _run("table_row_statistics", args, sparse_gradient)
        return RowStatistics(rows[0], positive, rows[1].detach().to(torch.int64))
    operator, pools, candidate_ids, log_q = _operator("row_statistics", pools, candidate_ids, log_q)
    rows, _ = operator(
        queries, pools, positives, positive_embeddings, candidate_ids, log_q, positive_ids, None, offsets, excluded_ids, None,
        temperature, tau, options, gradients,
    )
    return RowStatistics(rows[0], rows[1], rows[2].detach().to(torch.int64))


class TopK(NamedTuple):
    """The best K candidates of each row, best first, in the order of torch.topk's result."""

    values: Tensor
    """(B, K) float32 similarities, without temperature; -inf behind the last of a row that has fewer than K."""
    indices: Tensor
    """(B, K) int64, counted over all pools; -1 behind the last."""


def top_k(
    queries: Tensor,
    candidates: Pools,
    k: int,
    *,
    similarity: Similarity = "cosine",
    candidate_ids: Pools | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
) -> TopK:
    """The ``k`` candidates most similar to each query, exactly and without the B x N scores. No gradient.

    Args:
        queries, candidates, candidate_ids, excluded: as those of `softmax_loss`; excluded ids (items that a user has seen) are
            left out.
        k: from 1 to 1024, and at most N.

    Of equal similarities the smaller index comes first. Rows and candidates with a NaN or an infinity are never returned.
    """
    pools, _, candidate_ids = _pools(candidates, None, candidate_ids)
    offsets, excluded_ids = _pair(excluded)
    detached = [pool.detach() for pool in pools]
    values, indices = torch.ops.catalog_softmax.top_k(
        queries.detach(), detached, k, candidate_ids, offsets, excluded_ids, similarity
    )
    return TopK(values, indices)


def hardest_negatives(
    queries: Tensor,
    candidates: Pools | None = None,
    positives: Tensor | None = None,
    *,
    k: int,
    similarity: Similarity = "cosine",
    candidate_ids: Pools | None = None,
    positive_ids: Tensor | None = None,
    positive_embeddings: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
    table: Tensor | None = None,
    table_ids: Tensor | None = None,
    candidate_rows: Pools | None = None,
    positive_offsets: Tensor | None = None,
) -> TopK:
    """The ``k`` negatives of each row that are most similar to its query: the hardest in-batch negatives where the pool is the batch's own
    items. Positives, accidental hits and excluded ids are left out. No gradient, and no B x N scores.

    Arguments as those of `softmax_loss`; ``k`` as that of `top_k`. Indices count candidates over the pools of ``candidates`` and, after
    them, those of ``candidate_rows``; of the whole table they are its rows. Where a row has fewer than k they end with -1, which
    ``row_negatives`` take for none:

        hardest = hardest_negatives(users, positives=items, table=table, candidate_rows=items, k=8).indices
        rows = torch.where(hardest < 0, -1, items[hardest])
        loss = softmax_loss(users, positives=items, table=table, row_negatives=rows)

    TensorFlow Recommenders' ``num_hard_negatives`` trains on these alone.
    """
    extra = _Extra((table, table_ids, candidate_rows, None, None, positive_offsets, None), (None, None), False)
    pools, _, candidate_ids = _pools(candidates, None, candidate_ids, extra)
    offsets, excluded_ids = _pair(excluded)
    detach = lambda tensor: None if tensor is None else tensor.detach()
    tensors = [detach(extra.tensors[0]), *extra.tensors[1:]]
    values, indices = torch.ops.catalog_softmax.hardest_negatives(
        queries.detach(), [pool.detach() for pool in pools], positives, detach(positive_embeddings), candidate_ids, [], positive_ids, None,
        offsets, excluded_ids, None, *tensors, k, similarity,
    )
    return TopK(values, indices)


def check_device(device: torch.device | str | int | None = None) -> None:
    """Waits for the current stream of a CUDA device, by default the current one, and raises a ValueError for the first value since the
    last call that broke a rule and that only the device saw: an index past the candidates, offsets out of order, a log_q or weight that
    is not finite. Losses since then are not to be used. Once in a while is enough, or where a loss looks wrong."""
    index = torch.cuda.current_device() if device is None else torch.cuda.device(device).idx
    place = _cuda.Place(torch.device("cuda", index))
    with place.guard():
        _core.device_fault(place.raw)


def _list(tensors: Pools | None) -> list[Tensor]:
    if tensors is None:
        return []
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


class _Extra:
    """A table and what else few batches have: `given` where one does. Those go to the operators of `_tables.py`."""

    def __init__(self, tensors, filter, sparse_gradient):
        self.given = any(x is not None for x in (*tensors, *filter))
        self.tensors, self.filter = list(tensors), filter
        if sparse_gradient and tensors[0] is None:
            raise ValueError("sparse_gradient is True; rule: the gradient of a table, and there is none")
        place = _EXTRA.index("candidate_rows")
        self.tensors[place] = self._by_rows = _list(tensors[place])

    def pools_of_table(self, own: int) -> int:
        """How many pools there are beside those of embeddings of their own."""
        alone = self.tensors[0] is not None and own == 0 and self.tensors[_EXTRA.index("row_negatives")] is None
        return max(len(self._by_rows), 1 if alone else 0)


def _pools(candidates, log_q, candidate_ids, extra=None):
    pools = _list(candidates)
    if not pools and (extra is None or not extra.given):
        found = "missing" if candidates is None else "a list of no pools"
        raise ValueError(f"candidates is {found}; rule: one pool at least")
    number = len(pools) + (0 if extra is None else extra.pools_of_table(len(pools)))
    lists = []
    for argument, given, number in (("log_q", log_q, number), ("candidate_ids", candidate_ids, len(pools))):
        tensors = _list(given)
        if tensors and len(tensors) != number:
            raise ValueError(f"{argument} has {len(tensors)} tensors; rule: one for each pool, {number}")
        lists.append(tensors)
    return pools, *lists


def _run(name, args, sparse_gradient):
    return _outside_of_graphs(name, args) if sparse_gradient else getattr(torch.ops.catalog_softmax, name)(*args)


@_ops.outside_of_graphs
def _outside_of_graphs(name, args):
    """The size of a row-sparse gradient depends on data, and a traced backward has no sparse tensors."""
    return getattr(torch.ops.catalog_softmax, name)(*args)


_ALLOWED = {
    "similarity": get_args(Similarity),
    "correction": get_args(Correction),
    "reduction": get_args(Reduction),
}


def _options(**options):
    """As the operators take them: in one string."""
    for name, value in options.items():
        if value not in _ALLOWED[name]:
            raise ValueError(f"{name} is {value!r}; rule: one of {', '.join(_ALLOWED[name])}")
    return " ".join(options.values())


def _operator(name, pools, candidate_ids, log_q):
    """The operator for one pool or for several, and what it takes of them."""
    if len(pools) > 1:
        return getattr(torch.ops.catalog_softmax, f"{name}_pools"), pools, candidate_ids, log_q
    first = lambda tensors: tensors[0] if tensors else None
    return getattr(torch.ops.catalog_softmax, name), pools[0], first(candidate_ids), first(log_q)


def _temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """As a tensor, or as a number."""
    if not isinstance(temperature, Tensor):
        return None, float(temperature)
    if temperature.numel() != 1 or not temperature.dtype.is_floating_point:
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)} of {temperature.dtype}; rule: a number, or a floating-point tensor "
            "of one element"
        )
    return temperature, 1.0


def _check_constants(**constants):
    for argument, tensors in constants.items():
        for tensor in tensors if isinstance(tensors, list) else [tensors]:
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{argument} requires a gradient; rule: a constant of the loss, {argument}.detach()")


def _pair(excluded):
    if excluded is None:
        return None, None
    if not isinstance(excluded, (tuple, list)) or len(excluded) != 2:
        raise ValueError(f"excluded is {type(excluded).__name__}; rule: a pair of tensors, (offsets (B + 1), ids)")
    return excluded


def _wanted(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
