"""Arrays as what the core takes: addresses, shapes and strides, checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

_EMBEDDINGS = ("float32", "float16", "bfloat16")


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
        raise ValueError(f"{argument} has elements of type {found.dtype}; rule: float32, float16 or (of ml_dtypes) bfloat16")
    if found.ndim != 2:
        raise ValueError(f"{argument} has shape {found.shape}; rule: two axes, (rows, dim)")
    (rows, dim), (between, within), size = found.shape, found.strides, found.itemsize
    side_by_side = dim <= 1 or within == size
    apart = rows <= 1 or (between >= dim * size and between % size == 0)
    return found if side_by_side and apart and found.flags.aligned else np.ascontiguousarray(found)


def raw_embeddings(found: np.ndarray) -> tuple[int, int, int, int, str]:
    rows, dim = found.shape
    return (found.ctypes.data, rows, dim, found.strides[0] // found.itemsize if rows > 1 else dim, found.dtype.name)


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


class Batch:
    """The arrays of a call, which live as long as this object does, and their addresses as the core takes them."""

    def __init__(
        self, queries: Any, candidates: Any, positives: Any = None, positive_embeddings: Any = None, candidate_ids: Any = None,
        log_q: Any = None, positive_ids: Any = None, positive_log_q: Any = None, excluded: Any = None, row_weight: Any = None,
        candidate_gradients: bool | Sequence[bool] = True,
    ):
        self.several = isinstance(candidates, (list, tuple))
        pools = list(candidates) if self.several else [candidates]
        if not pools:
            raise ValueError("candidates is a list of no pools; rule: one pool at least")
        named = lambda argument, p: f"{argument}[{p}]" if len(pools) > 1 else argument
        self.queries = embeddings(queries, "queries")
        self.pools = [embeddings(pool, named("candidates", p)) for p, pool in enumerate(pools)]
        ids = per_pool(candidate_ids, len(pools), self.several, "candidate_ids")
        self.ids = [integers(x, named("candidate_ids", p)) for p, x in enumerate(ids)]
        of_pools = per_pool(log_q, len(pools), self.several, "log_q")
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
