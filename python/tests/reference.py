"""The losses as they would be written with logits, in any precision: what the package is compared with."""

import math

import torch
import torch.nn.functional as F


COEFFICIENTS = None
"""The type that what multiplies embeddings in a backward is rounded to, as tensor cores take it: None is that of the computation."""


def _rounded(x):
    """Relative to the largest, so that nothing underflows."""
    largest = x.abs().max().clamp_min(1e-30).log2().ceil().exp2()
    return (x / largest).to(COEFFICIENTS).to(x.dtype) * largest


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, items, temperature):
        s = queries @ items.T / temperature
        ctx.save_for_backward(queries, items, temperature, s)
        return s

    @staticmethod
    def backward(ctx, d):
        queries, items, temperature, s = ctx.saved_tensors
        d = _rounded(d)
        return d @ items / temperature, d.T @ queries / temperature, (-(d * s).sum() / temperature).reshape(temperature.shape)


def scores(queries, pools, positives, positive_embeddings, similarity, temperature):
    """(B, N) scores and (B) those of the positives."""
    items = torch.cat(pools)
    unit = (lambda x: F.normalize(x, dim=1, eps=1e-12)) if similarity == "cosine" else (lambda x: x)
    queries, items = unit(queries), unit(items)
    if COEFFICIENTS is None:
        s = queries @ items.T / temperature
    else:
        s = _Scores.apply(queries, items, torch.as_tensor(temperature, dtype=queries.dtype))
    if positive_embeddings is not None:
        return s, (queries * unit(positive_embeddings)).sum(1) / temperature
    return s, s[torch.arange(len(s)), positives]


def negatives(b, n, positives, candidate_ids, positive_ids, excluded):
    """(B, N): who is a negative of whom."""
    mask = torch.ones(b, n, dtype=torch.bool)
    ids = torch.arange(n) if candidate_ids is None else torch.cat([ids.long() for ids in candidate_ids])
    if positives is not None:
        mask[torch.arange(b), positives] = False
        positive_ids = None if candidate_ids is None else ids[positives]
    if positive_ids is not None:
        mask &= ids[None, :] != positive_ids[:, None]
    if excluded is not None:
        offsets, excluded_ids = excluded
        for row in range(b):
            mask[row] &= ~torch.isin(ids, excluded_ids[offsets[row] : offsets[row + 1]])
    return mask


def statistics(
    queries, candidates, positives=None, *, similarity="cosine", temperature=0.05, log_q=None, candidate_ids=None,
    positive_ids=None, positive_embeddings=None, excluded=None,
):
    """lse, positive, num_negatives."""
    pools = candidates if isinstance(candidates, list) else [candidates]
    log_q, candidate_ids = ([x] if isinstance(x, torch.Tensor) else x for x in (log_q, candidate_ids))
    if positives is None and positive_embeddings is None:
        positives = torch.arange(len(queries))
    positives = None if positives is None else positives.long()
    s, positive = scores(queries, pools, positives, positive_embeddings, similarity, temperature)
    mask = negatives(*s.shape, positives, candidate_ids, positive_ids, excluded)
    z = s if log_q is None else s - torch.cat(log_q).to(s.dtype)
    return z.masked_fill(~mask, -math.inf).logsumexp(1), positive, mask.sum(1)


def softmax_loss(
    queries, candidates, positives=None, *, correction="none", log_q=None, positive_log_q=None, row_weight=None,
    reduction="mean", symmetric=False, **options,
):
    lse, positive, n = statistics(queries, candidates, positives, log_q=log_q, **options)
    loss = rows(lse, positive, n, correction, log_q, positive_log_q, positives)
    if symmetric:
        pool = candidates[0] if isinstance(candidates, list) else candidates
        query_of = None if positives is None else torch.argsort(positives)
        ids = options.pop("candidate_ids", None)
        swapped_ids = ids if ids is None or positives is None else ids[positives.long()]
        other = softmax_loss(pool, queries, query_of, reduction="none", candidate_ids=swapped_ids, **options)
        loss = 0.5 * (loss + (other if positives is None else other[positives.long()]))
    weight = torch.ones_like(loss) if row_weight is None else row_weight.to(loss.dtype)
    loss = torch.where(weight > 0, weight * loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / {"mean": len(loss), "sum": 1.0, "weighted_mean": weight.sum()}[reduction]


def rows(lse, positive, n, correction, log_q, positive_log_q, positives):
    shift = 0.0
    if correction in ("logq", "corrected_logq"):
        if positive_log_q is None:
            flat = log_q if isinstance(log_q, torch.Tensor) else torch.cat(log_q)
            positive_log_q = flat[: len(lse)] if positives is None else flat[positives.long()]
        shift = positive_log_q.to(lse.dtype)
        if correction == "corrected_logq":
            shift = torch.log1p(-shift.exp())
    # A row without negatives has loss 0 and gradient 0.
    margin = torch.where(n > 0, lse, 0.0) + shift - positive
    if correction == "corrected_logq":
        loss = torch.sigmoid(margin - n.clamp(min=1).to(lse.dtype).log()).detach() * margin
    else:
        loss = F.softplus(margin, threshold=100.0)
    return torch.where(n > 0, loss, 0.0)
