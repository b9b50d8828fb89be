"""Tensors of a batch over a table, with several positives for a row or with a filter, as what the core takes."""

import torch
from torch import Tensor

from . import _arguments
from ._arguments import Arguments, _check_length, _optional, _per_pool, _rows_of_csr, integers, numbers, raw, raw_embeddings

NAMES = ("table", "table_ids", "candidate_rows", "row_negatives", "row_negatives_log_q", "positive_offsets", "positive_weight")
"""What a batch may have beside the eleven arguments of `Arguments`, in the order of the operators."""
FILTERS = ("false_negative_margin", "false_negative_ratio")


class TableArguments(Arguments):
    """`Arguments` with what `NAMES` says, and the filter's two numbers."""

    def __init__(self, batch, extra, margin=None, ratio=None):
        of_batch = dict(zip(NAMES, extra))
        device = batch[0].device
        self.filter = dict(zip(FILTERS, (margin, ratio)))
        self.table = _optional(_arguments.embeddings, of_batch["table"], "table", device)
        self.table_ids = _optional(integers, of_batch["table_ids"], "table_ids", device)
        self.candidate_rows = _per_pool(integers, of_batch["candidate_rows"], "candidate_rows", device)
        self.row_negatives = _of_rows(of_batch["row_negatives"], "row_negatives", (torch.int64, torch.int32), torch.int64, device)
        self.row_negatives_log_q = _of_rows(
            of_batch["row_negatives_log_q"], "row_negatives_log_q", _FLOATS, torch.float32, device
        )
        self.positive_offsets = _optional(integers, of_batch["positive_offsets"], "positive_offsets", device)
        self.positive_weight = _optional(numbers, of_batch["positive_weight"], "positive_weight", device)
        self._check(len(batch[1]))
        self.kept_pairs = self.absent_pairs = None
        self.num_pairs = next((x.shape[0] for x in (batch[2], batch[3]) if x is not None and x.dim() > 0), batch[0].shape[0])
        super().__init__(*batch)

    def _check(self, own_pools):
        if self.table is None:
            for name in ("table_ids", "candidate_rows", "row_negatives"):
                if getattr(self, name) is not None and len(getattr(self, name)) > 0:
                    raise ValueError(f"table is missing; rule: {name} are of a table")
            if own_pools == 0:
                raise ValueError("candidates is missing; rule: candidates or a table")
        if self.row_negatives_log_q is not None:
            if self.row_negatives is None:
                raise ValueError("row_negatives is missing; rule: row_negatives_log_q is theirs")
            if self.row_negatives_log_q.shape != self.row_negatives.shape:
                shape, rule = tuple(self.row_negatives_log_q.shape), tuple(self.row_negatives.shape)
                raise ValueError(f"row_negatives_log_q has shape {shape}; rule: {rule}, that of row_negatives")

    @property
    def whole_table(self):
        return self.table is not None and not self.candidates and not self.candidate_rows and self.row_negatives is None

    def _for_device(self):
        """Rows of the table as the device takes them: 32 bits, and what is out of range stays so. Of a row of weight 0, what it names does
        not matter."""
        b, p = self.num_rows, self.num_pairs
        if self.table is None:
            limit = sum(tensor.shape[0] for tensor in self.candidates)
            if self.positives is None and self.positive_embeddings is None:
                self._check_in_batch()
                self.positives = torch.arange(b, device=self.queries.device)
        else:
            limit = self.table.shape[0]
        rows = lambda tensor: tensor.clamp(-1, limit).to(torch.int32)
        if self.absent is not None:
            self._hide_absent_rows(b, p)
        self.positives = None if self.positives is None else rows(self.positives)
        self.candidate_rows = [rows(tensor) for tensor in self.candidate_rows]
        if self.row_negatives is not None:
            # -1 stands for none, and no other negative number does.
            self.row_negatives = rows(self.row_negatives.masked_fill(self.row_negatives < -1, limit))

    def _hide_absent_rows(self, b, p):
        self.absent_pairs = self.absent
        if self.positive_offsets is not None:
            _check_length(self.positive_offsets, "positive_offsets", b + 1)
            self.absent_pairs = self.absent[row_of_pairs(self.positive_offsets, p)]
        for name, harmless in (("positives", 0), ("positive_log_q", -1.0), ("positive_weight", 0.0)):
            tensor = getattr(self, name)
            if tensor is not None:
                _check_length(tensor, name, p)
                setattr(self, name, tensor.masked_fill(self.absent_pairs, harmless))
        for name, harmless in (("row_negatives", -1), ("row_negatives_log_q", -1.0)):
            tensor = getattr(self, name)
            if tensor is not None:
                _check_length(tensor, name, b)
                setattr(self, name, tensor.masked_fill(self.absent[:, None], harmless))

    def _leave_out_rows(self):
        kept = self.row_weight.nonzero().squeeze(1)
        b = self.num_rows
        if len(kept) == b:
            return
        self.kept = self.kept_pairs = kept
        if self.positive_offsets is not None:
            of_what = "positive_embeddings" if self.positives is None else "positives"
            offsets, places = _rows_of_csr(self.positive_offsets, "positive_offsets", self.num_pairs, of_what, kept, b)
            self.positive_offsets, self.kept_pairs = offsets, places
            self.positive_weight = self._of_kept_pairs(self.positive_weight, "positive_weight")
        if self.positives is None and self.positive_embeddings is None and self.table is None:
            self._check_in_batch()
            self.positives = kept
        else:
            self.positives = self._of_kept_pairs(self.positives, "positives")
        for name in ("positive_embeddings", "positive_ids", "positive_log_q"):
            setattr(self, name, self._of_kept_pairs(getattr(self, name), name))
        for name in ("queries", "row_weight", "row_negatives", "row_negatives_log_q"):
            setattr(self, name, self._of_kept(getattr(self, name), name))
        if self.excluded is not None:
            offsets, places = _rows_of_csr(self.excluded[0], "excluded[0]", len(self.excluded[1]), "excluded[1]", kept, b)
            self.excluded = offsets, self.excluded[1][places]

    def _of_kept_pairs(self, tensor, argument):
        if tensor is None:
            return None
        _check_length(tensor, argument, self.num_pairs)
        return tensor[self.kept_pairs]

    def raw_extra(self, gradient=True):
        """What the core takes beside `raw`. `gradient`: whether the table gets one."""
        own, place = len(self.candidates), self.place
        log_q = [raw(tensor, place) for tensor in self.log_q]
        pools = [raw(rows, place) for rows in self.candidate_rows]
        if self.whole_table and log_q:
            pools = [None]
        of_pools = [(rows, log_q[own + p] if log_q else None) for p, rows in enumerate(pools)]
        negatives = self.row_negatives
        if negatives is not None:
            negatives = (raw(negatives, place), negatives.shape[1], raw(self.row_negatives_log_q, place))
        return {
            "table": None if self.table is None else raw_embeddings(self.table, place), "table_ids": raw(self.table_ids, place),
            "table_gradient": gradient, "candidate_rows": of_pools, "row_negatives": negatives,
            "positive_offsets": raw(self.positive_offsets, place), "positive_weight": raw(self.positive_weight, place), **self.filter,
        }

    def spread_pairs(self, kept: Tensor, dim: int) -> Tensor:
        """As `spread`, of what each positive has."""
        if self.kept_pairs is None:
            return kept
        shape = list(kept.shape)
        shape[dim] = self.num_pairs
        return kept.new_zeros(shape).index_copy_(dim, self.kept_pairs, kept)

    def gather_pairs(self, of_all: Tensor, dim: int) -> Tensor:
        """The inverse of `spread_pairs`."""
        return of_all.contiguous() if self.kept_pairs is None else of_all.index_select(dim, self.kept_pairs).contiguous()


_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def row_of_pairs(offsets, pairs):
    """(P): the row of each positive. In bounds whatever the offsets are, for a device, where a call of PyTorch's that finds them out of
    order would stop everything."""
    places = torch.arange(pairs, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), places, right=True).clamp(max=max(len(offsets) - 2, 0))


def _of_rows(tensor, argument, dtypes, dtype, device):
    """(B, K)"""
    if tensor is None:
        return None
    _arguments._on(device, tensor, argument)
    if tensor.dim() != 2 or tensor.dtype not in dtypes:
        kind = "int32 or int64" if torch.int64 in dtypes else "floating-point numbers"
        raise ValueError(f"{argument} has shape {tuple(tensor.shape)} of {tensor.dtype}; rule: two axes, (B, K), of {kind}")
    return tensor.to(dtype).contiguous()
