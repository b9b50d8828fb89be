"""The losses of other libraries, written out as they compute them, and the call that docs/guide/src/from-other-libraries.md says takes their place."""

import math

import torch
import torch.nn.functional as F

from catalog_softmax.torch import FullSoftmaxLoss, InfoNCELoss, SampledSoftmaxLoss, TableSoftmaxLoss, hardest_negatives, softmax_loss
from common import embeddings, integers, log_q

B, D = 24, 16


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-5)


def test_tensorflow_recommenders_retrieval():
    q, c, ids, p, weight = embeddings(B, D, 1), embeddings(B, D, 2), integers(15, B, 3), log_q(B, 4).exp(), torch.rand(B)
    scores = q @ c.T / 0.5 - p.log()
    duplicate = (ids[:, None] == ids[None, :]).float() - torch.eye(B)
    scores = scores + duplicate * (torch.finfo(torch.float32).min / 100)
    wanted = (weight * F.cross_entropy(scores, torch.arange(B), reduction="none")).sum()
    found = softmax_loss(
        q, c, similarity="dot", temperature=0.5, correction="logq", log_q=p.log(), candidate_ids=ids, row_weight=weight, reduction="sum"
    )
    close(found, wanted)


def test_tensorflow_recommenders_hard_negatives():
    q, c, k = embeddings(B, D, 1), embeddings(B, D, 2), 5
    scores = q @ c.T
    # HardNegativeMining: the k best of each row beside its positive.
    mined = (scores + 1e9 * torch.eye(B)).topk(k + 1).indices
    logits = scores.gather(1, mined)
    wanted = F.cross_entropy(logits, torch.zeros(B, dtype=torch.int64), reduction="sum")
    hardest = hardest_negatives(q, c, k=k, similarity="dot").indices
    options = {"similarity": "dot", "temperature": 1.0, "reduction": "sum"}
    close(softmax_loss(q, table=c, positives=torch.arange(B), row_negatives=hardest, **options), wanted)


def test_open_clip():
    images, texts = F.normalize(embeddings(B, D, 1), dim=1), F.normalize(embeddings(B, D, 2), dim=1)
    scale = torch.tensor(1 / 0.07)
    logits = scale * images @ texts.T
    wanted = (F.cross_entropy(logits, torch.arange(B)) + F.cross_entropy(logits.T, torch.arange(B))) / 2
    close(softmax_loss(images, texts, temperature=1 / scale, symmetric=True), wanted)
    close(InfoNCELoss(0.07)(images, texts), wanted)


def test_multiple_negatives_ranking():
    anchors, positives, negatives = embeddings(B, D, 1), embeddings(B, D, 2), embeddings(B, D, 3)
    scores = F.normalize(anchors, dim=1) @ F.normalize(torch.cat([positives, negatives]), dim=1).T * 20.0
    close(softmax_loss(anchors, [positives, negatives]), F.cross_entropy(scores, torch.arange(B)))


def test_merlin_contrastive_output():
    q, c, ids, p = embeddings(B, D, 1), embeddings(B, D, 2), integers(15, B, 3), log_q(B, 4).exp()
    negative = q @ c.T - (p + 1e-16).log()
    positive = (q * c).sum(1, keepdim=True) - (p + 1e-16).log()[:, None]
    negative = torch.where(ids[:, None] == ids[None, :], torch.finfo(torch.float32).min / 100, negative)
    wanted = F.cross_entropy(torch.cat([positive, negative], 1) / 2.0, torch.zeros(B, dtype=torch.int64))
    found = softmax_loss(
        q, c, similarity="dot", temperature=2.0, correction="logq", candidate_ids=ids, positive_embeddings=c, positive_ids=ids,
        log_q=p.log() / 2.0, positive_log_q=p.log() / 2.0,
    )
    close(found, wanted)


def test_sasrec_with_full_and_with_sampled_softmax():
    hidden, items, labels = embeddings(B, D, 1).reshape(4, 6, D), embeddings(40, D, 2), integers(40, B, 3).reshape(4, 6)
    padding = 40
    labels[:, :2] = padding
    mask = labels != padding
    close(FullSoftmaxLoss(ignore_index=padding)(hidden, items, labels), F.cross_entropy((hidden @ items.T)[mask], labels[mask]))
    negatives = integers(40, 10, 4)
    scores = torch.cat([(hidden * items[labels.clamp(max=39)]).sum(-1, keepdim=True), hidden @ items[negatives].T - math.log(1 / 40)], -1)
    scores[..., 0] -= math.log(1 / 40)
    scores[..., 1:][negatives == labels[..., None]] = -torch.inf
    wanted = F.cross_entropy(scores[mask], torch.zeros(int(mask.sum()), dtype=torch.int64))
    found = SampledSoftmaxLoss(similarity="dot", temperature=1.0)(
        hidden, items[labels.clamp(max=39)], items[negatives], log_q=torch.full((10,), math.log(1 / 40)),
        positive_log_q=torch.full((4, 6), math.log(1 / 40)), negative_ids=negatives, positive_ids=labels, mask=mask,
    )
    close(found, wanted)


def test_sentence_transformers_margins():
    q, c, tau, margin = F.normalize(embeddings(B, D, 1), dim=1), F.normalize(embeddings(B, D, 2), dim=1), 0.05, 0.1
    s = q @ c.T
    positive = s.diagonal()[:, None]
    for bound, option in (
        (positive - margin, {"false_negative_margin": -margin / tau}),
        (torch.where(positive > 0, positive * (1 - margin), torch.inf), {"false_negative_ratio": 1 - margin}),
    ):
        masked = (s / tau).masked_fill((s > bound) & ~torch.eye(B, dtype=torch.bool), -torch.inf)
        close(softmax_loss(q, c, temperature=tau, **option), F.cross_entropy(masked, torch.arange(B)))


def test_sasrec_with_negatives_of_each_position():
    t, k, items = 5, 7, 40
    hidden, table = torch.randn(B, t, D), embeddings(items, D, 2)
    labels, negatives = torch.randint(1, items, (B, t)), torch.randint(items, (B, t, k))
    mask = torch.rand(B, t) > 0.3
    logits = torch.einsum("btd,btkd->btk", hidden, table[torch.cat([labels[..., None], negatives], 2)])
    hits = F.pad(negatives == labels[..., None], (1, 0))
    logits = logits.masked_fill(hits, -torch.inf)[mask]
    wanted = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))
    close(TableSoftmaxLoss()(hidden, table, labels, row_negatives=negatives, mask=mask), wanted)
