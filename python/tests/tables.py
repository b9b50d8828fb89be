"""The losses of batches over a table as plain gathers and loops, in any precision: what the package is compared with.

`softmax_loss` and `row_statistics` have the package's arguments. Each row's candidates are written out, one after the other.
"""

import math

import torch
import torch.nn.functional as F

from reference import rows as rows_of_losses


def _list(tensors):
    return [] if tensors is None else [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _pools(table, candidates, candidate_rows, candidate_ids, log_q, ids, row_negatives):
    """(embeddings, ids, log_q) of all shared candidates."""
    rows = _list(candidate_rows)
    if table is not None and not _list(candidates) and not rows and row_negatives is None:
        rows = [torch.arange(len(table))]
    embeddings = _list(candidates) + [table[r.long()] for r in rows]
    of_ids = [None if i is None else i.long() for i in _list(candidate_ids) or [None] * len(_list(candidates))]
    of_ids += [ids[r.long()] for r in rows]
    of_log_q = _list(log_q) or [None] * len(embeddings)
    if not embeddings:
        return None
    start, found = 0, []
    for e, i, q in zip(embeddings, of_ids, of_log_q):
        # Candidates without ids are who they are.
        i = -1 - torch.arange(start, start + len(e)) if i is None else i
        found.append((e, i, torch.zeros(len(e), dtype=e.dtype) if q is None else q.to(e.dtype)))
        start += len(e)
    return tuple(torch.cat(x) for x in zip(*found))


def row_statistics(
    queries, candidates=None, positives=None, *, similarity="cosine", temperature=0.05, log_q=None, candidate_ids=None, positive_ids=None,
    positive_embeddings=None, excluded=None, table=None, table_ids=None, candidate_rows=None, row_negatives=None,
    row_negatives_log_q=None, positive_offsets=None, false_negative_margin=None, false_negative_ratio=None, sparse_gradient=False,
    skip=(),
):
    """lse (B), positive (P), num_negatives (B). Rows of `skip` are left out: 0."""
    unit = (lambda x: F.normalize(x, dim=1, eps=1e-12)) if similarity == "cosine" else (lambda x: x)
    b = len(queries)
    ids = None if table is None else torch.arange(len(table)) if table_ids is None else table_ids.long()
    shared = _pools(table, candidates, candidate_rows, candidate_ids, log_q, ids, row_negatives)
    if positives is None and positive_embeddings is None:
        positives = torch.arange(b)
    count = len(positives) if positives is not None else len(positive_embeddings)
    offsets = list(range(b + 1)) if positive_offsets is None else positive_offsets.tolist()
    lse, of_pairs, counts = [], [None] * count, []
    for row in range(b):
        pairs = range(offsets[row], offsets[row + 1])
        if row in skip:
            lse.append(queries.new_zeros(()))
            counts.append(0)
            for pair in pairs:
                of_pairs[pair] = queries.new_zeros(())
            continue
        q = unit(queries[row : row + 1])
        identities = set()
        for pair in pairs:
            if positive_embeddings is not None:
                e, identity = positive_embeddings[pair], None if positive_ids is None else int(positive_ids[pair])
            elif table is not None:
                e, identity = table[positives[pair].long()], int(ids[positives[pair].long()])
            else:
                e, identity = shared[0][positives[pair].long()], int(shared[1][positives[pair].long()])
            of_pairs[pair] = (q @ unit(e[None]).T / temperature).reshape(())
            identities.add(identity)
        if excluded is not None:
            identities |= set(excluded[1][excluded[0][row] : excluded[0][row + 1]].tolist())
        e, i, l = [], [], []
        if shared is not None:
            e.append(shared[0]), i.append(shared[1]), l.append(shared[2])
        if row_negatives is not None:
            own = row_negatives[row].long()
            keep = own >= 0
            e.append(table[own[keep]]), i.append(ids[own[keep]])
            of_own = torch.zeros(len(own)) if row_negatives_log_q is None else row_negatives_log_q[row]
            l.append(of_own[keep].to(queries.dtype))
        e, i, l = torch.cat(e), torch.cat(i), torch.cat(l)
        s = (q @ unit(e).T / temperature).reshape(-1)
        negative = torch.tensor([int(x) not in identities for x in i], dtype=torch.bool)
        scores = [of_pairs[pair].detach() for pair in pairs]
        if scores and (false_negative_margin is not None or false_negative_ratio is not None):
            best = max(scores)
            if false_negative_margin is not None:
                negative &= ~(s.detach() > best + false_negative_margin)
            elif best > 0:
                negative &= ~(s.detach() > best * false_negative_ratio)
        lse.append((s - l)[negative].logsumexp(0) if negative.any() else queries.new_full((), -math.inf))
        counts.append(int(negative.sum()))
    stack = lambda values: torch.stack(values) if values else queries.new_zeros(0)
    return stack(lse), stack(of_pairs), torch.tensor(counts)


def softmax_loss(
    queries, candidates=None, positives=None, *, correction="none", log_q=None, positive_log_q=None, row_weight=None, reduction="mean",
    positive_offsets=None, positive_weight=None, **options,
):
    b = len(queries)
    skip = () if row_weight is None else set(torch.nonzero(row_weight == 0).reshape(-1).tolist())
    lse, positive, n = row_statistics(
        queries, candidates, positives, log_q=log_q, positive_offsets=positive_offsets, skip=skip, **options
    )
    row_of = torch.arange(b) if positive_offsets is None else torch.repeat_interleave(torch.arange(b), positive_offsets.long().diff())
    per_row = torch.bincount(row_of, minlength=b)
    weight = (1.0 / per_row[row_of]).to(queries.dtype) if positive_weight is None else positive_weight.to(queries.dtype)
    if positive_log_q is None and positives is not None and options.get("table") is None and log_q is not None:
        positive_log_q = torch.cat(_list(log_q))[positives.long()]
    pairs = rows_of_losses(lse[row_of], positive, n[row_of], correction, None, positive_log_q, None)
    loss = queries.new_zeros(b).index_add(0, row_of, weight * pairs)
    of_rows = torch.ones(b, dtype=queries.dtype) if row_weight is None else row_weight.to(queries.dtype)
    loss = torch.where(of_rows > 0, of_rows * loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / {"mean": b, "sum": 1.0, "weighted_mean": of_rows.sum()}[reduction]
