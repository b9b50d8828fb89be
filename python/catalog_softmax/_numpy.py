"""Losses, statistics, gradients and searches of numpy arrays, and of arrays in device memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from . import _core, _device_arrays
from ._arrays import Batch, Extra, embeddings, numbers, raw, raw_embeddings, threads as _threads
from ._device_views import on_device

Similarity = Literal["cosine", "dot"]
Correction = Literal["none", "logq", "logq_negatives_only", "corrected_logq"]
Reduction = Literal["none", "mean", "sum", "weighted_mean"]


class Statistics(NamedTuple):
    """Statistics of each row's scores over its negatives: (B) each, but for the last. With ``positive_offsets``, what belongs to a
    positive is (P)."""

    lse: np.ndarray
    """float64: log of the sum over negatives of exp(s - log_q); -inf of a row with none."""
    positive: np.ndarray
    """float64: the score s of the positive."""
    num_negatives: np.ndarray
    """int64."""
    expected_score: np.ndarray | None
    """float64: the mean score under the softmax over negatives, with ``moments=True``."""
    entropy: np.ndarray | None
    """float64: of the softmax over negatives, in nats, with ``moments=True``."""
    above: np.ndarray | None
    """int64: negatives that score above the positive, with ``rank=True``."""
    ties: np.ndarray | None
    """int64: negatives that score as the positive, with ``rank=True``."""
    expected_negative: np.ndarray | None
    """(B, D) float32: the mean candidate under the softmax over negatives, which `gradients` needs."""


class Gradients(NamedTuple):
    """Gradients of the total, float32."""

    d_queries: np.ndarray
    """(B, D)"""
    d_candidates: Any
    """(N, D), or a list with one for each pool where candidates were a list; None for a pool without gradient."""
    d_positive_embeddings: np.ndarray | None
    """(B, D); with ``positive_offsets`` (P, D)."""
    d_temperature: float
    d_table: Any = None
    """(M, D), or with ``row_sparse=True`` the pair (rows (U) int64 ascending, values (U, D)): all other rows are 0. In device memory,
    where the host does not wait for their number, (rows int32, values, num_rows): what stands behind ``num_rows`` is not written."""


class Output(NamedTuple):
    """A step's results."""

    total: float
    """The reduced loss; with ``reduction="none"`` the weighted sum. Gradients are its derivatives."""
    loss: np.ndarray
    """(B) float64: of each row, before weights."""
    probability: np.ndarray
    """(B) float64: that of the positive under the loss; with ``positive_offsets`` (P)."""
    statistics: Statistics
    gradients: Gradients | None


def value_and_grad(
    queries: Any, candidates: Any = None, positives: Any = None, *, similarity: Similarity = "cosine", temperature: float = 0.05,
    correction: Correction = "none", log_q: Any = None, positive_log_q: Any = None, candidate_ids: Any = None,
    positive_ids: Any = None, positive_embeddings: Any = None, excluded: Any = None, row_weight: Any = None,
    reduction: Reduction = "mean", symmetric: bool = False, candidate_gradients: bool | Sequence[bool] = True,
    gradients: bool = True, moments: bool = False, rank: bool = False, threads: int | None = None, stream: int | None = None,
    table: Any = None, table_ids: Any = None, candidate_rows: Any = None, row_negatives: Any = None, row_negatives_log_q: Any = None,
    positive_offsets: Any = None, positive_weight: Any = None, false_negative_margin: float | None = None,
    false_negative_ratio: float | None = None, table_gradient: bool = True, row_sparse: bool = False,
) -> Output:
    """The loss and its gradients.

    Arrays are numpy's, or anything with DLPack or numpy's array protocol in host memory. float32, float16 and ml_dtypes' bfloat16
    with rows at any distance are read where they are.

    Or all of them are in the memory of one CUDA device, with ``__cuda_array_interface__`` or DLPack. Then nothing is copied: ids are
    int64 or uint64, ``positives`` int32 or uint32, ``excluded[0]`` int64, other columns float32, contiguous. Results are
    `DeviceArray` (numbers, too), written in the order of the stream. So keep the arrays until that work is done, or free them in the
    order of the same stream, as their library does if it is its own. Values that break a rule, such as an index past the candidates,
    are seen by the device alone, and `check_device` reports them.

    Args:
        queries ... symmetric: those of `catalog_softmax.torch.softmax_loss`, with arrays for tensors.
        candidate_gradients: whether candidates have a gradient, or whether each pool has.
        gradients, moments, rank: what to compute beside the loss.
        threads: how many; None: as many as the process may use. Results do not depend on it. Of no meaning on a device.
        stream: of device memory, the handle of the stream to run on; None: the one that the arrays name, else the legacy default one.
        table ... false_negative_ratio: those of `catalog_softmax.torch.softmax_loss`. In device memory, rows of the table are int32 or
            uint32, contiguous.
        table_gradient: whether the table has a gradient.
        row_sparse: the table's gradient as the rows that the batch names, without (M, D) memory.

    Raises:
        ValueError: names the argument, its value and the rule that it breaks.
        DeviceUnavailable: arrays are in a GPU's memory, and this build or this machine cannot compute there.
    """
    arguments = (
        queries, candidates, positives, positive_embeddings, candidate_ids, log_q, positive_ids, positive_log_q, excluded,
        row_weight, candidate_gradients,
    )
    extra = _extra(queries)(
        table, table_ids, candidate_rows, row_negatives, row_negatives_log_q, positive_offsets, positive_weight,
        false_negative_margin, false_negative_ratio, table_gradient,
    )
    options = (similarity, float(temperature), correction, reduction, symmetric)
    requested = (gradients, moments, rank)
    if table is None:
        _check_row_sparse(row_sparse)
    if on_device(queries):
        batch = _device_arrays.Batch(*arguments, extra, stream=stream)
        return output_over_table(_device_arrays.compute(batch, options, requested, row_sparse), batch)
    if extra.given:
        batch = Batch(*arguments, extra)
        return output_over_table(
            _core.table_compute(batch.raw, batch.raw_extra, options, row_sparse, requested, _threads(threads)), batch
        )
    batch = Batch(*arguments)
    total, loss, probability, statistics, found = _core.compute(batch.raw, options, requested, _threads(threads))
    return Output(total, loss, probability, _statistics(statistics), None if found is None else _gradients(found, batch))


def statistics(
    queries: Any, candidates: Any = None, positives: Any = None, *, similarity: Similarity = "cosine", temperature: float = 0.05,
    log_q: Any = None, candidate_ids: Any = None, positive_ids: Any = None, positive_embeddings: Any = None, excluded: Any = None,
    gradients: bool = False, moments: bool = False, rank: bool = False, threads: int | None = None, stream: int | None = None,
    table: Any = None, table_ids: Any = None, candidate_rows: Any = None, row_negatives: Any = None, row_negatives_log_q: Any = None,
    positive_offsets: Any = None,
    false_negative_margin: float | None = None, false_negative_ratio: float | None = None,
) -> Statistics:
    """Row statistics, for a loss of your own or for an evaluation over a whole catalogue (``rank=True``).

    Arguments as those of `value_and_grad`; ``log_q`` is subtracted from the negatives' scores alone. With ``gradients=True`` they
    have what `gradients` needs.
    """
    arguments = (queries, candidates, positives, positive_embeddings, candidate_ids, log_q, positive_ids, None, excluded)
    extra = _extra(queries)(
        table, table_ids, candidate_rows, row_negatives, row_negatives_log_q, positive_offsets, None, false_negative_margin,
        false_negative_ratio,
    )
    options = _options(similarity, temperature, log_q, row_negatives_log_q)
    requested = (gradients, moments, rank)
    if on_device(queries):
        batch = _device_arrays.Batch(*arguments, extra=extra, stream=stream)
        return _statistics(_device_arrays.statistics(batch, options, requested))
    if extra.given:
        batch = Batch(*arguments, extra=extra)
        return _statistics(_core.table_statistics(batch.raw, batch.raw_extra, options, requested, _threads(threads)))
    return _statistics(_core.statistics(Batch(*arguments).raw, options, requested, _threads(threads)))


def gradients(
    statistics: Statistics, d_lse: Any, d_positive: Any, queries: Any, candidates: Any = None, positives: Any = None, *,
    similarity: Similarity = "cosine", temperature: float = 0.05, log_q: Any = None, candidate_ids: Any = None,
    positive_ids: Any = None, positive_embeddings: Any = None, excluded: Any = None,
    candidate_gradients: bool | Sequence[bool] = True, threads: int | None = None, stream: int | None = None,
    table: Any = None, table_ids: Any = None, candidate_rows: Any = None, row_negatives: Any = None, row_negatives_log_q: Any = None,
    positive_offsets: Any = None,
    false_negative_margin: float | None = None, false_negative_ratio: float | None = None,
    table_gradient: bool = True, row_sparse: bool = False,
) -> Gradients:
    """Gradients of any function of the rows' ``lse`` and ``positive``, given its derivatives (B) by them; with ``positive_offsets``, (P)
    by ``positive``.

    ``statistics`` are `statistics` with ``gradients=True`` of the same arguments.
    """
    if statistics.expected_negative is None:
        raise ValueError("statistics has no expected_negative; rule: statistics(..., gradients=True)")
    arguments = (
        queries, candidates, positives, positive_embeddings, candidate_ids, log_q, positive_ids, None, excluded, None,
        candidate_gradients,
    )
    extra = _extra(queries)(
        table, table_ids, candidate_rows, row_negatives, row_negatives_log_q, positive_offsets, None, false_negative_margin,
        false_negative_ratio, table_gradient,
    )
    options = _options(similarity, temperature, log_q, row_negatives_log_q)
    if table is None:
        _check_row_sparse(row_sparse)
    if on_device(queries):
        batch = _device_arrays.Batch(*arguments, extra, stream=stream)
        return _with_table(*_device_arrays.gradients(batch, options, statistics, d_lse, d_positive, row_sparse), batch)
    if extra.given:
        return _gradients_over_table(
            statistics, numbers(d_lse, "d_lse", np.float64), numbers(d_positive, "d_positive", np.float64), Batch(*arguments, extra),
            options, row_sparse, _threads(threads),
        )
    batch = Batch(*arguments)
    rows = np.stack([statistics.lse, statistics.positive, statistics.num_negatives.astype(np.float64)])
    expected = np.ascontiguousarray(statistics.expected_negative)
    upstream = numbers(d_lse, "d_lse", np.float64), numbers(d_positive, "d_positive", np.float64)
    found = _core.gradients(batch.raw, options, raw(rows), raw(expected), (raw(upstream[0]), raw(upstream[1])), _threads(threads))
    return _gradients(found, batch)


def _gradients_over_table(
    statistics: Statistics, d_lse: np.ndarray, d_positive: np.ndarray, batch: Batch, options: tuple, row_sparse: bool, threads: int
) -> Gradients:
    counts, expected = statistics.num_negatives.astype(np.float64), np.ascontiguousarray(statistics.expected_negative)
    kept = [np.ascontiguousarray(x) for x in (statistics.lse, statistics.positive, counts, expected)]
    upstream = raw(d_lse), raw(d_positive)
    found = _core.table_gradients(batch.raw, batch.raw_extra, options, row_sparse, tuple(raw(x) for x in kept), upstream, threads)
    return _with_table(*found, batch)


class TopK(NamedTuple):
    """The best K candidates of each row, best first."""

    scores: np.ndarray
    """(B, K) float32 similarities, without temperature; -inf behind the last of a row that has fewer than K."""
    indices: np.ndarray
    """(B, K) int64, counted over all pools; -1 behind the last. Of arrays in device memory int32, which are unsigned from 2^31 on."""


def top_k(
    queries: Any, candidates: Any, k: int, *, similarity: Similarity = "cosine", candidate_ids: Any = None, excluded: Any = None,
    threads: int | None = None, stream: int | None = None,
) -> TopK:
    """The ``k`` candidates most similar to each query, exactly: 1 to 1024 of them, at most N. Excluded ids are left out."""
    arguments = {"queries": queries, "candidates": candidates, "candidate_ids": candidate_ids, "excluded": excluded}
    if on_device(queries):
        batch = _device_arrays.Batch(**arguments, search=True, stream=stream)
        indices, scores = _device_arrays.top_k(batch, similarity, k)
        return TopK(scores, indices)
    batch = Batch(**arguments)
    indices, scores = _core.top_k(batch.raw, similarity, k, _threads(threads))
    return TopK(scores, indices)


def hardest_negatives(
    queries: Any, candidates: Any = None, positives: Any = None, *, k: int, similarity: Similarity = "cosine",
    candidate_ids: Any = None, positive_ids: Any = None, positive_embeddings: Any = None, excluded: Any = None, table: Any = None,
    table_ids: Any = None, candidate_rows: Any = None, positive_offsets: Any = None, threads: int | None = None,
    stream: int | None = None,
) -> TopK:
    """The ``k`` negatives of each row that are most similar to its query, among the candidates of the pools: see
    `catalog_softmax.torch.hardest_negatives`."""
    extra = _extra(queries)(table, table_ids, candidate_rows, positive_offsets=positive_offsets)
    arguments = (queries, candidates, positives, positive_embeddings, candidate_ids, None, positive_ids, None, excluded)
    if on_device(queries):
        batch = _device_arrays.Batch(*arguments, extra=extra, stream=stream)
        indices, scores = _device_arrays.hardest_negatives(batch, similarity, k)
        return TopK(scores, indices)
    batch = Batch(*arguments, extra=extra)
    raw_extra = batch.raw_extra or extra.raw(len(batch.pools), [])
    indices, scores = _core.hardest_negatives(batch.raw, raw_extra, similarity, k, _threads(threads))
    return TopK(scores, indices)


def alignment(x: Any, y: Any, alpha: float = 2.0) -> float:
    """Mean distance of positive pairs on the unit sphere, ``E |x - y|^alpha``: 0 if the two rows of each pair are one point.

    x and y: (B, D), in host memory; row i of both is a pair. Wang and Isola, ICML 2020, equation 1. In float64; NaN where a row is not
    finite.
    """
    x, y = embeddings(x, "x"), embeddings(y, "y")
    return _core.alignment(raw_embeddings(x), raw_embeddings(y), alpha)


def uniformity(x: Any, t: float = 2.0, *, threads: int | None = None) -> float:
    """How evenly embeddings cover the unit sphere, ``log E exp(-t |x - y|^2)`` over pairs of different rows: lower is more even, and 0
    says that all are one point.

    x: (B, D) with B >= 2, in host memory. Wang and Isola, ICML 2020, equation 2. Costs what a loss of B queries and B candidates does,
    without a B x B matrix: of a catalogue, take a sample. NaN where a row is not finite.
    """
    x = embeddings(x, "x")
    return _core.uniformity(raw_embeddings(x), t, _threads(threads))


def check_device(device: int = 0, stream: int = 0) -> None:
    """Waits for a stream of a device, and raises a ValueError for the first value since the last call that broke a rule and that only
    the device saw: an index past the candidates, offsets out of order, a log_q or weight that is not finite. Results of the calls since
    then are not to be used."""
    _core.device_fault((device, stream, False))


def _options(similarity: str, temperature: float, *log_q: Any) -> tuple:
    """Of statistics: what is subtracted from the negatives' scores alone."""
    correction = "none" if all(x is None for x in log_q) else "logq_negatives_only"
    return (similarity, float(temperature), correction, "sum", False)


def _extra(queries: Any) -> type:
    """What few batches have, where the queries are."""
    return _device_arrays.Extra if on_device(queries) else Extra


def _check_row_sparse(row_sparse: bool) -> None:
    if row_sparse:
        raise ValueError("row_sparse is True; rule: the gradient of a table, and there is none")


def output_over_table(found: tuple, batch: Batch) -> Output:
    """Of what `_core.table_compute` returns."""
    total, loss, probability, statistics, gradients = found
    if gradients is not None:
        gradients = _with_table(*gradients, batch)
    return Output(total, loss, probability, _statistics(statistics), gradients)


def _statistics(found: Any) -> Statistics:
    lse, positive, num_negatives, moments, rank, expected_negative = found
    return Statistics(lse, positive, num_negatives, *(moments or (None, None)), *(rank or (None, None)), expected_negative)


def _gradients(found: Any, batch: Batch) -> Gradients:
    d_queries, d_pools, d_positives, d_temperature = found
    return Gradients(d_queries, d_pools if batch.several else d_pools[0], d_positives, d_temperature)


def _with_table(found: tuple, d_table: Any, batch: Batch) -> Gradients:
    d_queries, d_pools, d_positives, d_temperature = found
    # Pools by rows of the table come after the others, and have no gradient but the table's.
    own = d_pools[: len(batch.pools)]
    return Gradients(d_queries, (own if batch.several else own[0]) if own else None, d_positives, d_temperature, d_table)
