"""Arrays as what the core takes: addresses, shapes and strides, checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

# uint16 are the bits of bfloat16, which numpy has no type for.
_EMBEDDINGS = ("float32", "float16", "bfloat16", "uint16")


def array(values: Any, argument: str) -> np.ndarray:
    """numpy's view of an array: of numpy, or of anything with DLPack or the array protocol. Nothing is copied."""
    if hasattr(values, "__cuda_array_interface__"):
        raise ValueError(f"{argument} is in device memory; rule: host memory, as queries")
    if isinstance(values, np.ndarray):
        return values
    if hasattr(values, "__dlpack__") and not hasattr(values, "__array__"):
        return np.from_dlpack(values)
    return np.asarray(values)


def embeddings(values: Any, argument: str) -> np.ndarray:
    """(rows, dim) with the elements of a row side by side, rows at any distance. Copied only where it is not so."""
    found = array(values, argument)
    if found.dtype.name not in _EMBEDDINGS or not found.dtype.isnative:
        raise ValueError(f"{argument} has elements of type {found.dtype}; rule: float32, float16 or bfloat16 (of ml_dtypes, or as uint16)")
    if found.ndim != 2:
        raise ValueError(f"{argument} has shape {found.shape}; rule: two axes, (rows, dim)")
    (rows, dim), (between, within), size = found.shape, found.strides, found.itemsize
    side_by_side = dim <= 1 or within == size
    apart = rows <= 1 or (between >= dim * size and between % size == 0)
    return found if side_by_side and apart and found.flags.aligned else np.ascontiguousarray(found)


def raw_embeddings(found: np.ndarray) -> tuple[int, int, int, int, str]:
    rows, dim = found.shape
    name = "bfloat16" if found.dtype == np.uint16 else found.dtype.name
    return (found.ctypes.data, rows, dim, found.strides[0] // found.itemsize if rows > 1 else dim, name)


def numbers(values: Any, argument: str, dtype: type = np.float32) -> np.ndarray:
    found = array(values, argument)
    if found.ndim != 1 or found.dtype.kind != "f":
        raise ValueError(f"{argument} has shape {found.shape} of {found.dtype}; rule: one axis of floating-point numbers")
    return np.ascontiguousarray(found, dtype)


def integers(values: Any, argument: str) -> np.ndarray:
    """(n) int64; uint64 as its bits."""
    found = array(values, argument)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ValueError(f"{argument} has shape {found.shape} of {found.dtype}; rule: one axis of integers")
    return np.ascontiguousarray(found.view(np.int64) if found.dtype == np.uint64 else found, np.int64)


def raw(found: np.ndarray | None) -> tuple[int, int] | None:
    return None if found is None else (found.ctypes.data, found.size)


def threads(number: int | None) -> int:
    """As many as the process may use."""
    if number is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if number < 1:
        raise ValueError(f"threads is {number}; rule: >= 1, or None for all that the process may use")
    return number


def per_pool(values: Any, pools: int, several: bool, argument: str) -> list[Any]:
    """One value for each pool: `several` says that the candidates came as a list."""
    if values is None:
        return []
    found = list(values) if several else [values]
    if len(found) != pools:
        raise ValueError(f"{argument} has {len(found)} arrays; rule: one for each pool, {pools}")
    return found


def pool_gradients(values: bool | Sequence[bool], pools: int) -> list[bool]:
    """Of each pool, whether it gets a gradient."""
    found = [values] * pools if isinstance(values, bool) else [bool(value) for value in values]
    if len(found) != pools:
        raise ValueError(f"candidate_gradients has {len(found)} values; rule: one for each pool, {pools}")
    return found


def pair(excluded: Any) -> tuple[Any, Any]:
    """Offsets and ids, or None for both."""
    if excluded is None:
        return None, None
    if not isinstance(excluded, (tuple, list)) or len(excluded) != 2:
        raise ValueError(f"excluded is {type(excluded).__name__}; rule: a pair of arrays, (offsets (B + 1), ids)")
    return tuple(excluded)


class Extra:
    """What few batches have: a table with what names its rows, several positives for a row, and a filter of false negatives."""

    def __init__(
        self, table: Any = None, table_ids: Any = None, candidate_rows: Any = None, row_negatives: Any = None,
        row_negatives_log_q: Any = None, positive_offsets: Any = None, positive_weight: Any = None,
        false_negative_margin: float | None = None, false_negative_ratio: float | None = None, table_gradient: bool = True,
    ):
        self.names = [name for name, value in locals().items() if name not in ("self", "table_gradient") and value is not None]
        self.table = None if table is None else embeddings(table, "table")
        self.table_ids = None if table_ids is None else integers(table_ids, "table_ids")
        several = isinstance(candidate_rows, (list, tuple)) and not all(isinstance(row, (int, np.integer)) for row in candidate_rows)
        rows = [] if candidate_rows is None else candidate_rows if several else [candidate_rows]
        named = lambda p: f"candidate_rows[{p}]" if len(rows) > 1 else "candidate_rows"
        self.candidate_rows = [integers(x, named(p)) for p, x in enumerate(rows)]
        self.row_negatives = _of_rows(row_negatives, "row_negatives", "iu", np.int64)
        self.row_negatives_log_q = _of_rows(row_negatives_log_q, "row_negatives_log_q", "f", np.float32)
        self.positive_offsets = None if positive_offsets is None else integers(positive_offsets, "positive_offsets")
        self.positive_weight = None if positive_weight is None else numbers(positive_weight, "positive_weight")
        self.filter = {"false_negative_margin": false_negative_margin, "false_negative_ratio": false_negative_ratio}
        self.table_gradient = table_gradient
        self._check()

    @property
    def given(self) -> bool:
        return bool(self.names)

    def _check(self) -> None:
        for name in ("table_ids", "candidate_rows", "row_negatives"):
            if name in self.names and self.table is None:
                raise ValueError(f"table is missing; rule: {name} are of a table")
        if self.row_negatives_log_q is None:
            return
        if self.row_negatives is None:
            raise ValueError("row_negatives is missing; rule: row_negatives_log_q is theirs")
        if self.row_negatives_log_q.shape != self.row_negatives.shape:
            shape, rule = self.row_negatives_log_q.shape, self.row_negatives.shape
            raise ValueError(f"row_negatives_log_q has shape {shape}; rule: {rule}, that of row_negatives")

    def pools_of_table(self, own: int) -> int:
        """How many pools there are beside those of embeddings of their own."""
        alone = self.table is not None and own == 0 and self.row_negatives is None
        return max(len(self.candidate_rows), 1 if alone else 0)

    def raw(self, own: int, log_q: list[np.ndarray]) -> dict[str, Any]:
        """What the core takes, given how many pools have embeddings of their own, and the log_q of all."""
        pools = [raw(rows) for rows in self.candidate_rows]
        if self.pools_of_table(own) > len(pools) and log_q:
            pools = [None]
        negatives = self.row_negatives
        if negatives is not None:
            negatives = (raw(negatives), negatives.shape[1], raw(self.row_negatives_log_q))
        return {
            "table": None if self.table is None else raw_embeddings(self.table), "table_ids": raw(self.table_ids),
            "table_gradient": self.table_gradient,
            "candidate_rows": [(rows, raw(log_q[own + p]) if log_q else None) for p, rows in enumerate(pools)],
            "row_negatives": negatives, "positive_offsets": raw(self.positive_offsets), "positive_weight": raw(self.positive_weight),
            **self.filter,
        }


def _of_rows(values: Any, argument: str, kinds: str, dtype: type) -> np.ndarray | None:
    """(B, K)"""
    if values is None:
        return None
    found = array(values, argument)
    if found.ndim != 2 or found.dtype.kind not in kinds:
        kind = "integers" if "i" in kinds else "floating-point numbers"
        raise ValueError(f"{argument} has shape {found.shape} of {found.dtype}; rule: two axes, (B, K), of {kind}")
    return np.ascontiguousarray(found, dtype)


class Batch:
    """The arrays of a call, which live as long as this object does, and their addresses as the core takes them."""

    def __init__(
        self, queries: Any, candidates: Any, positives: Any = None, positive_embeddings: Any = None, candidate_ids: Any = None,
        log_q: Any = None, positive_ids: Any = None, positive_log_q: Any = None, excluded: Any = None, row_weight: Any = None,
        candidate_gradients: bool | Sequence[bool] = True, extra: Extra | None = None,
    ):
        self.extra = None if extra is None or not extra.given else extra
        if self.extra is not None and candidates is None:
            candidates = []
        elif candidates is None:
            raise ValueError("candidates is missing; rule: candidates or a table")
        self.several = isinstance(candidates, (list, tuple))
        pools = list(candidates) if self.several else [candidates]
        if not pools and (self.extra is None or self.extra.table is None):
            raise ValueError("candidates is a list of no pools; rule: one pool at least")
        named = lambda argument, p: f"{argument}[{p}]" if len(pools) > 1 else argument
        self.queries = embeddings(queries, "queries")
        self.pools = [embeddings(pool, named("candidates", p)) for p, pool in enumerate(pools)]
        ids = per_pool(candidate_ids, len(pools), self.several, "candidate_ids")
        self.ids = [integers(x, named("candidate_ids", p)) for p, x in enumerate(ids)]
        number = len(pools) + (0 if self.extra is None else self.extra.pools_of_table(len(pools)))
        of_pools = per_pool(log_q, number, isinstance(log_q, (list, tuple)) if self.extra else self.several, "log_q")
        self.log_q = [numbers(x, named("log_q", p)) for p, x in enumerate(of_pools)]
        gradients = pool_gradients(candidate_gradients, len(pools))
        self.positives = None if positives is None else integers(positives, "positives")
        self.positive_embeddings = None if positive_embeddings is None else embeddings(positive_embeddings, "positive_embeddings")
        self.positive_ids = None if positive_ids is None else integers(positive_ids, "positive_ids")
        self.positive_log_q = None if positive_log_q is None else numbers(positive_log_q, "positive_log_q")
        self.row_weight = None if row_weight is None else numbers(row_weight, "row_weight")
        offsets, excluded_ids = pair(excluded)
        self.excluded = None if offsets is None else (integers(offsets, "excluded[0]"), integers(excluded_ids, "excluded[1]"))
        self.raw = (
            raw_embeddings(self.queries),
            [
                (raw_embeddings(pool), raw(self.ids[p]) if ids else None, raw(self.log_q[p]) if of_pools else None, gradients[p])
                for p, pool in enumerate(self.pools)
            ],
            raw(self.positives),
            None if self.positive_embeddings is None else raw_embeddings(self.positive_embeddings),
            raw(self.positive_ids),
            raw(self.positive_log_q),
            None if self.excluded is None else (raw(self.excluded[0]), raw(self.excluded[1])),
            raw(self.row_weight),
        )
        self.raw_extra = None if self.extra is None else self.extra.raw(len(pools), self.log_q)
