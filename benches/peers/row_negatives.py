"""Negatives of a row's own from a table, and a step over a whole catalogue: PyTorch's gathers against catalog_softmax.torch.

    pip install ./python torch numpy
    python benches/peers/row_negatives.py

Sequential recommenders (SASRec, gSASRec) score each position against K items that were drawn for it. PyTorch gathers (B, K + 1, D)
embeddings, multiplies, masks accidental hits, and calls cross_entropy; its table has a sparse gradient, which most optimisers coalesce
first. `softmax_loss` reads the rows where they are, and its sparse gradient has each row once, so coalesce() does nothing. With an
optimiser's step, SGD here, ours is `update_table`, which needs no gradient of the table. Losses must agree to 1e-4.

The second table is a full catalogue with row-wise Adagrad: `update_table`, against the loss's gradient (M, D) and the optimiser's step
on it.

Milliseconds are medians of alternating rounds, the best in brackets. Memory is the peak beside what was resident before, of one step:
gradients are part of it.
"""

import argparse
import datetime
import os
import statistics
import time

import torch
import torch.nn.functional as F

import catalog_softmax
from catalog_softmax.torch import softmax_loss, update_table
from common import processor
from memory import forget_peak, status


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096, help="B")
    parser.add_argument("--negatives", type=int, default=256, help="K")
    parser.add_argument("--items", type=int, default=1_000_000, help="M")
    parser.add_argument("--dim", type=int, default=64, help="D")
    parser.add_argument("--catalogue-rows", type=int, default=512, help="B of the full catalogue")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


LEARNING_RATE = 1e-6
"""So small that all losses stay comparable."""


def gather(similarity, temperature):
    def loss(q, table, positives, negatives):
        gathered = F.embedding(torch.cat([positives[:, None], negatives], 1), table, sparse=True)
        if similarity == "cosine":
            q, gathered = F.normalize(q, dim=1), F.normalize(gathered, dim=2)
        logits = torch.einsum("bd,bkd->bk", q, gathered) / temperature
        hits = F.pad(negatives == positives[:, None], (1, 0))
        return F.cross_entropy(logits.masked_fill(hits, -torch.inf), torch.zeros(len(q), dtype=torch.int64))

    return loss


def ours(similarity, temperature, then):
    if then == "SGD":
        optimizer = catalog_softmax.Optimizer.sgd(LEARNING_RATE)
        return lambda q, table, positives, negatives: update_table(
            q, table, optimizer, positives, row_negatives=negatives, similarity=similarity, temperature=temperature
        )
    return lambda q, table, positives, negatives: softmax_loss(
        q, table=table, positives=positives, row_negatives=negatives, similarity=similarity, temperature=temperature, sparse_gradient=True
    )


class OwnNegatives:
    """Loss and backward, and what an optimiser does then: nothing, coalesce(), or a step of SGD."""

    def __init__(self, args, loss, then):
        generator = torch.Generator().manual_seed(1)
        self.loss, self.then = loss, then
        self.q = torch.randn(args.rows, args.dim, generator=generator).requires_grad_()
        self.positives = torch.randint(args.items, (args.rows,), generator=generator)
        self.negatives = torch.randint(args.items, (args.rows, args.negatives), generator=generator)

    def __call__(self, table):
        self.q.grad = table.grad = None
        loss = self.loss(self.q, table, self.positives, self.negatives)
        loss.backward()
        if self.then == "coalesced":
            table.grad = table.grad.coalesce()
        elif self.then == "SGD" and table.grad is not None:
            torch.optim.SGD([table], lr=LEARNING_RATE).step()
        return loss.item()


class Catalogue:
    """Loss, backward and the table's step."""

    def __init__(self, args, step):
        generator = torch.Generator().manual_seed(2)
        self.step = step
        self.q = torch.randn(args.catalogue_rows, args.dim, generator=generator).requires_grad_()
        self.positives = torch.randint(args.items, (args.catalogue_rows,), generator=generator)
        self.optimizer = catalog_softmax.Optimizer.row_adagrad(args.items, LEARNING_RATE)

    def __call__(self, table):
        self.q.grad = table.grad = None
        return self.step(self.q, table, self.positives, self.optimizer)


def in_place(q, table, positives, optimizer):
    loss = update_table(q, table, optimizer, positives)
    loss.backward()
    return loss.item()


def gradient_then_step(q, table, positives, optimizer):
    loss = softmax_loss(q, table=table, positives=positives)
    loss.backward()
    optimizer.step(table.detach().numpy(), table.grad.numpy(), threads=torch.get_num_threads())
    return loss.item()


def compare(shape, steps, table, rounds):
    seconds, losses = {name: [] for name in steps}, {name: step(table) for name, step in steps.items()}
    first = losses["ours"]
    for name, loss in losses.items():
        assert abs(loss - first) <= 1e-4 * abs(first), f"{name} has the loss {loss}, ours {first}"
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step(table)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    for name, step in steps.items():
        peer = "ours" + (name[name.index(","):] if name.startswith("PyTorch,") else "")
        table.grad = step.q.grad = None
        before = forget_peak()
        step(table)
        memory = (status("VmHWM") - before) / 2**20
        cells = [datetime.date.today().isoformat(), shape, name, f"{medians[name] * 1e3:.1f} ({min(seconds[name]) * 1e3:.1f})"]
        print("| " + " | ".join([*cells, f"{medians[name] / medians[peer]:.2f}", f"{memory:.1f}"]) + " |", flush=True)


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    print(f"{processor()}, {args.threads} threads; PyTorch {torch.__version__}, f32; median (best) of {args.rounds} alternating")
    print(f"rounds; load average at the start {os.getloadavg()[0]:.1f}\n")
    print("| date | shape | step | ms | times ours | memory, MiB |")
    print("|" + "---|" * 6)
    table = torch.randn(args.items, args.dim, generator=torch.Generator().manual_seed(3)).requires_grad_()
    for similarity, temperature in (("dot", 8.0), ("cosine", 0.1)):
        steps = {}
        for then in ("", "coalesced", "SGD"):
            beside = then and f", {then}"
            steps[f"PyTorch{beside}"] = OwnNegatives(args, gather(similarity, temperature), then)
            steps[f"ours{beside}"] = OwnNegatives(args, ours(similarity, temperature, then), then)
        shape = f"{args.rows} x {args.negatives} of {args.items} x {args.dim}, {similarity}"
        compare(shape, steps, table, args.rounds)
    table.grad = None
    steps = {"gradient, then step": Catalogue(args, gradient_then_step), "ours": Catalogue(args, in_place)}
    compare(f"{args.catalogue_rows} x {args.items} x {args.dim}, row-wise Adagrad", steps, table, args.rounds)


if __name__ == "__main__":
    main()
