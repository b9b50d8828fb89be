"""The losses as modules, for loops that hold theirs as one."""

import math

import torch
from torch import Tensor, nn

from ._functional import Correction, Pools, Reduction, Similarity, softmax_loss


def _flat(queries: Tensor) -> Tensor:
    return queries.reshape(-1, queries.shape[-1])


def _weights(mask: Tensor | None, row_weight: Tensor | None, rows: int) -> Tensor | None:
    """One weight for each row: 0 where the mask says no."""
    if mask is not None:
        _check_mask(mask, rows)
        mask = mask.reshape(-1)
        row_weight = mask.to(torch.float32) if row_weight is None else torch.where(mask, row_weight.reshape(-1), 0.0)
    return None if row_weight is None else row_weight.reshape(-1)


def _check_mask(mask: Tensor, rows: int) -> None:
    if mask.numel() != rows:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; rule: an element for each of {rows} queries")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has elements of type {mask.dtype}; rule: torch.bool, True for rows that count")


def _reduction(reduction: Reduction, mask: Tensor | None) -> Reduction:
    """A mean is over the rows that the mask leaves, as that of torch.nn.CrossEntropyLoss with an ignore_index."""
    return "weighted_mean" if reduction == "mean" and mask is not None else reduction


class InfoNCELoss(nn.Module):
    """In-batch contrastive loss with a learned logit scale, as CLIP has it (Radford et al. 2021, section 2.5).

    The parameter ``logit_scale`` is ln(1 / temperature), as OpenCLIP's. Call `clamp_` after the optimiser's step to keep it in its
    range, as OpenCLIP does.

    Args:
        temperature: where it starts.
        learned: False keeps it there; ``logit_scale`` is then a buffer.
        symmetric: both directions, as CLIP; False: queries against candidates alone.
        similarity: "cosine" or "dot".
        min_temperature, max_temperature: the range of `clamp_`.
        reduction: of `softmax_loss`.
    """

    def __init__(
        self, temperature: float = 0.07, *, learned: bool = True, symmetric: bool = True, similarity: Similarity = "cosine",
        min_temperature: float = 0.01, max_temperature: float = 1.0, reduction: Reduction = "mean",
    ):
        super().__init__()
        if not 0.0 < min_temperature <= temperature <= max_temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; rule: from {min_temperature} to {max_temperature}, all > 0 and finite")
        logit_scale = torch.tensor(-math.log(temperature))
        if learned:
            self.logit_scale = nn.Parameter(logit_scale)
        else:
            self.register_buffer("logit_scale", logit_scale)
        self.symmetric, self.similarity, self.reduction = symmetric, similarity, reduction
        self.min_temperature, self.max_temperature = min_temperature, max_temperature

    @property
    def temperature(self) -> Tensor:
        return torch.exp(-self.logit_scale)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Moves the logit scale into its range: after each step of the optimiser."""
        self.logit_scale.clamp_(-math.log(self.max_temperature), -math.log(self.min_temperature))

    def forward(
        self, queries: Tensor, candidates: Pools, *, candidate_ids: Pools | None = None,
        excluded: tuple[Tensor, Tensor] | None = None, row_weight: Tensor | None = None, mask: Tensor | None = None,
    ) -> Tensor:
        """Candidate i is the positive of query i. ``mask`` (B) is False for rows without one."""
        return softmax_loss(
            queries, candidates, similarity=self.similarity, temperature=self.temperature, candidate_ids=candidate_ids,
            excluded=excluded, row_weight=_weights(mask, row_weight, queries.shape[0]),
            reduction=_reduction(self.reduction, mask), symmetric=self.symmetric,
        )


class SampledSoftmaxLoss(nn.Module):
    """Positives apart from sampled negatives, with a correction for how these were drawn.

    Args: those of `softmax_loss`.
    """

    def __init__(
        self, *, correction: Correction = "logq", similarity: Similarity = "cosine", temperature: float = 0.05,
        reduction: Reduction = "mean",
    ):
        super().__init__()
        self.correction, self.similarity, self.temperature, self.reduction = correction, similarity, temperature, reduction

    def extra_repr(self) -> str:
        return f"correction={self.correction!r}, similarity={self.similarity!r}, temperature={self.temperature}"

    def forward(
        self, queries: Tensor, positive_embeddings: Tensor, negatives: Pools, *, log_q: Pools | None = None,
        positive_log_q: Tensor | None = None, negative_ids: Pools | None = None, positive_ids: Tensor | None = None,
        row_weight: Tensor | None = None, mask: Tensor | None = None,
    ) -> Tensor:
        """queries (B, D) or (B, T, D), positive_embeddings, positive_log_q, positive_ids and mask of the same leading axes; negatives
        (N, D) with log_q and negative_ids (N), or lists of such pools. Ids mask negatives that are a row's positive item."""
        flat = _flat(queries)
        one = lambda tensor: None if tensor is None else tensor.reshape(-1)
        return softmax_loss(
            flat, negatives, similarity=self.similarity, temperature=self.temperature, correction=self.correction, log_q=log_q,
            positive_log_q=one(positive_log_q), candidate_ids=negative_ids, positive_ids=one(positive_ids),
            positive_embeddings=_flat(positive_embeddings), row_weight=_weights(mask, row_weight, flat.shape[0]),
            reduction=_reduction(self.reduction, mask),
        )


class TableSoftmaxLoss(nn.Module):
    """A loss over a table of all items' embeddings, of which a batch names rows, as sequential recommenders train: ``loss(states,
    items.weight, positives, row_negatives=negatives, mask=mask)``. With neither row_negatives nor candidate_rows the whole table is the
    pool.

    Args: those of `softmax_loss`; "dot" and 1.0 are what SASRec and gSASRec have.
    """

    def __init__(
        self, *, correction: Correction = "none", similarity: Similarity = "dot", temperature: float = 1.0, reduction: Reduction = "mean",
        false_negative_margin: float | None = None, false_negative_ratio: float | None = None, sparse_gradient: bool = False,
    ):
        super().__init__()
        self.correction, self.similarity, self.temperature, self.reduction = correction, similarity, temperature, reduction
        self.false_negative_margin, self.false_negative_ratio = false_negative_margin, false_negative_ratio
        self.sparse_gradient = sparse_gradient

    def extra_repr(self) -> str:
        return (
            f"correction={self.correction!r}, similarity={self.similarity!r}, temperature={self.temperature}, "
            f"sparse_gradient={self.sparse_gradient}"
        )

    def forward(
        self, queries: Tensor, table: Tensor, positives: Tensor, *, row_negatives: Tensor | None = None,
        row_negatives_log_q: Tensor | None = None, candidate_rows: Pools | None = None, log_q: Pools | None = None,
        positive_log_q: Tensor | None = None, excluded: tuple[Tensor, Tensor] | None = None, row_weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """queries (B, D) or (B, T, D); positives, positive_log_q, row_weight and mask of the same leading axes; row_negatives and
        row_negatives_log_q with an axis K behind them. Where the mask is False, at no cost, nothing is looked at."""
        flat = _flat(queries)
        one = lambda tensor: None if tensor is None else tensor.reshape(-1)
        of_rows = lambda tensor: None if tensor is None else tensor.reshape(-1, tensor.shape[-1])
        return softmax_loss(
            flat, None, one(positives), table=table, similarity=self.similarity, temperature=self.temperature,
            correction=self.correction, log_q=log_q, positive_log_q=one(positive_log_q), candidate_rows=candidate_rows,
            row_negatives=of_rows(row_negatives), row_negatives_log_q=of_rows(row_negatives_log_q), excluded=excluded,
            row_weight=_weights(mask, row_weight, flat.shape[0]), reduction=_reduction(self.reduction, mask),
            false_negative_margin=self.false_negative_margin, false_negative_ratio=self.false_negative_ratio,
            sparse_gradient=self.sparse_gradient,
        )


class FullSoftmaxLoss(nn.Module):
    """Cross-entropy over the whole catalogue: ``F.cross_entropy(queries @ items.T, positives, ignore_index=...)`` without the logits.

    Args:
        similarity, temperature: "dot" and 1.0 are those of F.cross_entropy.
        reduction: "mean" is over the rows that count.
        ignore_index: rows with this positive are left out, at no cost.
    """

    def __init__(
        self, *, similarity: Similarity = "dot", temperature: float = 1.0, reduction: Reduction = "mean", ignore_index: int = -100
    ):
        super().__init__()
        self.similarity, self.temperature, self.reduction, self.ignore_index = similarity, temperature, reduction, ignore_index

    def extra_repr(self) -> str:
        return f"similarity={self.similarity!r}, temperature={self.temperature}, ignore_index={self.ignore_index}"

    def forward(
        self, queries: Tensor, items: Tensor, positives: Tensor, *, mask: Tensor | None = None, row_weight: Tensor | None = None
    ) -> Tensor:
        """queries (B, D) or (B, T, D), positives and mask of the same leading axes, items (N, D)."""
        flat, positives = _flat(queries), positives.reshape(-1)
        counts = positives != self.ignore_index
        if mask is not None:
            _check_mask(mask, flat.shape[0])
            counts = mask.reshape(-1) & counts
        return softmax_loss(
            flat, items, positives, similarity=self.similarity, temperature=self.temperature,
            row_weight=_weights(counts, row_weight, flat.shape[0]), reduction=_reduction(self.reduction, counts),
        )
