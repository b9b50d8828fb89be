"""What a catalogue-parallel call is given, beside the shard: checked, without rows of weight 0, and the same on every rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..torch import _arguments
from ..torch._arguments import _check_length, _rows_of_csr, integers, numbers
from ..torch._functional import _check_constants, _list, _options, _pair, _temperature
from ..torch._ops import refuse_transforms
from ..torch._table_arguments import _FLOATS, _of_rows
from ._agreement import checksum, fingerprint
from ._shards import Shards


ALIKE = ("options", "queries", "positives", "other arguments")
"""What must be the same on every rank."""


@dataclass
class Options:
    """Arguments of `row_statistics` and `softmax_loss` by their names."""

    similarity: str
    temperature: float | Tensor
    correction: str
    reduction: str
    positive_log_q: Tensor | None
    log_q: object
    excluded: tuple | None
    row_weight: Tensor | None
    table_ids: Tensor | None
    candidate_rows: object
    row_negatives: Tensor | None
    row_negatives_log_q: Tensor | None
    positive_offsets: Tensor | None
    positive_weight: Tensor | None
    false_negative_margin: float | None
    false_negative_ratio: float | None
    sparse_gradient: bool


class Problem:
    """Rows that count, their positives as rows of the whole table, and options."""

    def __init__(self, queries: Tensor, shard: Tensor, positives: Tensor, given: Options):
        device = queries.device
        if positives is None:
            raise ValueError("positives is missing; rule: (B) rows of the whole table, or (P) with positive_offsets")
        refuse_transforms(queries, shard, given.temperature)
        _arguments.embeddings(queries, "queries", device), _arguments.embeddings(shard, "table_shard", device)
        if queries.dtype != shard.dtype or queries.shape[1] != shard.shape[1]:
            found, rule = (f"{x.dtype} with {x.shape[1]} columns" for x in (shard, queries))
            raise ValueError(f"table_shard is {found}; rule: {rule}, as queries")
        if queries.numel() == 0:
            raise ValueError(f"queries has shape {tuple(queries.shape)}; rule: rows >= 1 and dim >= 1")
        self.given = given
        self.options = _options(similarity=given.similarity, correction=given.correction, reduction=given.reduction).split()
        self.temperature, self.tau = _temperature(given.temperature)
        self.filtered = given.false_negative_margin is not None or given.false_negative_ratio is not None
        self.table_ids = None if given.table_ids is None else integers(given.table_ids, "table_ids", device)
        if self.table_ids is not None:
            _check_length(self.table_ids, "table_ids", len(shard))
        self._pools(given, device)
        self._rows(queries, positives, given, device)
        self._constants(shard)
        self.alike = self._alike(queries)

    def _pools(self, given: Options, device) -> None:
        _check_constants(
            log_q=_list(given.log_q), positive_log_q=given.positive_log_q, row_weight=given.row_weight,
            row_negatives_log_q=given.row_negatives_log_q, positive_weight=given.positive_weight,
        )
        self.candidate_rows = [integers(rows, "candidate_rows", device) for rows in _list(given.candidate_rows)]
        self.row_negatives = _of_rows(given.row_negatives, "row_negatives", (torch.int64, torch.int32), torch.int64, device)
        self.row_negatives_log_q = _of_rows(given.row_negatives_log_q, "row_negatives_log_q", _FLOATS, torch.float32, device)
        self.whole_shard = not self.candidate_rows and self.row_negatives is None
        self.log_q = [numbers(log_q, "log_q", device) for log_q in _list(given.log_q)]
        pools = 1 if self.whole_shard else len(self.candidate_rows)
        if self.log_q and len(self.log_q) != pools:
            raise ValueError(f"log_q has {len(self.log_q)} tensors; rule: one for each pool, {pools}")
        for p, (rows, log_q) in enumerate(zip(self.candidate_rows, self.log_q)):
            _check_length(log_q, f"log_q[{p}]", len(rows))
        own = self.row_negatives is not None
        if self.row_negatives_log_q is not None and (not own or self.row_negatives_log_q.shape != self.row_negatives.shape):
            raise ValueError(
                f"row_negatives_log_q has shape {tuple(self.row_negatives_log_q.shape)}; rule: row_negatives, and of their shape"
            )
        self.has_log_q = bool(self.log_q) or self.row_negatives_log_q is not None
        if self.has_log_q and ((self.candidate_rows and not self.log_q) or (own and self.row_negatives_log_q is None)):
            raise ValueError("log_q is given for some of the negatives; rule: for all pools and row_negatives, or for none")
        if given.sparse_gradient and self.whole_shard:
            raise ValueError("sparse_gradient is True; rule: candidate_rows or row_negatives, a whole shard has a gradient everywhere")

    def _rows(self, queries, positives, given: Options, device) -> None:
        self.num_rows, self.kept = queries.shape[0], None
        self.positives = integers(positives, "positives", device)
        self.offsets = None if given.positive_offsets is None else integers(given.positive_offsets, "positive_offsets", device)
        self.num_pairs = len(self.positives)
        if self.offsets is None:
            _check_length(self.positives, "positives", self.num_rows)
            if given.positive_weight is not None:
                raise ValueError("positive_weight is given; rule: positive_offsets beside it, a row's one positive has weight 1")
        of_pairs = lambda tensor, name: None if tensor is None else numbers(tensor, name, device)
        self.positive_log_q = of_pairs(given.positive_log_q, "positive_log_q")
        self.positive_weight = of_pairs(given.positive_weight, "positive_weight")
        for name in ("positive_log_q", "positive_weight"):
            if getattr(self, name) is not None:
                _check_length(getattr(self, name), name, self.num_pairs)
        offsets, ids = _pair(given.excluded)
        self.excluded = None
        if offsets is not None:
            self.excluded = (integers(offsets, "excluded[0]", device), integers(ids, "excluded[1]", device))
        self._check_offsets()
        self.row_weight = of_pairs(given.row_weight, "row_weight")
        if self.row_weight is not None:
            _check_length(self.row_weight, "row_weight", self.num_rows)
            self._leave_out(self.row_weight.nonzero().squeeze(1))

    def _check_offsets(self) -> None:
        every = torch.arange(self.num_rows, device=self.positives.device)
        if self.offsets is not None:
            _rows_of_csr(self.offsets, "positive_offsets", self.num_pairs, "positives", every[:0], self.num_rows)
        if self.excluded is not None:
            _rows_of_csr(self.excluded[0], "excluded[0]", len(self.excluded[1]), "excluded[1]", every[:0], self.num_rows)

    def _leave_out(self, kept: Tensor) -> None:
        """Rows of weight 0: what stands in them is not looked at."""
        b = self.num_rows
        if len(kept) == b:
            return
        self.kept, pairs = kept, kept
        if self.offsets is not None:
            self.offsets, pairs = _rows_of_csr(self.offsets, "positive_offsets", self.num_pairs, "positives", kept, b)
        if self.excluded is not None:
            offsets, places = _rows_of_csr(self.excluded[0], "excluded[0]", len(self.excluded[1]), "excluded[1]", kept, b)
            self.excluded = offsets, self.excluded[1][places]
        of = lambda tensor, rows: None if tensor is None else tensor[rows]
        self.positives, self.num_pairs = self.positives[pairs], len(pairs)
        self.positive_log_q, self.positive_weight = of(self.positive_log_q, pairs), of(self.positive_weight, pairs)
        self.row_negatives, self.row_negatives_log_q = of(self.row_negatives, kept), of(self.row_negatives_log_q, kept)
        self.row_weight = self.row_weight[kept]

    def _constants(self, shard: Tensor) -> None:
        """Rules between options that no core sees: it computes statistics, and the loss is computed from these."""
        similarity, correction, reduction = self.options
        if reduction == "weighted_mean" and self.given.row_weight is None:
            raise ValueError('row_weight is missing; rule: reduction="weighted_mean" divides by its sum')
        if correction == "none" and (self.has_log_q or self.positive_log_q is not None):
            raise ValueError("log_q is given; rule: a correction that uses it, or none")
        if correction != "none" and not self.has_log_q:
            raise ValueError(f'log_q is missing; rule: every correction subtracts it, and correction is "{correction}"')
        uses_positive = correction in ("logq", "corrected_logq")
        if self.positive_log_q is not None and not uses_positive:
            raise ValueError('positive_log_q is given; rule: correction="logq" or "corrected_logq", the others use none')
        # Where log_q is of the rows of the table, the positives have theirs.
        self.shares_log_q = uses_positive and self.positive_log_q is None
        if self.shares_log_q and not self.whole_shard:
            raise ValueError(f'positive_log_q is missing; rule: (P), for correction="{correction}" with candidate_rows or row_negatives')
        if self.whole_shard and self.log_q:
            _check_length(self.log_q[0], "log_q", len(shard))
        for name, values, finite in (
            ("positive_log_q", self.positive_log_q, True), ("row_weight", self.row_weight, False),
            ("positive_weight", self.positive_weight, False),
        ):
            wrong = None if values is None else values[~(values.isfinite() if finite else values.isfinite() & (values >= 0))]
            if wrong is not None and len(wrong):
                raise ValueError(f"{name} has an element {float(wrong[0])}; rule: finite" + ("" if finite else " and >= 0"))
        if self.positive_log_q is not None:
            self.check_positive_log_q(self.positive_log_q)

    def check_positive_log_q(self, log_q: Tensor) -> None:
        if self.options[1] == "corrected_logq" and (log_q >= 0.0).any():
            raise ValueError(
                f'positive_log_q has an element {float(log_q.max())}; rule: < 0 with correction="corrected_logq", a probability below 1'
            )

    def _alike(self, queries: Tensor) -> dict[str, int]:
        """By name, what `agree` compares between ranks."""
        g, tensors = self.given, (self.row_weight, self.positive_weight, self.positive_log_q, self.row_negatives, self.row_negatives_log_q)
        shared = [] if self.whole_shard else [*self.candidate_rows, *self.log_q]
        tau = self.tau if self.temperature is None else float(self.temperature.detach())
        gradients = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (queries, self.temperature)]
        options = fingerprint(
            self.options, tau, gradients, queries.dtype, tuple(queries.shape), self.num_pairs, len(self.candidate_rows), self.has_log_q,
            g.table_ids is not None, g.false_negative_margin, g.false_negative_ratio, g.sparse_gradient,
            *(None if x is None else tuple(x.shape) for x in (*tensors, self.offsets, *shared)),
        )
        others = checksum(*tensors, *shared, self.offsets, *(self.excluded or ()))
        return dict(zip(ALIKE, (options, checksum(queries), checksum(self.positives), others)))

    def check_rows(self, shards: Shards) -> None:
        """Against the size of the whole table, which one rank alone does not know. Alike on every rank."""
        if shards.total == 0:
            raise ValueError("table_shard has 0 rows on every rank; rule: at least 1 row on one of them")
        shards.check(self.positives, "positives")
        for p, rows in enumerate(self.candidate_rows):
            shards.check(rows, f"candidate_rows[{p}]")
        if self.row_negatives is not None:
            shards.check(self.row_negatives, "row_negatives", none=-1)
