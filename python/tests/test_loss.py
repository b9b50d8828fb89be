"""softmax_loss against float64 autograd of the same loss with logits: every correction, reduction, mask, type and kind of positive."""

import pytest
import torch

import common
import reference
from catalog_softmax.torch import softmax_loss
from common import compare, embeddings, excluded, integers, log_q

B, N, D, CATALOGUE = 37, 300, 24, 120
CORRECTIONS = ["none", "logq", "logq_negatives_only", "corrected_logq"]
REDUCTIONS = ["none", "mean", "sum", "weighted_mean"]


def weights(seed=9):
    weight = torch.rand(B, generator=torch.Generator().manual_seed(seed))
    weight[[3, 11, B - 1]] = 0.0
    return weight


def upstream(loss):
    """A different derivative for each row, and not 1 for a number."""
    return (loss * torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)).sum()


def indexed(correction, dtype=torch.float32, masks=True):
    """Positives by index over two pools."""
    queries, first = embeddings(B, D, 1, dtype).requires_grad_(), embeddings(N, D, 2, dtype).requires_grad_()
    second = embeddings(41, D, 3, dtype).requires_grad_()
    options = {"temperature": torch.tensor(0.2, requires_grad=True), "correction": correction}
    if correction != "none":
        options["log_q"] = [log_q(N, 4), log_q(41, 5)]
    if masks:
        options["candidate_ids"] = [integers(CATALOGUE, N, 6), integers(CATALOGUE, 41, 7)]
        options["excluded"] = excluded(B, CATALOGUE, 8)
    return [queries, [first, second], integers(N + 41, B, 10)], options


def separate(correction, dtype=torch.float32):
    queries, candidates = embeddings(B, D, 1, dtype).requires_grad_(), embeddings(N, D, 2, dtype).requires_grad_()
    options = {
        "positive_embeddings": embeddings(B, D, 3, dtype).requires_grad_(), "positive_ids": integers(CATALOGUE, B, 4),
        "candidate_ids": integers(CATALOGUE, N, 5), "temperature": torch.tensor([0.15], requires_grad=True), "correction": correction,
    }
    if correction != "none":
        options["log_q"] = log_q(N, 6)
    if correction in ("logq", "corrected_logq"):
        options["positive_log_q"] = log_q(B, 7)
    return [queries, candidates], options


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_positives_by_index_over_pools_with_masks_and_weights(correction, reduction):
    args, options = indexed(correction)
    compare(softmax_loss, reference.softmax_loss, args, {**options, "reduction": reduction, "row_weight": weights()}, upstream)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_positives_of_their_own(correction, reduction):
    args, options = separate(correction)
    compare(softmax_loss, reference.softmax_loss, args, {**options, "reduction": reduction}, upstream)
    weighted = {**options, "reduction": reduction, "row_weight": weights(), "excluded": excluded(B, CATALOGUE, 8)}
    compare(softmax_loss, reference.softmax_loss, args, weighted, upstream)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_in_batch(correction, weighted):
    args = [embeddings(B, D, 1).requires_grad_(), embeddings(B + 5, D, 2).requires_grad_()]
    options = {"correction": correction, "candidate_ids": integers(30, B + 5, 3), "temperature": torch.tensor(0.3, requires_grad=True)}
    if correction != "none":
        options["log_q"] = log_q(B + 5, 4)
    if weighted:
        options |= {"row_weight": weights(), "excluded": excluded(B, 30, 8)}
    compare(softmax_loss, reference.softmax_loss, args, options, upstream)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_symmetric(reduction, permuted, ids):
    args = [embeddings(B, D, 1).requires_grad_(), embeddings(B, D, 2).requires_grad_()]
    if permuted:
        args.append(torch.randperm(B, generator=torch.Generator().manual_seed(3)).to(torch.int32))
    options = {"symmetric": True, "reduction": reduction, "row_weight": weights()}
    options["temperature"] = torch.tensor(0.2, requires_grad=True)
    if ids:
        options["candidate_ids"] = integers(30, B, 4)
    compare(softmax_loss, reference.softmax_loss, args, options, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_types_and_similarities(dtype, similarity):
    args, options = indexed("logq", dtype)
    options |= {"similarity": similarity, "temperature": torch.tensor(0.2 if similarity == "cosine" else 4.0, requires_grad=True)}
    compare(softmax_loss, reference.softmax_loss, args, options)
    args, options = separate("corrected_logq", dtype)
    options |= {"similarity": similarity, "temperature": torch.tensor(0.2 if similarity == "cosine" else 4.0, requires_grad=True)}
    compare(softmax_loss, reference.softmax_loss, args, options)


def test_integers_of_32_bits_are_those_of_64():
    args, options = indexed("logq")
    wanted = softmax_loss(*args, **options)
    options |= {"candidate_ids": [ids.int() for ids in options["candidate_ids"]], "excluded": tuple(x.int() for x in options["excluded"])}
    assert softmax_loss(args[0], args[1], args[2].int(), **options) == wanted


def test_negative_ids_are_ids():
    args, options = indexed("none")
    wanted = softmax_loss(*args, **options)
    offsets, ids = options["excluded"]
    options |= {"candidate_ids": [ids - 50 for ids in options["candidate_ids"]], "excluded": (offsets, ids - 50)}
    assert softmax_loss(*args, **options) == wanted


def test_rows_of_weight_0_may_hold_anything():
    """An ignore index, NaN embeddings: as if the row were not there."""
    args, options = indexed("logq")
    options["row_weight"] = weights()
    options["reduction"] = "weighted_mean"
    kept = options["row_weight"] > 0
    compare(softmax_loss, reference.softmax_loss, args, options)
    wanted = softmax_loss(*args, **options)
    with torch.no_grad():
        queries, positives = args[0].clone(), args[2].clone()
        queries[~kept], positives[~kept] = float("nan"), -100
    queries.requires_grad_()
    loss = softmax_loss(queries, args[1], positives, **options)
    loss.backward()
    assert loss == wanted and (queries.grad[~kept] == 0).all() and queries.grad[kept].isfinite().all()


def test_no_row_counts():
    args, options = indexed("logq")
    options["row_weight"] = torch.zeros(B)
    for reduction in ("none", "mean", "sum"):
        loss = softmax_loss(*args, **options, reduction=reduction)
        loss.sum().backward()
        assert (loss == 0).all() and (args[0].grad == 0).all() and (args[1][1].grad == 0).all()
    if common.ON_DEVICE:
        return  # where only `check_device` knows
    with pytest.raises(ValueError, match="the sum of row_weight is 0; rule: > 0"):
        softmax_loss(*args, **options, reduction="weighted_mean")


def test_a_row_without_negatives_has_no_loss():
    args = [embeddings(4, D, 1).requires_grad_(), embeddings(4, D, 2).requires_grad_()]
    loss = softmax_loss(*args, candidate_ids=torch.zeros(4, dtype=torch.int64), reduction="none")
    loss.sum().backward()
    assert (loss == 0).all() and (args[0].grad == 0).all() and (args[1].grad == 0).all()
