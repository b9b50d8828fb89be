"""Catalogue-parallel losses on 1 to 4 processes against one process: every loss, mask and shape of shards.

`test_distributed_batches.py` has gathered candidates, and `test_distributed_ranks.py` what ranks do to each other.
"""

import functools
import math

import pytest
import torch

import sharded
import tables
from catalog_softmax.torch import row_statistics, softmax_loss, top_k, update_table
from common import check, copy_of, embeddings, excluded, integers, log_q
from test_tables import B, CASES, D, M, offsets_and_positives, rows_and_log_q

SPLITS = [(70,), (33, 37), (0, 70), (1, 1, 68), (20, 0, 50), (0, 35, 0, 35)]


def grid(tensor):
    """As float32 and float64 hold it alike."""
    return (64 * tensor).round() / 64


QUERIES, TABLE = grid(embeddings(B, D, 1)), grid(embeddings(M, D, 2))


def cases():
    """Those of a table on one process, but for pools of their own, and more."""
    rows, own_log_q = rows_and_log_q(3)
    offsets, several = offsets_and_positives(5)
    positives, pool, every = integers(M, B, 6), integers(M, 25, 7), log_q(M, 14)
    tau = torch.tensor(0.3, requires_grad=True)
    weight = torch.linspace(0.1, 2.0, B).index_fill(0, torch.tensor([2, 5, 8]), 0.0)
    ids = integers(50, M, 10)
    kept = {name: case for name, case in CASES.items() if "candidates" not in case}
    return kept | {
        "log_q of the table, logq": {"positives": positives, "log_q": every, "correction": "logq"},
        "log_q of the table, corrected": {
            "positives": several, "positive_offsets": offsets, "log_q": every, "correction": "corrected_logq", "temperature": tau,
        },
        "log_q of the table, negatives only": {"positives": positives, "log_q": every, "correction": "logq_negatives_only"},
        "temperature and ids": {
            "positives": positives, "table_ids": ids, "excluded": excluded(B, 50, 22), "temperature": tau, "row_weight": weight,
        },
        "excluded rows": {"positives": positives, "excluded": excluded(B, M, 30), "reduction": "sum", "temperature": tau},
        "ids and a filter": {
            "positives": several, "positive_offsets": offsets, "table_ids": ids, "false_negative_margin": 0.2, "temperature": 0.2,
            "row_negatives": rows, "candidate_rows": pool,
        },
        "everything that shards have": {
            "positives": several, "positive_offsets": offsets, "positive_log_q": log_q(len(several), 8), "candidate_rows": [pool, pool[:9]],
            "log_q": [log_q(25, 25), log_q(9, 26)], "row_negatives": rows, "row_negatives_log_q": own_log_q, "row_weight": weight,
            "correction": "corrected_logq", "reduction": "none", "excluded": excluded(B, M, 27), "false_negative_margin": -0.5,
            "temperature": tau, "positive_weight": torch.linspace(0.0, 1.0, len(several)),
        },
        "sparse": {"positives": positives, "candidate_rows": pool, "row_negatives": rows, "sparse_gradient": True},
        "sparse, positives far from negatives": {
            "positives": integers(1, B, 1) + M - 1, "row_negatives": integers(20, B * 3, 31).reshape(B, 3), "sparse_gradient": True,
        },
        "positives and negatives elsewhere": {"positives": positives % 2 + M - 2, "candidate_rows": pool % 20},
        "no row with a positive": {
            "positives": positives[:2], "positive_offsets": torch.tensor([0, 2] + [2] * (B - 1)), "row_negatives": rows, "table_ids": ids,
            "row_weight": torch.ones(B).index_fill(0, torch.tensor([0]), 0.0), "sparse_gradient": True,
        },
        "no row counts": {"positives": positives, "row_weight": torch.zeros(B)},
    }


CASES_HERE = cases()


def of_one_process(loss, name, similarity, dtype):
    """(loss, gradients of queries, table and temperature)"""
    options = {key: copy_of(x, dtype) for key, x in options_of(name, similarity).items()}
    options = with_log_q_of_positives(options)
    queries, table = (x.to(dtype, copy=True).requires_grad_() for x in (QUERIES, TABLE))
    value = loss(queries, table=table, **options)
    sharded.upstream_of(value).backward()
    temperature, gradient = options["temperature"], table.grad
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    of_temperature = temperature.grad if isinstance(temperature, torch.Tensor) else torch.zeros((), dtype=dtype)
    return value.detach(), queries.grad, gradient, of_temperature


def with_log_q_of_positives(options):
    """One process is told what shards look up."""
    looked_up = options.get("correction") in ("logq", "corrected_logq") and "positive_log_q" not in options
    return {**options, "positive_log_q": options["log_q"][options["positives"]]} if looked_up else options


def options_of(name, similarity):
    return {"temperature": 0.7 if similarity == "dot" else 0.1, "similarity": similarity, **CASES_HERE[name]}


@functools.cache
def references(name, similarity):
    return [of_one_process(tables.softmax_loss, name, similarity, dtype) for dtype in (torch.float64, torch.float32)]


def joined(found):
    """One result of all ranks: they agree in everything but the shards' gradients, bit for bit."""
    for rank, of_rank in enumerate(found):
        for place in (0, 1, 3):
            assert torch.allclose(of_rank[place], found[0][place], rtol=0.0, atol=0.0, equal_nan=True), f"result {place} of rank {rank}"
    return [*found[0][:2], torch.cat([of_rank[2] for of_rank in found]), found[0][3]]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("name", CASES_HERE)
def test_loss_and_gradients(processes, name, similarity):
    options = options_of(name, similarity)
    if similarity == "dot" and "false_negative_ratio" in options:
        pytest.skip("a ratio is for cosine alone")
    if name in ("no row counts", "no row with a positive"):
        pytest.skip("the reference has no graph then: test_formulas_are_exact")
    for sizes in SPLITS if similarity == "cosine" else SPLITS[1::2]:
        found = joined(processes.call(len(sizes), sharded.step, QUERIES, TABLE, sizes, options))
        for place, (mine, wanted, baseline) in enumerate(zip(found, *references(name, similarity))):
            check(mine, wanted, baseline, f"result {place} with {sizes}")


@pytest.mark.parametrize("name", CASES_HERE)
def test_formulas_are_exact(processes, name):
    """In float64, with the crate's reference in place of its CPU backend on both sides."""
    options = options_of(name, "cosine")
    with sharded.float64():
        wanted = of_one_process(softmax_loss, name, "cosine", torch.float64)
    for sizes in SPLITS:
        for place, (mine, exact) in enumerate(zip(joined(in_float64(processes, sizes, options)), wanted)):
            # Rows of size 1, gradients in units of the largest.
            assert mine.dtype == torch.float64 or place == 3
            assert (mine - exact).abs().max() <= 1e-12 * max(1.0, exact.abs().max()), f"result {place} with {sizes}"


def in_float64(processes, sizes, options):
    if isinstance(options["temperature"], torch.Tensor):
        options = {**options, "temperature": options["temperature"].detach().double().requires_grad_()}
    return processes.call(len(sizes), sharded.step, QUERIES.double(), TABLE.double(), sizes, options, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["whole table", "ids and a filter", "sparse", "log_q of the table, corrected"])
def test_types(processes, name, dtype):
    options = {"temperature": 0.2, **CASES_HERE[name]}
    queries, table = QUERIES.to(dtype), TABLE.to(dtype)
    # An odd number of columns: bits of a row are padded on their way.
    assert D % 2 == 1
    results = []
    for wanted in (torch.float64, torch.float32):
        of = with_log_q_of_positives({key: copy_of(x, wanted) for key, x in options.items()})
        q, t = (x.to(wanted, copy=True).requires_grad_() for x in (queries, table))
        loss = tables.softmax_loss(q, table=t, **of)
        loss.backward()
        results.append((loss.detach(), q.grad, t.grad))
    for sizes in SPLITS[1:4]:
        found = joined(processes.call(len(sizes), sharded.step, queries, table, sizes, options))
        assert found[1].dtype == found[2].dtype == dtype
        for place, (mine, wanted, baseline) in enumerate(zip(found, *results)):
            check(mine, wanted, baseline, f"result {place} with {sizes}")


@pytest.mark.parametrize("name", ["whole table", "log_q of the table, logq", "temperature and ids", "excluded rows"])
def test_operators_of_a_gpu(processes, name):
    """Batches that GPUs take go to other operators there; these have the same results on the CPU."""
    options = options_of(name, "cosine")
    for sizes in SPLITS[1:]:
        steps = sharded.step_past_tables, sharded.step
        found, wanted = (joined(processes.call(len(sizes), step, QUERIES, TABLE, sizes, options)) for step in steps)
        for mine, other in zip(found, wanted):
            assert (mine - other).abs().max() <= 1e-6 * max(1.0, other.abs().max())


def test_the_same_call_twice_gives_the_same_bits(processes):
    options = options_of("everything that shards have", "cosine")
    first, second = (joined(processes.call(3, sharded.step, QUERIES, TABLE, (20, 0, 50), options)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_under_torch_compile(processes):
    """The call stays out of the graphs."""
    assert all(processes.call(2, sharded.compiled, QUERIES, TABLE, (30, 40), {"positives": integers(M, B, 6)}))


def test_padding_may_hold_anything(processes):
    """Rows of weight 0 are left out before anything is looked at, and have gradient 0."""
    weight = torch.ones(B).index_fill(0, torch.tensor([0, 4]), 0.0)
    queries = QUERIES.clone()
    queries[[0, 4]] = math.nan
    positives = integers(M, B, 6).index_fill(0, torch.tensor([0, 4]), -100)
    found = joined(processes.call(2, sharded.step, queries, TABLE, (30, 40), {"positives": positives, "row_weight": weight}))
    wanted = joined(processes.call(2, sharded.step, QUERIES, TABLE, (30, 40), {"positives": positives, "row_weight": weight}))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted)) and (found[1][[0, 4]] == 0).all()


def test_rows_without_positives_have_an_lse(processes):
    options = {"positives": torch.zeros(0, dtype=torch.int64), "positive_offsets": torch.zeros(B + 1, dtype=torch.int64)}
    q, table = QUERIES.clone().requires_grad_(), TABLE.clone().requires_grad_()
    sharded.z_loss(row_statistics(q, table=table, **options)).backward()
    for sizes in SPLITS[1:]:
        found = processes.call(len(sizes), sharded.own_loss, QUERIES, TABLE, sizes, options)
        for mine, wanted in ((found[0][0], q.grad), (torch.cat([shard for _, shard in found]), table.grad)):
            assert (mine - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_nan_spoils_its_row_alone(processes):
    table, positives = TABLE.clone(), torch.arange(B)
    table[40] = math.nan
    options = {"positives": positives, "row_negatives": torch.stack([positives + 20, positives + 35], 1), "reduction": "none"}
    found = joined(processes.call(3, sharded.step, QUERIES, table, (20, 20, 30), options))
    assert found[0].isnan().tolist() == [row == 5 for row in range(B)]
    assert found[1].isnan().any(1).tolist() == [row == 5 for row in range(B)]


def test_a_loss_of_the_users_own(processes):
    options = {"positives": integers(M, B, 4), "log_q": log_q(M, 5), "temperature": 0.2}
    q, table = QUERIES.clone().requires_grad_(), TABLE.clone().requires_grad_()
    sharded.z_loss(row_statistics(q, table=table, **options)).backward()
    for sizes in SPLITS[1:]:
        found = processes.call(len(sizes), sharded.own_loss, QUERIES, TABLE, sizes, options)
        for mine, wanted in ((found[0][0], q.grad), (torch.cat([shard for _, shard in found]), table.grad)):
            assert (mine - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@pytest.mark.parametrize("name", ["alone", "excluded rows", "ids", "more than a shard has"])
def test_top_k(processes, name):
    table = TABLE.clone()
    table[[5, 33, 34, 60]] = table[50].clone()  # equal similarities, on several ranks
    table[7] = math.nan
    k = 45 if name == "more than a shard has" else 6
    of_cases = {
        "excluded rows": {"excluded": excluded(B, M, 8)}, "ids": {"excluded": excluded(B, 50, 8), "table_ids": integers(50, M, 10)},
    }
    options = of_cases.get(name, {})
    ids = options.get("table_ids", torch.arange(M) if options else None)
    wanted = top_k(QUERIES, table, k, candidate_ids=ids, excluded=options.get("excluded"))
    for sizes in SPLITS:
        for values, indices in processes.call(len(sizes), sharded.search, QUERIES, table, sizes, k, options):
            assert torch.equal(indices, wanted.indices) and torch.equal(values, wanted.values), sizes


UPDATES = {
    "whole table": {"positives": integers(M, B, 6)},
    "named rows": {"positives": integers(M, B, 6), "candidate_rows": integers(M, 25, 7), "row_negatives": rows_and_log_q(3)[0]},
    "several positives": {
        **dict(zip(("positive_offsets", "positives"), offsets_and_positives(5))), "log_q": log_q(M, 4), "correction": "logq",
        "reduction": "sum",
    },
}


@pytest.mark.parametrize("rule", ["sgd", "row_adagrad", "adam"])
@pytest.mark.parametrize("name", UPDATES)
def test_update(processes, name, rule):
    table, options = TABLE.clone(), {"temperature": 0.2, **UPDATES[name]}
    one = with_log_q_of_positives(options)
    optimizer, losses = sharded.optimizer_of(rule, table), []
    for at in range(3):
        q = (QUERIES + 0.1 * at).requires_grad_()
        loss = update_table(q, table, optimizer, **one)
        (2.0 * loss).backward()
        losses.append(loss.item())
    for sizes in SPLITS[1:5]:
        found = processes.call(len(sizes), sharded.updates, QUERIES, TABLE, sizes, rule, options)
        assert all(of_rank[3] == 3 for of_rank, n in zip(found, sizes) if n)
        stepped, moved = torch.cat([of_rank[2] for of_rank in found]), table - TABLE
        # Adam's step divides by the square root of a gradient's square: its sign, where it is small.
        tolerance = (1e-4 if rule == "adam" else 1e-5) * moved.abs().max()
        assert (stepped - table).abs().max() <= tolerance, sizes
        for of_rank in found:
            assert torch.allclose(torch.tensor(of_rank[0]), torch.tensor(losses), rtol=1e-5)
            assert (of_rank[1] - q.grad).abs().max() <= 1e-4 * q.grad.abs().max()


def test_update_without_a_row_that_counts(processes):
    options = {"positives": integers(M, B, 6), "row_weight": torch.zeros(B)}
    for losses, gradient, shard, steps in processes.call(2, sharded.updates, QUERIES, TABLE, (70, 0), "sgd", options):
        assert losses == [0.0] * 3 and (gradient == 0).all() and steps == 0
        assert len(shard) == 0 or torch.equal(shard, TABLE)
