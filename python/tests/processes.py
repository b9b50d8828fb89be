"""Processes of `torch.distributed` on this machine (gloo), which stay between calls: starting them costs more than most tests.

    with Processes(4) as processes:
        results = processes.call(3, function, ...)     # function(group of the first 3 ranks, ...) on each of them

Functions are of modules, and so are their arguments and results (tensors too) picklable. An exception of theirs is raised here, with the
rank and its traceback.
"""

import contextlib
import datetime
import io
import multiprocessing
import os
import sys
import tempfile
import traceback

import torch
import torch.distributed as dist

TIMEOUT = 60.0


class Failed(Exception):
    """`errors`: of each rank its exception's type and text, or None."""

    def __init__(self, errors):
        self.errors = errors
        super().__init__("\n".join(f"rank {rank}: {error[2]}" for rank, error in enumerate(errors) if error))


class Processes:
    def __init__(self, ranks, timeout=TIMEOUT):
        self.timeout = timeout
        # A server that has imported torch, and what losses import when they first run, forks them. It has run nothing of torch.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "catalog_softmax.distributed"])
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.children = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            child = context.Process(target=_work, args=(rank, ranks, os.path.join(self.folder.name, "store"), timeout, there), daemon=True)
            child.start()
            there.close()
            self.pipes.append(here), self.children.append(child)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(b"")
        for child in self.children:
            child.join(2)
            if child.is_alive():
                child.kill()
        self.folder.cleanup()

    def call(self, ranks, function, *args, **options):
        """The results of the first `ranks` processes."""
        for pipe in self.pipes[:ranks]:
            self.send(pipe, ranks, function, *args, **options)
        found = [self.answer(rank) for rank in range(ranks)]
        errors = [error for _, error in found]
        if any(errors):
            raise Failed(errors)
        return [result for result, _ in found]

    def send(self, pipe, ranks, function, *args, **options):
        pipe.send_bytes(_bytes((ranks, function, args, options)))

    def answer(self, rank):
        """(the result, None) or (None, the error)."""
        try:
            if self.pipes[rank].poll(2 * self.timeout + 30):
                return _value(self.pipes[rank].recv_bytes())
        except EOFError:
            return None, ("Died", "the process ended", "the process ended")
        return None, ("Silent", "no answer", "no answer")


def _bytes(value):
    """Tensors as their bytes, not as shared memory."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _value(data):
    return torch.load(io.BytesIO(data), weights_only=False)


def _work(rank, ranks, store, timeout, pipe):
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=limit)
    groups = {n: dist.new_group(list(range(n)), timeout=limit) for n in range(1, ranks)} | {ranks: dist.group.WORLD}
    while data := pipe.recv_bytes():
        n, function, args, options = _value(data)
        try:
            answer = function(groups[n], *args, **options), None
        except Exception as error:
            answer = None, (type(error).__name__, str(error), traceback.format_exc())
        pipe.send_bytes(_bytes(answer))
    dist.destroy_process_group()
