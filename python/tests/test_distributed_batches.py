"""Batches in parts: candidates of all ranks as negatives, gathered queries, towers under DDP and FSDP2, tables as DTensors."""

import pytest
import torch

import parallel_towers
import reference
import sharded
import tables
from catalog_softmax.torch import softmax_loss, update_table
from common import check, copy_of, embeddings, excluded, integers, log_q
from processes import Failed

B, N, D = 12, 20, 6
SPLITS = [((12,), (20,)), ((5, 7), (8, 12)), ((12, 0), (3, 17)), ((4, 4, 4), (10, 0, 10)), ((0, 6, 2, 4), (1, 7, 5, 7))]
QUERIES, CANDIDATES = embeddings(B, D, 1), embeddings(N, D, 2)
IDS = integers(15, N, 4)


def offsets(total):
    return torch.tensor([0, 1, 3, 3, 4, 6, 7, 8, 10, 11, 11, 12, total])


# By name: options alike on every rank, of rows, of candidates, whether positives are indices into each rank's own.
CASES = {
    "plain": ({}, {}, {}, True),
    "ids and excluded": ({"temperature": 0.2}, {"excluded": excluded(B, 15, 6)}, {"candidate_ids": IDS}, True),
    "logq": ({"correction": "logq"}, {}, {"log_q": log_q(N, 7), "candidate_ids": IDS}, True),
    "logq negatives only": ({"correction": "logq_negatives_only", "reduction": "sum"}, {}, {"log_q": log_q(N, 7)}, True),
    "corrected": (
        {"correction": "corrected_logq", "temperature": 0.3}, {"row_weight": torch.linspace(0, 2, B)}, {"log_q": log_q(N, 7)}, True,
    ),
    "weighted mean": ({"reduction": "weighted_mean"}, {"row_weight": torch.linspace(0, 2, B)}, {}, True),
    "mean with weights": ({"similarity": "dot", "temperature": 2.0}, {"row_weight": torch.linspace(1, 0, B)}, {"candidate_ids": IDS}, True),
    "none": ({"reduction": "none"}, {"row_weight": torch.linspace(0, 2, B)}, {}, True),
    "filter": ({"false_negative_margin": 0.1, "temperature": 0.3}, {}, {}, True),
    "positives of their own": (
        {"correction": "logq", "temperature": 0.2},
        {"positive_embeddings": embeddings(B, D, 8), "positive_ids": integers(15, B, 9), "positive_log_q": log_q(B, 10)},
        {"log_q": log_q(N, 7), "candidate_ids": IDS}, False,
    ),
}


def positives_of(sizes):
    """Of the whole batch, those of each rank among its own candidates."""
    starts = [sum(sizes[1][:rank]) for rank in range(len(sizes[0]))]
    each = [start + integers(max(n, 1), b, 11 + rank) for rank, (start, b, n) in enumerate(zip(starts, *sizes))]
    return torch.cat(each)


def one_process(loss, name, positives, dtype):
    options, of_rows, of_candidates, _ = CASES[name]
    q, c = (x.to(dtype, copy=True).requires_grad_() for x in (QUERIES, CANDIDATES))
    temperature = torch.tensor(options.get("temperature", 0.1), dtype=dtype).requires_grad_()
    given = {key: copy_of(x, dtype) for key, x in {**options, **of_rows, **of_candidates}.items()} | {"temperature": temperature}
    separate = given.get("positive_embeddings")
    if separate is not None:
        given["positive_embeddings"] = separate.to(dtype, copy=True).requires_grad_()
    value = loss(q, c, positives, **given)
    (value.sum() if value.dim() else value).backward()
    separate = given.get("positive_embeddings")
    return value.detach(), q.grad, c.grad, temperature.grad, torch.zeros((), dtype=dtype) if separate is None else separate.grad


def joined(found, reduction, separate):
    """What ranks have of their own side by side, and sums over ranks of what all have a part of."""
    if reduction == "none":
        loss = torch.cat([of_rank[0] for of_rank in found])
    else:
        loss = found[0][0]
        assert all(torch.equal(of_rank[0], loss) for of_rank in found)
    temperature = torch.stack([of_rank[3] for of_rank in found]).sum(0)
    own = torch.cat([of_rank[4] for of_rank in found if of_rank[4].dim()]) if separate else torch.zeros(())
    return loss, *(torch.cat([of_rank[place] for of_rank in found]) for place in (1, 2)), temperature, own


@pytest.mark.parametrize("name", CASES)
def test_gathered_loss_is_that_of_the_whole_batch(processes, name):
    options, of_rows, of_candidates, indexed = CASES[name]
    for sizes in SPLITS:
        if indexed and any(b and not n for b, n in zip(*sizes)):
            sizes = ((4, 0, 8), (10, 0, 10))  # who has no candidates has no positives among them
        positives = positives_of(sizes) if indexed else None
        rows = {**of_rows, **({} if positives is None else {"positives": positives})}
        one = lambda dtype: one_process(tables.softmax_loss, name, positives, dtype)
        same = {"temperature": torch.tensor(0.1), **{k: torch.tensor(x) if k == "temperature" else x for k, x in options.items()}}
        found = processes.call(len(sizes[0]), sharded.gathered, (QUERIES, CANDIDATES), sizes, same, rows, of_candidates)
        found = joined(found, options.get("reduction"), "positive_embeddings" in of_rows)
        for place, (mine, wanted, baseline) in enumerate(zip(found, one(torch.float64), one(torch.float32))):
            check(mine, wanted, baseline, f"result {place} with {sizes}")


def test_in_batch_and_symmetric(processes):
    q, c = embeddings(10, D, 1), embeddings(10, D, 2)
    for options in ({}, {"symmetric": True}, {"symmetric": True, "row_weight": True, "ids": True}):
        options = dict(options)
        rows = {"row_weight": torch.linspace(0.5, 2, 10)} if options.pop("row_weight", False) else {}
        ids = {"candidate_ids": integers(8, 10, 3)} if options.pop("ids", False) else {}
        a, b, t = q.clone().requires_grad_(), c.clone().requires_grad_(), torch.tensor(0.2, requires_grad=True)
        loss = softmax_loss(a, b, temperature=t, **options, **rows, **ids)
        loss.backward()
        for sizes in ((10,), (4, 6), (7, 0, 3)):
            same = {"temperature": torch.tensor(0.2), **options}
            found = processes.call(len(sizes), sharded.gathered, (q, c), (sizes, sizes), same, rows, ids)
            for mine, wanted in zip(joined(found, None, False), (loss.detach(), a.grad, b.grad, t.grad)):
                assert (mine - wanted).abs().max() <= 1e-6 * max(1.0, wanted.abs().max()), (options, sizes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types(processes, dtype):
    sizes = ((5, 7), (8, 12))
    positives = positives_of(sizes)
    batch = QUERIES.to(dtype), CANDIDATES.to(dtype)
    found = processes.call(2, sharded.gathered, batch, sizes, {"temperature": torch.tensor(0.2)}, {"positives": positives}, {})
    results = []
    for wanted in (torch.float64, torch.float32):
        q, c, t = *(x.to(wanted, copy=True).requires_grad_() for x in batch), torch.tensor(0.2, dtype=wanted, requires_grad=True)
        loss = reference.softmax_loss(q, c, positives, temperature=t)
        loss.backward()
        results.append((loss.detach(), q.grad, c.grad, t.grad))
    for place, (mine, wanted, baseline) in enumerate(zip(joined(found, None, False), *results)):
        # A candidate's gradient is rounded by each rank, and then their sum.
        parts = 2.0 * torch.finfo(dtype).eps * wanted.abs().max() if place == 2 else 0.0
        check(mine.double() if place == 2 else mine, wanted, baseline + parts, f"result {place}")


def test_averaged_multiplies_gradients_and_not_the_loss(processes):
    sizes = ((4, 8), (8, 12))
    args = (QUERIES, CANDIDATES), sizes, {"temperature": torch.tensor(0.2)}, {"positives": positives_of(sizes)}, {}
    plain, averaged = processes.call(2, sharded.gathered, *args), processes.call(2, sharded.gathered, *args, averaged=True)
    for one, other in zip(plain, averaged):
        assert torch.equal(one[0], other[0])
        for place in (1, 2, 3):
            assert torch.allclose(2 * one[place], other[place], rtol=1e-6)


def test_a_backend_without_reduce_scatter(processes):
    """The sum of everything takes its place."""
    sizes = ((5, 7), (8, 12))
    args = (QUERIES, CANDIDATES), sizes, {"temperature": torch.tensor(0.2)}, {"positives": positives_of(sizes)}, {}
    with_it, without = processes.call(2, sharded.gathered, *args), processes.call(2, sharded.gathered_without_reduce_scatter, *args)
    for one, other in zip(with_it, without):
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(one, other))


def one_tower_step(users, loss):
    tower = parallel_towers.tower(users.shape[1])
    value = loss(tower(users))
    value.backward()
    return value.detach(), [p.grad for p in tower.parameters()]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_towers_beside_a_table_in_shards(processes, kind):
    users, table, items = embeddings(12, D, 1), embeddings(31, D, 2), integers(31, 12, 3)
    leaf = table.clone().requires_grad_()
    loss, wanted = one_tower_step(users, lambda queries: softmax_loss(queries, positives=items, table=leaf))
    sizes, of_ranks = (5, 7), (10, 21)
    found = processes.call(2, parallel_towers.catalog_parallel, kind, users, table, items, sizes, of_ranks)
    close_to(found, loss, wanted)
    assert (torch.cat([of_rank[2] for of_rank in found]) - leaf.grad).abs().max() <= 1e-6 * leaf.grad.abs().max()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_towers_with_the_candidates_of_all_ranks(processes, kind):
    users, candidates, sizes = embeddings(12, D, 1), embeddings(12, D, 2), (5, 7)
    both = torch.nn.ModuleDict({"users": parallel_towers.tower(D), "texts": parallel_towers.tower(D)})
    loss = softmax_loss(both["users"](users), both["texts"](candidates))
    loss.backward()
    found = processes.call(2, parallel_towers.gathered, kind, users, candidates, sizes)
    close_to(found, loss.detach(), [p.grad for p in both.parameters()])


@pytest.mark.parametrize("local_loss", [True, False])
def test_gradients_under_ddp_are_those_of_open_clip(processes, local_loss):
    batch = embeddings(12, D, 1), embeddings(12, D, 2), (6, 6)
    ours = processes.call(2, parallel_towers.gathered, "ddp", *batch, symmetric=True, temperature=0.2)
    theirs = processes.call(2, parallel_towers.open_clip, *batch, local_loss)
    for (_, mine), wanted in zip(ours, theirs):
        largest = max(x.abs().max() for x in wanted)
        assert all((a - b).abs().max() <= 2e-6 * largest for a, b in zip(mine, wanted))


def close_to(found, loss, wanted):
    largest = max(x.abs().max() for x in wanted)
    for of_rank in found:
        assert (of_rank[0] - loss).abs() <= 1e-6 * loss.abs()
        errors = [float((mine - x).abs().max()) for mine, x in zip(of_rank[1], wanted)]
        assert max(errors) <= 2e-6 * largest, (errors, largest)


def test_a_table_that_is_a_dtensor(processes):
    queries, table, items = embeddings(7, D, 1), embeddings(9, D, 2), integers(9, 7, 3)
    leaf = table.clone().requires_grad_()
    loss = softmax_loss(queries, positives=items, table=leaf)
    loss.backward()
    stepped = table.clone()
    update_table(queries, stepped, sharded.optimizer_of("row_adagrad", stepped), items)
    # All four ranks: the last one has no row of 9 in chunks of 3.
    for step, wanted in ((False, leaf.grad), (True, stepped)):
        for value, gradient, placed in processes.call(4, parallel_towers.dtensor, queries, table, items, step):
            assert placed and (value - loss).abs() <= 1e-6 * loss.abs()
            assert (gradient - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_dtensors_that_are_no_shards(processes):
    for said in processes.call(4, parallel_towers.refused_dtensors, embeddings(9, D, 2)):
        assert len(said) == 3 and "Shard(0)" in said[0] and "Shard(0)" in said[1] and "sparse_gradient" in said[2]


def test_pooled_rows_of_shards(processes):
    table, rows = embeddings(31, D, 2), integers(31, 24, 3).reshape(8, 3)
    leaf = table.clone().requires_grad_()
    loss = softmax_loss(leaf[rows].sum(1), positives=rows[:, 0], table=leaf)
    loss.backward()
    for sizes in ((10, 21), (31, 0), (5, 20, 6)):
        found = processes.call(len(sizes), parallel_towers.pooled, table, rows, sizes)
        assert all((of_rank[0] - loss).abs() <= 1e-6 * loss.abs() for of_rank in found)
        assert (torch.cat([of_rank[1] for of_rank in found]) - leaf.grad).abs().max() <= 2e-6 * leaf.grad.abs().max()


@pytest.mark.parametrize(("options", "of_rows", "said"), [
    ({"positives": "past"}, {}, "positives has an element 20"),
    ({"correction": "logq"}, {}, "log_q"),
    ({"symmetric": True}, {}, "symmetric"),
])
def test_errors_of_gathered_losses(processes, options, of_rows, said):
    sizes = ((6, 6), (10, 10))
    positives = positives_of(sizes)
    if options.pop("positives", None):
        positives[11] = 30  # the 21st of rank 1, which has 10
    rows = {**of_rows, **({} if "symmetric" in options else {"positives": positives})}
    with pytest.raises(Failed) as failed:
        processes.call(2, sharded.gathered, (QUERIES, CANDIDATES), sizes, {"temperature": torch.tensor(0.2), **options}, rows, {})
    assert all(error and error[0] == "ValueError" for error in failed.value.errors)
    assert any(said in error[1] for error in failed.value.errors)
