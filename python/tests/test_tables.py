"""Batches over a table, negatives of a row's own, several positives, filters, row-sparse gradients and steps in place of gradients."""

import os
import pathlib
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import catalog_softmax as cs
import tables
from catalog_softmax import _core
from catalog_softmax.torch import (
    TableSoftmaxLoss, _arguments, _cuda, _ops, _tables, hardest_negatives, row_statistics, softmax_loss, top_k, update_table,
)
from common import check, compare, embeddings, excluded, integers, log_q
from test_golden import correction as correction_of
from test_golden import options_of

B, M, D, K = 11, 70, 9, 6


def rows_and_log_q(seed, none=True):
    """(B, K) rows of the table, some of them none, and the log_q of each."""
    rows = integers(M, B * K, seed).reshape(B, K)
    if none:
        rows[1, 2:] = -1
        rows[4] = -1
    return rows, log_q(B * K, seed + 1).reshape(B, K)


def offsets_and_positives(seed):
    """Rows with one, several and no positive, one item twice."""
    counts = torch.tensor([1, 3, 0, 2, 1, 4, 1, 0, 2, 1, 2])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    positives = integers(M, int(offsets[-1]), seed)
    positives[2] = positives[1]
    return offsets, positives


def q_and_table(dtype=torch.float32, grad=True):
    return embeddings(B, D, 1, dtype).requires_grad_(grad), embeddings(M, D, 2, dtype).requires_grad_(grad)


def over_table(loss):
    """The function of (queries, table), for `compare`."""
    return lambda q, table, **options: loss(q, table=table, **options)


def cases():
    rows, own_log_q = rows_and_log_q(3)
    offsets, several = offsets_and_positives(5)
    positives, pool = integers(M, B, 6), integers(M, 25, 7)
    of_p = {"positive_log_q": log_q(len(several), 8)}
    of_b = {"positive_log_q": log_q(B, 9)}
    ids = integers(50, M, 10)
    own = {"candidates": embeddings(8, D, 11).requires_grad_(), "candidate_ids": integers(M, 8, 12)}
    weight = torch.linspace(0.1, 2.0, B).index_fill(0, torch.tensor([2, 5, 8]), 0.0)
    one, more = {"positives": positives}, {"positives": several, "positive_offsets": offsets}
    pair_weight = torch.rand(len(several), generator=torch.Generator().manual_seed(13)).index_fill(0, torch.tensor([3]), 0.0)
    return {
        "whole table": one,
        "whole table, log_q": {**one, **of_b, "log_q": log_q(M, 14), "correction": "logq"},
        "candidate_rows": {**one, "candidate_rows": pool},
        "candidate_rows int32": {**one, "positives": positives.int(), "candidate_rows": pool.int()},
        "two pools by rows": {
            **one, **of_b, "candidate_rows": [pool, integers(M, 9, 15)], "log_q": [log_q(25, 16), log_q(9, 17)], "correction": "logq",
        },
        "rows beside a pool of its own": {
            **one, **of_b, **own, "candidate_rows": pool, "log_q": [log_q(8, 18), log_q(25, 19)], "correction": "corrected_logq",
        },
        "row_negatives": {**one, "row_negatives": rows},
        "row_negatives int32": {**one, "row_negatives": rows.int(), "reduction": "none"},
        "row_negatives_log_q": {
            **one, **of_b, "row_negatives": rows, "row_negatives_log_q": own_log_q, "correction": "corrected_logq", "reduction": "sum",
        },
        "row_negatives and a pool": {
            **one, "row_negatives": rows, "row_negatives_log_q": own_log_q, "candidate_rows": pool, "log_q": log_q(25, 20),
            "correction": "logq_negatives_only",
        },
        "positive_offsets": {**more, "candidate_rows": pool},
        "positive_offsets int32, whole table": {**more, "positive_offsets": offsets.int(), "reduction": "none"},
        "positive_weight": {**more, **of_p, "positive_weight": pair_weight, "log_q": log_q(M, 21), "correction": "logq"},
        "margin": {**one, "candidate_rows": pool, "row_negatives": rows, "false_negative_margin": 0.3, "temperature": 0.2},
        "ratio": {**more, "candidate_rows": pool, "false_negative_ratio": 0.8, "temperature": 0.2},
        "excluded and ids": {**one, "table_ids": ids, "candidate_rows": pool, "row_negatives": rows, "excluded": excluded(B, 50, 22)},
        "weights of rows": {**one, "row_negatives": rows, "row_weight": weight, "reduction": "weighted_mean"},
        "weights of rows, several": {**more, **of_p, "row_negatives": rows, "row_negatives_log_q": own_log_q, "correction": "logq",
                                     "row_weight": weight, "reduction": "mean", "excluded": excluded(B, M, 23)},
        "everything": {
            **more, **of_p, **own, "positive_weight": pair_weight, "candidate_rows": [pool, integers(M, 9, 15)],
            "log_q": [log_q(8, 24), log_q(25, 25), log_q(9, 26)], "row_negatives": rows, "row_negatives_log_q": own_log_q,
            "correction": "corrected_logq", "row_weight": weight, "reduction": "none", "excluded": excluded(B, M, 27),
            "false_negative_margin": -0.5, "temperature": torch.tensor(0.3, requires_grad=True),
        },
    }


CASES = cases()


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name, similarity):
    options = {"temperature": 0.7 if similarity == "dot" else 0.1, "similarity": similarity, **CASES[name]}
    if similarity == "dot" and "false_negative_ratio" in options:
        pytest.skip("a ratio is for cosine alone")
    upstream = lambda loss: (loss * torch.linspace(1, 2, B)).sum() if loss.dim() else loss
    compare(over_table(softmax_loss), over_table(tables.softmax_loss), q_and_table(), options, upstream)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["whole table", "row_negatives and a pool", "weights of rows, several"])
def test_types(name, dtype):
    options = {"temperature": 0.2, **CASES[name]}
    compare(over_table(softmax_loss), over_table(tables.softmax_loss), q_and_table(dtype), options)


@pytest.mark.parametrize("kind", ["index", "separate"])
def test_several_positives_and_filters_without_a_table(kind):
    offsets, _ = offsets_and_positives(1)
    count, pools = int(offsets[-1]), [embeddings(40, D, 2).requires_grad_(), embeddings(9, D, 3).requires_grad_()]
    options = {
        "candidate_ids": [integers(30, 40, 4), integers(30, 9, 5)], "log_q": [log_q(40, 6), log_q(9, 7)], "correction": "logq",
        "positive_offsets": offsets, "positive_weight": torch.rand(count), "temperature": torch.tensor(0.2, requires_grad=True),
        "row_weight": torch.linspace(0.0, 1.0, B), "false_negative_margin": 1.5,
    }
    args = [embeddings(B, D, 1).requires_grad_(), pools]
    if kind == "index":
        args.append(integers(49, count, 8))
    else:
        options |= {"positive_embeddings": embeddings(count, D, 9).requires_grad_(), "positive_ids": integers(30, count, 10)}
        options["positive_log_q"] = log_q(count, 11)
    compare(softmax_loss, tables.softmax_loss, args, options)


def test_a_filter_alone_in_batch_and_symmetric():
    q, items = embeddings(B, D, 1).requires_grad_(), embeddings(B, D, 2).requires_grad_()
    options = {"temperature": 0.2, "false_negative_margin": 0.5}
    compare(softmax_loss, tables.softmax_loss, [q, items], options)
    both = lambda q, c, **options: 0.5 * (tables.softmax_loss(q, c, **options) + tables.softmax_loss(c, q, **options))
    compare(lambda q, c, **options: softmax_loss(q, c, symmetric=True, **options), both, [q, items], options)


@pytest.mark.parametrize("name", ["whole table", "row_negatives", "positive_offsets", "margin", "ratio"])
def test_statistics_for_a_loss_of_the_users_own(name):
    def loss_of(statistics):
        def loss(q, table, **options):
            lse, positive, n = statistics(q, table=table, **options)
            return torch.where(n > 0, lse, 0.0).square().sum() + (positive * torch.linspace(1, 2, len(positive))).sum()
        return loss

    compare(loss_of(row_statistics), loss_of(tables.row_statistics), q_and_table(), {"temperature": 0.2, **CASES[name]})


def test_only_what_asks_has_a_gradient():
    q, table = q_and_table()
    rows, _ = rows_and_log_q(3)
    wanted = torch.autograd.grad(softmax_loss(q, table=table, positives=integers(M, B, 4), row_negatives=rows), (q, table))
    for place in (0, 1):
        leaves = [x.detach().requires_grad_(i == place) for i, x in enumerate((q, table))]
        softmax_loss(leaves[0], table=leaves[1], positives=integers(M, B, 4), row_negatives=rows).backward()
        assert torch.equal(leaves[place].grad, wanted[place]) and leaves[1 - place].grad is None
    with torch.no_grad():
        assert not softmax_loss(q, table=table, positives=integers(M, B, 4), row_negatives=rows).requires_grad


def test_views_change_nothing():
    wide = embeddings(2 * M, D + 5, 2)
    rows, own = rows_and_log_q(3)
    positives = integers(M, B, 4)
    options = {"correction": "logq", "positive_log_q": log_q(B, 5)}

    def run(table, rows, own, positives):
        table = table.detach().requires_grad_()
        q = embeddings(B, D, 1).requires_grad_()
        softmax_loss(
            q, table=table, positives=positives, row_negatives=rows, row_negatives_log_q=own, **options
        ).backward()
        return q.grad, table.grad

    plain = run(wide[::2, 3 : 3 + D].contiguous(), rows, own, positives)
    spread = lambda x: torch.stack([x, x], -1)[..., 0]
    for table in (wide[::2, 3 : 3 + D], wide[::2, 3 : 3 + D].T.contiguous().T):
        viewed = run(table, spread(rows).T.contiguous().T, spread(own), spread(positives))
        assert all(torch.equal(a, b) for a, b in zip(plain, viewed))
    offsets, several = offsets_and_positives(6)
    leaf = wide.clone().requires_grad_()
    softmax_loss(embeddings(B, D, 1), table=leaf[::2, 3 : 3 + D], positives=several, positive_offsets=offsets).backward()
    assert (leaf.grad[1::2] == 0).all() and leaf.grad[::2, 3 : 3 + D].abs().sum() > 0


# Against float64 of the crate's reference.


class Reference:
    @staticmethod
    def table_forward(batch, extra, options, gradients, threads):
        return _core.reference_table_forward(batch, extra, options, gradients)

    @staticmethod
    def table_statistics(batch, extra, options, requested, threads):
        return _core.reference_table_statistics(batch, extra, options, requested[0])

    @staticmethod
    def table_gradients(batch, extra, options, row_sparse, statistics, upstream, threads):
        return _core.reference_table_gradients(batch, extra, options, row_sparse, statistics, upstream)


GRID, STEP = 2.0**-6, 2.0**-10


@pytest.fixture(params=["past the dispatcher", "through it"])
def float64(request, monkeypatch):
    convert = _arguments.embeddings

    def rounded(tensor, argument, *device):
        single = tensor.to(torch.float32)
        assert torch.equal(single.to(tensor.dtype), tensor), "the test's own rule: exact in float32"
        return convert(single, argument, *device)

    monkeypatch.setattr(_arguments, "embeddings", rounded)
    monkeypatch.setattr(_tables, "_core", Reference)
    monkeypatch.setattr(_ops, "_LOSS", torch.float64)
    if request.param == "through it":
        monkeypatch.setattr(_ops, "is_plain", lambda *values: False)


def leaf(rows, seed, dim=3):
    values = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((values / GRID).round() * GRID).requires_grad_()


GRADCHECKS = ["whole table", "row_negatives", "row_negatives and a pool", "positive_weight", "weights of rows, several"]


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name, float64):
    temperature = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    loss = lambda q, table, temperature: softmax_loss(q, table=table, temperature=temperature, **CASES[name])
    assert torch.autograd.gradcheck(loss, (leaf(B, 1), leaf(M, 2), temperature), eps=STEP, atol=100 * STEP**2, rtol=0.0)


def test_gradcheck_of_statistics(float64):
    temperature = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    offsets, several = offsets_and_positives(3)

    def rows(q, table, own, temperature):
        found = row_statistics(
            q, own, several, table=table, candidate_ids=integers(M, 4, 5), candidate_rows=integers(M, 9, 6), positive_offsets=offsets,
            log_q=[log_q(4, 7), log_q(9, 8)], temperature=temperature,
        )
        return found.lse, found.positive

    inputs = (leaf(B, 1), leaf(M, 2), leaf(4, 3), temperature)
    assert torch.autograd.gradcheck(rows, inputs, eps=STEP, atol=100 * STEP**2, rtol=0.0)


FILES = sorted((pathlib.Path(__file__).parents[2] / "tests" / "golden2").glob("*.safetensors"))


def test_there_are_golden_batches():
    assert len(FILES) >= 28


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_batch(path):
    tensors, options = load_file(path), options_of(path)
    expected = {name.removeprefix("expected."): tensors.pop(name) for name in list(tensors) if name.startswith("expected.")}
    q, table = tensors.pop("queries").requires_grad_(), tensors.pop("table").requires_grad_()
    temperature = torch.tensor(float(options["temperature"]), dtype=torch.float64, requires_grad=True)
    names = ("positives", "candidate_rows", "row_negatives", "row_negatives_log_q", "positive_offsets", "log_q")
    arguments = {name: tensors[name] for name in names if name in tensors}
    if "exclude_offsets" in tensors:
        arguments["excluded"] = tensors["exclude_offsets"], tensors["exclude_ids"]
    arguments |= {name: float(options[name]) for name in ("false_negative_margin", "false_negative_ratio") if name in options}
    arguments |= {"table": table, "similarity": options["similarity"], "temperature": temperature}
    statistics = row_statistics(q, **arguments)
    arguments |= {name: tensors[name] for name in ("positive_log_q", "positive_weight", "row_weight") if name in tensors}
    has_log_q = {"log_q": 0} if "log_q" in tensors or "row_negatives_log_q" in tensors else {}
    arguments["correction"] = correction_of(has_log_q, options)
    total = softmax_loss(q, **arguments, reduction=options.get("reduction", "mean")).sum()
    total.backward()
    found = {"total": total, "d_queries": q.grad, "d_table": table.grad, "d_temperature": temperature.grad}
    found |= {"lse": statistics.lse, "positive": statistics.positive, "num_negatives": statistics.num_negatives}
    arguments.pop("row_weight", None)
    with torch.no_grad():
        found["loss"] = softmax_loss(q, **arguments, reduction="none")
    assert set(expected) == set(found)
    rounding = 2.0**-21 / float(temperature.detach())
    half = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}.get(q.dtype, 0.0)
    for name, wanted in expected.items():
        wanted, result = wanted.double(), found[name].detach().double().reshape(wanted.shape)
        if name == "num_negatives":
            assert torch.equal(result, wanted)
            continue
        finite = wanted.isfinite()
        assert torch.equal(result[~finite], wanted[~finite]), name
        result, wanted = result[finite], wanted[finite]
        scale = max(wanted.abs().max().item(), 1.0 if name in ("loss", "lse", "positive", "total") else 0.0)
        # A gradient is rounded to its tensor's type.
        tolerance = rounding * scale + 1e-12 + (2 * half * wanted.abs() + 6e-8 * (half > 0) if name in ("d_queries", "d_table") else 0.0)
        assert (result - wanted).abs().le(tolerance).all(), f"{name}: {(result - wanted).abs().max()}"


# Row-sparse gradients.

SPARSE = ["whole table", "candidate_rows", "row_negatives", "rows beside a pool of its own", "weights of rows, several", "margin"]


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_gradient_is_the_dense_one(name, dtype):
    options = dict(CASES[name])
    if "candidates" in options:
        options["candidates"] = options["candidates"].detach().to(dtype)
    found = []
    for sparse in (False, True):
        q, table = q_and_table(dtype)
        loss = softmax_loss(q, table=table, sparse_gradient=sparse, **{"temperature": 0.1, **options})
        found.append(torch.autograd.grad(2.0 * loss, (q, table), retain_graph=True))
        loss.backward(retain_graph=True)
        assert torch.equal(2.0 * table.grad.to_dense(), found[-1][1].to_dense())
        assert not sparse or table.grad.is_coalesced()
        loss.backward()
        assert not sparse or not table.grad.is_coalesced() or (table.grad.indices()[0].diff() > 0).all()
        assert torch.equal(table.grad.to_dense(), found[-1][1].to_dense())
    (d_q, dense), (d_q_beside, sparse) = found
    assert torch.equal(d_q, d_q_beside) and sparse.is_sparse and sparse.is_coalesced() and sparse.dtype == dtype
    assert torch.equal(sparse.to_dense(), dense)
    rows = sparse.indices()[0]
    assert (rows.diff() > 0).all()
    if name == "row_negatives":
        named = torch.cat([options["positives"], options["row_negatives"].reshape(-1)])
        assert torch.equal(rows, named[named >= 0].unique())


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.SGD(p, lr=0.3), lambda p: torch.optim.SparseAdam(p, lr=0.01), lambda p: torch.optim.Adagrad(p, lr=0.1),
])
def test_torchs_optimisers_take_the_sparse_gradient(optimizer):
    """As they take that of an embedding, whose gather the loss replaces."""
    rows, own = rows_and_log_q(3, none=False)
    positives, of_p = integers(M, B, 5), log_q(B, 6)
    found = []
    for gathered in (False, True):
        table = torch.nn.Embedding(M, D, sparse=True)
        with torch.no_grad():
            table.weight.copy_(embeddings(M, D, 2))
        step = optimizer([table.weight])
        for _ in range(3):
            step.zero_grad()
            q = embeddings(B, D, 1)
            if gathered:
                s = torch.einsum("bd,bkd->bk", q, table(torch.cat([positives[:, None], rows], 1)))
                z = s - torch.cat([of_p[:, None], own], 1)
                z = torch.cat([z[:, :1], z[:, 1:].masked_fill(rows == positives[:, None], -torch.inf)], 1)
                loss = torch.nn.functional.cross_entropy(z, torch.zeros(B, dtype=torch.int64))
            else:
                loss = softmax_loss(
                    q, table=table.weight, positives=positives, row_negatives=rows, row_negatives_log_q=own, positive_log_q=of_p,
                    correction="logq", similarity="dot", temperature=1.0, sparse_gradient=True,
                )
            loss.backward()
            assert table.weight.grad.is_sparse
            step.step()
        found.append(table.weight.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_sparse_gradient_uses_no_memory_of_the_table_s_size(tmp_path):
    """In a process of its own: the gradient of 2^20 rows would be 64 MiB."""
    script = tmp_path / "run.py"
    script.write_text("""
import resource, torch
from catalog_softmax.torch import softmax_loss
q, table = torch.randn(64, 16, requires_grad=True), torch.randn(2**20, 16, requires_grad=True)
rows, positives = torch.randint(2**20, (64, 32)), torch.randint(2**20, (64,))
run = lambda: softmax_loss(q, table=table, positives=positives, row_negatives=rows, sparse_gradient=True).backward()
softmax_loss(q, table=table[:1000], positives=positives % 1000, row_negatives=rows % 1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run()
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert table.grad.is_sparse and grown < 24 * 1024, grown
""")
    import subprocess
    import sys

    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# numpy.


def arrays(value):
    if isinstance(value, (list, tuple)):
        return type(value)(arrays(x) for x in value)
    return value.detach().numpy() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", SPARSE + ["everything", "ratio", "positive_weight"])
def test_numpy_is_the_operators(name):
    options = {"temperature": 0.2, **CASES[name]}
    options["temperature"] = torch.as_tensor(options["temperature"]).item()
    options.pop("reduction", None)
    q, table = q_and_table()
    softmax_loss(q, table=table, **options).backward()
    as_arrays = {key: arrays(x) for key, x in options.items()}
    output = cs.value_and_grad(arrays(q), table=arrays(table), moments=True, rank=True, **as_arrays)
    np.testing.assert_allclose(output.gradients.d_queries, q.grad.numpy(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(output.gradients.d_table, table.grad.numpy(), rtol=1e-5, atol=1e-7)
    pairs = len(options["positives"])
    assert output.loss.shape == (B,) and output.probability.shape == output.statistics.above.shape == (pairs,)
    rows, values = cs.value_and_grad(arrays(q), table=arrays(table), row_sparse=True, **as_arrays).gradients.d_table
    dense = np.zeros((M, D), np.float32)
    dense[rows] = values
    assert (dense == output.gradients.d_table).all() and (np.diff(rows) > 0).all()
    assert cs.value_and_grad(arrays(q), table=arrays(table), table_gradient=False, **as_arrays).gradients.d_table is None
    if "candidates" in options:
        assert output.gradients.d_candidates.shape == (8, D)
    else:
        assert output.gradients.d_candidates is None


def test_numpy_statistics_and_gradients():
    q, table = (arrays(x) for x in q_and_table())
    options = {key: arrays(CASES["positive_weight"][key]) for key in ("positives", "positive_offsets", "log_q")}
    found = cs.statistics(q, table=table, gradients=True, temperature=0.2, **options)
    offsets = options["positive_offsets"]
    assert found.lse.shape == (B,) and found.positive.shape == (offsets[-1],)
    row_of = np.repeat(np.arange(B), np.diff(offsets))
    a = 1.0 / (1.0 + np.exp(found.positive - found.lse[row_of])) / np.diff(offsets)[row_of] / B
    d_lse = np.bincount(row_of, a, minlength=B)
    own = cs.gradients(found, d_lse, -a, q, table=table, temperature=0.2, row_sparse=True, **options)
    wanted = cs.value_and_grad(q, table=table, temperature=0.2, correction="logq_negatives_only", **options).gradients
    np.testing.assert_allclose(own.d_queries, wanted.d_queries, rtol=1e-5, atol=1e-8)
    rows, values = own.d_table
    np.testing.assert_allclose(values, wanted.d_table[rows], rtol=1e-5, atol=1e-8)


def test_hardest_negatives_are_those_of_the_scores():
    q, table = q_and_table(grad=False)
    positives, k = integers(M, B, 3), 4
    offsets, left_out = excluded(B, M, 4)
    s = torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(table, dim=1).T
    s[torch.arange(B), positives] = -torch.inf
    for row in range(B):
        s[row, left_out[offsets[row] : offsets[row + 1]]] = -torch.inf
    wanted = s.topk(k)
    found = hardest_negatives(q, positives=positives, table=table, k=k, excluded=(offsets, left_out))
    assert torch.equal(found.indices, wanted.indices)
    torch.testing.assert_close(found.values, wanted.values)
    of_numpy = cs.hardest_negatives(
        q.numpy(), positives=positives.numpy(), table=table.numpy(), k=k, excluded=(offsets.numpy(), left_out.numpy())
    )
    assert (of_numpy.indices == found.indices.numpy()).all() and (of_numpy.scores == found.values.numpy()).all()
    # Of the batch's own items: indices are places in candidate_rows. Item 7 is nobody's negative that has it as a positive.
    items = positives.clone()
    items[3] = items[7]
    in_batch = hardest_negatives(q, positives=items, table=table, candidate_rows=items, k=B - 1).indices
    assert (items[in_batch[3][:-1]] != items[3]).all() and in_batch[3, -1] == -1
    rows = torch.where(in_batch < 0, -1, items[in_batch])
    assert softmax_loss(q, positives=items, table=table, row_negatives=rows[:, :3]).isfinite()
    # Without a table.
    plain = hardest_negatives(q, table[:B], k=2)
    everybody = top_k(q, table[:B], B)
    first = [[i for i in row if i != place][:2] for place, row in enumerate(everybody.indices.tolist())]
    assert plain.indices.tolist() == first


# Optimisers and updates.

RULES = {
    "sgd": lambda **o: cs.Optimizer.sgd(0.3, weight_decay=0.01, **o),
    "row_adagrad": lambda **o: cs.Optimizer.row_adagrad(M, 0.3, eps=1e-6, initial_accumulator=0.01, **o),
    "adam": lambda **o: cs.Optimizer.adam(M, D, 0.02, betas=(0.8, 0.95), **o),
}


@pytest.mark.parametrize("rule", RULES)
def test_steps_are_those_of_the_formulas(rule):
    table, optimizer = embeddings(M, D, 1).numpy(), RULES[rule]()
    w, total, m, v = table.astype(np.float64), 0.01 * np.ones((M, 1)), 0.0, 0.0
    for t in range(1, 4):
        g = embeddings(M, D, 1 + t).numpy()
        optimizer.step(table, g, threads=2)
        g = g.astype(np.float64)
        if rule == "sgd":
            w = (1 - 0.3 * 0.01) * w - 0.3 * g
        elif rule == "row_adagrad":
            total = total + (g**2).mean(1, keepdims=True)
            w = w - 0.3 * g / (np.sqrt(total) + 1e-6)
        else:
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
            w = w - 0.02 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        np.testing.assert_allclose(table, w, rtol=1e-5, atol=1e-5)
    assert optimizer.steps == 3
    if rule == "row_adagrad":
        np.testing.assert_allclose(optimizer.accumulator, total[:, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16"])
@pytest.mark.parametrize("rule", RULES)
def test_state_is_saved_and_rows_are_stepped_alone(rule, dtype):
    start = embeddings(M, D, 1)
    table = start.numpy().copy() if dtype == "float32" else start.half().numpy() if dtype == "float16" else bits(start)
    optimizer = RULES[rule](rounding_seed=5)
    rows, values = np.array([3, 17, 42]), embeddings(3, D, 2).numpy()
    before = table.copy()
    optimizer.step_rows(table, rows, values)
    others = np.setdiff1d(np.arange(M), rows)
    assert (table[others] == before[others]).all() and (table[rows] != before[rows]).any(1).all()
    restored, copy = pickle.loads(pickle.dumps(optimizer)), table.copy()
    for one, of_table in ((optimizer, table), (restored, copy)):
        one.learning_rate = 0.1
        one.step_rows(of_table, rows[1:], values[1:], threads=1)
        one.step(of_table, embeddings(M, D, 3).numpy(), threads=2)
    assert (table == copy).all() and optimizer.to_bytes() == restored.to_bytes() and restored.steps == 3


def bits(tensor):
    return tensor.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).copy()


UPDATES = ["whole table", "candidate_rows", "row_negatives", "positive_weight", "rows beside a pool of its own"]


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("rule", RULES)
def test_update_is_gradient_then_step(name, rule):
    options = {"temperature": 0.2, **{key: arrays(x) for key, x in CASES[name].items()}}
    q = embeddings(B, D, 1).numpy()
    tables_of, optimizers = [embeddings(M, D, 2).numpy().copy() for _ in range(2)], [RULES[rule]() for _ in range(2)]
    whole = "candidate_rows" not in options and "row_negatives" not in options
    for _ in range(3):
        found = cs.update(q, tables_of[0], optimizers[0], **options)
        wanted = cs.value_and_grad(q, table=tables_of[1], row_sparse=True, **options)
        rows, values = wanted.gradients.d_table
        if whole:
            optimizers[1].step(tables_of[1], values)
        else:
            optimizers[1].step_rows(tables_of[1], rows, values)
        assert found.gradients.d_table is None
        np.testing.assert_allclose(found.total, wanted.total, rtol=1e-5)
        np.testing.assert_allclose(found.gradients.d_queries, wanted.gradients.d_queries, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(tables_of[0], tables_of[1], rtol=1e-4, atol=2e-5)
    assert optimizers[0].steps == 3


@pytest.mark.parametrize("dtype", ["float16", "uint16"])
def test_update_of_16_bits_keeps_a_master_copy(dtype):
    make = (lambda x: x.half().numpy().copy()) if dtype == "float16" else bits
    q, start = make(embeddings(B, D, 1)), embeddings(M, D, 2)
    table = make(start)
    optimizer = cs.Optimizer.row_adagrad(M, 0.3, master_copy=table)
    losses = [cs.update(q, table, optimizer, integers(M, B, 3).numpy(), temperature=0.1).total for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.7 * losses[0]
    assert (table != make(start)).any()
    assert optimizer.master_copy.dtype == np.float32 and (make(torch.from_numpy(optimizer.master_copy)) == table).all()


@pytest.mark.parametrize("name", ["whole table", "row_negatives", "rows beside a pool of its own", "weights of rows, several", "margin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_table_has_the_losss_gradients_and_steps(name, dtype):
    options = dict(CASES[name])
    q, start = q_and_table(dtype)
    own = options.pop("candidates", None)
    temperature = torch.tensor(0.2, requires_grad=True)
    wide = torch.zeros(M, D + 3, dtype=dtype)
    tables_of = wide[:, :D], start.detach().clone().requires_grad_()
    wide[:, :D] = start.detach()
    rule = lambda: cs.Optimizer.row_adagrad(M, 0.3, rounding_seed=3)
    results = []
    for updates, table in zip((True, False), tables_of):
        leaves = [x.detach().clone().requires_grad_() for x in (q, temperature, *([] if own is None else [own.to(dtype)]))]
        given = {**options, "temperature": leaves[1], **({} if own is None else {"candidates": leaves[2]})}
        if updates:
            optimizer, version = rule(), table._version
            loss = update_table(leaves[0], table, optimizer, **given)
            assert table._version > version and not torch.equal(table, start)
        else:
            loss = softmax_loss(leaves[0], table=table, **given)
        (3.0 * loss).backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    for found, wanted in zip(*results):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, **tolerance)
    assert (wide[:, D:] == 0).all()
    # The table was stepped by the gradient of the loss, not by three times it.
    if dtype == torch.float32:
        stepped, gradient = start.detach().numpy().copy(), tables_of[1].grad.numpy() / np.float32(3.0)
        rule().step(stepped, gradient)
        named = gradient.any(1)
        np.testing.assert_allclose(tables_of[0].numpy()[named], stepped[named], rtol=1e-3, atol=1e-4)
        assert (tables_of[0].numpy()[~named] == start.detach().numpy()[~named]).all()


def test_a_training_loop_with_update_table_learns():
    torch.manual_seed(1)
    tower, table = torch.nn.Linear(D, D), torch.nn.Parameter(torch.randn(M, D))
    optimizer, of_tower = cs.Optimizer.adam(M, D, 0.05), torch.optim.SGD(tower.parameters(), lr=0.1)
    x, positives, losses = torch.randn(B, D), integers(M, B, 4), []
    for _ in range(30):
        loss = update_table(tower(x), table, optimizer, positives, temperature=0.2)
        of_tower.zero_grad()
        loss.backward()
        of_tower.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0] and table.grad is None and optimizer.steps == 30
    with torch.no_grad():
        before = table.detach().clone()
        update_table(tower(x), table, optimizer, positives)
        assert not torch.equal(before, table)
        kept = table.detach().clone()
        assert update_table(tower(x), table, optimizer, positives, row_weight=torch.zeros(B)) == 0.0
        assert torch.equal(kept, table) and optimizer.steps == 31


def test_module_of_padded_sequences():
    torch.manual_seed(2)
    b, t = 3, 5
    states, table = torch.randn(b, t, D, requires_grad=True), embeddings(M, D, 1).requires_grad_()
    positives, negatives = torch.randint(M, (b, t)), torch.randint(M, (b, t, K))
    mask = torch.rand(b, t) > 0.3
    positives[~mask], negatives[~mask] = -100, 10**9
    loss = TableSoftmaxLoss(sparse_gradient=True)(states, table, positives, row_negatives=negatives, mask=mask)
    loss.backward()
    found = loss.detach(), states.grad.clone(), table.grad.to_dense()
    states.grad = table.grad = None
    wanted = softmax_loss(
        states[mask], table=table, positives=positives[mask], row_negatives=negatives[mask], similarity="dot", temperature=1.0
    )
    wanted.backward()
    for a, b in zip(found, (wanted.detach(), states.grad, table.grad)):
        torch.testing.assert_close(a, b)
    assert (found[1][~mask] == 0).all()


# Errors.

Q, TABLE = embeddings(B, D, 1), embeddings(M, D, 2)
P, ROWS = integers(M, B, 3), integers(M, B * K, 4).reshape(B, K)
OFFSETS, SEVERAL = offsets_and_positives(5)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: softmax_loss(Q, None, P), "candidates is missing; rule: one pool at least"),
    (lambda: softmax_loss(Q, table=TABLE), "positives"),
    (lambda: softmax_loss(Q, TABLE, P, row_negatives=ROWS), "table is missing; rule: row_negatives are of a table"),
    (lambda: softmax_loss(Q, TABLE, P, candidate_rows=P), "table is missing; rule: candidate_rows are of a table"),
    (lambda: softmax_loss(Q, TABLE, P, sparse_gradient=True), "sparse_gradient is True; rule: the gradient of a table"),
    (lambda: softmax_loss(Q, table=TABLE[:, :-1], positives=P), "table has"),
    (lambda: softmax_loss(Q, table=TABLE.half(), positives=P), "table has elements of type float16"),
    (lambda: softmax_loss(Q, table=TABLE.double(), positives=P), "table has elements of type torch.float64; rule: torch.float32"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P + M), "positives["),
    (lambda: softmax_loss(Q, table=TABLE, positives=P[:-1]), "positives has length 10"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, candidate_rows=P - M), "candidate_rows[0] is -"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, candidate_rows=P.float()), "candidate_rows has shape (11,) of torch.float32"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, row_negatives=ROWS - M - 2), "row_negatives[0, 0] is -"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, row_negatives=ROWS.index_fill(0, torch.tensor(1), M)),
     f"row_negatives[1, 0] is {M}; rule: a row of the table, or -1 for none"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, row_negatives=ROWS[:-1]), "row_negatives"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, row_negatives=ROWS[0]),
     "row_negatives has shape (6,) of torch.int64; rule: two axes"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, row_negatives=torch.zeros(B, 4097, dtype=torch.int64)),
     "row_negatives.shape[1] is 4097; rule: at least 1 and at most 4096"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, row_negatives=ROWS, row_negatives_log_q=torch.zeros(B, K - 1)),
     "row_negatives_log_q has shape (11, 5); rule: (11, 6), that of row_negatives"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, row_negatives_log_q=torch.zeros(B, K)), "row_negatives is missing"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, row_negatives=ROWS, row_negatives_log_q=torch.zeros(B, K)), "log_q"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, row_negatives=ROWS, log_q=torch.zeros(M)),
     "log_q has 1 tensors; rule: one for each pool, 0"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, correction="logq", log_q=torch.zeros(M)), "positive_log_q"),
    (lambda: softmax_loss(Q, table=TABLE, positives=SEVERAL, positive_offsets=OFFSETS[:-1]), "positive_offsets has length 11"),
    (lambda: softmax_loss(Q, table=TABLE, positives=SEVERAL, positive_offsets=OFFSETS.flip(0)), "positive_offsets"),
    (lambda: softmax_loss(Q, table=TABLE, positives=SEVERAL, positive_offsets=OFFSETS + 1, row_weight=torch.arange(float(B))),
     "positive_offsets is [1, 2"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, positive_weight=torch.ones(B)), "positive_weight"),
    (lambda: softmax_loss(Q, table=TABLE, positives=SEVERAL, positive_offsets=OFFSETS, positive_weight=-torch.ones(17)),
     "positive_weight[0] is -1"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, false_negative_margin=1.0, false_negative_ratio=0.9),
     "false_negative_margin is 1 and"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, false_negative_margin=float("nan")), "false_negative_margin is NaN; rule: finite"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, false_negative_ratio=0.0), "false_negative_ratio is 0; rule: finite and > 0"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, false_negative_ratio=0.9, similarity="dot"), "false_negative_ratio"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, symmetric=True), "table"),
    (lambda: softmax_loss(Q, Q, table=TABLE, positives=P), "candidate_ids"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, table_ids=P), "table_ids has length 11"),
    (lambda: softmax_loss(Q, table=TABLE, positives=P, row_negatives=ROWS, row_negatives_log_q=torch.zeros(B, K, requires_grad=True)),
     "row_negatives_log_q requires a gradient"),
    (lambda: hardest_negatives(Q, table=TABLE, positives=P, k=0), "k is 0"),
    (lambda: hardest_negatives(Q, table=TABLE, positives=P, k=M + 1), f"k is {M + 1}"),
    (lambda: cs.value_and_grad(Q.numpy(), TABLE.numpy(), P.numpy(), row_sparse=True), "row_sparse is True; rule: the gradient of a table"),
    (lambda: cs.value_and_grad(Q.numpy(), positives=P.numpy(), row_negatives=ROWS.numpy()), "table is missing"),
    (lambda: cs.value_and_grad(Q.numpy(), positives=P.numpy()), "candidates is missing; rule: candidates or a table"),
    (lambda: cs.Optimizer.sgd(-1.0), "learning_rate is -1; rule: finite and >= 0"),
    (lambda: cs.Optimizer.adam(M, D, 0.1, betas=(1.0, 0.9)), "beta1 is 1"),
    (lambda: cs.Optimizer.row_adagrad(0, 0.1), "rows from 1"),
    (lambda: cs.Optimizer.from_bytes(b"none"), "bytes has only 4 bytes left"),
    (lambda: update_table(Q, TABLE.clone(), cs.Optimizer.sgd(0.1), P, reduction="none"), 'reduction is "none"'),
    (lambda: update_table(Q, TABLE.clone(), torch.optim.SGD([TABLE.clone()], lr=1.0), P),
     "optimizer is a SGD; rule: a catalog_softmax.Optimizer"),
    (lambda: update_table(Q, TABLE.T.contiguous().T, cs.Optimizer.sgd(0.1), P),
     "table has strides (1, 70); rule: elements of a row side by side"),
    (lambda: update_table(Q, TABLE.clone().requires_grad_() * 2, cs.Optimizer.sgd(0.1), P),
     "table is a result of other operators"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_errors_of_a_step_change_nothing():
    table, adagrad = TABLE.numpy().copy(), cs.Optimizer.row_adagrad(M, 0.1)
    state = adagrad.to_bytes()
    g = np.ones((M, D), np.float32)
    read_only = table.copy()
    read_only.flags.writeable = False
    for call, message in [
        (lambda: adagrad.step(table[:-1], g[:-1]), "table has shape (69, 9); rule: shape (70, 9), that of the state"),
        (lambda: adagrad.step(table, g[:-1]), "gradient has shape (69, 9)"),
        (lambda: adagrad.step(table, g.astype(int)), "gradient has shape (70, 9) of int64"),
        (lambda: adagrad.step(read_only, g), "table is read-only; rule: a writable array"),
        (lambda: adagrad.step(np.asfortranarray(table), g), "table has strides (4, 280); rule: elements of a row side by side"),
        (lambda: adagrad.step_rows(table, [3, 2], g[:2]), "rows[1] is 2; rule: above the one before, 3"),
        (lambda: adagrad.step_rows(table, [2, M], g[:2]), f"rows[1] is {M}"),
        (lambda: adagrad.step_rows(table, [-1], g[:1]), "rows[0] is "),
        (lambda: cs.update(table[:B], table, adagrad, P.numpy()), "queries is in the memory of table; rule: memory of its own"),
        (lambda: cs.update(Q.numpy(), table, adagrad, P.numpy() + M), "positives["),
        (lambda: cs.update(Q.numpy(), read_only, adagrad, P.numpy()), "table is read-only"),
        (lambda: cs.update(Q.numpy(), table[1:], adagrad, P.numpy() % 5), "table has shape (69, 9)"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    shared = torch.from_numpy(table)
    with pytest.raises(ValueError, match="queries is in the memory of table"):
        update_table(shared[:B], shared, adagrad, P)
    assert (table == TABLE.numpy()).all() and adagrad.to_bytes() == state


def test_a_step_of_cuda_tensors_is_refused(monkeypatch):
    """By what goes the way of CUDA tensors."""
    monkeypatch.setattr(_cuda, "place_of", lambda tensor, argument: object())
    adagrad = cs.Optimizer.row_adagrad(M, 0.1)
    with pytest.raises(ValueError, match="update_table does not apply to tensors on cpu; rule: the step runs on the CPU"):
        update_table(Q, TABLE.clone(), adagrad, P)


# Operators.


def operator_args(name):
    options = {**CASES[name], "temperature": torch.tensor(0.2, requires_grad=True)}
    q, table = q_and_table()
    lists = lambda key: options.get(key, []) if isinstance(options.get(key, []), list) else [options[key]]
    offsets, ids = options.get("excluded", (None, None))
    batch = (
        q, lists("candidates"), options["positives"], None, lists("candidate_ids"), lists("log_q"), None, options.get("positive_log_q"),
        offsets, ids, options.get("row_weight"),
    )
    extra = (
        table, options.get("table_ids"), lists("candidate_rows"), *(options.get(key) for key in (
            "row_negatives", "row_negatives_log_q", "positive_offsets", "positive_weight", "false_negative_margin", "false_negative_ratio",
        )),
    )
    return (*batch, *extra, options["temperature"], 1.0)


@pytest.mark.parametrize("name", ["whole table", "row_negatives and a pool", "weights of rows, several", "everything", "ratio"])
def test_opcheck(name):
    ops, args = torch.ops.catalog_softmax, operator_args(name)
    correction = CASES[name].get("correction", "none")
    reduction = CASES[name].get("reduction", "mean")
    torch.library.opcheck(ops.table_softmax_loss.default, (*args, f"cosine {correction} {reduction}", False, True))
    statistics = f"cosine {'none' if correction == 'none' else 'logq_negatives_only'}"
    # Without positive_log_q and row_weight.
    without_weight = (*args[:7], None, *args[8:10], None, *args[11:])
    torch.library.opcheck(ops.table_row_statistics.default, (*without_weight, statistics, False, True))
    with torch.no_grad():
        rows, positive, expected = ops.table_row_statistics(*without_weight, statistics, False, True)
    detached = [detach(x) for x in without_weight]
    wanted = [True, False, True, True] + [True] * len(args[1])
    back = (rows, positive, expected, torch.rand(B), torch.rand(len(positive)), *detached, statistics, wanted)
    torch.library.opcheck(ops.table_gradients.default, back)


def detach(value):
    if isinstance(value, list):
        return [x.detach() for x in value]
    return value.detach() if isinstance(value, torch.Tensor) else value


def test_opcheck_of_hardest_negatives():
    args = (Q, [], P, None, [], [], None, None, None, None, None, TABLE, None, [P], None, None, None, None, 3, "cosine")
    torch.library.opcheck(torch.ops.catalog_softmax.hardest_negatives.default, args)


def tower_and_losses(x, weight, table, rows, positives, offsets, several):
    q = torch.tanh(x @ weight)
    loss = softmax_loss(q, table=table, positives=positives, row_negatives=rows, candidate_rows=positives)
    loss = loss + softmax_loss(q, table=table, positives=several, positive_offsets=offsets, reduction="none").square().mean()
    lse, positive, _ = row_statistics(q, table=table, positives=positives, false_negative_margin=0.5, temperature=0.3)
    hard = hardest_negatives(q, table=table, positives=positives, k=2)
    return loss + torch.nn.functional.softplus(lse - positive).mean() + hard.values.sum()


def test_compile_of_the_whole_graph_changes_nothing():
    results = []
    for function in (tower_and_losses, torch.compile(tower_and_losses, fullgraph=True)):
        x, weight, table = embeddings(B, D, 1), embeddings(D, D, 2).requires_grad_(), embeddings(M, D, 3).requires_grad_()
        loss = function(x, weight, table, ROWS, P, OFFSETS, SEVERAL)
        loss.backward()
        results.append((loss.detach(), weight.grad, table.grad))
    for found, wanted in zip(results[1], results[0]):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def sparse_step(x, weight, table):
    q = torch.tanh(x @ weight)
    return softmax_loss(q, table=table, positives=P, row_negatives=ROWS, sparse_gradient=True) * 2.0


def update_step(x, weight, table, optimizer):
    return update_table(torch.tanh(x @ weight), table, optimizer, P) * 2.0


def test_sparse_gradients_and_updates_are_outside_of_graphs():
    found = []
    for function in (sparse_step, torch.compile(sparse_step)):
        x, weight, table = embeddings(B, D, 1), embeddings(D, D, 2).requires_grad_(), embeddings(M, D, 3).requires_grad_()
        function(x, weight, table).backward()
        assert table.grad.is_sparse
        found.append((weight.grad, table.grad.to_dense()))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.compiler.reset()
    with pytest.raises(Exception, match="_outside_of_graphs|disable"):
        torch.compile(sparse_step, fullgraph=True)(x, weight, table)
    found = []
    for function in (update_step, torch.compile(update_step)):
        x, weight, table = embeddings(B, D, 1), embeddings(D, D, 2).requires_grad_(), embeddings(M, D, 3)
        function(x, weight, table, cs.Optimizer.sgd(0.1)).backward()
        found.append((weight.grad, table))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_double_backward_is_an_error_that_says_so(sparse):
    q, table = q_and_table()
    loss = softmax_loss(q, table=table, positives=P, sparse_gradient=sparse)
    with pytest.raises(RuntimeError, match="catalog_softmax has no double backward"):
        (d,) = torch.autograd.grad(loss, q, create_graph=True)
        d.sum().backward()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_no_memory_is_lost_in_1000_steps():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    q, table = embeddings(64, 32, 1).requires_grad_(), embeddings(500, 32, 2).requires_grad_()
    positives, rows, weight = integers(500, 64, 4), integers(500, 64 * 8, 5).reshape(64, 8), torch.ones(64)
    weight[5], stepped, optimizer = 0.0, embeddings(500, 32, 2), cs.Optimizer.row_adagrad(500, 0.1)

    def steps(number):
        for step in range(number):
            q.grad = table.grad = None
            options = {"positives": positives, "row_negatives": rows, "row_weight": weight}
            softmax_loss(q, table=table, sparse_gradient=step % 2 == 0, **options).backward()
            update_table(q, stepped, optimizer, candidate_rows=positives, **options).backward()
            with pytest.raises(ValueError):
                softmax_loss(q, table=table, temperature=-1.0, **options)
            hardest_negatives(q, table=table, positives=positives, k=3)

    steps(200)
    before = resident()
    steps(1000)
    # One gradient of the table each time would be 64 MB, one of the queries 8 MB, one row of numbers 0.5 MB.
    assert resident() - before < 400_000, resident() - before
