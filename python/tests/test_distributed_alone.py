"""Losses over several processes in a group of one, in this process: what they do beside communication. `pytest --on-device` runs these with
the code for CUDA tensors."""

import pytest
import torch
import torch.distributed as dist

import tables
from catalog_softmax.distributed import catalog_parallel_softmax_loss, catalog_parallel_top_k, gathered_softmax_loss
from catalog_softmax.torch import softmax_loss, top_k
from common import check, compare, embeddings, excluded
from test_distributed import CASES_HERE, D, M, QUERIES, TABLE, with_log_q_of_positives


@pytest.fixture(autouse=True, scope="module")
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# `compare` adds gradients up, which those of single rows do not take; test_row_sparse_gradients has these.
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("name", [name for name in CASES_HERE if not name.startswith(("sparse", "no row"))])
def test_catalog_parallel(name, similarity):
    if similarity == "dot" and "false_negative_ratio" in CASES_HERE[name]:
        pytest.skip("a ratio goes with cosine alone")
    options = {"temperature": 0.7 if similarity == "dot" else 0.1, "similarity": similarity, **CASES_HERE[name]}
    reference = lambda q, table, **options: tables.softmax_loss(q, table=table, **with_log_q_of_positives(options))
    compare(catalog_parallel_softmax_loss, reference, [x.clone().requires_grad_() for x in (QUERIES, TABLE)], options)


@pytest.mark.parametrize("name", [name for name in CASES_HERE if name.startswith("sparse")])
def test_row_sparse_gradients(name):
    gradients = []
    for sparse in (True, False):
        shard = TABLE.clone().requires_grad_()
        catalog_parallel_softmax_loss(QUERIES, shard, **{**CASES_HERE[name], "sparse_gradient": sparse}).backward()
        assert shard.grad.is_sparse == sparse
        gradients.append(shard.grad.to_dense() if sparse else shard.grad)
    sparse, dense = gradients
    check(sparse, dense.double(), dense, "d_table")


def test_gathered():
    batch = [embeddings(12, D, 1).requires_grad_(), embeddings(12, D, 2).requires_grad_()]
    results = []
    for loss in (gathered_softmax_loss, softmax_loss):
        value = loss(*batch, temperature=0.2, row_weight=torch.linspace(0, 2, 12), reduction="weighted_mean")
        results.append([value.detach(), *torch.autograd.grad(value, batch)])
    for place, (mine, one) in enumerate(zip(*results)):
        check(mine, one.double(), one, f"result {place}")


def test_top_k():
    options = {"excluded": excluded(len(QUERIES), M, 8)}
    found = catalog_parallel_top_k(QUERIES, TABLE, 5, **options)
    wanted = top_k(QUERIES, TABLE, 5, candidate_ids=torch.arange(M), **options)
    assert torch.equal(found.indices, wanted.indices) and torch.equal(found.values, wanted.values)
