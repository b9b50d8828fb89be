"""Tensors as what the core takes: addresses, shapes and strides, checked; and rows of weight 0 left out."""

import torch
from torch import Tensor

from .. import DeviceUnavailable

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def on_cpu(tensor: Tensor, argument: str) -> None:
    """Refuses tensors of other devices, by name."""
    if tensor.device.type != "cpu":
        raise DeviceUnavailable(
            f"{argument} is on {tensor.device}; rule: a CPU tensor. This build computes on the CPU: the crate's CUDA kernels "
            "are not reached from Python yet (python/README.md). Move the tensors with .cpu(), or call the Rust crate"
        )


def embeddings(tensor: Tensor, argument: str) -> Tensor:
    """(rows, dim) as the core reads it: elements of a row side by side, rows at any distance. Copied only where it is not so."""
    on_cpu(tensor, argument)
    if tensor.dtype not in _NAMES:
        raise ValueError(f"{argument} has elements of type {tensor.dtype}; rule: torch.float32, float16 or bfloat16")
    if tensor.layout != torch.strided:
        raise ValueError(f"{argument} has the layout {tensor.layout}; rule: torch.strided")
    if tensor.dim() != 2:
        raise ValueError(f"{argument} has shape {tuple(tensor.shape)}; rule: two axes, (rows, dim)")
    rows, dim = tensor.shape
    side_by_side = dim <= 1 or tensor.stride(1) == 1
    apart = rows <= 1 or tensor.stride(0) >= dim
    tensor = tensor if side_by_side and apart else tensor.contiguous()
    # A lazy negative or conjugate view has its elements elsewhere.
    return tensor.resolve_neg()


def raw_embeddings(tensor: Tensor) -> tuple[int, int, int, int, str]:
    rows, dim = tensor.shape
    stride = tensor.stride(0) if rows > 1 else dim
    return (tensor.data_ptr(), rows, dim, stride, _NAMES[tensor.dtype])


def numbers(tensor: Tensor, argument: str) -> Tensor:
    """(n) float32."""
    on_cpu(tensor, argument)
    if tensor.dim() != 1 or not tensor.dtype.is_floating_point:
        raise ValueError(f"{argument} has shape {tuple(tensor.shape)} of {tensor.dtype}; rule: one axis of floating-point numbers")
    return tensor.to(torch.float32).contiguous()


def integers(tensor: Tensor, argument: str) -> Tensor:
    """(n) int64."""
    on_cpu(tensor, argument)
    if tensor.dim() != 1 or tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{argument} has shape {tuple(tensor.shape)} of {tensor.dtype}; rule: one axis of int32 or int64")
    return tensor.to(torch.int64).contiguous()


def raw(tensor: Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.numel())


def _optional(convert, tensor, argument):
    return None if tensor is None else convert(tensor, argument)


def _per_pool(convert, tensors, argument):
    """Of one pool's tensor, or of a list of them."""
    if tensors is None:
        return []
    tensors = [tensors] if isinstance(tensors, Tensor) else tensors
    return [convert(tensor, argument if len(tensors) == 1 else f"{argument}[{p}]") for p, tensor in enumerate(tensors)]


class Arguments:
    """The tensors of a call, which live as long as this object does, and their addresses.

    Rows of weight 0 are left out before anything is scored: `kept` are the others, None where all are. Their positives, ids and
    embeddings are not looked at, so that padding may hold anything.
    """

    def __init__(
        self, queries, candidates, positives, positive_embeddings, candidate_ids, log_q, positive_ids, positive_log_q,
        excluded_offsets, excluded_ids, row_weight, *, all_rows=False,
    ):
        self.queries = embeddings(queries, "queries")
        self.candidates = _per_pool(embeddings, candidates, "candidates")
        self.candidate_ids = _per_pool(integers, candidate_ids, "candidate_ids")
        self.log_q = _per_pool(numbers, log_q, "log_q")
        self.positives = _optional(integers, positives, "positives")
        self.positive_embeddings = _optional(embeddings, positive_embeddings, "positive_embeddings")
        self.positive_ids = _optional(integers, positive_ids, "positive_ids")
        self.positive_log_q = _optional(numbers, positive_log_q, "positive_log_q")
        self.excluded = None
        if excluded_offsets is not None:
            self.excluded = (integers(excluded_offsets, "excluded[0]"), integers(excluded_ids, "excluded[1]"))
        self.row_weight = _optional(numbers, row_weight, "row_weight")
        self.num_rows = self.queries.shape[0]
        self.kept = None
        if self.row_weight is not None and not all_rows:
            self._leave_out_rows()

    def _leave_out_rows(self):
        b = self.num_rows
        _check_length(self.row_weight, "row_weight", b)
        # A NaN is not 0: the core refuses it.
        kept = self.row_weight.nonzero().squeeze(1)
        if len(kept) == b:
            return
        self.kept = kept
        if self.positives is None and self.positive_embeddings is None:
            if self.candidates[0].shape[0] < b:
                raise ValueError(
                    f"candidates has {self.candidates[0].shape[0]} rows; rule: positives=None needs a candidate for each of {b} "
                    "queries in the first pool"
                )
            self.positives = kept
        else:
            self.positives = self._of_kept(self.positives, "positives")
        self.queries = self.queries[kept]
        self.positive_embeddings = self._of_kept(self.positive_embeddings, "positive_embeddings")
        self.positive_ids = self._of_kept(self.positive_ids, "positive_ids")
        self.positive_log_q = self._of_kept(self.positive_log_q, "positive_log_q")
        self.row_weight = self.row_weight[kept]
        if self.excluded is not None:
            self.excluded = _rows_of_csr(*self.excluded, kept, b)

    def _of_kept(self, tensor, argument):
        if tensor is None:
            return None
        _check_length(tensor, argument, self.num_rows)
        return tensor[self.kept]

    def raw(self, gradients=None):
        """What the core calls a batch. `gradients`: of each pool, whether it gets one; None for all."""
        pools = []
        for p, tensor in enumerate(self.candidates):
            ids = raw(self.candidate_ids[p]) if self.candidate_ids else None
            log_q = raw(self.log_q[p]) if self.log_q else None
            pools.append((raw_embeddings(tensor), ids, log_q, gradients is None or gradients[p]))
        positive_embeddings = None if self.positive_embeddings is None else raw_embeddings(self.positive_embeddings)
        return (
            raw_embeddings(self.queries), pools, raw(self.positives), positive_embeddings, raw(self.positive_ids),
            raw(self.positive_log_q), self.excluded and (raw(self.excluded[0]), raw(self.excluded[1])), raw(self.row_weight),
        )

    def spread(self, kept: Tensor, dim: int) -> Tensor:
        """Values of the kept rows along axis `dim`, as values of all rows: 0 for those that were left out."""
        if self.kept is None:
            return kept
        shape = list(kept.shape)
        shape[dim] = self.num_rows
        return kept.new_zeros(shape).index_copy_(dim, self.kept, kept)

    def gather(self, of_all: Tensor, dim: int) -> Tensor:
        """The inverse of `spread`."""
        return of_all.contiguous() if self.kept is None else of_all.index_select(dim, self.kept).contiguous()


def _check_length(tensor, argument, length):
    if tensor.shape[0] != length:
        raise ValueError(f"{argument} has length {tensor.shape[0]}; rule: length {length}")


def _rows_of_csr(offsets, ids, rows, num_rows):
    """Offsets and ids of some rows alone."""
    _check_length(offsets, "excluded[0]", num_rows + 1)
    counts = offsets.diff()
    if offsets[0] != 0 or (counts < 0).any() or offsets[-1] != len(ids):
        raise ValueError(f"excluded[0] is {offsets.tolist()}; rule: from 0 to {len(ids)}, the length of excluded[1], and never falling")
    counts = counts[rows]
    ends = counts.cumsum(0)
    within = torch.arange(int(counts.sum())) - (ends - counts).repeat_interleave(counts)
    return torch.cat([ends.new_zeros(1), ends]), ids[within + offsets[rows].repeat_interleave(counts)]
