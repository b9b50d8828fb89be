"""The queue of past candidates, in numpy and in PyTorch."""

import pickle
import re

import numpy as np
import pytest
import torch

import catalog_softmax as cs
from catalog_softmax.torch import NegativeQueue, softmax_loss
from common import embeddings, integers, log_q

B, D = 5, 6


def test_rows_come_back_oldest_overwritten_first():
    queue, kept = cs.NegativeQueue(8, D, ids=True, log_q=True), {}
    for step in range(4):
        rows, ids, q = embeddings(B, D, step).numpy(), integers(99, B, step).numpy(), log_q(B, step).numpy()
        queue.enqueue(rows, ids, q)
        for i in range(B):
            kept[(step * B + i) % 8] = rows[i], ids[i], q[i]
        found = queue.rows()
        assert len(queue) == len(kept) == len(queue.ages())
        as_set = lambda rows: sorted((tuple(row), int(i), float(x)) for row, i, x in rows)
        assert as_set(zip(*found)) == as_set(kept.values())
    for other in (cs.NegativeQueue.from_bytes(queue.to_bytes()), pickle.loads(pickle.dumps(queue))):
        assert (other.rows().candidates == found.candidates).all()
    queue.clear()
    assert len(queue) == 0


def test_rows_grow_old():
    queue = cs.NegativeQueue(20, D, max_age=2)
    for step in range(4):
        queue.enqueue(embeddings(B, D, step).numpy())
    assert len(queue) == 2 * B and set(queue.ages()) == {1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_a_pool_and_are_in_the_state_dict(dtype):
    queue = NegativeQueue(12, D, dtype, ids=True)
    first, ids = embeddings(B, D, 1, dtype).requires_grad_(), integers(50, B, 2)
    queue.enqueue(first, ids)
    rows = queue.rows()
    assert torch.equal(rows.candidates, first) and torch.equal(rows.candidate_ids, ids) and not rows.candidates.requires_grad
    assert rows.log_q is None
    q, c, own = embeddings(B, D, 3, dtype).requires_grad_(), embeddings(B, D, 4, dtype).requires_grad_(), integers(50, B, 5)
    loss = softmax_loss(q, [c, rows.candidates], candidate_ids=[own, rows.candidate_ids])
    wanted = softmax_loss(q, torch.cat([c, first]), candidate_ids=torch.cat([own, ids]))
    assert loss == wanted
    loss.backward()
    queue.enqueue(c, own)
    other = NegativeQueue(12, D, dtype, ids=True)
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.rows().candidates, queue.rows().candidates) and len(other) == 2 * B
    with pytest.raises(ValueError, match="the state is of a queue of"):
        NegativeQueue(13, D, dtype, ids=True).load_state_dict(queue.state_dict())


def test_errors():
    queue = cs.NegativeQueue(8, D, ids=True)
    for call, message in [
        (lambda: queue.enqueue(np.ones((2, D), np.float32)), "candidate_ids is missing; rule: the queue was made to keep them"),
        (lambda: queue.enqueue(np.ones((2, 3), np.float32), [1, 2]), "candidates has dim 3; rule: the dim of the queue"),
        (lambda: queue.enqueue(np.ones((2, D), np.float16), [1, 2]), "candidates has elements of type float16"),
        (lambda: queue.enqueue(np.ones((2, D), np.float32), [1]), "candidate_ids has length 1; rule: length 2"),
        (lambda: cs.NegativeQueue(0, D), "queue has shape (0, 6); rule: capacity >= 1"),
        (lambda: cs.NegativeQueue(8, D, max_age=0), "max_age is 0; rule: >= 1"),
        (lambda: cs.NegativeQueue(8, D, "float64"), 'dtype is "float64"; rule: one of float32, float16, bfloat16'),
        (lambda: NegativeQueue(8, D, torch.float64), "dtype is torch.float64; rule: torch.float32"),
        (lambda: cs.NegativeQueue.from_bytes(b"no"), "rule:"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
