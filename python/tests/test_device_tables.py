"""Batches over a table in device memory: arrays of small libraries (device.py), against numpy's in host memory, and what tensors in device
memory have of their own. Losses of such tensors run by `pytest --on-device` (test_tables.py)."""

import numpy as np
import pytest
import torch

import catalog_softmax as cs
import device
from catalog_softmax import _core
from catalog_softmax.torch import _cuda, hardest_negatives, softmax_loss
from common import embeddings, excluded, integers, log_q
from device import DLPack, Interface, Place, needs_device
from test_device import there

pytestmark = needs_device
B, M, D, K = 11, 70, 9, 6


@pytest.fixture
def context():
    return device.Context()


@pytest.fixture
def cuda_tensors(context, monkeypatch):
    monkeypatch.setattr(_cuda, "place_of", lambda tensor, argument: Place(context))
    return context


def several():
    """Rows with one, several and no positive."""
    counts = torch.tensor([1, 3, 0, 2, 1, 4, 1, 0, 2, 1, 2])
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), integers(M, int(counts.sum()), 5)


def cases():
    own = integers(M, B * K, 3).reshape(B, K)
    own[4] = -1
    offsets, positives = several()
    one, more = {"positives": integers(M, B, 6)}, {"positives": positives, "positive_offsets": offsets}
    return {
        "whole table": {**one, "table_ids": integers(50, M, 10)},
        "rows": {**one, "candidate_rows": integers(M, 25, 7), "excluded": excluded(B, M, 22)},
        "two pools": {
            **one, "candidate_rows": [integers(M, 25, 7), integers(M, 9, 15)], "log_q": [log_q(25, 16), log_q(9, 17)],
            "positive_log_q": log_q(B, 9), "correction": "logq",
        },
        "whole table, log_q": {**one, "log_q": log_q(M, 14), "positive_log_q": log_q(B, 9), "correction": "logq"},
        "own negatives": {**one, "row_negatives": own, "row_weight": torch.linspace(0.1, 2.0, B), "reduction": "weighted_mean"},
        "several": {
            **more, "row_negatives": own, "row_negatives_log_q": log_q(B * K, 4).reshape(B, K), "candidates": embeddings(8, D, 11),
            "candidate_ids": integers(M, 8, 12), "log_q": [log_q(8, 13)], "positive_log_q": log_q(len(positives), 18),
            "positive_weight": torch.rand(len(positives)), "correction": "logq", "false_negative_margin": 0.3,
        },
        "ratio": {**more, "candidate_rows": integers(M, 25, 7), "false_negative_ratio": 0.8},
    }


CASES = cases()
ROWS = ("positives", "candidate_rows", "row_negatives")


def on_host(options):
    to = lambda x: x.numpy() if isinstance(x, torch.Tensor) else type(x)(to(y) for y in x) if isinstance(x, (list, tuple)) else x
    return {name: to(value) for name, value in options.items()}


def on_device(options, wrap):
    """Rows of the table as int32."""
    narrow = lambda x: [narrow(y) for y in x] if isinstance(x, list) else x.int()
    tensors = lambda x: isinstance(x, torch.Tensor) or isinstance(x, (list, tuple))
    options = {name: narrow(value) if name in ROWS else value for name, value in options.items()}
    return {name: there(value, wrap) if tensors(value) else value for name, value in options.items()}


def near(found, wanted, what):
    """As far apart as two ways to add float32."""
    found = found.numpy() if isinstance(found, cs.DeviceArray) else found
    wanted = np.asarray(wanted)
    finite = np.isfinite(wanted)
    assert found.shape == wanted.shape and (np.isfinite(found) == finite).all(), what
    if finite.any():
        np.testing.assert_allclose(found[finite], wanted[finite], rtol=2e-5, atol=2e-6 * np.abs(wanted[finite]).max(), err_msg=what)


@pytest.mark.parametrize("wrap", [Interface, DLPack])
@pytest.mark.parametrize("name", CASES)
def test_value_gradients_and_statistics_of_arrays(context, name, wrap):
    q, table = embeddings(B, D, 1), embeddings(M, D, 2)
    common = {"temperature": 0.2, "rank": True, "moments": True}
    host = cs.value_and_grad(q.numpy(), table=table.numpy(), **on_host(CASES[name]), **common)
    arguments = {"table": there(table, wrap), **on_device(CASES[name], wrap), **common}
    found = cs.value_and_grad(there(q, wrap), **arguments, stream=context.stream)
    sparse = cs.value_and_grad(there(q, wrap), **arguments, row_sparse=True, stream=context.stream)
    cs.check_device(stream=context.stream)
    for field in ("lse", "positive", "expected_score", "entropy"):
        near(getattr(found.statistics, field), getattr(host.statistics, field), field)
    for field in ("num_negatives", "above", "ties"):
        assert (getattr(found.statistics, field).numpy() == getattr(host.statistics, field)).all(), field
    for field in ("total", "loss", "probability"):
        near(getattr(found, field), getattr(host, field), field)
    for field in ("d_queries", "d_table", "d_temperature"):
        near(getattr(found.gradients, field), getattr(host.gradients, field), field)
    if host.gradients.d_candidates is not None:
        near(found.gradients.d_candidates, host.gradients.d_candidates, "d_candidates")
    rows, values, num_rows = (x.numpy() for x in sparse.gradients.d_table)
    rows, values = rows[: int(num_rows)], values[: int(num_rows)]
    dense, named = found.gradients.d_table.numpy(), np.zeros(M, bool)
    named[rows] = True
    assert (np.diff(rows) > 0).all() and (values == dense[rows]).all() and (dense[~named] == 0.0).all()
    assert name.startswith("whole") == named.all()


@pytest.mark.parametrize("name", ["rows", "own negatives", "ratio"])
def test_statistics_and_gradients_in_two_calls(context, name):
    options = {key: x for key, x in CASES[name].items() if key not in ("row_weight", "reduction")}
    q, table, stream = there(embeddings(B, D, 1)), there(embeddings(M, D, 2)), context.stream
    options = on_device(options, Interface)
    s = cs.statistics(q, table=table, temperature=0.2, gradients=True, stream=stream, **options)
    whole = cs.value_and_grad(q, table=table, temperature=0.2, reduction="sum", stream=stream, **options)
    counts = np.diff(several()[0].numpy()) if name == "ratio" else np.ones(B, int)
    row_of = np.repeat(np.arange(B), counts)
    # -ln softmax of each pair, and its mean over the positives of a row.
    d = 1.0 / (1.0 + np.exp(s.positive.numpy() - s.lse.numpy()[row_of])) / counts[row_of]
    d_lse = np.bincount(row_of, d, B)
    for row_sparse in (False, True):
        found = cs.gradients(
            s, Interface(d_lse), Interface(-d), q, table=table, temperature=0.2, stream=stream, row_sparse=row_sparse, **options
        )
        near(found.d_queries, whole.gradients.d_queries.numpy(), "d_queries")
        if row_sparse:
            rows, values, num_rows = (x.numpy() for x in found.d_table)
            near(values[: int(num_rows)], whole.gradients.d_table.numpy()[rows[: int(num_rows)]], "d_table")
        else:
            near(found.d_table, whole.gradients.d_table.numpy(), "d_table")


@pytest.mark.parametrize("name", ["whole table", "rows", "ratio", "two pools"])
def test_hardest_negatives(context, cuda_tensors, name):
    q, table = embeddings(B, D, 1), embeddings(M, D, 2)
    kept = {"positives", "positive_offsets", "candidate_rows", "excluded", "table_ids"}
    options = {key: x for key, x in CASES[name].items() if key in kept}
    wanted = cs.hardest_negatives(q.numpy(), table=table.numpy(), k=7, **on_host(options))
    found = cs.hardest_negatives(there(q), table=there(table), k=7, stream=context.stream, **on_device(options, Interface))
    of_tensors = hardest_negatives(q, table=table, k=7, **options)
    cs.check_device(stream=context.stream)
    for indices, scores in ((found.indices.numpy(), found.scores.numpy()), (of_tensors.indices.numpy(), of_tensors.values.numpy())):
        assert (indices == wanted.indices).all()
        near(scores, wanted.scores, name)


def test_values_that_only_the_device_sees(context, cuda_tensors):
    q, table = embeddings(B, D, 1), embeddings(M, D, 2).requires_grad_()
    offsets, positives = several()
    own = integers(M, B * K, 3).reshape(B, K)
    place = Place(context)
    spoiled = lambda rows, row: rows.reshape(-1).index_fill(0, torch.tensor([8]), row).reshape(B, K)
    torn = offsets.clone()
    torn[4] = 2**40
    for argument, options in [
        ("candidate_rows[3]", {"positives": positives[:B], "candidate_rows": integers(M, 9, 7).index_fill(0, torch.tensor([3]), M)}),
        ("row_negatives[8]", {"positives": positives[:B], "row_negatives": spoiled(own, -2)}),
        ("row_negatives[8]", {"positives": positives[:B], "row_negatives": spoiled(own, M)}),
        ("positives[2]", {"positives": positives[:B].index_fill(0, torch.tensor([2]), 2**32 + 1)}),
        ("positive_offsets[4]", {"positives": positives, "positive_offsets": torn}),
    ]:
        softmax_loss(q, table=table, **options).backward()
        with pytest.raises(ValueError, match=device.start(argument)):
            _core.device_fault(place.raw)


def test_padding_of_weight_0_may_hold_anything(cuda_tensors):
    """As on the CPU, which leaves such rows out."""
    offsets, positives = several()
    absent = torch.tensor([1, 5])
    weight = torch.ones(B).index_fill(0, absent, 0.0)
    results = []
    for spoiled in (False, True):
        q, table = embeddings(B, D, 1), embeddings(M, D, 2).requires_grad_()
        own, named = integers(M, B * K, 3).reshape(B, K), positives.clone()
        of_pairs = torch.rand(len(positives), generator=torch.Generator().manual_seed(1))
        if spoiled:
            q[1], own[5] = torch.nan, -100
            named[int(offsets[1]) : int(offsets[2])] = 10**9
            of_pairs[int(offsets[5]) : int(offsets[6])] = torch.nan
        q.requires_grad_()
        loss = softmax_loss(
            q, positives=named, positive_offsets=offsets, positive_weight=of_pairs, table=table, row_negatives=own, row_weight=weight,
            temperature=0.2,
        )
        loss.backward()
        _core.device_fault(Place(cuda_tensors).raw)
        results.append((loss.detach(), q.grad, table.grad))
    for clean, spoiled in zip(*results):
        assert torch.equal(clean, spoiled)
    assert (results[1][1][absent] == 0.0).all()


def test_errors(context):
    q, table, positives = there(embeddings(B, D, 1)), there(embeddings(M, D, 2)), there(integers(M, B, 3).int())
    rows, over_table = there(integers(M, 9, 4).int()), {"table": table, "positives": positives}
    for call, message in [
        (lambda: cs.value_and_grad(q, candidate_rows=rows), "table is missing; rule: candidate_rows are of a table"),
        (lambda: cs.value_and_grad(q, table=table), "positives is missing"),
        (lambda: cs.value_and_grad(q, table=embeddings(M, D, 2).numpy(), positives=positives), "table is in host memory; rule: device"),
        (lambda: cs.value_and_grad(q, **over_table, candidate_rows=there(integers(M, 9, 4))), "candidate_rows has shape"),
        (lambda: cs.value_and_grad(q, **over_table, row_negatives=rows), "row_negatives has shape (9,) of int32; rule: two axes"),
        (lambda: cs.value_and_grad(q, there(embeddings(8, D, 1)), row_sparse=True), "row_sparse is True; rule: the gradient of a table"),
        (lambda: cs.value_and_grad(q), "candidates is missing; rule: candidates or a table"),
    ]:
        with pytest.raises(ValueError, match=device.start(message)):
            call()
