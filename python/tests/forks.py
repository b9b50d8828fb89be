"""Forks 20 times in each way, in a Python of its own: `python forks.py`. test_tensors.py runs it.

With another thread inside of calls, a child may inherit a lock that nobody lets go: a build whose locks outlived the fork hung here in
both of two runs.

PyTorch itself has two limits in forked children, which these checks keep away from; `python forks.py pytorch-alone` shows
without this package the second of: its OpenMP threads do not survive (a child sets one thread before anything else, as PyTorch's data
loader does); and where torch.compile or opcheck ran the parent's first backward, backward in a child is a RuntimeError.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time

import numpy as np

TIMES = 20


def arrays(seed):
    random = np.random.default_rng(seed)
    return random.standard_normal((60, 16), np.float32), random.standard_normal((200, 16), np.float32)


def array_step():
    import catalog_softmax as cs

    output = cs.value_and_grad(*arrays(1), np.arange(60), threads=2)
    return output.total, output.gradients.d_candidates.tobytes()


def tensor_step():
    import torch

    from catalog_softmax.torch import softmax_loss

    queries, candidates = (torch.from_numpy(x).requires_grad_() for x in arrays(1))
    loss = softmax_loss(queries, candidates, torch.arange(60))
    loss.backward()
    return loss.item(), candidates.grad.numpy().tobytes()


def tensor_step_of_a_child():
    import torch

    torch.set_num_threads(1)
    return tensor_step()


def forked(work, wanted):
    """In a child by os.fork. The alarm ends one that hangs; faulthandler's watch would itself hang in a child of a child."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if work() == wanted else 3)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"a forked child ended with {os.waitstatus_to_exitcode(status)}"


def _send(pipe, work):
    signal.alarm(30)
    pipe.send(work())


def of_multiprocessing(work, wanted):
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, work))
    child.start()
    # Not a wait for a result alone: a child that raised will never send one.
    sender.close()
    assert receiver.poll(30), "a forked child is silent"
    assert receiver.recv() == wanted
    child.join(30)
    assert child.exitcode == 0


def check(step, step_of_a_child, busy):
    """`busy`: while another thread of the parent is in calls of the core, of different numbers of threads."""
    wanted, stop = step(), threading.Event()

    def calls():
        import catalog_softmax as cs

        queries, candidates = arrays(2)
        while not stop.is_set():
            for rows in (1, 60):
                cs.value_and_grad(queries[:rows], candidates, np.arange(rows), threads=1 + rows % 2)

    other = threading.Thread(target=calls)
    if busy:
        other.start()
    try:
        for number in range(TIMES):
            time.sleep(0.001 * (number % 5))
            forked(step_of_a_child, wanted)
            of_multiprocessing(step_of_a_child, wanted)
        assert step() == wanted
    finally:
        stop.set()
        if busy:
            other.join()


def grandchildren():
    """Each generation has its own pool."""
    wanted = array_step()
    forked(lambda: forked(array_step, wanted) or array_step(), wanted)


def pytorch_alone():
    """What PyTorch does in a forked child, without this package."""
    import torch

    def backward(function=lambda x, w: torch.tanh(x @ w).square().mean()):
        function(torch.randn(30, 16), torch.randn(16, 16, requires_grad=True)).backward()

    def child(what):
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            torch.set_num_threads(1)
            try:
                backward()
                print(f"{what}: backward works in a forked child", flush=True)
            except RuntimeError as error:
                print(f"{what}: {error}", flush=True)
            os._exit(0)
        os.waitpid(child, 0)

    child("before anything")
    backward(torch.compile(lambda x, w: torch.tanh(x @ w).square().mean(), backend="aot_eager"))
    child("after torch.compile")


if __name__ == "__main__":
    if "pytorch-alone" in sys.argv:
        pytorch_alone()
    else:
        for busy in (False, True):
            check(array_step, array_step, busy)
        grandchildren()
        for busy in (False, True):
            check(tensor_step, tensor_step_of_a_child, busy)
