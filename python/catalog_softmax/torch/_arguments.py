"""Tensors as what the core takes: addresses, shapes and strides, checked; and rows of weight 0 left out."""

import contextlib

import torch
from torch import Tensor

from . import _cuda

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


_CPU = torch.device("cpu")


def _on(device: torch.device, tensor: Tensor, argument: str) -> None:
    """Refuses tensors of other devices, by name."""
    if tensor.device != device:
        raise ValueError(f"{argument} is on {tensor.device}; rule: {device}, as the rest of the call")


def embeddings(tensor: Tensor, argument: str, device: torch.device = _CPU) -> Tensor:
    """(rows, dim) as the core reads it: elements of a row side by side, rows at any distance. Copied only where it is not so."""
    _on(device, tensor, argument)
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


def _address(tensor: Tensor, place: _cuda.Place | None) -> int:
    return tensor.data_ptr() if place is None else place.address(tensor)


def raw_embeddings(tensor: Tensor, place: _cuda.Place | None = None) -> tuple[int, int, int, int, str]:
    rows, dim = tensor.shape
    stride = tensor.stride(0) if rows > 1 else dim
    return (_address(tensor, place), rows, dim, stride, _NAMES[tensor.dtype])


def numbers(tensor: Tensor, argument: str, device: torch.device = _CPU) -> Tensor:
    """(n) float32."""
    _on(device, tensor, argument)
    if tensor.dim() != 1 or not tensor.dtype.is_floating_point:
        raise ValueError(f"{argument} has shape {tuple(tensor.shape)} of {tensor.dtype}; rule: one axis of floating-point numbers")
    return tensor.to(torch.float32).contiguous()


def integers(tensor: Tensor, argument: str, device: torch.device = _CPU) -> Tensor:
    """(n) int64."""
    _on(device, tensor, argument)
    if tensor.dim() != 1 or tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{argument} has shape {tuple(tensor.shape)} of {tensor.dtype}; rule: one axis of int32 or int64")
    return tensor.to(torch.int64).contiguous()


def raw(tensor: Tensor | None, place: _cuda.Place | None = None) -> tuple[int, int] | None:
    return None if tensor is None else (_address(tensor, place), tensor.numel())


def _optional(convert, tensor, argument, device):
    return None if tensor is None else convert(tensor, argument, device)


def _per_pool(convert, tensors, argument, device):
    """Of one pool's tensor, or of a list of them."""
    if tensors is None:
        return []
    tensors = [tensors] if isinstance(tensors, Tensor) else tensors
    names = [argument if len(tensors) == 1 else f"{argument}[{p}]" for p in range(len(tensors))]
    return [convert(tensor, name, device) for tensor, name in zip(tensors, names)]


class Arguments:
    """The tensors of a call, which live as long as this object does, and their addresses.

    On the CPU, rows of weight 0 are left out before anything is scored: `kept` are the others, None where all are. On a device, which
    the host does not wait for, they are computed with the rest, and `absent` says which they are. Either way their positives, ids and
    embeddings do not matter, so that padding may hold anything.
    """

    def __init__(
        self, queries, candidates, positives, positive_embeddings, candidate_ids, log_q, positive_ids, positive_log_q,
        excluded_offsets, excluded_ids, row_weight, *, all_rows=False, search=False,
    ):
        device = queries.device
        self.place = _cuda.place_of(queries, "queries")
        self.queries = embeddings(queries, "queries", device)
        self.candidates = _per_pool(embeddings, candidates, "candidates", device)
        self.candidate_ids = _per_pool(integers, candidate_ids, "candidate_ids", device)
        self.log_q = _per_pool(numbers, log_q, "log_q", device)
        self.positives = _optional(integers, positives, "positives", device)
        self.positive_embeddings = _optional(embeddings, positive_embeddings, "positive_embeddings", device)
        self.positive_ids = _optional(integers, positive_ids, "positive_ids", device)
        self.positive_log_q = _optional(numbers, positive_log_q, "positive_log_q", device)
        self.excluded = None
        if excluded_offsets is not None:
            self.excluded = (integers(excluded_offsets, "excluded[0]", device), integers(excluded_ids, "excluded[1]", device))
        self.row_weight = _optional(numbers, row_weight, "row_weight", device)
        self.num_rows = self.queries.shape[0]
        self.kept = self.absent = None
        if self.row_weight is not None and not all_rows:
            _check_length(self.row_weight, "row_weight", self.num_rows)
            if self.place is None:
                self._leave_out_rows()
            else:
                self.absent = self.row_weight == 0.0
        if self.place is not None and not search:
            self._for_device()

    def guard(self):
        """To be entered around calls of the core: the device that these tensors are on is then the current one."""
        return contextlib.nullcontext() if self.place is None else self.place.guard()

    def _for_device(self):
        """Positives as the device takes them: 32 bits, and what is out of range stays so."""
        b, n = self.num_rows, sum(tensor.shape[0] for tensor in self.candidates)
        if self.positives is None and self.positive_embeddings is None:
            self._check_in_batch()
            self.positives = torch.arange(b, dtype=torch.int32, device=self.queries.device)
        elif self.positives is not None:
            positives = self.positives.clamp(-1, n)
            if self.absent is not None:
                _check_length(positives, "positives", b)
                positives = positives.masked_fill(self.absent, 0)
            self.positives = positives.to(torch.int32)
        if self.absent is not None and self.positive_log_q is not None:
            _check_length(self.positive_log_q, "positive_log_q", b)
            self.positive_log_q = self.positive_log_q.masked_fill(self.absent, -1.0)

    def _check_in_batch(self):
        if self.candidates[0].shape[0] < self.num_rows:
            raise ValueError(
                f"candidates has {self.candidates[0].shape[0]} rows; rule: positives=None needs a candidate for each of "
                f"{self.num_rows} queries in the first pool"
            )

    def _leave_out_rows(self):
        b = self.num_rows
        # A NaN is not 0: the core refuses it.
        kept = self.row_weight.nonzero().squeeze(1)
        if len(kept) == b:
            return
        self.kept = kept
        if self.positives is None and self.positive_embeddings is None:
            self._check_in_batch()
            self.positives = kept
        else:
            self.positives = self._of_kept(self.positives, "positives")
        self.queries = self.queries[kept]
        self.positive_embeddings = self._of_kept(self.positive_embeddings, "positive_embeddings")
        self.positive_ids = self._of_kept(self.positive_ids, "positive_ids")
        self.positive_log_q = self._of_kept(self.positive_log_q, "positive_log_q")
        self.row_weight = self.row_weight[kept]
        if self.excluded is not None:
            offsets, places = _rows_of_csr(self.excluded[0], "excluded[0]", len(self.excluded[1]), "excluded[1]", kept, b)
            self.excluded = offsets, self.excluded[1][places]

    def _of_kept(self, tensor, argument):
        if tensor is None:
            return None
        _check_length(tensor, argument, self.num_rows)
        return tensor[self.kept]

    def raw(self, gradients=None):
        """What the core calls a batch. `gradients`: of each pool, whether it gets one; None for all."""
        place, pools = self.place, []
        for p, tensor in enumerate(self.candidates):
            ids = raw(self.candidate_ids[p], place) if self.candidate_ids else None
            log_q = raw(self.log_q[p], place) if self.log_q else None
            pools.append((raw_embeddings(tensor, place), ids, log_q, gradients is None or gradients[p]))
        positive_embeddings = None if self.positive_embeddings is None else raw_embeddings(self.positive_embeddings, place)
        return (
            raw_embeddings(self.queries, place), pools, raw(self.positives, place), positive_embeddings, raw(self.positive_ids, place),
            raw(self.positive_log_q, place), self.excluded and (raw(self.excluded[0], place), raw(self.excluded[1], place)),
            raw(self.row_weight, place),
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


def _rows_of_csr(offsets, argument, total, of_what, rows, num_rows):
    """Offsets of some rows alone, and the places of their elements among the `total`."""
    _check_length(offsets, argument, num_rows + 1)
    counts = offsets.diff()
    if offsets[0] != 0 or (counts < 0).any() or offsets[-1] != total:
        raise ValueError(f"{argument} is {offsets.tolist()}; rule: from 0 to {total}, the length of {of_what}, and never falling")
    counts = counts[rows]
    ends = counts.cumsum(0)
    within = torch.arange(int(counts.sum())) - (ends - counts).repeat_interleave(counts)
    return torch.cat([ends.new_zeros(1), ends]), within + offsets[rows].repeat_interleave(counts)
