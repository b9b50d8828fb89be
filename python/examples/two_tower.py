"""Trains a two-tower recommender with each loss and compares them over the whole catalogue, as the Rust example does.

    pip install ./python torch
    python python/examples/two_tower.py                             # generated data, every loss
    python python/examples/two_tower.py --data FILE --loss logq     # a CSV with the columns user, item, time

Model, split, optimiser and metrics are those of examples/train_two_tower: of each user the last item is tested, the one before it
chooses the epoch, and the earlier ones are targets, each predicted from what the user took before it. Items are rows of a table,
queries the user's last 20 items of a second one, pooled by an EmbeddingBag, through a small layer. With tqdm there are progress bars,
with matplotlib and --curves FILE a picture of the validation.

`--write FILE` saves the generated data, so that the Rust example can be trained on the same: `--data FILE`.
"""

import argparse
import csv
import gzip
import time

import numpy as np
import torch

import catalog_softmax as cs
from catalog_softmax.torch import softmax_loss

try:
    from tqdm import tqdm
except ImportError:
    tqdm = lambda steps, **_: steps

LOSSES = ["in-batch", "logq", "corrected-logq", "sampled", "full"]
DECAY = 0.9  # how much less an item of the history counts than the one taken after it
SAMPLED = 1024


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="CSV (or .csv.gz) with the columns user, item, time, or user_id, item_id, timestamp; generated where not given")
    parser.add_argument("--write", metavar="FILE", help="where to save the generated data")
    parser.add_argument("--loss", choices=["all", *LOSSES], default="all")
    parser.add_argument("--users", type=int, default=6000, help="of generated data")
    parser.add_argument("--items", type=int, default=2000, help="of generated data")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--history", type=int, default=20, help="items that a query sees")
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--temperature", type=float, default=0.07)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1])
    # Steps are small: on a busy machine, PyTorch's threads wait for each other longer than they compute.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--curves", metavar="FILE", help="validation by epoch, as a picture (matplotlib)")
    return parser.parse_args()


def read(path):
    """Of each user the items in the order of time, first takes alone."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    column = lambda *names: next(name for name in names if name in rows[0])
    user, item, when = column("user", "user_id", "userId"), column("item", "item_id", "movieId"), column("time", "timestamp")
    rows.sort(key=lambda row: float(row[when]))  # stable: equal times keep the order of the file
    items, users = {}, {}
    for row in rows:
        users.setdefault(row[user], {}).setdefault(items.setdefault(row[item], len(items)))
    return [np.array(list(taken)) for taken in users.values()], len(items)


def generate(num_users, num_items, latent=8, taste=5.0):
    """Zipf popularity and latent taste: each user takes 10 to 39 items in proportion to exp(taste affinity) / rank."""
    rng = np.random.default_rng(1)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    points, users = unit(rng.standard_normal((num_items, latent))), unit(rng.standard_normal((num_users, latent)))
    scores = taste * users @ points.T - np.log(np.arange(1, num_items + 1)) + rng.gumbel(size=(num_users, num_items))
    order = np.argsort(-scores, axis=1)[:, :39]
    return [rng.permutation(row[: rng.integers(10, 40)]) for row in order], num_items


class Split:
    """Training targets, as (user, position) in what each user took; the last two of a user are held out."""

    def __init__(self, taken, num_items):
        self.taken, self.num_items = taken, num_items
        enough = [user for user, items in enumerate(taken) if len(items) >= 3]
        self.test = np.array([(user, len(taken[user]) - 1) for user in enough])
        self.validation = self.test - [0, 1]
        trained = [len(items) - 2 if len(items) >= 3 else len(items) for items in taken]
        self.train = np.array([(user, position) for user, n in enumerate(trained) for position in range(1, n)])
        self.counts = np.bincount(np.concatenate([items[:n] for items, n in zip(taken, trained)]), minlength=num_items)

    def before(self, examples, last=None):
        """(offsets (B + 1), items): what the user took before each target, oldest first; the `last` of them."""
        rows = [self.taken[user][max(0, position - last) if last else 0 : position] for user, position in examples]
        return torch.from_numpy(np.cumsum([0] + [len(row) for row in rows])), torch.from_numpy(np.concatenate(rows))

    def targets(self, examples):
        return torch.tensor([self.taken[user][position] for user, position in examples])


class TwoTower(torch.nn.Module):
    def __init__(self, num_items, dim, sparse_items):
        super().__init__()
        self.items = torch.nn.Embedding(num_items, dim, sparse=sparse_items)
        self.history = torch.nn.EmbeddingBag(num_items, dim, mode="sum", sparse=True)
        self.layer = torch.nn.Linear(dim, dim)
        for table in (self.items, self.history):
            torch.nn.init.normal_(table.weight, std=dim**-0.5)
        torch.nn.init.zeros_(self.layer.weight), torch.nn.init.zeros_(self.layer.bias)

    def queries(self, offsets, items):
        ends = offsets[1:].repeat_interleave(offsets.diff())
        weights = DECAY ** (ends - 1 - torch.arange(len(items)))
        sums = torch.zeros(len(offsets) - 1).index_add_(0, torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff()), weights)
        pooled = self.history(items, offsets[:-1], per_sample_weights=weights / sums.repeat_interleave(offsets.diff()))
        return pooled + torch.tanh(self.layer(pooled))


class RowwiseAdagrad(torch.optim.Optimizer):
    """One number for each row: a row that a step does not touch costs nothing."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                table = parameter if parameter.dim() == 2 else parameter[None]
                state = self.state[parameter]
                sums = state.setdefault("sums", torch.zeros(len(table)))
                gradient = parameter.grad
                if gradient.is_sparse:
                    gradient = gradient.coalesce()
                    rows, gradient = gradient.indices()[0], gradient.values()
                else:
                    rows, gradient = torch.arange(len(table)), gradient.reshape(table.shape)
                sums.index_add_(0, rows, gradient.square().mean(1))
                table.index_add_(0, rows, gradient / (sums[rows].sqrt() + 1e-8)[:, None], alpha=-group["lr"])


def loss_of(name, model, queries, targets, excluded, split, temperature, random):
    """The one call that a loop writes; what differs is where the negatives come from."""
    every = torch.arange(split.num_items)
    if name == "full":
        return softmax_loss(queries, model.items.weight, targets, temperature=temperature, candidate_ids=every, excluded=excluded)
    if name == "sampled":
        drawn = cs.Uniform(split.num_items).draw(SAMPLED, random)
        ids = torch.from_numpy(drawn.ids)
        return softmax_loss(
            queries, model.items(ids), positive_embeddings=model.items(targets), positive_ids=targets, candidate_ids=ids,
            temperature=temperature, excluded=excluded,
        )
    options = {}
    if name != "in-batch":
        counts = torch.from_numpy(split.counts).float()
        options["log_q"] = (counts / counts.sum()).log()[targets]
        options["correction"] = "logq" if name == "logq" else "corrected_logq"
    return softmax_loss(queries, model.items(targets), candidate_ids=targets, excluded=excluded, temperature=temperature, **options)


@torch.no_grad()
def rank(model, split, examples, history):
    """Places of the targets among all items that the user had not taken, and the ten items recommended to each."""
    ranking, recommended, ids = None, cs.Recommended(split.num_items), np.arange(split.num_items)
    for start in range(0, len(examples), 1024):
        block = examples[start : start + 1024]
        queries = model.queries(*split.before(block, history)).numpy()
        batch = dict(candidate_ids=ids, excluded=tuple(x.numpy() for x in split.before(block)))
        items = model.items.weight.numpy()
        found = cs.statistics(queries, items, split.targets(block).numpy(), rank=True, **batch)
        of_block = cs.Ranking.of_positives(found.above, found.ties, found.lse, found.positive)
        ranking = of_block if ranking is None else ranking.append(of_block) or ranking
        recommended.add(cs.top_k(queries, items, 10, **batch).indices)
    return ranking, recommended


def train(name, split, args, seed):
    torch.manual_seed(seed)
    random, shuffled = cs.RandomStream(seed), np.random.default_rng(seed)
    model = TwoTower(split.num_items, args.dim, sparse_items=name != "full")
    optimiser = RowwiseAdagrad(model.parameters(), args.learning_rate)
    best, curve = (-1.0, None), []
    for epoch in range(args.epochs):
        start, total = time.perf_counter(), 0.0
        order = shuffled.permutation(len(split.train))
        for first in tqdm(range(0, len(order), args.batch), desc=f"{name} {epoch + 1}", leave=False):
            examples = split.train[order[first : first + args.batch]]
            queries, targets = model.queries(*split.before(examples, args.history)), split.targets(examples)
            loss = loss_of(name, model, queries, targets, split.before(examples), split, args.temperature, random)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(examples)
        ranking, _ = rank(model, split, split.validation, args.history)
        curve.append(ranking.ndcg_at(10))
        speed = len(order) / (time.perf_counter() - start)
        print(f"{name:>14}  seed {seed}  epoch {epoch + 1}  loss {total / len(order):.4f}  validation NDCG@10 {curve[-1]:.4f}  "
              f"{speed:.0f} examples/s", flush=True)
        if curve[-1] > best[0]:
            best = curve[-1], {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(best[1])
    return rank(model, split, split.test, args.history), curve


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    taken, num_items = read(args.data) if args.data else generate(args.users, args.items)
    if args.write:
        with open(args.write, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user", "item", "time"])
            writer.writerows((user, item, at) for user, items in enumerate(taken) for at, item in enumerate(items))
    split = Split(taken, num_items)
    what = args.data or "GENERATED data (no --data given)"
    print(f"{what}: {len(taken)} users, {num_items} items, {len(split.train)} training targets, {len(split.test)} test users\n")
    lines, curves = [], {}
    for name in LOSSES if args.loss == "all" else [args.loss]:
        for seed in args.seeds:
            (ranking, recommended), curves[name] = train(name, split, args, seed)
            metrics = [ranking.recall_at(k) for k in (10, 20, 100)] + [ranking.ndcg_at(10), ranking.ndcg_at(20), ranking.mrr()]
            around = f"{recommended.mean_popularity(split.counts.astype(float)):10.1f} {recommended.coverage():8.3f}"
            lines.append(f"{name:>14} {seed:4d} " + " ".join(f"{metric:9.4f}" for metric in metrics) + around)
    print("\n          loss seed Recall@10 Recall@20 Recall@100 NDCG@10   NDCG@20       MRR popularity coverage")
    print("\n".join(lines))
    if args.curves:
        import matplotlib.pyplot as plt

        for name, curve in curves.items():
            plt.plot(range(1, len(curve) + 1), curve, label=name)
        plt.xlabel("epoch"), plt.ylabel("validation NDCG@10"), plt.legend(), plt.savefig(args.curves)


if __name__ == "__main__":
    main()
