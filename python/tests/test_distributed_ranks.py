"""What ranks do to each other: arguments that differ, errors of one, one that dies or hangs; and the bytes that they send."""

import os
import time

import pytest
import torch
import torch.distributed as dist

import sharded
from catalog_softmax.distributed import (
    catalog_parallel_softmax_loss, catalog_parallel_top_k, catalog_parallel_update, gather_queries, gathered_softmax_loss,
)
from common import embeddings, integers, log_q
from processes import Failed, Processes

B, M, D = 8, 30, 5
QUERIES, TABLE, POSITIVES = embeddings(B, D, 1), embeddings(M, D, 2), integers(M, B, 3)
SIZES = (10, 12, 8)


def with_changes(group, changes):
    """A loss of three ranks, of which each has its own changes to what all have."""
    rank = dist.get_rank(group)
    given = {"queries": QUERIES, "table_shard": sharded.part(TABLE, SIZES, rank), "positives": POSITIVES, **changes[rank]}
    return catalog_parallel_softmax_loss(group=group, **given)


def failed(processes, changes):
    """Every rank's error; the ranks are there for the next call."""
    with pytest.raises(Failed) as found:
        processes.call(3, with_changes, changes)
    assert all(processes.call(3, with_changes, [{}, {}, {}]))
    errors = found.value.errors
    assert all(error and error[0] == "ValueError" for error in errors), errors
    return [error[1] for error in errors]


@pytest.mark.parametrize(("changes", "said"), [
    ({"queries": QUERIES + 1}, "queries of rank 1 differ"),
    ({"queries": QUERIES.flip(0)}, "queries of rank 1 differ"),
    ({"positives": POSITIVES.flip(0)}, "positives of rank 1 differ"),
    ({"temperature": 0.06}, "options of rank 1 differ"),
    ({"reduction": "sum"}, "options of rank 1 differ"),
    ({"queries": QUERIES.clone().requires_grad_()}, "options of rank 1 differ"),
    ({"row_weight": torch.ones(B)}, "options of rank 1 differ"),
])
def test_what_differs_is_an_error_everywhere(processes, changes, said):
    assert all(said in error for error in failed(processes, [{}, changes, {}]))


def test_other_arguments_that_differ(processes):
    changes = [{"row_weight": torch.ones(B)}, {"row_weight": torch.ones(B)}, {"row_weight": torch.full((B,), 2.0)}]
    assert all("other arguments of rank 2 differ" in error for error in failed(processes, changes))
    changes = [{"candidate_rows": torch.arange(5)}] * 2 + [{"candidate_rows": torch.arange(1, 6)}]
    assert all("other arguments of rank 2 differ" in error for error in failed(processes, changes))


@pytest.mark.parametrize(("changes", "said"), [
    ({"table_shard": TABLE[:5].double()}, "table_shard"),
    ({"table_shard": TABLE[:5, :3]}, "table_shard"),
    ({"table_shard": TABLE[:5].bfloat16()}, "table_shard"),
    ({"positives": POSITIVES[:3]}, "positives has length 3; rule: length 8"),
    ({"similarity": "euclidean"}, "similarity"),
    ({"positives": None}, "positives is missing"),
    ({"queries": QUERIES[:0]}, "queries has shape (0, 5)"),
    ({"correction": "logq"}, "log_q is missing"),
    ({"log_q": log_q(12, 4)}, "rule: a correction"),
    ({"table_ids": torch.arange(3)}, "table_ids has length 3; rule: length 12"),
    ({"row_weight": -torch.ones(B)}, "row_weight has an element -1.0"),
    ({"reduction": "weighted_mean"}, "row_weight is missing"),
    ({"positive_offsets": torch.arange(4)}, "positive_offsets"),
    ({"excluded": (torch.arange(4), torch.arange(3))}, "excluded[0]"),
    ({"sparse_gradient": True}, "sparse_gradient"),
    ({"row_negatives": torch.zeros(B, 2).long(), "candidate_rows": torch.arange(3), "log_q": log_q(3, 1)}, "log_q is given for some"),
])
def test_what_one_rank_refuses_is_an_error_everywhere(processes, changes, said):
    first, second, third = failed(processes, [{}, changes, {}])
    assert said in second
    assert "rank 1 of the group refused" in first and "rank 1 of the group refused" in third


def test_what_a_shard_holds(processes):
    """Values that the core refuses, in the middle of the forward pass."""
    of = lambda wrong: [
        {"correction": "logq", "log_q": sharded.part(wrong, SIZES, rank), "positive_log_q": log_q(B, 4)} for rank in range(3)
    ]
    first, second, third = failed(processes, of(log_q(M, 5).index_fill(0, torch.tensor([15]), float("nan"))))
    assert "log_q" in second and "rank 1 of the group refused its shard" in first and first == third


@pytest.mark.parametrize(("changes", "said"), [
    ({"positives": POSITIVES + M}, f"rule: from 0 to {M - 1}, a row of the whole table"),
    ({"candidate_rows": torch.tensor([1, M])}, f"candidate_rows[0][1] is {M}"),
    ({"row_negatives": torch.full((B, 2), -2)}, "row_negatives[0, 0] is -2; rule: from -1"),
    ({"temperature": 0.0}, "temperature"),
    ({"false_negative_ratio": -1.0}, "false_negative"),
    (
        {"correction": "corrected_logq", "candidate_rows": torch.arange(3), "log_q": log_q(3, 1), "positive_log_q": torch.zeros(B)},
        "positive_log_q has an element 0.0; rule: < 0",
    ),
    ({"correction": "logq", "candidate_rows": torch.arange(3), "log_q": log_q(3, 1)}, "positive_log_q is missing"),
    ({"row_weight": torch.zeros(B), "reduction": "weighted_mean"}, "the sum of row_weight is 0"),
])
def test_errors_of_all(processes, changes, said):
    errors = failed(processes, [changes] * 3)
    assert any(said in error for error in errors), errors


def no_rows(group):
    catalog_parallel_softmax_loss(QUERIES, TABLE[:0], POSITIVES, group=group)


def search_too_far(group):
    catalog_parallel_top_k(QUERIES, sharded.part(TABLE, SIZES, dist.get_rank(group)), M + 1, group=group)


def update_of_another_size(group):
    rank = dist.get_rank(group)
    shard = sharded.part(TABLE, SIZES, rank).clone()
    catalog_parallel_update(QUERIES, shard, sharded.optimizer_of("row_adagrad", shard[rank == 1 :]), POSITIVES, group=group)


def update_read_only(group):
    shard = sharded.part(TABLE, SIZES, dist.get_rank(group)).clone()
    optimizer = sharded.optimizer_of("sgd", shard)
    catalog_parallel_update(QUERIES, shard if dist.get_rank(group) else 2 * shard.requires_grad_(), optimizer, POSITIVES, group=group)


@pytest.mark.parametrize(("function", "said"), [
    (no_rows, "0 rows on every rank"), (search_too_far, "k is 31"), (update_of_another_size, "refused"), (update_read_only, "refused"),
])
def test_errors_of_other_calls(processes, function, said):
    with pytest.raises(Failed) as found:
        processes.call(3, function)
    assert all(error and error[0] == "ValueError" for error in found.value.errors), found.value.errors
    assert any(said in error[1] for error in found.value.errors)


# A rank that is not there. These have ranks of their own.


def leave(group, when, how):
    """Rank 1 leaves, before the loss or between forward and backward: the others are to raise."""
    rank = dist.get_rank(group)

    def gone():
        if rank == 1:
            os._exit(7) if how == "dies" else time.sleep(3600)

    if when == "before":
        gone()
    queries, shard = QUERIES.clone().requires_grad_(), sharded.part(TABLE, SIZES, rank).clone().requires_grad_()
    loss = catalog_parallel_softmax_loss(queries, shard, POSITIVES, group=group)
    if when == "between":
        gone()
    loss.backward()
    return queries.grad


@pytest.mark.parametrize(("when", "how"), [("before", "dies"), ("between", "dies"), ("before", "hangs"), ("between", "hangs")])
def test_a_rank_that_leaves(when, how):
    timeout = 3.0
    with Processes(3, timeout=timeout) as started:
        started.call(3, with_changes, [{}, {}, {}])  # connections are there
        start = time.monotonic()
        for pipe in started.pipes:
            started.send(pipe, 3, leave, when, how)
        for rank in (0, 2):
            result, error = started.answer(rank)
            assert result is None and error[0] not in ("Silent", "Died"), error
        # A generous limit: it is no test of speed, but that nobody waits for ever.
        assert time.monotonic() - start < timeout + 30


# Bytes.


def counted(group, function, *args):
    """What a rank hands to collectives, by their names, while a function runs."""
    found, kept = [], {}
    for name, place in (("all_gather_into_tensor", 1), ("all_reduce", 0), ("reduce_scatter_tensor", 1)):
        kept[name] = getattr(dist, name)

        def counting(*tensors, name=name, place=place, **options):
            found.append((name, tensors[place].numel() * tensors[place].element_size()))
            return kept[name](*tensors, **options)

        setattr(dist, name, counting)
    try:
        function(group, *args)
    finally:
        for name, original in kept.items():
            setattr(dist, name, original)
    return found


def words(dtype):
    return -(-D * torch.empty(0, dtype=dtype).element_size() // 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["whole table", "log_q", "ids", "filter", "ids and filter, several", "temperature"])
def test_bytes_of_catalog_parallel_losses(processes, kind, dtype):
    options, p = {"positives": POSITIVES}, B
    if kind == "log_q":
        options |= {"log_q": log_q(M, 4), "correction": "logq"}
    if "ids" in kind:
        options["table_ids"] = torch.arange(M)
    if "filter" in kind:
        options["false_negative_margin"] = 0.1
    if "several" in kind:
        p = 2 * B
        options |= {"positives": integers(M, p, 5), "positive_offsets": torch.arange(0, p + 1, 2)}
    if kind == "temperature":
        options["temperature"] = torch.tensor(0.1, requires_grad=True)
    expected = [("all_gather_into_tensor", 48)]
    shared = (8 * p if "ids" in kind else 0) + (4 * p * words(dtype) if "filter" in kind else 0)
    expected += [("all_reduce", shared)] if shared else []
    expected.append(("all_gather_into_tensor", 8 * (2 * B + p * (2 if kind == "log_q" else 1) + 1)))
    expected.append(("all_reduce", 4 * (B * D + (kind == "temperature"))))
    # No byte depends on the number of rows, or on how they are split.
    for table, sizes in ((TABLE, SIZES), (TABLE, (30, 0)), (TABLE.repeat(3, 1), (70, 10, 10))):
        given = {**options, **({"log_q": log_q(len(table), 4)} if "log_q" in options else {})}
        given |= {"table_ids": torch.arange(len(table))} if "table_ids" in options else {}
        for found in processes.call(len(sizes), counted, sharded.step, QUERIES.to(dtype), table.to(dtype), sizes, given):
            assert found == expected, sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_gathered_losses(processes, dtype):
    sizes, s, longest = ((4, 4), (12, 18)), torch.empty(0, dtype=dtype).element_size(), 18
    of_candidates = {"candidate_ids": torch.arange(M), "log_q": log_q(M, 4)}
    batch = QUERIES.to(dtype), TABLE.to(dtype)
    rows = {"positives": torch.tensor([0, 1, 2, 3, 12, 13, 14, 15])}
    args = batch, sizes, {"temperature": torch.tensor(0.1), "correction": "logq"}, rows, of_candidates
    gathers = sorted([24, longest * D * s, 8 * longest, 4 * longest])
    for found in processes.call(2, counted, sharded.gathered, *args):
        of = lambda name: sorted(bytes for kind, bytes in found if kind == name)
        assert of("all_gather_into_tensor") == gathers
        assert of("all_reduce") == [32] and of("reduce_scatter_tensor") == [4 * 2 * longest * D]


def test_bytes_of_symmetric_losses(processes):
    sizes, options = (3, 5), {"temperature": torch.tensor(0.1), "symmetric": True}
    for found in processes.call(2, counted, sharded.gathered, (QUERIES, TABLE[:B]), (sizes, sizes), options, {}, {}):
        of = lambda name: sorted(bytes for kind, bytes in found if kind == name)
        assert of("all_gather_into_tensor") == [24, 5 * D * 4, 5 * D * 4]
        assert of("all_reduce") == [32] and of("reduce_scatter_tensor") == [4 * 2 * 5 * D] * 2


def test_bytes_of_an_update(processes):
    for found in processes.call(3, counted, sharded.updates, QUERIES, TABLE, SIZES, "sgd", {"positives": POSITIVES}, 1):
        of = lambda name: sorted(bytes for kind, bytes in found if kind == name)
        assert of("all_gather_into_tensor") == [8, 8, 48, 8 * (3 * B + 1)] and of("all_reduce") == [4 * B * D]


def test_bytes_of_gathered_queries(processes):
    for found in processes.call(3, counted, gathered_queries_of_ranks):
        assert found == [("all_gather_into_tensor", 24), ("all_gather_into_tensor", 4 * 5 * D)]


def test_bytes_of_a_search(processes):
    for k, width in ((3, 3), (25, 12)):
        for found in processes.call(3, counted, sharded.search, QUERIES, TABLE, SIZES, k, {}):
            assert sum(bytes for _, bytes in found) == 48 + 12 * B * width


def gathered_queries_of_ranks(group):
    rank = dist.get_rank(group)
    return gather_queries(sharded.part(QUERIES, (3, 0, 5), rank), group=group)


def test_gathered_queries(processes):
    assert all(torch.equal(found, QUERIES) for found in processes.call(3, gathered_queries_of_ranks))


def outside(group):
    catalog_parallel_softmax_loss(QUERIES, TABLE, POSITIVES)


def test_without_torch_distributed():
    for call in (outside, lambda _: gathered_softmax_loss(QUERIES, QUERIES)):
        with pytest.raises(RuntimeError, match="init_process_group"):
            call(None)
