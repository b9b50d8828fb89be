"""Steps on device memory, whoever it belongs to.

A batch comes as the core takes it: of each array address, shape, stride and type, with the device and the stream that it is used on.
What it is made of, PyTorch's CUDA tensors or arrays of another library, is its caller's business, and so is who allocates results: a
`Place` says all of that. PyTorch's is in `torch/_cuda.py`, the one for other libraries' arrays in `_device_arrays.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from . import _core


class Place(Protocol):
    """A device, a stream on it, and an allocator for memory that is used in the order of that stream."""

    raw: tuple[int, int, bool]
    """(ordinal, handle of the stream, whether workspaces come from `empty`)"""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """An array that is not initialised."""

    def address(self, array: Any) -> int:
        """Of an array of `empty`."""


def _slice(place: Place, array: Any, count: int) -> tuple[int, int]:
    return place.address(array), count


def _workspace(place: Place, size: int) -> Any:
    """The array, which its caller keeps until the call has returned, or None where the core has its own."""
    return place.empty((size,), "uint8") if place.raw[2] and size else None


def _raw_workspace(place: Place, array: Any, size: int) -> tuple[int, int] | None:
    return None if array is None else _slice(place, array, size)


def plan(place: Place, batch: tuple, loss: tuple, requested: tuple[bool, bool, bool], extra: dict | None = None) -> int:
    """Bytes of a workspace for (gradients or expected negatives, moments, ranks). Checks shapes and options."""
    return _core.device_plan(place.raw, batch, extra, loss, requested)


def num_pairs(batch: tuple) -> int:
    """P."""
    queries, _, positives, positive_embeddings, *_ = batch
    return positives[1] if positives is not None else queries[1] if positive_embeddings is None else positive_embeddings[1]


def compute(
    place: Place, batch: tuple, loss: tuple, results: dict[str, tuple[tuple[int, ...], str]], gradients: dict | None = None,
    extra: dict | None = None,
) -> dict[str, Any]:
    """A step. `extra`: what few batches have (`src/extra.rs`), with rows as int32. `results` names what is
    wanted, with shapes and types (`src/device.rs` has the names); "total" is there always.
    `gradients`: see `gradient_places`. Returns the arrays."""
    arrays, raw = {}, {}
    for name, (shape, dtype) in {"total": ((), "float64"), **results}.items():
        arrays[name] = place.empty(shape, dtype)
        raw[name] = _slice(place, arrays[name], math.prod(shape))
    if gradients is not None:
        raw["gradients"] = _raw_gradients(place, gradients)
    requested = (gradients is not None or "expected_negative" in results, "entropy" in results, "above" in results)
    size = plan(place, batch, loss, requested, extra) if place.raw[2] else 0
    workspace = _workspace(place, size)
    _core.device_compute(place.raw, _raw_workspace(place, workspace, size), batch, extra, loss, raw)
    return arrays


def gradient_places(place: Place, batch: tuple, extra: dict | None = None, row_sparse: bool = False) -> dict[str, Any]:
    """Arrays for the gradients of a batch, (rows, dim) float32 each: of queries, of each pool or None, of positive embeddings or
    None, and the temperature's, () float64. Of a table with gradient the matrix, or with `row_sparse` a triple: rows int32, of which as
    many are written as its last, () int64, says, and their gradients."""
    like = lambda raw: place.empty((raw[1], raw[2]), "float32")
    queries, pools, _, positive_embeddings = batch[:4]
    by_reference = 0 if extra is None else pools_of_table(extra, len(pools))
    return {
        "d_queries": like(queries),
        "d_candidates": [like(candidates) if wanted else None for candidates, _, _, wanted in pools] + [None] * by_reference,
        "d_positive_embeddings": None if positive_embeddings is None else like(positive_embeddings),
        "d_temperature": place.empty((), "float64"),
        "d_table": None if extra is None else _table_place(place, batch, extra, row_sparse),
        "counts": [raw[1] * raw[2] for raw in (queries, *(pool[0] for pool in pools), positive_embeddings or queries)],
    }


def pools_of_table(extra: dict, own: int) -> int:
    """Pools whose candidates are rows of the table; the whole table is one where nothing else is."""
    alone = extra["table"] is not None and own == 0 and extra["row_negatives"] is None
    return max(len(extra["candidate_rows"]), 1 if alone else 0)


def _table_place(place: Place, batch: tuple, extra: dict, row_sparse: bool) -> Any:
    if extra["table"] is None or not extra["table_gradient"]:
        return None
    _, m, dim, *_ = extra["table"]
    if not row_sparse:
        return place.empty((m, dim), "float32")
    lists, negatives = [rows for rows, _ in extra["candidate_rows"]], extra["row_negatives"]
    whole = None in lists or pools_of_table(extra, len(batch[1])) > len(lists)
    # Positives with embeddings of their own name no row.
    positives = 0 if batch[3] is not None else num_pairs(batch)
    uses = positives + (0 if negatives is None else negatives[0][1]) + sum(rows[1] for rows in lists if rows is not None)
    most = m if whole else min(uses, m)
    return place.empty((most,), "int32"), place.empty((most, dim), "float32"), place.empty((), "int64")


def _raw_gradients(place: Place, places: dict[str, Any]) -> tuple:
    count, *counts, of_positives = places["counts"]
    own = zip(places["d_candidates"], counts)
    pools = [None if array is None else _slice(place, array, n) for array, n in own]
    pools += [None] * (len(places["d_candidates"]) - len(pools))
    positives = places["d_positive_embeddings"]
    return (
        _slice(place, places["d_queries"], count), pools,
        None if positives is None else _slice(place, positives, of_positives), _slice(place, places["d_temperature"], 1),
        _raw_table(place, places["d_table"]),
    )


def _raw_table(place: Place, d_table: Any) -> tuple | None:
    if d_table is None:
        return None
    if not isinstance(d_table, tuple):
        return _slice(place, d_table, math.prod(d_table.shape)), None
    rows, values, num_rows = d_table
    return _slice(place, values, math.prod(values.shape)), (_slice(place, rows, rows.shape[0]), _slice(place, num_rows, 1))


def gradients(
    place: Place, batch: tuple, loss: tuple, upstream: Sequence[Any], extra: dict | None = None, row_sparse: bool = False
) -> dict[str, Any]:
    """The stream back. `upstream`: (B) lse float64, num_negatives int64, expected negatives (B, D) float32, and float64 derivatives
    by lse (B) and by positive (P). Returns what `gradient_places` makes."""
    _, rows, dim, *_ = batch[0]
    places = gradient_places(place, batch, extra, row_sparse)
    counts = (rows, rows, rows * dim, rows, num_pairs(batch))
    raw = tuple(_slice(place, array, count) for array, count in zip(upstream, counts))
    size = plan(place, batch, loss, (True, False, False), extra) if place.raw[2] else 0
    workspace = _workspace(place, size)
    to = _raw_gradients(place, places)
    _core.device_gradients(place.raw, _raw_workspace(place, workspace, size), batch, extra, loss, raw, to)
    return places


def top_k(place: Place, batch: tuple, similarity: str, k: int) -> tuple[Any, Any]:
    """(B, K) int32 indices, unsigned with all ones for none, and float32 similarities."""
    rows = batch[0][1]
    size = _core.device_plan_top_k(place.raw, batch, similarity, k)  # checks k, before anything of that size is allocated
    indices, scores = place.empty((rows, k), "int32"), place.empty((rows, k), "float32")
    workspace = _workspace(place, size)
    output = _slice(place, indices, rows * k), _slice(place, scores, rows * k)
    _core.device_top_k(place.raw, _raw_workspace(place, workspace, size), batch, similarity, k, output)
    return indices, scores


def hardest_negatives(place: Place, batch: tuple, extra: dict | None, similarity: str, k: int) -> tuple[Any, Any]:
    """As `top_k`, among each row's negatives."""
    rows = batch[0][1]
    size = _core.device_plan_hardest_negatives(place.raw, batch, extra, similarity, k)
    indices, scores = place.empty((rows, k), "int32"), place.empty((rows, k), "float32")
    workspace = _workspace(place, size)
    output = _slice(place, indices, rows * k), _slice(place, scores, rows * k)
    _core.device_hardest_negatives(place.raw, _raw_workspace(place, workspace, size), batch, extra, similarity, k, output)
    return indices, scores
