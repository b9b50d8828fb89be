"""The operators as PyTorch's own machinery sees them."""

import os
import warnings

import pytest
import torch
import torch.nn.functional as F

import reference
from catalog_softmax.torch import _ops, row_statistics, softmax_loss, top_k
from common import compare, embeddings, excluded, integers, log_q

B, N, D = 11, 40, 8


def pools():
    return (
        embeddings(B, D, 1).requires_grad_(), [embeddings(N, D, 2).requires_grad_(), embeddings(7, D, 3)], integers(N, B, 4), None,
        [integers(30, N, 5), integers(30, 7, 6)], [log_q(N, 7), log_q(7, 8)], None, None, *excluded(B, 30, 9),
    )


def one_pool():
    return (
        embeddings(B, D, 1), embeddings(N, D, 2).requires_grad_(), None, embeddings(B, D, 3).requires_grad_(), integers(30, N, 5),
        log_q(N, 6), integers(30, B, 7), log_q(B, 8), None, None,
    )


@pytest.mark.parametrize("options", ["cosine logq mean", "dot corrected_logq none", "dot logq weighted_mean"])
def test_opcheck_of_the_loss(options):
    temperature = torch.tensor(0.1, requires_grad=True)
    weight = torch.rand(B).index_fill(0, torch.tensor([2, 5]), 0.0)
    ops = torch.ops.catalog_softmax
    torch.library.opcheck(ops.softmax_loss_pools.default, (*pools(), weight, temperature, 1.0, options, True))
    torch.library.opcheck(ops.softmax_loss.default, (*one_pool(), weight, None, 0.1, options, True))


def test_opcheck_of_the_others():
    temperature = torch.tensor(0.1, requires_grad=True)
    ops = torch.ops.catalog_softmax
    torch.library.opcheck(ops.row_statistics_pools.default, (*pools(), None, temperature, 1.0, "cosine logq", True))
    torch.library.opcheck(ops.row_statistics.default, (*one_pool(), None, temperature, 1.0, "cosine logq", True))
    torch.library.opcheck(ops.top_k.default, (embeddings(B, D, 1), [embeddings(N, D, 2)], 5, [], None, None, "dot"))
    rows, expected = ops.row_statistics_pools(*pools(), None, None, 0.1, "cosine logq", True)
    back = (rows.detach(), expected.detach(), torch.rand(B), torch.rand(B), *(detached(x) for x in pools()), None)
    torch.library.opcheck(ops.gradients.default, (*back, None, 0.1, "cosine logq", [True, False, False, True, False]))


def detached(value):
    if isinstance(value, list):
        return [x.detach() for x in value]
    return value.detach() if isinstance(value, torch.Tensor) else value


def tower_and_loss(x, y, weight, positives, scale, ids):
    queries, items = x @ weight, torch.tanh(y @ weight)
    loss = softmax_loss(queries, items, positives, temperature=1.0 / scale, candidate_ids=ids)
    rows = row_statistics(queries, [items, items.detach()], positives, temperature=0.2)
    in_batch = softmax_loss(queries, items[: len(queries)], symmetric=True, reduction="none")
    return loss + F.softplus(rows.lse - rows.positive).mean() + in_batch.square().mean() + top_k(queries, items, 2).values.sum()


def test_compile_of_the_whole_graph_changes_nothing():
    inputs = lambda: (
        embeddings(B, D, 1), embeddings(N, D, 2), embeddings(D, D, 3).requires_grad_(), integers(N, B, 4),
        torch.tensor(5.0, requires_grad=True), integers(30, N, 5),
    )
    results = []
    for function in (tower_and_loss, torch.compile(tower_and_loss, fullgraph=True)):
        for b in (B, B - 3):  # the second with another shape
            args = inputs()
            loss = function(args[0][:b], args[1], args[2], args[3][:b], args[4], args[5])
            loss.backward()
            results.append((loss.detach(), args[2].grad, args[4].grad))
    for eager, compiled in zip(results[:2], results[2:]):
        for found, wanted in zip(compiled, eager):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_past_the_dispatcher_and_through_it_are_the_same(reduction, monkeypatch):
    def run():
        batch = [x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in one_pool()]
        temperature, weight = torch.tensor(0.1, requires_grad=True), torch.ones(B).index_fill(0, torch.tensor([2, 5]), 0.0)
        loss = softmax_loss(
            batch[0], batch[1], positive_embeddings=batch[3], candidate_ids=batch[4], log_q=batch[5].detach(), positive_ids=batch[6],
            positive_log_q=batch[7].detach(), row_weight=weight, temperature=temperature, correction="logq", reduction=reduction,
        )
        (loss * torch.linspace(1, 2, B)).sum().backward()
        return [loss.detach(), batch[0].grad, batch[1].grad, batch[3].grad, temperature.grad]

    names = []
    monkeypatch.setattr(_ops._DirectLoss, "apply", lambda *args, of=_ops._DirectLoss.apply: names.append("direct") or of(*args))
    direct = run()
    assert names == ["direct"]
    monkeypatch.setattr(_ops, "is_plain", lambda *values: False)
    through = run()
    assert names == ["direct"]
    assert all(torch.equal(a, b) for a, b in zip(direct, through))


def test_who_watches_the_dispatcher_sees_the_operator():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        softmax_loss(embeddings(B, D, 1).requires_grad_(), embeddings(N, D, 2), integers(N, B, 4)).backward()
    assert {"catalog_softmax.softmax_loss.default", "catalog_softmax.gradients.default"} <= set(seen)


def test_double_backward_is_an_error_that_says_so():
    q, c = embeddings(B, D, 1).requires_grad_(), embeddings(N, D, 2)
    (d,) = torch.autograd.grad(softmax_loss(q, c, integers(N, B, 4)), q, create_graph=True)
    with pytest.raises(RuntimeError, match="catalog_softmax has no double backward"):
        d.sum().backward()


def test_autocast_leaves_what_it_is_given():
    q, c, positives = embeddings(B, D, 1).requires_grad_(), embeddings(N, D, 2), integers(N, B, 4)
    wanted = softmax_loss(q, c, positives)
    with torch.autocast("cpu", torch.bfloat16):
        found = softmax_loss(q, c, positives)
        low = q @ torch.eye(D)
        assert low.dtype == torch.bfloat16
        loss = softmax_loss(low, c.to(torch.bfloat16), positives)
    assert found.dtype == torch.float32 and found == wanted
    loss.backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["index", "in-batch", "separate"])
def test_statistics_for_a_loss_of_the_users_own(kind):
    def loss_of(statistics):
        def loss(*args, **options):
            lse, positive, n = statistics(*args, **options)
            assert (n > 0).all()
            return F.softplus(lse - positive).mean() + 1e-2 * lse.square().sum() + (positive * lse).mean()
        return loss

    args = [embeddings(B, D, 1).requires_grad_(), [embeddings(N, D, 2).requires_grad_(), embeddings(7, D, 3).requires_grad_()]]
    options = {"candidate_ids": [integers(30, N, 5), integers(30, 7, 6)], "temperature": torch.tensor(0.2, requires_grad=True)}
    options |= {"excluded": excluded(B, 30, 9), "log_q": [log_q(N, 7), log_q(7, 8)]}
    if kind == "index":
        args.append(integers(N + 7, B, 4))
    if kind == "separate":
        options |= {"positive_embeddings": embeddings(B, D, 10).requires_grad_(), "positive_ids": integers(30, B, 11)}
    compare(loss_of(row_statistics), loss_of(reference.statistics), args, options)


def test_top_k_is_torchs_over_the_scores():
    q, pools = embeddings(B, D, 1), [embeddings(N, D, 2), embeddings(7, D, 3)]
    ids, (offsets, seen) = [torch.arange(N), torch.arange(N, N + 7)], excluded(B, N + 7, 4)
    for similarity in ("cosine", "dot"):
        scores, _ = reference.scores(q, pools, torch.zeros(B, dtype=torch.int64), None, similarity, 1.0)
        found = top_k(q, pools, 6, similarity=similarity)
        wanted = scores.topk(6)
        assert torch.equal(found.indices, wanted.indices)
        torch.testing.assert_close(found.values, wanted.values)
        for row in range(B):
            scores[row, seen[offsets[row] : offsets[row + 1]]] = -torch.inf
        found = top_k(q, pools, 6, similarity=similarity, candidate_ids=ids, excluded=(offsets, seen))
        assert torch.equal(found.indices, scores.topk(6).indices)
    few = top_k(q[:1], pools[1], 7, candidate_ids=ids[1], excluded=(torch.tensor([0, 2]), torch.tensor([N, N + 1])))
    assert few.indices[0, 5:].tolist() == [-1, -1] and few.values[0, 5:].tolist() == [-torch.inf] * 2


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_no_memory_is_lost_in_1000_steps():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    q, c = embeddings(64, 32, 1).requires_grad_(), embeddings(500, 32, 2).requires_grad_()
    temperature = torch.tensor(0.1, requires_grad=True)
    ids, positives, weight = integers(100, 500, 3), integers(500, 64, 4), torch.rand(64)
    weight[5] = 0.0

    def steps(number):
        for _ in range(number):
            q.grad = c.grad = temperature.grad = None
            softmax_loss(q, c, positives, temperature=temperature, candidate_ids=ids, row_weight=weight).backward()
            with pytest.raises(ValueError):
                softmax_loss(q, c, positives, temperature=-1.0)
            top_k(q, c, 5)

    steps(200)
    before = resident()
    steps(1000)
    # One gradient of the candidates each time would be 64 MB, one of the queries 8 MB, one row of numbers 0.5 MB.
    assert resident() - before < 400_000, resident() - before


def test_transforms_work_or_say_that_they_do_not():
    q, c, positives = embeddings(3 * B, D, 1).reshape(3, B, D), embeddings(N, D, 2), integers(N, B, 3)
    loss = lambda q: softmax_loss(q, c, positives)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, of a call for each element
        assert torch.equal(torch.func.vmap(loss)(q), torch.stack([loss(x) for x in q]))
    for transform in (torch.func.grad(loss), torch.func.vmap(torch.func.grad(loss)), lambda q: torch.func.hessian(loss)(q[0])):
        with pytest.raises(RuntimeError, match="catalog_softmax has no torch.func.grad, vjp, jacrev or hessian; rule: loss.backward"):
            transform(q)
    dual = torch.autograd.forward_ad

    def forward_mode(function):
        with dual.dual_level():
            function(dual.make_dual(q[0], q[1]))

    rows = lambda q: row_statistics(q, c, positives).lse
    for function in (loss, rows):
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            torch.func.jvp(function, (q[0],), (q[1],))
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            forward_mode(function)
