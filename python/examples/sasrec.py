"""Trains a small causal transformer over sequences (SASRec) with three losses on padded batches, and compares them over all items.

    pip install ./python torch
    python python/examples/sasrec.py                                # generated data, every loss
    python python/examples/sasrec.py --data FILE --loss full        # a CSV with the columns user, item, time

At each position the model predicts the item that comes next. Shorter sequences are padded in front; a padded position has weight 0, and
is left out before anything is scored. Losses: `full`, over all items; `sampled`, over uniform draws; `corrected-logq`, over draws by
popularity, with log Q subtracted and each row weighted. Data and split are two_tower.py's: of each user the last item is tested, and the
one before it chooses the epoch. The model is that of Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018; the loss
there is a binary one, with one negative for each position.
"""

import argparse
import time

import numpy as np
import torch

import catalog_softmax as cs
from catalog_softmax.torch import softmax_loss
from two_tower import generate, read

LOSSES = ["full", "sampled", "corrected-logq"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="CSV with the columns user, item, time (or timestamp); generated where not given")
    parser.add_argument("--loss", choices=["all", *LOSSES], default="all")
    parser.add_argument("--users", type=int, default=2000, help="of generated data")
    parser.add_argument("--items", type=int, default=1000, help="of generated data")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64, help="sequences of a step")
    parser.add_argument("--length", type=int, default=32, help="items that a sequence keeps, the last ones")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--sampled", type=int, default=256, help="negatives drawn for a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def padded(sequences, length, padding):
    """The last `length` of each, with padding in front."""
    out = np.full((len(sequences), length), padding)
    for row, items in zip(out, sequences):
        last = items[-length:]
        row[length - len(last) :] = last
    return torch.from_numpy(out)


class SasRec(torch.nn.Module):
    def __init__(self, num_items, dim, length, layers):
        super().__init__()
        self.items = torch.nn.Embedding(num_items, dim)
        self.inputs = torch.nn.Embedding(num_items + 1, dim, padding_idx=num_items)
        self.places = torch.nn.Embedding(length, dim)
        for table in (self.items, self.inputs, self.places):
            torch.nn.init.normal_(table.weight, std=dim**-0.5)
        layer = torch.nn.TransformerEncoderLayer(dim, 2, 2 * dim, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.register_buffer("future", torch.full((length, length), -torch.inf).triu(1), persistent=False)

    def forward(self, taken):
        """(B, T, D): the state after each item. What padded places see of each other does not matter: none of them is scored."""
        padding = torch.zeros(taken.shape).masked_fill(taken == self.inputs.padding_idx, -1e9)
        return self.layers(self.inputs(taken) + self.places.weight, mask=self.future, src_key_padding_mask=padding)


def loss_of(name, model, hidden, targets, distribution, random, args):
    """`targets` (B, T) have the number of items where there is none."""
    num_items = model.items.num_embeddings
    queries, targets = hidden.flatten(0, 1), targets.flatten()
    weight = (targets < num_items).float()
    options = {"temperature": args.temperature, "row_weight": weight, "reduction": "weighted_mean"}
    if name == "full":
        return softmax_loss(queries, model.items.weight, targets, **options)  # targets of weight 0 are not looked at
    drawn = distribution.draw(args.sampled, random)
    ids, positive_ids = torch.from_numpy(drawn.ids), targets.clamp(max=num_items - 1)
    if name == "corrected-logq":
        log_probabilities = torch.from_numpy(distribution.log_probabilities(np.arange(num_items)))
        options |= {"correction": "corrected_logq", "log_q": log_probabilities[ids], "positive_log_q": log_probabilities[positive_ids]}
    return softmax_loss(
        queries, model.items(ids), positive_embeddings=model.items(positive_ids), positive_ids=positive_ids, candidate_ids=ids, **options
    )


@torch.no_grad()
def rank(model, histories, targets, args):
    """Places of the targets among all items that the user had not taken."""
    model.eval()
    ranking, every, table = None, np.arange(model.items.num_embeddings), model.items.weight.numpy()
    for start in range(0, len(histories), 512):
        block = histories[start : start + 512]
        queries = model(padded(block, args.length, model.inputs.padding_idx))[:, -1].contiguous().numpy()
        seen = np.cumsum([0] + [len(items) for items in block]), np.concatenate(block)
        options = {"candidate_ids": every, "excluded": seen, "threads": args.threads}
        found = cs.statistics(queries, table, targets[start : start + 512], rank=True, **options)
        of_block = cs.Ranking.of_positives(found.above, found.ties, found.lse, found.positive)
        ranking = of_block if ranking is None else ranking.append(of_block) or ranking
    model.train()
    return ranking


def train(name, taken, num_items, args):
    torch.manual_seed(args.seed)
    random, shuffled = cs.RandomStream(args.seed), np.random.default_rng(args.seed)
    model = SasRec(num_items, args.dim, args.length, args.layers)
    optimiser = torch.optim.Adam(model.parameters(), args.learning_rate)
    counts = np.bincount(np.concatenate([items[:-2] for items in taken]), minlength=num_items)
    distribution = cs.Uniform(num_items) if name == "sampled" else cs.Unigram(np.maximum(counts, 1).astype(float))
    inputs = padded([items[:-3] for items in taken], args.length, num_items)
    targets = padded([items[1:-2] for items in taken], args.length, num_items)
    best = -1.0, None
    for epoch in range(args.epochs):
        start, total, order = time.perf_counter(), 0.0, torch.from_numpy(shuffled.permutation(len(taken)))
        for rows in order.split(args.batch):
            loss = loss_of(name, model, model(inputs[rows]), targets[rows], distribution, random, args)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(rows)
        ndcg = rank(model, [items[:-2] for items in taken], np.array([items[-2] for items in taken]), args).ndcg_at(10)
        print(f"{name:>14}  epoch {epoch + 1}  loss {total / len(taken):.4f}  validation NDCG@10 {ndcg:.4f}  "
              f"{time.perf_counter() - start:.1f} s", flush=True)
        if ndcg > best[0]:
            best = ndcg, {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(best[1])
    return rank(model, [items[:-1] for items in taken], np.array([items[-1] for items in taken]), args)


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    taken, num_items = read(args.data) if args.data else generate(args.users, args.items)
    taken = [items for items in taken if len(items) >= 4]  # two held out, and one transition to learn from
    what = args.data or "GENERATED data (no --data given)"
    print(f"{what}: {len(taken)} users with 4 items at least, {num_items} items\n")
    lines = []
    for name in LOSSES if args.loss == "all" else [args.loss]:
        ranking = train(name, taken, num_items, args)
        lines.append(f"{name:>14} {ranking.recall_at(10):9.4f} {ranking.ndcg_at(10):9.4f} {ranking.mrr():9.4f}")
    print("\n          loss Recall@10   NDCG@10       MRR")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
