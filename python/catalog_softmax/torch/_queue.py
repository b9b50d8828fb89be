"""A queue of past candidates, for tensors."""

import numpy as np
import torch
from torch import Tensor, nn

from .. import _core
from .._queue import Queued
from ._arguments import _NAMES, embeddings, integers, numbers, raw, raw_embeddings


class NegativeQueue(nn.Module):
    """`catalog_softmax.NegativeQueue` of tensors, a module so that its rows are in the model's state_dict.

        loss = softmax_loss(users, [items, queue.rows().candidates] if len(queue) else items, ...)
        loss.backward()
        queue.enqueue(items)

    Args: those of `catalog_softmax.NegativeQueue`, with torch.float32, float16 or bfloat16 as ``dtype``.
    """

    def __init__(
        self, capacity: int, dim: int, dtype: torch.dtype = torch.float32, *, ids: bool = False, log_q: bool = False,
        max_age: int | None = None,
    ):
        super().__init__()
        if dtype not in _NAMES:
            raise ValueError(f"dtype is {dtype}; rule: torch.float32, float16 or bfloat16")
        self._queue = _core.Queue(capacity, dim, _NAMES[dtype], ids, log_q, max_age)

    @torch.no_grad()
    def enqueue(self, candidates: Tensor, candidate_ids: Tensor | None = None, log_q: Tensor | None = None) -> None:
        """Copies rows in over the oldest ones: after the loss. What the queue does not keep is not looked at."""
        rows = embeddings(candidates.detach(), "candidates")
        ids = None if candidate_ids is None else integers(candidate_ids, "candidate_ids")
        of_rows = None if log_q is None else numbers(log_q, "log_q")
        self._queue.enqueue((raw_embeddings(rows), raw(ids), raw(of_rows), False))

    def rows(self) -> Queued:
        """Copies of the rows that the next step uses, without gradient. A queue without rows is no pool: look at its length first."""
        candidates, ids, log_q = self._queue.rows()
        dtype = next(dtype for dtype, name in _NAMES.items() if name == self._queue.options()[2])
        tensor = lambda values: None if values is None else torch.from_numpy(values)
        # Elements of 16 bits come as integers of as many.
        candidates = candidates if candidates.dtype == np.float32 else candidates.view(np.int16)
        return Queued(torch.from_numpy(candidates).view(dtype), tensor(ids), tensor(log_q))

    def clear(self) -> None:
        """Forgets all rows."""
        self._queue.clear()

    def __len__(self) -> int:
        return len(self._queue)

    def get_extra_state(self) -> Tensor:
        return torch.frombuffer(bytearray(self._queue.to_bytes()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        loaded = _core.Queue.from_bytes(state.numpy().tobytes())
        if loaded.options() != self._queue.options():
            raise ValueError(f"the state is of a queue of {loaded.options()}; rule: {self._queue.options()}, as this one was made")
        self._queue = loaded
