"""A queue of past candidates, for numpy arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import _core
from ._arrays import embeddings, integers, numbers, raw, raw_embeddings


class Queued(NamedTuple):
    """The rows of a queue, copied: a pool without gradient."""

    candidates: Any
    """(L, D)"""
    candidate_ids: Any
    """(L) int64, where the queue keeps ids."""
    log_q: Any
    """(L) float32, where the queue keeps log_q."""


class NegativeQueue:
    """The last candidates of past steps as further negatives: a memory bank (MoCo, He et al. 2020; cross-batch negative sampling, Wang et
    al. 2021), first in, first out.

    **Enqueue after the loss**: a batch's own candidates in the queue would be there twice. With a correction, give batch and queue one
    log_q by `union_log_q`; `union_gradient_weight` makes up for the gradient that its rows do not pass on.

    Args:
        capacity: rows that it holds.
        dim: D.
        dtype: "float32" or "float16"; "bfloat16" rows come back as uint16 (`catalog_softmax.torch.NegativeQueue` has them as tensors).
        ids, log_q: whether each row has them.
        max_age: for how many steps a row is used; each enqueue adds 1 to the age of those that are there.
    """

    def __init__(
        self, capacity: int, dim: int, dtype: str = "float32", *, ids: bool = False, log_q: bool = False, max_age: int | None = None
    ):
        self._queue = _core.Queue(capacity, dim, np.dtype(dtype).name if dtype != "bfloat16" else dtype, ids, log_q, max_age)

    def enqueue(self, candidates: Any, candidate_ids: Any = None, log_q: Any = None) -> None:
        """Copies rows in over the oldest ones. What the queue does not keep is not looked at."""
        rows = embeddings(candidates, "candidates")
        ids = None if candidate_ids is None else integers(candidate_ids, "candidate_ids")
        of_rows = None if log_q is None else numbers(log_q, "log_q")
        self._queue.enqueue((raw_embeddings(rows), raw(ids), raw(of_rows), False))

    def rows(self) -> Queued:
        """Copies of the rows that the next step uses. A queue without rows is no pool: look at its length first."""
        candidates, ids, log_q = self._queue.rows()
        return Queued(candidates.view(np.float16) if self._queue.options()[2] == "float16" else candidates, ids, log_q)

    def ages(self) -> np.ndarray:
        """(L) int64: the age of each row in the next step."""
        return self._queue.ages()

    def clear(self) -> None:
        """Forgets all rows."""
        self._queue.clear()

    def __len__(self) -> int:
        return len(self._queue)

    def to_bytes(self) -> bytes:
        """The whole queue, for a checkpoint."""
        return self._queue.to_bytes()

    @classmethod
    def from_bytes(cls, bytes: bytes) -> NegativeQueue:
        """A queue from its state. A ValueError for bytes that are none."""
        queue = cls.__new__(cls)
        queue._queue = _core.Queue.from_bytes(bytes)
        return queue

    def __reduce__(self) -> Any:
        return NegativeQueue.from_bytes, (self.to_bytes(),)
