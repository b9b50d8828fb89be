"""Arrays in device memory of libraries that the package does not know, by ``__cuda_array_interface__`` or DLPack, and steps on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _core, _device
from ._arrays import pair, per_pool, pool_gradients


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


_CUDA, _CUDA_MANAGED = 2, 13  # DLDeviceType


def on_device(values: Any) -> bool:
    """Whether an array says that it is in a CUDA device's memory."""
    if isinstance(values, np.ndarray):
        return False
    if hasattr(values, "__dlpack_device__"):
        return values.__dlpack_device__()[0] in (_CUDA, _CUDA_MANAGED)
    return hasattr(values, "__cuda_array_interface__")


def stream_of(arrays: Sequence[Any], stream: int | None) -> int:
    """The stream that a call runs on: the one that is asked for, else the one that the arrays name, else the legacy default one."""
    if stream is not None:
        return stream
    # DLPack names none: there, the producer is told the one that has to wait.
    plain = [values for values in arrays if values is not None and not hasattr(values, "__dlpack_device__") and on_device(values)]
    named = {values.__cuda_array_interface__.get("stream") for values in plain} - {None}
    if len(named) > 1:
        raise ValueError(f"the arrays name the streams {sorted(named)}; rule: one of them, or the argument stream")
    return named.pop() if named else 0


class View:
    """An array in device memory: what the core needs of it. It keeps the array."""

    def __init__(self, values: Any, argument: str, stream: int):
        if not on_device(values):
            raise ValueError(f"{argument} is in host memory; rule: device memory, as queries")
        described = _of_dlpack(values, argument, stream) if hasattr(values, "__dlpack__") else _of_interface(values)
        self.address, self.shape, strides, self.dtype, self.ordinal, self.owner = described
        if any(n == 0 for n in self.shape):
            self.strides = tuple(strides or (0,) * len(self.shape))
            return
        contiguous = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        self.strides = tuple(contiguous if strides is None else strides)
        if self.ordinal is None:
            self.ordinal = _core.device_of(self.address)


def _of_interface(values: Any) -> tuple:
    """Address, shape, strides in elements or None, type, and the device, which this interface does not say."""
    interface = values.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise ValueError("an array has a mask; rule: none")
    dtype = np.dtype(interface["typestr"])
    if not dtype.isnative:
        raise ValueError(f"an array has elements of type {dtype}, which are not this machine's; rule: native byte order")
    strides = interface.get("strides")
    if strides is not None and any(between % dtype.itemsize for between in strides):
        raise ValueError(f"an array has strides of {strides} bytes; rule: multiples of an element")
    strides = None if strides is None else [between // dtype.itemsize for between in strides]
    return interface["data"][0], tuple(interface["shape"]), strides, dtype.name, None, values


def _of_dlpack(values: Any, argument: str, stream: int) -> tuple:
    # The producer makes this stream wait for its own work; 1 is the legacy default stream there.
    capsule = values.__dlpack__(stream=stream or 1)
    address, kind, ordinal, shape, strides, dtype = _core.dlpack(capsule)
    if kind not in (_CUDA, _CUDA_MANAGED):
        raise ValueError(f"{argument} is on a device of DLPack's type {kind}; rule: CUDA")
    return address, tuple(shape), strides, dtype, ordinal, capsule


def embeddings(values: Any, argument: str, stream: int) -> View:
    """(rows, dim), elements of a row side by side, rows at any distance. Nothing is copied: what does not fit is an error."""
    found = View(values, argument, stream)
    if found.dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"{argument} has elements of type {found.dtype}; rule: float32, float16 or bfloat16")
    if len(found.shape) != 2:
        raise ValueError(f"{argument} has shape {found.shape}; rule: two axes, (rows, dim)")
    (rows, dim), (between, within) = found.shape, found.strides
    if (dim > 1 and within != 1) or (rows > 1 and between < dim):
        raise ValueError(f"{argument} has strides {found.strides}; rule: elements of a row side by side, in device memory")
    return found


def column(values: Any, argument: str, stream: int, allowed: Sequence[str]) -> View:
    """One axis of a type, contiguous."""
    found = View(values, argument, stream)
    if len(found.shape) != 1 or found.dtype not in allowed:
        rule = f"one axis of {' or '.join(allowed)}, in device memory"
        raise ValueError(f"{argument} has shape {found.shape} of {found.dtype}; rule: {rule}")
    if found.shape[0] > 1 and found.strides[0] != 1:
        raise ValueError(f"{argument} has elements {found.strides[0]} apart; rule: side by side, in device memory")
    return found


_INT64, _INT32 = ("int64", "uint64"), ("int32", "uint32")


class Batch:
    """As `_arrays.Batch`, in device memory: the arrays of a call, which live as long as this object does."""

    def __init__(
        self, queries: Any, candidates: Any, positives: Any = None, positive_embeddings: Any = None, candidate_ids: Any = None,
        log_q: Any = None, positive_ids: Any = None, positive_log_q: Any = None, excluded: Any = None, row_weight: Any = None,
        candidate_gradients: bool | Sequence[bool] = True, *, search: bool = False, stream: int | None = None,
    ):
        self.several = isinstance(candidates, (list, tuple))
        pools = list(candidates) if self.several else [candidates]
        if not pools:
            raise ValueError("candidates is a list of no pools; rule: one pool at least")
        ids = per_pool(candidate_ids, len(pools), self.several, "candidate_ids")
        of_pools = per_pool(log_q, len(pools), self.several, "log_q")
        gradients = pool_gradients(candidate_gradients, len(pools))
        offsets, excluded_ids = pair(excluded)
        named = lambda argument, p: f"{argument}[{p}]" if len(pools) > 1 else argument
        columns = [
            *((x, named("candidate_ids", p), _INT64) for p, x in enumerate(ids)),
            *((x, named("log_q", p), ("float32",)) for p, x in enumerate(of_pools)),
            (positives, "positives", _INT32), (positive_ids, "positive_ids", _INT64), (positive_log_q, "positive_log_q", ("float32",)),
            (row_weight, "row_weight", ("float32",)), (offsets, "excluded[0]", ("int64",)), (excluded_ids, "excluded[1]", _INT64),
        ]
        stream = stream_of([queries, *pools, positive_embeddings, *(values for values, *_ in columns)], stream)
        matrices = [(pool, named("candidates", p)) for p, pool in enumerate(pools)]
        matrices = [(queries, "queries"), *matrices, (positive_embeddings, "positive_embeddings")]
        matrices = [None if values is None else embeddings(values, argument, stream) for values, argument in matrices]
        columns = [None if values is None else column(values, argument, stream, allowed) for values, argument, allowed in columns]
        self.views = [view for view in (*matrices, *columns) if view is not None]
        others = {view.ordinal for view in self.views if view.ordinal is not None} - {matrices[0].ordinal}
        if others:
            raise ValueError(f"an array is on cuda:{others.pop()}; rule: cuda:{matrices[0].ordinal}, the device of queries")
        self.place = Own(matrices[0].ordinal or 0, stream)
        queries, *pools, positive_embeddings = (None if view is None else raw_embeddings(view) for view in matrices)
        columns = [None if view is None else (view.address, view.shape[0]) for view in columns]
        ids, log_q, columns = columns[: len(ids)], columns[len(ids) : len(ids) + len(of_pools)], columns[len(ids) + len(of_pools) :]
        positives, positive_ids, positive_log_q, row_weight, offsets, excluded_ids = columns
        if positives is None and positive_embeddings is None and not search:
            self.in_batch = self.place.in_batch(queries[1])
            positives = (self.in_batch.address, queries[1])
        first = lambda values, p: values[p] if values else None
        self.raw = (
            queries, [(pool, first(ids, p), first(log_q, p), gradients[p]) for p, pool in enumerate(pools)], positives,
            positive_embeddings, positive_ids, positive_log_q, None if offsets is None else (offsets, excluded_ids), row_weight,
        )
        self.rows, self.dim = queries[1], queries[2]


def raw_embeddings(found: View) -> tuple[int, int, int, int, str]:
    rows, dim = found.shape
    return (found.address, rows, dim, found.strides[0] if rows > 1 else dim, found.dtype)


def _wanted(batch: Batch, gradients: bool, moments: bool, rank: bool) -> dict[str, tuple[tuple[int, ...], str]]:
    names = {"lse": "float64", "positive": "float64", "num_negatives": "int64"}
    if moments:
        names |= {"expected_score": "float64", "entropy": "float64"}
    if rank:
        names |= {"above": "int64", "ties": "int64"}
    wanted = {name: ((batch.rows,), dtype) for name, dtype in names.items()}
    return wanted | {"expected_negative": ((batch.rows, batch.dim), "float32")} if gradients else wanted


def compute(batch: Batch, loss: tuple, requested: tuple[bool, bool, bool]) -> tuple:
    """What `_core.compute` returns of host memory, in arrays of the device."""
    gradients, moments, rank = requested
    symmetric = loss[4]
    of_rows = {name: ((batch.rows,), "float64") for name in ("loss", "probability")}
    wanted = _wanted(batch, gradients and not symmetric, moments, rank) | of_rows
    places = _device.gradient_places(batch.place, batch.raw) if gradients else None
    found = _device.compute(batch.place, batch.raw, loss, wanted, places)
    return found["total"], found["loss"], found["probability"], _statistics(found), None if places is None else _gradients(places)


def statistics(batch: Batch, loss: tuple, requested: tuple[bool, bool, bool]) -> tuple:
    return _statistics(_device.compute(batch.place, batch.raw, loss, _wanted(batch, *requested)))


def gradients(batch: Batch, loss: tuple, found: Any, d_lse: Any, d_positive: Any) -> tuple:
    """`found`: lse, num_negatives and expected_negative of `statistics`."""
    stream, f64 = batch.place.raw[1], ("float64",)
    upstream = [
        column(found.lse, "statistics.lse", stream, f64), column(found.num_negatives, "statistics.num_negatives", stream, _INT64),
        embeddings(found.expected_negative, "statistics.expected_negative", stream),
        column(d_lse, "d_lse", stream, f64), column(d_positive, "d_positive", stream, f64),
    ]
    for view, argument in zip(upstream, _UPSTREAM):
        shape = (batch.rows, batch.dim)[: len(view.shape)]
        if view.shape != shape:
            raise ValueError(f"{argument} has shape {view.shape}; rule: {shape}")
    return _gradients(_device.gradients(batch.place, batch.raw, loss, upstream))


_UPSTREAM = ("statistics.lse", "statistics.num_negatives", "statistics.expected_negative", "d_lse", "d_positive")


def top_k(batch: Batch, similarity: str, k: int) -> tuple[Any, Any]:
    """int32 indices, unsigned, and scores."""
    return _device.top_k(batch.place, batch.raw, similarity, k)


def _statistics(found: dict[str, Any]) -> tuple:
    moments = (found["expected_score"], found["entropy"]) if "entropy" in found else None
    rank = (found["above"], found["ties"]) if "above" in found else None
    return found["lse"], found["positive"], found["num_negatives"], moments, rank, found.get("expected_negative")


def _gradients(places: dict[str, Any]) -> tuple:
    return places["d_queries"], places["d_candidates"], places["d_positive_embeddings"], places["d_temperature"]
