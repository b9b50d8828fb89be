#!/usr/bin/env python3
"""A model of a training step over several GPUs: bytes sent, floating-point operations, memory, and which of them takes longest.

    python3 scripts/scaling.py
    python3 scripts/scaling.py --check docs/scaling.md

The first prints the tables of docs/scaling.md, and the second fails where that page has others. Nothing here was measured on a GPU: the
rates below are those of data sheets and of the kernels' floor in docs/benchmarks.md. So each time is the least that the hardware allows, and
real steps take longer.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

TENSOR = 790e12
"""bf16 operations a second of an H200's tensor cores at the clock of docs/benchmarks.md."""

MEMORY = 141e9
"""Bytes of an H200."""

LINKS = {"NVLink": 450e9, "InfiniBand": 50e9}
"""Bytes a second that one GPU sends, and as many that it receives: NVLink 4 (900 GB/s both ways), and NDR of 400 Gb/s a GPU."""

EMBEDDING, FLOAT, ROW = 2, 4, 32
"""Bytes of an element of an embedding (bf16), of a gradient (f32), and of a row: its log-sum-exp, number of negatives, positive's score
and positive's log_q, in f64."""


@dataclass(frozen=True)
class Step:
    """Of each rank: bytes that it sends, operations of its matmuls, bytes of its memory, and of those the gradient's of its items."""

    sent: float
    operations: float
    memory: float
    gradient: float

    def compute_seconds(self):
        return self.operations / TENSOR

    def seconds(self, link):
        return self.sent / LINKS[link]


def all_gather(ranks, one_rank_has):
    """Bytes that a rank sends in a ring: the parts of all ranks but one pass through it."""
    return (ranks - 1) * one_rank_has


def reduce_scatter(ranks, one_rank_keeps):
    """The same way round."""
    return (ranks - 1) * one_rank_keeps


def all_reduce(ranks, total):
    """A reduce-scatter, then an all-gather, of a part of the total each."""
    return 2 * (ranks - 1) * total / ranks


def catalogue_parallel(ranks, batch, items, dim, optimizer_bytes_per_row=FLOAT):
    """The table in shards, the whole batch of queries on every rank.

    Sent: the queries are gathered, as they come from a tower that runs on 1 / ranks of the batch on each rank, and their gradient is
    summed. Each rank then takes the gradient of its own queries. Of the loss itself: 32 bytes for each row, and the queries' gradient.
    """
    own = batch / ranks
    towers = all_gather(ranks, EMBEDDING * own * dim)
    loss = all_gather(ranks, ROW * batch) + all_reduce(ranks, FLOAT * batch * dim)
    shard = items / ranks
    table, gradient = shard * (EMBEDDING * dim + optimizer_bytes_per_row), shard * FLOAT * dim
    rows = batch * dim * (2 * EMBEDDING + 3 * FLOAT)
    return Step(towers + loss, MATMULS * 2 * batch * shard * dim, table + gradient + rows, gradient)


def gathered(ranks, batch, dim):
    """Everybody's candidates as negatives: each rank's part of the queries against the whole batch's items."""
    own = batch / ranks
    candidates = EMBEDDING * dim + 8 + FLOAT  # with an id and a log_q
    sent = all_gather(ranks, own * candidates) + reduce_scatter(ranks, own * FLOAT * dim)
    gradient = batch * FLOAT * dim
    memory = batch * candidates + gradient + own * dim * (EMBEDDING + 2 * FLOAT)
    return Step(sent, MATMULS * 2 * own * batch * dim, memory, gradient)


MATMULS = 4
"""Of a loss with gradients: scores, their mean candidate, scores again, and the candidates' gradient."""


def milliseconds(seconds):
    return f"{seconds * 1e3:,.2f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def size(count):
    exponent = len(f"{count:.0f}") - 1
    return f"10^{exponent}" if count == 10**exponent else f"{count:,.0f}"


def table(head, rows):
    line = lambda cells: "| " + " | ".join(str(cell) for cell in cells) + " |"
    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def catalogue_rows():
    shapes = [(10**7, 128, 8192), (10**8, 64, 8192), (10**8, 128, 8192), (10**8, 128, 65536), (10**8, 256, 8192)]
    shapes += [(10**9, 64, 8192), (10**9, 128, 8192), (10**9, 128, 65536), (10**9, 256, 65536)]
    for shape in shapes:
        yield from (catalogue_row(*shape, ranks) for ranks in (1, 8, 64))


def catalogue_row(items, dim, batch, ranks):
    step = catalogue_parallel(ranks, batch, items, dim)
    link = "NVLink" if ranks <= 8 else "InfiniBand"
    sending = [f"{step.sent / 1e6:,.0f}", milliseconds(step.seconds(link)), link] if ranks > 1 else ["0", "0", "none"]
    memory = [memory_cell(step.memory), memory_cell(step.memory - step.gradient)]
    return [size(items), dim, f"{batch:,}", ranks, milliseconds(step.compute_seconds()), *sending, *memory]


def memory_cell(found):
    return f"{found / 1e9:,.1f}" + ("" if found < MEMORY else " (too much)")


def gathered_rows():
    for dim in (64, 128, 256):
        for batch in (8192, 65536):
            for ranks in (2, 8, 64):
                step = gathered(ranks, batch, dim)
                links = [milliseconds(step.seconds(link)) for link in LINKS]
                yield [dim, f"{batch:,}", ranks, milliseconds(step.compute_seconds()), f"{step.sent / 1e6:,.1f}", *links]


def crossings():
    """Below how many rows of a shard, and how many queries of a rank, sending takes longer than computing. 64 ranks."""
    ranks, dim, batch = 64, 128, 65536
    catalogue, everybody = catalogue_parallel(ranks, batch, ranks, dim), gathered(ranks, ranks, dim)
    for link in LINKS:
        yield [link, *(f"{step.seconds(link) / step.compute_seconds():,.0f}" for step in (catalogue, everybody))]


def main():
    memory = ["memory of a rank, GB", "without the gradient of the table"]
    head = ["N", "D", "B", "ranks", "compute, ms", "sent by a rank, MB", "sending, ms", "over", *memory]
    tables = [
        table(["link", "catalogue: rows of a shard", "everybody's negatives: queries of a rank"], crossings()),
        table(head, catalogue_rows()),
        table(["D", "B", "ranks", "compute, ms", "sent by a rank, MB", *(f"over {link}, ms" for link in LINKS)], gathered_rows()),
    ]
    match sys.argv[1:]:
        case []:
            print("\n\n".join(tables))
        case ["--check", page]:
            text = Path(page).read_text()
            missing = [found.splitlines()[0] for found in tables if found not in text]
            if missing:
                sys.exit(f"{page} has another table than this script prints: {missing[0]}")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
