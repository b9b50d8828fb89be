"""`torch.autograd.gradcheck` of the operators: the crate's float64 reference takes the place of its CPU backend, and everything else,
forward, what is kept, and the formula of the backward, is as it is.

The reference reads float32 embeddings and computes in float64. So inputs and gradcheck's steps are powers of two that float32 holds
exactly: no rounding is in the way, and the error of a central difference is that of its formula, `step^2 / 6` times a third derivative.
"""

import pytest
import torch

from catalog_softmax import _core
from catalog_softmax.torch import _arguments, _ops, row_statistics, softmax_loss
from common import excluded, integers, log_q

B, N, D = 5, 9, 3
GRID, STEP = 2.0**-6, 2.0**-10


class Reference:
    """What `_ops` calls of the core."""

    @staticmethod
    def forward(batch, options, gradients, threads):
        return _core.reference_forward(batch, options, gradients)

    @staticmethod
    def statistics(batch, options, requested, threads):
        return _core.reference_statistics(batch, options, requested[0])

    @staticmethod
    def gradients(batch, options, rows, expected, upstream, threads):
        return _core.reference_gradients(batch, options, rows, expected, upstream)


@pytest.fixture(autouse=True, params=["past the dispatcher", "through it"])
def float64(request, monkeypatch):
    embeddings = _arguments.embeddings

    def rounded(tensor, argument, *device):
        single = tensor.to(torch.float32)
        assert torch.equal(single.to(tensor.dtype), tensor), "the test's own rule: exact in float32"
        return embeddings(single, argument, *device)

    monkeypatch.setattr(_arguments, "embeddings", rounded)
    monkeypatch.setattr(_ops, "_core", Reference)
    monkeypatch.setattr(_ops, "_LOSS", torch.float64)
    if request.param == "through it":
        monkeypatch.setattr(_ops, "is_plain", lambda *values: False)


def leaf(rows, seed):
    values = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((values / GRID).round() * GRID).requires_grad_()


def gradcheck(function, *inputs):
    temperature = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    # Third derivatives are of size 1 / temperature^3 or less, times sizes of the embeddings: 100 covers them.
    assert torch.autograd.gradcheck(function, (*inputs, temperature), eps=STEP, atol=100 * STEP**2, rtol=0.0)


WEIGHT = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25])


@pytest.mark.parametrize(("similarity", "correction", "reduction"), [
    ("cosine", "none", "mean"), ("cosine", "logq", "none"), ("dot", "logq_negatives_only", "sum"), ("dot", "logq", "weighted_mean"),
])
def test_softmax_loss(similarity, correction, reduction):
    of_pools = {} if correction == "none" else {"log_q": [log_q(N, 4), log_q(4, 5)]}

    def loss(q, first, second, temperature):
        return softmax_loss(
            q, [first, second], integers(N + 4, B, 6), temperature=temperature, similarity=similarity, correction=correction,
            reduction=reduction, row_weight=WEIGHT, candidate_ids=[integers(7, N, 7), integers(7, 4, 8)],
            excluded=excluded(B, 7, 9), **of_pools,
        )

    gradcheck(loss, leaf(B, 1), leaf(N, 2), leaf(4, 3))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_one_pool_with_positives_of_their_own(reduction):
    def loss(q, c, p, temperature):
        return softmax_loss(
            q, c, positive_embeddings=p, temperature=temperature, correction="logq", log_q=log_q(N, 4),
            positive_log_q=log_q(B, 5), reduction=reduction, row_weight=WEIGHT,
        )

    gradcheck(loss, leaf(B, 1), leaf(N, 2), leaf(B, 3))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_in_batch_and_symmetric(reduction):
    gradcheck(lambda q, c, t: softmax_loss(q, c, temperature=t, reduction=reduction), leaf(B, 1), leaf(N, 2))
    order = torch.tensor([2, 0, 1, 4, 3])
    symmetric = lambda q, c, t: softmax_loss(q, c, order, temperature=t, reduction=reduction, symmetric=True, row_weight=WEIGHT)
    gradcheck(symmetric, leaf(B, 1), leaf(B, 2))


def test_a_weight_of_the_corrected_loss_is_a_constant():
    """gradcheck moves it, so that it is held by hand: the gradient is that of the weighted difference of lse and positive."""
    q, c, p, of_c, of_p = leaf(B, 1), leaf(N, 2), leaf(B, 3), log_q(N, 4), log_q(B, 5)
    options = {"positive_embeddings": p, "temperature": 0.75, "log_q": of_c}
    rows = row_statistics(q, c, **options)
    margin = rows.lse + torch.log(-torch.expm1(of_p.double())) - rows.positive
    weight = torch.sigmoid(margin.detach() - torch.log(rows.num_negatives.double()))
    wanted = torch.autograd.grad((weight * margin).sum(), (q, c, p))
    loss = softmax_loss(q, c, **options, positive_log_q=of_p, correction="corrected_logq", reduction="sum")
    for found, exact in zip(torch.autograd.grad(loss, (q, c, p)), wanted):
        assert (found - exact).abs().max() < 1e-12


def test_row_statistics():
    def rows(q, first, second, temperature):
        found = row_statistics(q, [first, second], integers(N + 4, B, 6), temperature=temperature, log_q=[log_q(N, 4), log_q(4, 5)])
        return found.lse, found.positive

    gradcheck(rows, leaf(B, 1), leaf(N, 2), leaf(4, 3))
