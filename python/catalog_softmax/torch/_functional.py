"""What a training loop calls."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import _core
from . import _cuda, _ops  # the last one registers the operators

Similarity = Literal["cosine", "dot"]
Correction = Literal["none", "logq", "logq_negatives_only", "corrected_logq"]
Reduction = Literal["none", "mean", "sum", "weighted_mean"]
Pools = Tensor | Sequence[Tensor]


def softmax_loss(
    queries: Tensor,
    candidates: Pools,
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

    Returns:
        float32, () or with ``reduction="none"`` (B). Gradients of queries, candidates, positive_embeddings and temperature, those
        that are asked for. There is no double backward.

    Raises:
        ValueError: names the argument, its value and the rule that it breaks.
        catalog_softmax.DeviceUnavailable: tensors are on a device that this build or this machine cannot compute on.

    CUDA tensors are computed on their device, in the order of its current stream, in memory of PyTorch's allocator. The host does not
    wait, but for a ``temperature`` that is a tensor there. So values that break a rule are not seen: `check_device` asks for them.
    Rows of weight 0 cost there what others do.
    """
    pools, log_q, candidate_ids = _pools(candidates, log_q, candidate_ids)
    temperature, tau = _temperature(temperature)
    _check_constants(log_q=log_q, positive_log_q=positive_log_q, row_weight=row_weight)
    offsets, excluded_ids = _pair(excluded)
    gradients = _wanted(queries, *pools, positive_embeddings, temperature)

    options = _options(similarity=similarity, correction=correction, reduction=reduction) + (" symmetric" if symmetric else "")

    def direction(queries, pools, positives, candidate_ids, row_weight):
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
    """Statistics of each row's scores, all (B)."""

    lse: Tensor
    """float64: log of the sum over negatives of exp(s - log_q); -inf of a row with none. Differentiable."""
    positive: Tensor
    """float64: the score s of the positive. Differentiable."""
    num_negatives: Tensor
    """int64."""


def row_statistics(
    queries: Tensor,
    candidates: Pools,
    positives: Tensor | None = None,
    *,
    similarity: Similarity = "cosine",
    temperature: float | Tensor = 0.05,
    log_q: Pools | None = None,
    candidate_ids: Pools | None = None,
    positive_ids: Tensor | None = None,
    positive_embeddings: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
) -> RowStatistics:
    """For a loss of your own: any function of ``lse`` and ``positive`` of each row has its gradients through these two.

    InfoNCE is ``softplus(lse - positive).mean()``; a z-loss adds ``1e-4 * lse.square().mean()``. Arguments and errors as those of
    `softmax_loss`; ``log_q`` is subtracted from the negatives' scores alone, the positive's is up to you. Mask rows by weights in
    your own sum, and a row without negatives (``num_negatives == 0``), whose lse is -inf, by ``torch.where``.
    """
    pools, log_q, candidate_ids = _pools(candidates, log_q, candidate_ids)
    temperature, tau = _temperature(temperature)
    _check_constants(log_q=log_q)
    offsets, excluded_ids = _pair(excluded)
    options = _options(similarity=similarity, correction="logq_negatives_only" if log_q else "none")
    gradients = _wanted(queries, *pools, positive_embeddings, temperature)
    _ops.refuse_transforms(queries, pools, positive_embeddings, temperature)
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


def _pools(candidates, log_q, candidate_ids):
    pools = _list(candidates)
    if not pools:
        raise ValueError("candidates is a list of no pools; rule: one pool at least")
    lists = []
    for argument, given in (("log_q", log_q), ("candidate_ids", candidate_ids)):
        tensors = _list(given)
        if tensors and len(tensors) != len(pools):
            raise ValueError(f"{argument} has {len(tensors)} tensors; rule: one for each pool, {len(pools)}")
        lists.append(tensors)
    return pools, *lists


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
