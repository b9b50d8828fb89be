"""Modules are the function with what people write around it."""

import math

import pytest
import torch
import torch.nn.functional as F

from catalog_softmax.torch import FullSoftmaxLoss, InfoNCELoss, SampledSoftmaxLoss, softmax_loss
from common import embeddings, integers, log_q


def test_info_nce_is_clips_loss_with_its_logit_scale():
    q, c = embeddings(20, 8, 1).requires_grad_(), embeddings(20, 8, 2).requires_grad_()
    module = InfoNCELoss(0.07)
    loss = module(q, c)
    loss.backward()
    found = [loss.detach(), q.grad, c.grad, module.logit_scale.grad]
    Q, C = q.detach().double().requires_grad_(), c.detach().double().requires_grad_()
    scale = torch.tensor(math.log(1 / 0.07), dtype=torch.float64, requires_grad=True)
    logits = scale.exp() * F.normalize(Q) @ F.normalize(C).T
    wanted = 0.5 * (F.cross_entropy(logits, torch.arange(20)) + F.cross_entropy(logits.T, torch.arange(20)))
    wanted.backward()
    for a, b in zip(found, [wanted.detach(), Q.grad, C.grad, scale.grad]):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-7)


def test_info_nce_keeps_its_scale_in_range_and_in_checkpoints():
    module = InfoNCELoss(0.07)
    assert [name for name, _ in module.named_parameters()] == ["logit_scale"]
    with torch.no_grad():
        module.logit_scale.fill_(9.0)
    module.clamp_()
    assert abs(module.temperature.item() - 0.01) < 1e-8
    other = InfoNCELoss(0.5)
    other.load_state_dict(module.state_dict())
    assert other.temperature == module.temperature
    assert not list(InfoNCELoss(learned=False).parameters())


def test_a_mask_is_the_rows_that_it_leaves():
    q, c = embeddings(20, 8, 1), embeddings(20, 8, 2)
    mask = torch.rand(20, generator=torch.Generator().manual_seed(3)) < 0.6
    module = InfoNCELoss(0.1, symmetric=False)
    found, rows = module(q, c, mask=mask), softmax_loss(q, c, temperature=0.1, reduction="none")
    torch.testing.assert_close(found, rows[mask].mean())


def test_full_softmax_is_cross_entropy_of_padded_sequences():
    hidden, items = embeddings(12, 8, 1).reshape(3, 4, 8).requires_grad_(), embeddings(30, 8, 2).requires_grad_()
    positives = integers(30, 12, 3).reshape(3, 4)
    positives[0, 2:] = -100
    positives[2, 0] = -100
    loss = FullSoftmaxLoss()(hidden, items, positives)
    loss.backward()
    H, I = hidden.detach().double().requires_grad_(), items.detach().double().requires_grad_()
    wanted = F.cross_entropy((H @ I.T).reshape(12, 30), positives.reshape(12))
    wanted.backward()
    for a, b in zip([loss.detach(), hidden.grad, items.grad], [wanted.detach(), H.grad, I.grad]):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)
    mask = positives != -100
    mask[1, 1] = False
    wanted = F.cross_entropy((H @ I.T)[mask], positives[mask])
    torch.testing.assert_close(FullSoftmaxLoss()(hidden, items, positives, mask=mask).double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("correction", ["logq", "corrected_logq"])
def test_sampled_softmax_of_sequences(correction):
    hidden, positives = embeddings(12, 8, 1).reshape(3, 4, 8), embeddings(12, 8, 2).reshape(3, 4, 8)
    negatives, ids, positive_ids = embeddings(50, 8, 3), integers(40, 50, 4), integers(40, 12, 5).reshape(3, 4)
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(6)) < 0.7
    q_negative, q_positive = log_q(50, 7), log_q(12, 8).reshape(3, 4)
    module = SampledSoftmaxLoss(correction=correction, temperature=0.2)
    found = module(
        hidden, positives, negatives, log_q=q_negative, positive_log_q=q_positive, negative_ids=ids, positive_ids=positive_ids, mask=mask
    )
    wanted = softmax_loss(
        hidden[mask], negatives, positive_embeddings=positives[mask], log_q=q_negative, positive_log_q=q_positive[mask],
        candidate_ids=ids, positive_ids=positive_ids[mask], correction=correction, temperature=0.2,
    )
    torch.testing.assert_close(found, wanted)


def test_modules_are_compiled_whole():
    hidden, items, positives = embeddings(12, 8, 1).reshape(3, 4, 8), embeddings(30, 8, 2), integers(30, 12, 3).reshape(3, 4)
    positives[0, 2:] = -100
    module = FullSoftmaxLoss()
    assert torch.compile(module, fullgraph=True)(hidden, items, positives) == module(hidden, items, positives)
