"""The layer without PyTorch, against the PyTorch layer (which is compared with float64) and numpy."""

import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import catalog_softmax as cs
from catalog_softmax.torch import softmax_loss
from common import embeddings, excluded, integers, log_q

B, N, D = 23, 90, 12


def batch():
    q, pools = embeddings(B, D, 1), [embeddings(N, D, 2), embeddings(9, D, 3)]
    options = {
        "candidate_ids": [integers(60, N, 4), integers(60, 9, 5)], "log_q": [log_q(N, 6), log_q(9, 7)],
        "excluded": excluded(B, 60, 8), "row_weight": torch.linspace(0.1, 2.0, B),
    }
    return q, pools, integers(N + 9, B, 9), options


def arrays(value):
    if isinstance(value, (list, tuple)):
        return type(value)(arrays(x) for x in value)
    return value.numpy()


def test_value_and_grad_is_the_operators():
    q, pools, positives, options = batch()
    output = cs.value_and_grad(
        arrays(q), arrays(pools), arrays(positives), temperature=0.2, correction="logq", candidate_gradients=[True, False],
        **{name: arrays(x) for name, x in options.items()},
    )
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    q.requires_grad_(), pools[0].requires_grad_()
    loss = softmax_loss(q, pools, positives, temperature=temperature, correction="logq", **options)
    loss.backward()
    assert np.float32(output.total) == loss.item()
    for found, wanted in ((output.gradients.d_queries, q.grad), (output.gradients.d_candidates[0], pools[0].grad)):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-6, atol=1e-9)
    assert output.gradients.d_candidates[1] is None
    assert abs(output.gradients.d_temperature / temperature.grad.item() - 1.0) < 1e-6
    assert output.loss.shape == output.probability.shape == (B,)


def test_statistics_are_those_of_the_scores():
    q, pools, _, _ = batch()
    found = cs.statistics(q, pools[0], np.arange(B), temperature=0.2, moments=True, rank=True)
    unit = lambda x: x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    s = unit(q) @ unit(pools[0]).T / 0.2
    rows = np.arange(B)
    positive = s[rows, rows]
    negatives = np.where(np.eye(B, N, dtype=bool), -np.inf, s)
    lse = np.log(np.exp(negatives).sum(1))
    p = np.exp(negatives - lse[:, None])
    np.testing.assert_allclose(found.lse, lse, rtol=1e-5)
    np.testing.assert_allclose(found.positive, positive, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.expected_score, (p * s).sum(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.entropy, -np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0.0).sum(1), rtol=1e-5)
    assert (found.above == (negatives > positive[:, None]).sum(1)).all() and (found.num_negatives == N - 1).all()
    ranking = cs.Ranking.of_positives(found.above, found.ties, found.lse, found.positive)
    assert len(ranking) == B and ranking.recall_at(10) == (found.above + found.ties < 10).mean()
    np.testing.assert_allclose(ranking.mrr(), (1.0 / (1 + found.above)).mean())


def test_gradients_of_a_loss_of_the_users_own():
    q, pools, positives, options = batch()
    options.pop("row_weight")
    batch_options = {**{name: arrays(x) for name, x in options.items()}, "temperature": 0.2}
    found = cs.statistics(q, pools, positives, gradients=True, **batch_options)
    margin = found.lse - found.positive
    sigma = 1.0 / (1.0 + np.exp(-margin)) / B
    own = cs.gradients(found, sigma, -sigma, q, pools, positives, **batch_options)
    wanted = cs.value_and_grad(q, pools, positives, correction="logq_negatives_only", **batch_options).gradients
    np.testing.assert_allclose(own.d_queries, wanted.d_queries, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(own.d_candidates[1], wanted.d_candidates[1], rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match=re.escape("statistics has no expected_negative")):
        cs.gradients(cs.statistics(q, pools, positives), sigma, sigma, q, pools, positives)


def test_views_types_and_dlpack():
    wide = embeddings(B, D + 5, 1).numpy()
    wanted = cs.value_and_grad(np.ascontiguousarray(wide[:, 2 : 2 + D]), embeddings(N, D, 2).numpy())
    for view in (wide[:, 2 : 2 + D], np.asfortranarray(wide[:, 2 : 2 + D]), wide[::-1][::-1][:, 2 : 2 + D]):
        assert cs.value_and_grad(view, embeddings(N, D, 2).numpy()).total == wanted.total
    reverse = cs.value_and_grad(wide[::-1, 2 : 2 + D], embeddings(N, D, 2).numpy(), np.arange(B)[::-1])
    assert abs(reverse.total - wanted.total) < 1e-6

    class OfDlpack:
        def __init__(self, tensor):
            self.tensor = tensor
        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)
        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    found = cs.value_and_grad(OfDlpack(embeddings(B, D, 1)), embeddings(N, D, 2))
    wanted = cs.value_and_grad(embeddings(B, D, 1).numpy(), embeddings(N, D, 2).numpy())
    assert found.total == wanted.total
    half = embeddings(B, D, 1).half()
    items = embeddings(N, D, 2).half()
    found = cs.value_and_grad(half.numpy(), items.numpy())
    assert found.total == pytest.approx(softmax_loss(half, items).item(), rel=1e-6)


def test_threads_change_nothing_and_top_k_is_exact():
    q, items = embeddings(300, D, 1).numpy(), embeddings(800, D, 2).numpy()
    one, two = (cs.value_and_grad(q, items, threads=n) for n in (1, 2))
    assert one.total == two.total and (one.gradients.d_candidates == two.gradients.d_candidates).all()
    found = cs.top_k(q, items, 5, similarity="dot")
    assert (found.indices == np.argsort(-(q @ items.T), axis=1, kind="stable")[:, :5]).all()


def test_errors():
    q, c = np.ones((3, 4), np.float32), np.ones((5, 4), np.float32)
    for call, message in [
        (lambda: cs.value_and_grad(q.astype(float), c), "queries has elements of type float64; rule: float32"),
        (lambda: cs.value_and_grad(q[0], c), "queries has shape (4,); rule: two axes"),
        (lambda: cs.value_and_grad(q, [c, c[:, :2]]), "candidates[1] has dim 2; rule: the dim of queries"),
        (lambda: cs.value_and_grad(q, c, np.array([0, 1, 9])), "positives[2] is 9; rule: at least 0"),
        (lambda: cs.value_and_grad(q, [c, c], log_q=np.zeros(5)), "log_q has 5 arrays; rule: one for each pool, 2"),
        (lambda: cs.value_and_grad(q, c, threads=0), "threads is 0; rule: >= 1"),
        (lambda: cs.top_k(q, c, 9), "k is 9; rule: at least 1"),
        (lambda: cs.Uniform(0), "num_items is 0; rule: from 1 to 2^32 - 1"),
        (lambda: cs.Unigram([1.0, -1.0]), "counts[1] is -1"),
        (lambda: cs.Uniform(5).log_q([7]), "ids[0] is 7; rule: below 5"),
        (lambda: cs.Uniform(5).log_q([1.5]), "ids has shape (1,) of float64; rule: one axis of integers"),
        (lambda: cs.Uniform(5).draw_distinct(6, cs.RandomStream(1)), "count has 6 distinct ids; rule: at most the 5 ids"),
        (lambda: cs.GapEstimator(8, alpha=2.0), "alpha is 2; rule: from 1e-4 to 1"),
        (lambda: cs.CountMin.from_bytes(b"no"), "bytes is"),
        (lambda: cs.TemperatureSchedule("linear", 0.1), "end is missing"),
        (lambda: cs.TemperatureSchedule("cosine", 0.1, 0.0), "end is 0; rule: a temperature, finite and > 0"),
        (lambda: cs.TemperatureSchedule("steps", 0.1, 0.2), 'kind is "steps"; rule: one of constant, linear'),
        (lambda: cs.union_log_q([]), "pools is missing"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()

    class OnGpu:
        __cuda_array_interface__ = {"data": (4096, True), "shape": (3, 4), "typestr": "<f4", "version": 3}

    with pytest.raises(ValueError, match="candidates is in device memory; rule: host memory, as queries"):
        cs.value_and_grad(q, OnGpu())


@pytest.mark.parametrize("make", [
    lambda: cs.Uniform(50), lambda: cs.Unigram(np.arange(50), 0.75), lambda: cs.LogUniform(50),
    lambda: cs.Mixture([(0.5, cs.Uniform(50)), (0.5, cs.Unigram(range(50)))]),
])
def test_samplers_draw_what_their_log_q_says(make):
    items = make()
    q = items.probability(np.arange(50))
    assert items.num_items == 50 and items.support == (q > 0).sum() and abs(q.sum() - 1.0) < 1e-7
    sample = items.draw(20_000, cs.RandomStream(7))
    assert sample.ids.dtype == np.int64 and sample.log_q.dtype == np.float32 and len(sample) == 20_000
    np.testing.assert_allclose(sample.log_q, np.log(q[sample.ids]), rtol=1e-6)
    counts = np.bincount(sample.ids, minlength=50)
    # Six standard deviations of each count.
    assert (np.abs(counts - 20_000 * q) <= 6.0 * np.sqrt(20_000 * q * (1 - q)) + 1e-9).all()
    assert (items.draw(20, cs.RandomStream(7, 1)).ids == items.draw(20, cs.RandomStream(7, 1)).ids).all()
    distinct = items.draw_distinct(10, cs.RandomStream(7))
    assert len(set(distinct.ids)) == 10
    few = items.draw_deduplicated(30, cs.RandomStream(7))
    np.testing.assert_allclose(few.log_q, np.log1p(-((1 - q[few.ids]) ** 30)), rtol=1e-5)
    np.testing.assert_allclose(few.log_q_of(items, few.ids), few.log_q, rtol=1e-6)


@pytest.mark.parametrize("make", [cs.ExactCounts, lambda: cs.CountMin(1 << 12), lambda: cs.GapEstimator(1 << 12)])
def test_estimators_are_counted_saved_and_restored(make):
    estimator, ids = make(), np.array([17, -42, 17, 5])
    for _ in range(5):
        estimator.observe(ids)
    np.testing.assert_allclose(estimator.probability([17, -42, 5]), [0.5, 0.25, 0.25])
    np.testing.assert_allclose(estimator.log_q(torch.tensor([17, -42])), np.log([0.5, 0.25]), rtol=1e-6)
    np.testing.assert_allclose(estimator.log_q_deduplicated([17], 4), np.log(1 - 0.5**4), rtol=1e-5)
    for other in (type(estimator).from_bytes(estimator.to_bytes()), pickle.loads(pickle.dumps(estimator))):
        other.observe(np.array([99], np.uint64))
        estimator.observe([])
        assert other.probability([99])[0] == pytest.approx(1 / 21) and other.probability([17])[0] == pytest.approx(10 / 21)
    assert estimator.probability([17])[0] == 0.5


def test_union_of_pools():
    popular, uniform = np.log([0.01, 1e-7]).astype(np.float32), np.log([1e-6, 1e-6]).astype(np.float32)
    found = cs.union_log_q([(255.0, popular), (512.0, uniform)])
    np.testing.assert_allclose(found, np.log([255 * 0.01 + 512e-6, 255e-7 + 512e-6]), rtol=1e-5)
    weight = cs.union_gradient_weight([(255.0, popular, True), (512.0, uniform, True), (4096.0, popular, False)])
    np.testing.assert_allclose(weight, 1 + 4096 * np.exp(popular) / np.exp(found), rtol=1e-4)


def test_schedules_and_metrics_of_lists():
    schedule = cs.TemperatureSchedule("exponential", 0.2, 0.05)
    assert schedule.at(0, 10) == 0.2 and schedule.at(5, 10) == pytest.approx(0.1) and schedule.at_progress(1.0) == 0.05
    assert cs.TemperatureSchedule("constant", 0.07).at(3, 10) == 0.07
    indices, scores = np.array([[3, 1, 2], [0, 2, -1]]), np.array([[3.0, 2, 1], [5, 4, -np.inf]], np.float32)
    ranking = cs.Ranking.in_lists(indices, scores, [0, 2, 3], [1, 9, 0])
    assert ranking.recall_at(2) == pytest.approx((0.5 + 1.0) / 2) and ranking.mrr() == pytest.approx((0.5 + 1.0) / 2)
    ideal = 1 + 1 / np.log2(3)
    assert ranking.ndcg_at(3) == pytest.approx((1 / np.log2(3) / ideal + 1.0) / 2)
    with pytest.raises(ValueError, match="k is 4; rule: at most 3"):
        ranking.recall_at(4)
    recommended = cs.Recommended(5)
    recommended.add(indices)
    assert recommended.coverage() == 0.8 and recommended.mean_popularity(np.arange(5.0)) == pytest.approx(8 / 5)


def test_pytorch_is_not_needed():
    script = "import sys; sys.modules['torch'] = None; import catalog_softmax as cs; print(cs.Uniform(3).support)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "3\n"


@pytest.mark.parametrize("made", [
    cs.Uniform(50), cs.Unigram(np.arange(50), 0.75), cs.LogUniform(50),
    cs.Mixture([(0.5, cs.Uniform(50)), (0.5, cs.Unigram(range(50)))]), cs.TemperatureSchedule("linear", 0.2, 0.05),
    cs.TemperatureSchedule("constant", 0.2),
])
def test_distributions_and_schedules_are_pickled(made):
    copied = pickle.loads(pickle.dumps(made))
    assert type(copied) is type(made)
    if isinstance(made, cs.TemperatureSchedule):
        assert [copied.at(step, 10) for step in range(10)] == [made.at(step, 10) for step in range(10)]
        return
    one, two = (x.draw_distinct(20, cs.RandomStream(3)) for x in (made, copied))
    assert (one.ids == two.ids).all() and (one.log_q == two.log_q).all()
    assert (made.probability(np.arange(50)) == copied.probability(np.arange(50))).all()


def test_what_a_distribution_was_made_of_may_change_later():
    counts = np.arange(50.0)
    made = cs.Unigram(counts)
    counts[:] = 1.0
    assert pickle.loads(pickle.dumps(made)).probability([0])[0] == 0.0


def test_geometry_on_the_sphere():
    x, y = (embeddings(40, 6, seed).double().numpy() for seed in (1, 2))
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    distances = np.linalg.norm(unit(x) - unit(y), axis=1)
    single = [a.astype(np.float32) for a in (x, y)]
    assert abs(cs.alignment(*single) - (distances**2).mean()) < 1e-12
    assert abs(cs.alignment(*single, alpha=1.0) - distances.mean()) < 1e-12
    assert cs.alignment(single[0], single[0]) == 0.0
    squared = ((unit(x)[:, None] - unit(x)[None]) ** 2).sum(-1)
    wanted = np.log(np.exp(-2.0 * squared[~np.eye(40, dtype=bool)]).mean())
    # Cosines in float32, each with its rounding.
    assert abs(cs.uniformity(single[0]) - wanted) < 1e-6
    for call, message in [
        (lambda: cs.alignment(single[0], single[1][:3]), "y has shape (3, 6); rule: shape (40, 6), as x"),
        (lambda: cs.alignment(*single, alpha=0.0), "alpha is 0; rule: finite and > 0"),
        (lambda: cs.uniformity(single[0][:1]), "x has shape (1, 6); rule: rows >= 2"),
        (lambda: cs.uniformity(single[0], t=-1.0), "t is -1; rule: finite and > 0"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_places_of_single_rows():
    top = cs.top_k(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), 2, similarity="dot")
    ranking = cs.Ranking.in_lists(top.indices, top.scores, [0, 1, 1, 3], [0, 1, 2])
    assert ranking.k == 2 and len(ranking) == 3
    (first, relevant), (nothing, none), (last, two) = ranking.rows()
    assert (first, relevant) == ([0], 1) and (nothing, none) == ([], 0) and two == 2 and last[0] == 0
    of_positives = cs.Ranking.of_positives([2, 0], [0, 1], [1.0, 1.0], [0.0, 0.0])
    assert of_positives.k is None and of_positives.rows() == [([2], 1), ([1], 1)]
