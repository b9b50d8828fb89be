"""Steps on arrays in device memory of libraries that the package does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _core, _device
from ._arrays import pair, per_pool, pool_gradients
from ._device_extra import Extra
from ._device_views import INT32, INT64, column, embeddings, raw_column, raw_embeddings, stream_of


class Own:
    """Results in memory of the package's own, `DeviceArray`, for arrays of libraries that it does not know."""

    def __init__(self, ordinal: int, stream: int):
        self.raw = (ordinal, stream, False)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return _core.DeviceArray(self.raw, shape, dtype)

    def address(self, array: Any) -> int:
        return array.address

    def in_batch(self, rows: int) -> Any:
        """0, 1, ... as the core takes indices: copied from the host, which waits."""
        return _core.DeviceArray.of_bytes(self.raw, (rows,), "int32", np.arange(rows, dtype=np.int32).tobytes())


class Batch:
    """As `_arrays.Batch`, in device memory: the arrays of a call, which live as long as this object does."""

    def __init__(
        self, queries: Any, candidates: Any, positives: Any = None, positive_embeddings: Any = None, candidate_ids: Any = None,
        log_q: Any = None, positive_ids: Any = None, positive_log_q: Any = None, excluded: Any = None, row_weight: Any = None,
        candidate_gradients: bool | Sequence[bool] = True, extra: Extra | None = None, *, search: bool = False, stream: int | None = None,
    ):
        extra = Extra() if extra is None else extra
        over_table = extra.named["table"] is not None
        if candidates is None:
            if not over_table:
                raise ValueError("candidates is missing; rule: candidates or a table")
            candidates = []
        self.several = isinstance(candidates, (list, tuple))
        self.pools = pools = list(candidates) if self.several else [candidates]
        if not pools and not over_table:
            raise ValueError("candidates is a list of no pools; rule: one pool at least")
        ids = per_pool(candidate_ids, len(pools), self.several, "candidate_ids")
        number = len(pools) + extra.pools_of_table(len(pools))
        of_pools = per_pool(log_q, number, isinstance(log_q, (list, tuple)) if extra.given else self.several, "log_q")
        gradients = pool_gradients(candidate_gradients, len(pools))
        offsets, excluded_ids = pair(excluded)
        named = lambda argument, p, number: f"{argument}[{p}]" if number > 1 else argument
        floats = ("float32",)
        columns = [
            *((x, named("candidate_ids", p, len(pools)), INT64) for p, x in enumerate(ids)),
            *((x, named("log_q", p, number), floats) for p, x in enumerate(of_pools)),
            (positives, "positives", INT32), (positive_ids, "positive_ids", INT64), (positive_log_q, "positive_log_q", floats),
            (row_weight, "row_weight", floats), (offsets, "excluded[0]", ("int64",)), (excluded_ids, "excluded[1]", INT64),
        ]
        stream = stream_of([queries, *pools, positive_embeddings, *extra.arrays(), *(values for values, *_ in columns)], stream)
        matrices = [(pool, named("candidates", p, len(pools))) for p, pool in enumerate(pools)]
        matrices = [(queries, "queries"), *matrices, (positive_embeddings, "positive_embeddings")]
        matrices = [None if values is None else embeddings(values, argument, stream) for values, argument in matrices]
        columns = [None if values is None else column(allowed)(values, argument, stream) for values, argument, allowed in columns]
        self.views = [view for view in (*matrices, *columns, *extra.views(stream)) if view is not None]
        others = {view.ordinal for view in self.views if view.ordinal is not None} - {matrices[0].ordinal}
        if others:
            raise ValueError(f"an array is on cuda:{others.pop()}; rule: cuda:{matrices[0].ordinal}, the device of queries")
        self.place = Own(matrices[0].ordinal or 0, stream)
        queries, *pools, positive_embeddings = (None if view is None else raw_embeddings(view) for view in matrices)
        columns = [raw_column(view) for view in columns]
        ids, log_q, columns = columns[: len(ids)], columns[len(ids) : len(ids) + len(of_pools)], columns[len(ids) + len(of_pools) :]
        positives, positive_ids, positive_log_q, row_weight, offsets, excluded_ids = columns
        if positives is None and positive_embeddings is None and not search and not over_table:
            self.in_batch = self.place.in_batch(queries[1])
            positives = (self.in_batch.address, queries[1])
        first = lambda values, p: values[p] if values else None
        self.raw = (
            queries, [(pool, first(ids, p), first(log_q, p), gradients[p]) for p, pool in enumerate(pools)], positives,
            positive_embeddings, positive_ids, positive_log_q, None if offsets is None else (offsets, excluded_ids), row_weight,
        )
        self.raw_extra = extra.raw(len(pools), log_q) if extra.given else None
        self.rows, self.dim, self.num_pairs = queries[1], queries[2], _device.num_pairs(self.raw)


def _wanted(batch: Batch, gradients: bool, moments: bool, rank: bool) -> dict[str, tuple[tuple[int, ...], str]]:
    of_rows, of_pairs = {"lse": "float64", "num_negatives": "int64"}, {"positive": "float64"}
    if moments:
        of_rows |= {"expected_score": "float64", "entropy": "float64"}
    if rank:
        of_pairs |= {"above": "int64", "ties": "int64"}
    wanted = {name: ((batch.rows,), dtype) for name, dtype in of_rows.items()}
    wanted |= {name: ((batch.num_pairs,), dtype) for name, dtype in of_pairs.items()}
    return wanted | {"expected_negative": ((batch.rows, batch.dim), "float32")} if gradients else wanted


def compute(batch: Batch, loss: tuple, requested: tuple[bool, bool, bool], row_sparse: bool = False) -> tuple:
    """What `_core.compute` returns of host memory, in arrays of the device; the gradients with that of the table."""
    gradients, moments, rank = requested
    symmetric = loss[4]
    results = {"loss": ((batch.rows,), "float64"), "probability": ((batch.num_pairs,), "float64")}
    wanted = _wanted(batch, gradients and not symmetric, moments, rank) | results
    places = _device.gradient_places(batch.place, batch.raw, batch.raw_extra, row_sparse) if gradients else None
    found = _device.compute(batch.place, batch.raw, loss, wanted, places, batch.raw_extra)
    return found["total"], found["loss"], found["probability"], _statistics(found), None if places is None else _gradients(places)


def statistics(batch: Batch, loss: tuple, requested: tuple[bool, bool, bool]) -> tuple:
    return _statistics(_device.compute(batch.place, batch.raw, loss, _wanted(batch, *requested), extra=batch.raw_extra))


def gradients(batch: Batch, loss: tuple, found: Any, d_lse: Any, d_positive: Any, row_sparse: bool = False) -> tuple:
    """`found`: lse, num_negatives and expected_negative of `statistics`."""
    stream, f64 = batch.place.raw[1], column(("float64",))
    upstream = [
        f64(found.lse, "statistics.lse", stream), column(INT64)(found.num_negatives, "statistics.num_negatives", stream),
        embeddings(found.expected_negative, "statistics.expected_negative", stream),
        f64(d_lse, "d_lse", stream), f64(d_positive, "d_positive", stream),
    ]
    rows = (batch.rows,)
    for view, argument, shape in zip(upstream, _UPSTREAM, (rows, rows, (batch.rows, batch.dim), rows, (batch.num_pairs,))):
        if view.shape != shape:
            raise ValueError(f"{argument} has shape {view.shape}; rule: {shape}")
    return _gradients(_device.gradients(batch.place, batch.raw, loss, upstream, batch.raw_extra, row_sparse))


_UPSTREAM = ("statistics.lse", "statistics.num_negatives", "statistics.expected_negative", "d_lse", "d_positive")


def top_k(batch: Batch, similarity: str, k: int) -> tuple[Any, Any]:
    """int32 indices, unsigned, and scores."""
    return _device.top_k(batch.place, batch.raw, similarity, k)


def hardest_negatives(batch: Batch, similarity: str, k: int) -> tuple[Any, Any]:
    """As `top_k`."""
    return _device.hardest_negatives(batch.place, batch.raw, batch.raw_extra, similarity, k)


def _statistics(found: dict[str, Any]) -> tuple:
    moments = (found["expected_score"], found["entropy"]) if "entropy" in found else None
    rank = (found["above"], found["ties"]) if "above" in found else None
    return found["lse"], found["positive"], found["num_negatives"], moments, rank, found.get("expected_negative")


def _gradients(places: dict[str, Any]) -> tuple:
    return (places["d_queries"], places["d_candidates"], places["d_positive_embeddings"], places["d_temperature"]), places["d_table"]
