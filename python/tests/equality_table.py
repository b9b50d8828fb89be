"""Prints how far catalogue-parallel losses are from one process, by loss and number of processes: `python python/tests/equality_table.py`.

On 1, 2, 3 and 4 processes, in this order. Largest differences over three tables of unequal shards, an empty one among them: of rows' losses
in float64, where the crate's float64 reference takes the place of its CPU backend on both sides; and with the CPU backend, of rows' losses,
absolute, and of gradients, in units of the largest element of the gradient.

"gathered" are losses with the candidates of all ranks, of a batch in unequal parts: the whole batch's loss in place of rows, and
d_candidates in place of d_table.
"""

import torch

import sharded
from catalog_softmax.torch import softmax_loss
from common import embeddings, excluded, integers, log_q
from processes import Processes
from test_distributed import grid, with_log_q_of_positives

B, M, D = 64, 3000, 32
LOSSES = {
    "full softmax": {},
    "full softmax, dot": {"similarity": "dot", "temperature": 4.0},
    "logQ": {"correction": "logq", "log_q": log_q(M, 1)},
    "logQ on negatives": {"correction": "logq_negatives_only", "log_q": log_q(M, 1)},
    "corrected logQ": {"correction": "corrected_logq", "log_q": log_q(M, 1)},
    "excluded items, weights": {"excluded": excluded(B, M, 2), "row_weight": torch.linspace(0, 2, B)},
    "pool by rows": {"candidate_rows": integers(M, 500, 3)},
    "row negatives": {"row_negatives": integers(M, 16 * B, 4).reshape(B, 16)},
    "several positives, margin": {
        "positive_offsets": 2 * torch.arange(B + 1), "positives": integers(M, 2 * B, 5), "false_negative_margin": 0.5,
    },
}
SPLITS = {1: [(M,)], 2: [(1000, 2000), (0, M), (2999, 1)], 3: [(1000, 0, 2000), (1, 1, 2998), (1000, 1000, 1000)],
          4: [(0, 1500, 0, 1500), (700, 800, 701, 799), (1, 2, 3, 2994)]}
GATHERED = {
    "InfoNCE": ({}, {}),
    "symmetric": ({"symmetric": True}, {}),
    "logQ, ids": ({"correction": "logq"}, {"log_q": log_q(B, 1), "candidate_ids": integers(50, B, 2)}),
    "corrected logQ": ({"correction": "corrected_logq"}, {"log_q": log_q(B, 1)}),
}
BATCHES = [(B,), (24, 40), (24, 0, 40), (1, 31, 20, 12)]


def one_process(options, queries, table, double):
    queries, table = queries.clone().requires_grad_(), table.clone().requires_grad_()
    with sharded.float64() if double else torch.enable_grad():
        loss = softmax_loss(queries, table=table, **with_log_q_of_positives(options))
        sharded.upstream_of(loss).backward()
    return loss.detach(), queries.grad, table.grad


def main():
    torch.set_num_threads(1)
    queries, table = grid(embeddings(B, D, 6)), grid(embeddings(M, D, 7))
    print("| loss | rows, float64 | rows, CPU backend | d_queries | d_table |\n|---|---|---|---|---|")
    with Processes(4) as processes:
        for name, given in LOSSES.items():
            options = {"positives": integers(M, B, 8), "temperature": 0.1, "reduction": "none", **given}
            by_ranks = [largest_differences(processes, splits, options, queries, table) for splits in SPLITS.values()]
            print(line(name, zip(*by_ranks)), flush=True)
        for name, given in GATHERED.items():
            by_ranks = [gathered_differences(processes, sizes, given) for sizes in BATCHES]
            print(line(f"gathered, {name}", ([], *zip(*by_ranks))), flush=True)


def line(name, columns):
    return f"| {name} | " + " | ".join(", ".join(f"{x:.0e}" for x in column) or "-" for column in columns) + " |"


def gathered_differences(processes, sizes, given):
    """Of the loss, d_queries and d_candidates in float32."""
    batch = embeddings(B, D, 9), embeddings(B, D, 10)
    options, of_candidates = given
    leaves = [x.clone().requires_grad_() for x in batch]
    one = softmax_loss(*leaves, temperature=0.1, **options, **of_candidates)
    one.backward()
    same = {"temperature": torch.tensor(0.1), **options}
    found = processes.call(len(sizes), sharded.gathered, batch, (sizes, sizes), same, {}, of_candidates)
    found = found[0][0], *(torch.cat([of_rank[place] for of_rank in found]) for place in (1, 2))
    wanted = one.detach(), *(leaf.grad for leaf in leaves)
    scales = 1.0, *(float(gradient.abs().max()) for gradient in wanted[1:])
    return [float((mine - x).abs().max()) / scale for mine, x, scale in zip(found, wanted, scales)]


def largest_differences(processes, splits, options, queries, table):
    """Of rows in float64, and of rows, d_queries and d_table in float32."""
    worst = [0.0] * 4
    for double in (True, False):
        inputs = (queries.double(), table.double()) if double else (queries, table)
        wanted = one_process(options, *inputs, double)
        for sizes in splits:
            found = processes.call(len(sizes), sharded.step, *inputs, sizes, options, double)
            found = found[0][0], found[0][1], torch.cat([of_rank[2] for of_rank in found])
            scales = 1.0, *(float(gradient.abs().max()) for gradient in wanted[1:])
            off = [float((mine - one).abs().max()) / scale for mine, one, scale in zip(found, wanted, scales)]
            places = {0: off[0]} if double else {1: off[0], 2: off[1], 3: off[2]}
            worst = [max(x, places.get(place, 0.0)) for place, x in enumerate(worst)]
    return worst


if __name__ == "__main__":
    main()
