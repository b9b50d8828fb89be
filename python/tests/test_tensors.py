"""Tensors as they come: strides, offsets, types; what is copied and what is not; threads and processes."""

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch

import common
import reference
from catalog_softmax.torch import _arguments, softmax_loss
from common import compare, embeddings

B, N, D = 19, 70, 12


def views(rows, seed):
    """The same kind of matrix with elements in all places that PyTorch may have them."""
    yield "contiguous", embeddings(rows, D, seed)
    yield "columns of a wider one", embeddings(rows, D + 7, seed)[:, 3 : 3 + D]
    yield "every other row", embeddings(2 * rows, D, seed)[::2]
    yield "at an offset", embeddings(rows + 5, D, seed)[5:]
    yield "transposed", embeddings(D, rows, seed).T
    yield "every other column", embeddings(rows, 2 * D, seed)[:, ::2]
    yield "one row expanded", embeddings(1, D, seed).expand(rows, D)
    yield "an odd offset of bytes", embeddings(1, rows * D + 1, seed)[0, 1:].view(rows, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_views_are_their_contiguous_copies(dtype):
    positives = torch.arange(B) * 3
    for (name, queries), (_, candidates) in zip(views(B, 1), views(N, 2)):
        convert = (lambda x: x.detach().to(dtype=dtype)) if dtype == torch.float32 else (lambda x: _same_strides(x, dtype))
        queries, candidates = convert(queries), convert(candidates)
        results = []
        for q, c in ((queries, candidates), (queries.contiguous().clone(), candidates.contiguous().clone())):
            q, c = q.detach().requires_grad_(), c.detach().requires_grad_()
            loss = softmax_loss(q, c, positives)
            loss.backward()
            results.append((loss.detach(), q.grad, c.grad))
        for found, wanted in zip(*results):
            if common.ON_DEVICE:
                # Rows that start at multiples of 16 bytes may go through other kernels, which add up in another order.
                allowed = 4 * common.ROUNDING[dtype] * wanted.abs().max()
                assert (found - wanted).abs().max() <= allowed, name
            else:
                assert torch.equal(found, wanted), name


def _same_strides(x, dtype):
    out = torch.empty_strided(x.shape, x.stride(), dtype=dtype)
    return x.to(dtype) if 0 in x.stride() else out.copy_(x)


def test_row_strided_matrices_are_not_copied():
    copied = {name: _arguments.embeddings(view, "queries").data_ptr() != view.data_ptr() for name, view in views(B, 1)}
    assert [name for name, copied in copied.items() if copied] == ["transposed", "every other column", "one row expanded"]


def test_one_row_and_one_column():
    compare(softmax_loss, reference.softmax_loss, [embeddings(1, D, 1).requires_grad_(), embeddings(3, D, 2).requires_grad_()], {})
    q, c = embeddings(4, 1, 1).requires_grad_(), embeddings(6, 1, 2).requires_grad_()
    compare(softmax_loss, reference.softmax_loss, [q, c], {"similarity": "dot", "temperature": 1.0})


@pytest.mark.parametrize("wanted", range(1, 16))
def test_gradients_of_what_asks_alone(wanted):
    """Each gradient is the same whatever else has one."""
    def run(mask):
        inputs = [embeddings(B, D, 1), embeddings(N, D, 2), embeddings(9, D, 3), torch.tensor(0.1)]
        inputs = [x.requires_grad_(bool(mask >> i & 1)) for i, x in enumerate(inputs)]
        softmax_loss(inputs[0], inputs[1:3], torch.arange(B) * 4, temperature=inputs[3]).backward()
        return [x.grad for x in inputs]

    for i, (found, of_all) in enumerate(zip(run(wanted), run(15))):
        assert (found is None) == (not wanted >> i & 1)
        assert found is None or torch.equal(found, of_all)


def test_without_gradients_nothing_is_kept():
    q, c = embeddings(B, D, 1).requires_grad_(), embeddings(N, D, 2)
    with torch.no_grad():
        loss = softmax_loss(q, c, torch.arange(B))
    assert not loss.requires_grad
    assert torch.equal(loss, softmax_loss(q, c, torch.arange(B)).detach()) or abs(loss - softmax_loss(q, c, torch.arange(B))) < 1e-6
    assert not softmax_loss(q.detach(), c, torch.arange(B)).requires_grad


def test_a_tensor_changed_in_place_before_backward_is_an_error():
    q, c = embeddings(B, D, 1).requires_grad_(), embeddings(N, D, 2)
    loss = softmax_loss(q, c, torch.arange(B))
    c.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def step(seed=1):
    q, c = embeddings(300, 16, seed).requires_grad_(), embeddings(700, 16, 2).requires_grad_()
    loss = softmax_loss(q, c, torch.arange(300))
    loss.backward()
    return loss.detach(), q.grad, c.grad


def test_any_number_of_threads_gives_the_same_bits():
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            results.append(step())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_calls_at_the_same_time():
    wanted, found = [step(seed) for seed in range(4)], [[] for _ in range(4)]
    def work(seed):
        found[seed] += [step(seed) for _ in range(5)]
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed in range(4):
        assert len(found[seed]) == 5
        assert all(torch.equal(a, b) for result in found[seed] for a, b in zip(result, wanted[seed]))


def _child(queue):
    # As PyTorch's own data loader does: its OpenMP threads do not survive a fork, and operators wait for them for ever.
    torch.set_num_threads(1)
    queue.put(float(step()[0]))


def test_processes_of_data_loaders():
    """In a Python of its own: torch.compile and opcheck in other tests leave PyTorch in a state that refuses backward in a fork."""
    run_alone("-c", "import test_tensors; test_tensors.in_another_process('spawn')")


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="macOS's own libraries do not survive a fork; Windows has none")
def test_forked_processes():
    """Of a quiet parent and of one with a thread inside of calls."""
    run_alone("forks.py")


def run_alone(*arguments):
    subprocess.run([sys.executable, "-W", "ignore", *arguments], cwd=os.path.dirname(__file__), check=True, timeout=120)


def in_another_process(method):
    wanted = float(step()[0])
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    assert queue.get(timeout=120) == wanted
    child.join(30)
    assert child.exitcode == 0
