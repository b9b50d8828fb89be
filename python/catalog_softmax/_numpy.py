"""Losses, statistics, gradients and searches of numpy arrays, and of arrays in device memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from . import _core, _device_arrays
from ._arrays import Batch, embeddings, numbers, raw, raw_embeddings, threads as _threads
from ._device_arrays import on_device

Similarity = Literal["cosine", "dot"]
Correction = Literal["none", "logq", "logq_negatives_only", "corrected_logq"]
Reduction = Literal["none", "mean", "sum", "weighted_mean"]


class Statistics(NamedTuple):
    """Statistics of each row's scores over its negatives: (B) each, but for the last."""

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
    """(B, D)"""
    d_temperature: float


class Output(NamedTuple):
    """A step's results."""

    total: float
    """The reduced loss; with ``reduction="none"`` the weighted sum. Gradients are its derivatives."""
    loss: np.ndarray
    """(B) float64: of each row, before weights."""
    probability: np.ndarray
    """(B) float64: that of the positive under the loss."""
    statistics: Statistics
    gradients: Gradients | None


def value_and_grad(
    queries: Any, candidates: Any, positives: Any = None, *, similarity: Similarity = "cosine", temperature: float = 0.05,
    correction: Correction = "none", log_q: Any = None, positive_log_q: Any = None, candidate_ids: Any = None,
    positive_ids: Any = None, positive_embeddings: Any = None, excluded: Any = None, row_weight: Any = None,
    reduction: Reduction = "mean", symmetric: bool = False, candidate_gradients: bool | Sequence[bool] = True,
    gradients: bool = True, moments: bool = False, rank: bool = False, threads: int | None = None, stream: int | None = None,
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

    Raises:
        ValueError: names the argument, its value and the rule that it breaks.
        DeviceUnavailable: arrays are in a GPU's memory, and this build or this machine cannot compute there.
    """
    arguments = (
        queries, candidates, positives, positive_embeddings, candidate_ids, log_q, positive_ids, positive_log_q, excluded,
        row_weight, candidate_gradients,
    )
    options = (similarity, float(temperature), correction, reduction, symmetric)
    requested = (gradients, moments, rank)
    if on_device(queries):
        batch = _device_arrays.Batch(*arguments, stream=stream)
        total, loss, probability, statistics, found = _device_arrays.compute(batch, options, requested)
    else:
        batch = Batch(*arguments)
        total, loss, probability, statistics, found = _core.compute(batch.raw, options, requested, _threads(threads))
    return Output(total, loss, probability, _statistics(statistics), None if found is None else _gradients(found, batch))


def statistics(
    queries: Any, candidates: Any, positives: Any = None, *, similarity: Similarity = "cosine", temperature: float = 0.05,
    log_q: Any = None, candidate_ids: Any = None, positive_ids: Any = None, positive_embeddings: Any = None, excluded: Any = None,
    gradients: bool = False, moments: bool = False, rank: bool = False, threads: int | None = None, stream: int | None = None,
) -> Statistics:
    """Row statistics, for a loss of your own or for an evaluation over a whole catalogue (``rank=True``).

    Arguments as those of `value_and_grad`; ``log_q`` is subtracted from the negatives' scores alone. With ``gradients=True`` they
    have what `gradients` needs.
    """
    arguments = (queries, candidates, positives, positive_embeddings, candidate_ids, log_q, positive_ids, None, excluded)
    options = (similarity, float(temperature), "none" if log_q is None else "logq_negatives_only", "sum", False)
    requested = (gradients, moments, rank)
    if on_device(queries):
        return _statistics(_device_arrays.statistics(_device_arrays.Batch(*arguments, stream=stream), options, requested))
    return _statistics(_core.statistics(Batch(*arguments).raw, options, requested, _threads(threads)))


def gradients(
    statistics: Statistics, d_lse: Any, d_positive: Any, queries: Any, candidates: Any, positives: Any = None, *,
    similarity: Similarity = "cosine", temperature: float = 0.05, log_q: Any = None, candidate_ids: Any = None,
    positive_ids: Any = None, positive_embeddings: Any = None, excluded: Any = None,
    candidate_gradients: bool | Sequence[bool] = True, threads: int | None = None, stream: int | None = None,
) -> Gradients:
    """Gradients of any function of the rows' ``lse`` and ``positive``, given its derivatives (B) by them.

    ``statistics`` are `statistics` with ``gradients=True`` of the same arguments.
    """
    if statistics.expected_negative is None:
        raise ValueError("statistics has no expected_negative; rule: statistics(..., gradients=True)")
    arguments = (
        queries, candidates, positives, positive_embeddings, candidate_ids, log_q, positive_ids, None, excluded, None,
        candidate_gradients,
    )
    options = (similarity, float(temperature), "none" if log_q is None else "logq_negatives_only", "sum", False)
    if on_device(queries):
        batch = _device_arrays.Batch(*arguments, stream=stream)
        return _gradients(_device_arrays.gradients(batch, options, statistics, d_lse, d_positive), batch)
    batch = Batch(*arguments)
    rows = np.stack([statistics.lse, statistics.positive, statistics.num_negatives.astype(np.float64)])
    expected = np.ascontiguousarray(statistics.expected_negative)
    upstream = numbers(d_lse, "d_lse", np.float64), numbers(d_positive, "d_positive", np.float64)
    found = _core.gradients(batch.raw, options, raw(rows), raw(expected), (raw(upstream[0]), raw(upstream[1])), _threads(threads))
    return _gradients(found, batch)


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


def _statistics(found: Any) -> Statistics:
    lse, positive, num_negatives, moments, rank, expected_negative = found
    return Statistics(lse, positive, num_negatives, *(moments or (None, None)), *(rank or (None, None)), expected_negative)


def _gradients(found: Any, batch: Batch) -> Gradients:
    d_queries, d_pools, d_positives, d_temperature = found
    return Gradients(d_queries, d_pools if batch.several else d_pools[0], d_positives, d_temperature)
