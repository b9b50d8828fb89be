"""Trains the two-tower recommender of two_tower.py with its tables in shards, one on each process, by the full softmax.

    pip install ./python torch
    torchrun --nproc-per-node 2 python/examples/catalog_parallel.py                      # generated data
    torchrun --nproc-per-node 2 python/examples/catalog_parallel.py --items 1000000 --users 4000 --epochs 1 --steps 20
    python python/examples/catalog_parallel.py                                           # the same with the whole table on one process

Each process holds a contiguous part of the items, of the history's table and of their optimisers' states, and nothing holds a whole table.
All see the same batches: each pools the rows of the history that it has, a sum over processes makes the queries, and the loss exchanges
statistics of its rows. The small layer is on every process, and stays the same there because its gradients are. Tables start as a function
of the row alone, so any number of processes trains the same model, up to rounding. The last epoch is tested.
"""

import argparse
import os
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import catalog_softmax as cs
from catalog_softmax.distributed import catalog_parallel_top_k, catalog_parallel_update, sum_over_ranks
from two_tower import DECAY, RowwiseAdagrad, Split, generate, read

BLOCK = 1 << 14  # rows that one random generator fills
FEW_ITEMS = 20_000  # up to here two_tower.py's data, whose generator needs users x items numbers


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="CSV (or .csv.gz) with the columns user, item, time; generated where not given")
    parser.add_argument("--users", type=int, default=6000, help="of generated data")
    parser.add_argument("--items", type=int, default=2000, help="of generated data")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of an epoch, at most; all of its batches where not given")
    parser.add_argument("--tested", type=int, help="users, at most; all where not given")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--history", type=int, default=20, help="items that a query sees")
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--temperature", type=float, default=0.07)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    return parser.parse_args()


def generate_many(num_users, num_items, tastes=100):
    """Users with a taste each: item i is of taste i mod `tastes`, popular ones first, and four of five that a user takes are of theirs."""
    rng = np.random.default_rng(1)
    taken = []
    for taste in rng.integers(0, tastes, num_users):
        ranks = np.exp(rng.random(60) * np.log(num_items // tastes)).astype(int) - 1
        of = np.where(rng.random(60) < 0.8, taste, rng.integers(0, tastes, 60))
        _, first = np.unique(items := ranks * tastes + of, return_index=True)
        taken.append(items[np.sort(first)][: rng.integers(10, 40)])
    return taken, num_items


def rows_of(start, end, dim, seed):
    """The rows [start, end) of a table that starts at random, whoever asks for them."""
    table = torch.empty(end - start, dim)
    for block in range(start // BLOCK, -(-end // BLOCK)):
        values = torch.randn(BLOCK, dim, generator=torch.Generator().manual_seed(1_000_000 * seed + block)) * dim**-0.5
        first, last = max(start, block * BLOCK), min(end, (block + 1) * BLOCK)
        table[first - start : last - start] = values[first - block * BLOCK : last - block * BLOCK]
    return table


class Shards(torch.nn.Module):
    """A process's rows of both tables, and the layer that all have."""

    def __init__(self, num_items, dim, seed):
        super().__init__()
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.start, self.end = num_items * rank // ranks, num_items * (rank + 1) // ranks
        self.register_buffer("items", rows_of(self.start, self.end, dim, 2 * seed))
        self.history = torch.nn.Parameter(rows_of(self.start, self.end, dim, 2 * seed + 1))
        self.layer = torch.nn.Linear(dim, dim)
        torch.nn.init.zeros_(self.layer.weight), torch.nn.init.zeros_(self.layer.bias)

    def own(self, items):
        """Rows of the shard, the first one for an item of another, and whether each is here."""
        here = (items >= self.start) & (items < self.end)
        return torch.where(here, items - self.start, 0), here

    def queries(self, offsets, items):
        ends = offsets[1:].repeat_interleave(offsets.diff())
        weights = DECAY ** (ends - 1 - torch.arange(len(items)))
        user = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
        sums = torch.zeros(len(offsets) - 1).index_add_(0, user, weights)
        rows, here = self.own(items)
        pooled = F.embedding_bag(
            rows, self.history, offsets[:-1], mode="sum", sparse=True, per_sample_weights=weights / sums[user] * here
        )
        pooled = sum_over_ranks(pooled)
        return pooled + torch.tanh(self.layer(pooled))


@torch.no_grad()
def rank_of_targets(model, split, examples, history):
    """Places of the targets among all items that the user had not taken, and how much of the catalogue the lists of ten recommend."""
    ranking, recommended, ids = None, cs.Recommended(split.num_items), np.arange(model.start, model.end)
    for start in range(0, len(examples), 512):
        block = examples[start : start + 512]
        queries, targets, taken = model.queries(*split.before(block, history)), split.targets(block), split.before(block)
        rows, here = model.own(targets)
        of_targets = sum_over_ranks(model.items[rows] * here[:, None])
        # Those above the target are counted by each shard.
        found = cs.statistics(
            queries.numpy(), model.items.numpy(), positive_embeddings=of_targets.numpy(), positive_ids=targets.numpy(), candidate_ids=ids,
            excluded=tuple(x.numpy() for x in taken), rank=True,
        )
        places = sum_over_ranks(torch.stack([torch.from_numpy(x.astype(np.int64)) for x in (found.above, found.ties)]))
        lse = sum_over_ranks(torch.from_numpy(np.exp(found.lse))).log()
        of_block = cs.Ranking.of_positives(*places.numpy(), lse.numpy(), found.positive)
        ranking = of_block if ranking is None else ranking.append(of_block) or ranking
        recommended.add(catalog_parallel_top_k(queries, model.items, 10, excluded=taken).indices.numpy())
    return ranking, recommended


def peak_memory():
    """MiB that this process has had at most, on Linux."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def train(split, args):
    before = peak_memory()
    torch.manual_seed(args.seed)
    model, shuffled = Shards(split.num_items, args.dim, args.seed), np.random.default_rng(args.seed)
    of_items = cs.Optimizer.row_adagrad(len(model.items), args.learning_rate)
    others = RowwiseAdagrad(model.parameters(), args.learning_rate)
    for epoch in range(args.epochs):
        total, took, order = 0.0, [], shuffled.permutation(len(split.train))
        batches = range(0, len(order), args.batch)[: args.steps]
        for first in batches:
            start = time.perf_counter()
            examples = split.train[order[first : first + args.batch]]
            # The step of the items' table is in this call; its backward has the gradients of everything else.
            loss = catalog_parallel_update(
                model.queries(*split.before(examples, args.history)), model.items, of_items, split.targets(examples),
                temperature=args.temperature, excluded=split.before(examples),
            )
            others.zero_grad()
            loss.backward()
            others.step()
            total += loss.item()
            took.append(time.perf_counter() - start)
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}  loss {total / len(batches):.5f}  {np.median(took):.3f} s a step", flush=True)
    return model, before


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    taken, num_items = read(args.data) if args.data else (generate if args.items <= FEW_ITEMS else generate_many)(args.users, args.items)
    split = Split(taken, num_items)
    if dist.get_rank() == 0:
        what = args.data or "GENERATED data (no --data given)"
        print(f"{what}: {len(taken)} users, {num_items} items, {len(split.train)} training targets, {dist.get_world_size()} processes\n")
    model, before = train(split, args)
    trained = peak_memory()
    ranking, recommended = rank_of_targets(model, split, split.test[: args.tested], args.history)
    # Of every process, so that nobody is hidden behind the first.
    memory = torch.zeros(dist.get_world_size(), 3)
    memory[dist.get_rank()] = torch.tensor([before, trained, peak_memory()])
    dist.all_reduce(memory)
    if dist.get_rank() == 0:
        print("\nRecall@10 Recall@100 NDCG@10       MRR coverage")
        metrics = [ranking.recall_at(10), ranking.recall_at(100), ranking.ndcg_at(10), ranking.mrr()]
        print(" ".join(f"{metric:9.4f}" for metric in metrics) + f"{recommended.coverage():9.4f}")
        print("\nprocess   rows   before the model, MiB   peak of training   peak in all")
        for rank, (of_start, of_training, of_all) in enumerate(memory.tolist()):
            rows = num_items * (rank + 1) // len(memory) - num_items * rank // len(memory)
            print(f"{rank:7d} {rows:6d} {of_start:23.0f} {of_training:18.0f} {of_all:13.0f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
