"""A PyTorch training step with each loss: eager logits, F.linear_cross_entropy, torch.compile, and catalog_softmax.torch.

    pip install ./python torch numpy
    python benches/peers/torch_loop.py

A step is a query tower (a linear layer), an item table, the loss, its backward, that of the towers, and SGD. Three places where the
candidates come from: in-batch (N = B), sampled (the batch's positives and draws, looked up, with logQ), full (the table). All compute
cosine similarity over a temperature and softmax cross-entropy, of the same numbers; losses must agree to 1e-4. No masks, which
linear_cross_entropy has no place for.

Milliseconds are medians of alternating rounds: of the loss and its backward alone, and of the whole step. Memory is the peak of the
loss and its backward beside what was resident before. Each shape runs twice, in processes of their own: with PyTorch as it comes, and
with huge pages and memory that is kept between steps, which all of them get then. --overhead compares the operator with the Rust call
alone, on the same tensors and threads.
"""

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import time

KEPT_MEMORY = "--kept-memory" in sys.argv
if KEPT_MEMORY:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for tensors; read when torch is imported

import torch
import torch.nn.functional as F

from catalog_softmax import _core
from catalog_softmax.torch import softmax_loss
from catalog_softmax.torch._arguments import Arguments
from common import processor
from memory import forget_peak, keep_freed_memory, status

TAU = 0.05
SHAPES = "512:in-batch:64 512:in-batch:128 4096:in-batch:128 512:sampled:128 512:full:64 512:full:128"
NUM_CANDIDATES = {"sampled": 32_768, "full": 100_000}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=SHAPES.split(), help="B:in-batch|sampled|full:D")
    parser.add_argument("--peers", nargs="*", default=["eager", "lce 64", "lce 256", "lce auto", "compile"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="alternations between the implementations")
    parser.add_argument("--steps", type=int, default=3, help="counted steps per implementation and round")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what the script runs itself with: one shape
    parser.add_argument("--kept-memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--overhead", action="store_true", help="the operator against the Rust call alone")
    return parser.parse_args()


def eager(q, c, positives, log_q):
    logits = F.normalize(q, dim=1) @ F.normalize(c, dim=1).T / TAU
    return F.cross_entropy(logits if log_q is None else logits - log_q, positives)


def linear_cross_entropy(rows):
    chosen = {} if rows == "auto" else {"batch_chunk_size": int(rows), "chunking_method": None}
    options = torch.nn.LinearCrossEntropyOptions(**chosen)

    def loss(q, c, positives, log_q):
        bias = None if log_q is None else -log_q
        q, c = F.normalize(q, dim=1) / TAU, F.normalize(c, dim=1)
        return F.linear_cross_entropy(q, c, positives, linear_bias=bias, options=options)

    return loss


def ours(q, c, positives, log_q):
    correction = "none" if log_q is None else "logq"
    return softmax_loss(q, c, positives, temperature=TAU, correction=correction, log_q=log_q)


def implementation(name):
    if name.startswith("lce "):
        return linear_cross_entropy(name.split()[1])
    return {"eager": eager, "compile": torch.compile(eager, dynamic=False), "ours": ours}[name]


class Step:
    """A model of its own and the batches, the same for each implementation."""

    def __init__(self, loss, b, kind, dim):
        torch.manual_seed(1)
        self.loss, self.b, self.kind = loss, b, kind
        self.n = NUM_CANDIDATES.get(kind, b)
        self.num_items = max(NUM_CANDIDATES.values())
        self.features = torch.randn(b, dim)
        self.tower = torch.nn.Linear(dim, dim)
        self.items = torch.nn.Embedding(self.num_items, dim, sparse=kind != "full")
        self.optimiser = torch.optim.SGD([*self.tower.parameters(), *self.items.parameters()], lr=0.1)
        self.positive_items = torch.randint(self.num_items, (b,))
        self.drawn = torch.cat([self.positive_items, torch.randint(self.num_items, (self.n,))])[: self.n]
        self.positives = self.positive_items if kind == "full" else torch.arange(b)
        self.log_q = None if kind != "sampled" else torch.randn(self.n) - math.log(self.num_items)

    def step(self):
        """(loss, seconds of the loss and its backward, seconds of the step)"""
        start = time.perf_counter()
        self.optimiser.zero_grad()
        queries = self.tower(self.features)
        candidates = self.items.weight if self.kind == "full" else self.items(self.drawn)
        q, c = queries.detach().requires_grad_(), candidates.detach().requires_grad_()
        before = time.perf_counter()
        loss = self.loss(q, c, self.positives, self.log_q)
        loss.backward()
        after = time.perf_counter()
        value = loss.detach()
        torch.autograd.backward([queries, candidates], [q.grad, c.grad])
        self.optimiser.step()
        return value.item(), after - before, time.perf_counter() - start

    def memory(self):
        """Peak bytes of the loss and its backward."""
        with torch.no_grad():
            candidates = self.items.weight.detach() if self.kind == "full" else self.items(self.drawn)
            q, c = self.tower(self.features).requires_grad_(), candidates.requires_grad_()
        before = forget_peak()
        self.loss(q, c, self.positives, self.log_q).backward()
        return status("VmHWM") - before


def measure(shape, args):
    """Of each loss, in this process: medians and least of loss and backward, median of the step, peak bytes."""
    b, kind, dim = shape.split(":")
    b, dim = int(b), int(dim)
    steps = {name: Step(implementation(name), b, kind, dim) for name in [*args.peers, "ours"]}
    parts, wholes = {name: [] for name in steps}, {name: [] for name in steps}
    losses = {name: step.step()[0] for name, step in steps.items()}  # compiles, allocates
    for name, loss in losses.items():
        assert abs(loss - losses["ours"]) <= 1e-4 * abs(loss), f"{name} has the loss {loss}, ours {losses['ours']}"
    for round in range(args.rounds):
        for name, step in steps.items():
            # Its automatic chunks are a few rows, and take seconds: one step is enough to see it.
            slow = name == "lce auto"
            if slow and round > 0:
                continue
            if not slow:
                step.step()
            for _ in range(1 if slow else args.steps):
                _, part, whole = step.step()
                parts[name].append(part)
                wholes[name].append(whole)
    return {
        name: [statistics.median(parts[name]), min(parts[name]), statistics.median(wholes[name]), step.memory(), step.n]
        for name, step in steps.items()
    }


def compare(shape, args):
    """A line for each loss: both processes."""
    found = []
    for kept in ([], ["--kept-memory"]):
        command = [sys.executable, __file__, "--measure", shape, "--rounds", str(args.rounds), "--steps", str(args.steps)]
        command += ["--threads", str(args.threads), "--peers", *args.peers, *kept]
        found.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]))
    b, kind, dim = shape.split(":")
    for name in found[0]:
        cells = [datetime.date.today().isoformat(), f"{b} x {found[0][name][-1]} x {dim}, {kind}", name]
        for of_mode in found:
            median, least, whole, memory, _ = of_mode[name]
            cells += [f"{median * 1e3:.2f} ({least * 1e3:.2f})", f"{median / of_mode['ours'][0]:.1f}"]
        _, _, whole, memory, _ = found[0][name]
        print("| " + " | ".join([*cells, f"{whole * 1e3:.2f}", f"{memory / 2**20:.1f}"]) + " |", flush=True)


def overhead(shape, args):
    """The operator, forward and backward, and the Rust crate's one call for loss and gradients."""
    b, kind, dim = shape.split(":")
    step = Step(ours, int(b), kind, int(dim))
    candidates = step.items.weight if kind == "full" else step.items(step.drawn)
    q, c = step.tower(step.features).detach(), candidates.detach()
    arguments = Arguments(q, c, step.positives, None, None, step.log_q, None, None, None, None, None)
    options = ("cosine", TAU, "none" if step.log_q is None else "logq", "mean", False)
    leaves = q.clone().requires_grad_(), c.clone().requires_grad_()

    def operator():
        leaves[0].grad = leaves[1].grad = None
        ours(*leaves, step.positives, step.log_q).backward()

    def rust():
        _core.compute(arguments.raw(), options, (True, False, False), args.threads)

    seconds = {operator: [], rust: []}
    for _ in range(args.rounds * 4):
        for call in seconds:
            call()
            for _ in range(args.steps):
                start = time.perf_counter()
                call()
                seconds[call].append(time.perf_counter() - start)
    (median, least), (rust_median, rust_least) = (
        (statistics.median(seconds[call]) * 1e3, min(seconds[call]) * 1e3) for call in (operator, rust)
    )
    cells = [datetime.date.today().isoformat(), f"{b} x {step.n} x {dim}, {kind}", f"{median:.2f} ({least:.2f})"]
    cells += [f"{rust_median:.2f} ({rust_least:.2f})", f"{median - rust_median:.2f} ({least - rust_least:.2f})"]
    print("| " + " | ".join(cells) + " |", flush=True)


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.kept_memory:
        keep_freed_memory()
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return
    print(f"{processor()}, {args.threads} threads; PyTorch {torch.__version__}, f32; median (best) of {args.rounds} alternating rounds")
    print(f"of {args.steps} steps; load average at the start {os.getloadavg()[0]:.1f}\n")
    if args.overhead:
        print("| date | B x N x D | operator, ms | Rust call, ms | difference, ms |")
        print("|" + "---|" * 5)
    else:
        print("| date | B x N x D | loss | loss and backward, ms | times ours | huge pages, kept, ms | times ours | step, ms | memory, MiB |")
        print("|" + "---|" * 9)
    for shape in args.shapes:
        (overhead if args.overhead else compare)(shape, args)


if __name__ == "__main__":
    main()
