"""Bad input is a ValueError that names the argument, its value and the rule."""

import re

import pytest
import torch

import catalog_softmax
from catalog_softmax import _core
from catalog_softmax.torch import FullSoftmaxLoss, InfoNCELoss, _cuda, row_statistics, softmax_loss, top_k

Q, C, P = torch.ones(3, 4), torch.ones(5, 4), torch.tensor([0, 1, 2])
IDS = torch.arange(5)

CASES = [
    (lambda: softmax_loss(Q[0], C, P), "queries has shape (4,); rule: two axes, (rows, dim)"),
    (lambda: softmax_loss(Q.to_sparse(), C, P), "queries has the layout torch.sparse_coo; rule: torch.strided"),
    (lambda: softmax_loss(Q.double(), C.double(), P), "queries has elements of type torch.float64; rule: torch.float32"),
    (
        lambda: softmax_loss(Q, C.bfloat16(), P),
        "candidates has elements of type bfloat16; rule: the element type of queries, which is float32",
    ),
    (lambda: softmax_loss(Q, C[:, :3], P), "candidates has dim 3; rule: the dim of queries, which is 4"),
    (lambda: softmax_loss(Q, [C, C[:, :3]], P), "candidates[1] has dim 3"),
    (lambda: softmax_loss(Q, [], P), "candidates is a list of no pools; rule: one pool at least"),
    (lambda: softmax_loss(Q, C[:2]), "candidates has 2 rows; rule: positives=None needs a candidate for each of 3 queries"),
    (lambda: softmax_loss(Q, C[:2], row_weight=torch.tensor([0.0, 1.0, 1.0])), "candidates has 2 rows; rule: positives=None needs"),
    (lambda: softmax_loss(Q, C, P[:2]), "positives has length 2; rule: length 3"),
    (lambda: softmax_loss(Q, C, P[:2], row_weight=torch.tensor([0.0, 1.0, 1.0])), "positives has length 2; rule: length 3"),
    (lambda: softmax_loss(Q, C, P + 3), "positives[2] is 5; rule: at least 0 and less than the number of candidates"),
    (lambda: softmax_loss(Q, C, P - 1), "positives[0] is -1; rule: at least 0"),
    (lambda: softmax_loss(Q, C, P.float()), "positives has shape (3,) of torch.float32; rule: one axis of int32 or int64"),
    (lambda: softmax_loss(Q, C, P, positive_embeddings=Q), "a second kind of positives is given but does not apply"),
    (lambda: softmax_loss(Q, C, P, temperature=0.0), "temperature is 0; rule: finite and > 0"),
    (lambda: softmax_loss(Q, C, P, temperature=torch.tensor(-1.0)), "temperature is -1; rule: finite and > 0"),
    (lambda: softmax_loss(Q, C, P, temperature=torch.ones(2)), "temperature has shape (2,) of torch.float32; rule: a number"),
    (lambda: softmax_loss(Q, C, P, similarity="euclid"), "similarity is 'euclid'; rule: one of cosine, dot"),
    (lambda: softmax_loss(Q, C, P, correction="q"), "correction is 'q'; rule: one of none, logq, logq_negatives_only, corrected_logq"),
    (lambda: softmax_loss(Q, C, P, reduction="avg"), "reduction is 'avg'; rule: one of none, mean, sum, weighted_mean"),
    (lambda: softmax_loss(Q, C, P, log_q=torch.zeros(5)), 'log_q is given but does not apply; rule: correction="none" subtracts none'),
    (lambda: softmax_loss(Q, C, P, correction="logq"), "log_q is missing; rule: every correction subtracts it"),
    (lambda: softmax_loss(Q, C, P, correction="logq", log_q=torch.zeros(4)), "log_q has length 4; rule: length 5"),
    (lambda: softmax_loss(Q, C, P, correction="logq", log_q=torch.tensor([0, 1, 2, torch.inf, 0])), "log_q[3] is inf; rule: finite"),
    (lambda: softmax_loss(Q, [C, C], P, correction="logq", log_q=torch.zeros(5)), "log_q has 1 tensors; rule: one for each pool, 2"),
    (
        lambda: softmax_loss(Q, [C, C], P, correction="logq", log_q=[torch.zeros(5), torch.zeros(4)]),
        "log_q[1] has length 4; rule: length 5",
    ),
    (
        lambda: softmax_loss(Q, C, P, correction="logq", log_q=torch.zeros(5, requires_grad=True)),
        "log_q requires a gradient; rule: a constant",
    ),
    (
        lambda: softmax_loss(Q, C, P, correction="corrected_logq", log_q=torch.zeros(5)),
        'positive_log_q[0] is 0; rule: < 0 for correction="corrected_logq"',
    ),
    (lambda: softmax_loss(Q, C, P, candidate_ids=IDS[:4]), "candidate_ids has length 4; rule: length 5"),
    (
        lambda: softmax_loss(Q, C, P, candidate_ids=IDS.to(torch.uint8)),
        "candidate_ids has shape (5,) of torch.uint8; rule: one axis of int32",
    ),
    (lambda: softmax_loss(Q, C, P, candidate_ids=IDS, positive_ids=P), "positive_ids is given but does not apply"),
    (lambda: softmax_loss(Q, C, candidate_ids=IDS, positive_embeddings=Q), "positive_ids is missing; rule: separate positives need ids"),
    (lambda: softmax_loss(Q, C, P, excluded=(torch.tensor([0, 1, 1]), IDS)), "candidate_ids is missing"),
    (lambda: softmax_loss(Q, C, P, candidate_ids=IDS, excluded=(torch.tensor([0, 1, 1]), IDS)), "excluded[0] has length 3; rule: length 4"),
    (
        lambda: softmax_loss(Q, C, P, candidate_ids=IDS, excluded=(torch.tensor([0, 2, 1, 5]), IDS)),
        "excluded[0][2] is 1; rule: not less than",
    ),
    (
        lambda: softmax_loss(Q, C, P, candidate_ids=IDS, excluded=(torch.tensor([0, 2, 3, 4]), IDS)),
        "excluded[1] has 5 ids; rule: the last offset",
    ),
    (lambda: softmax_loss(Q, C, P, candidate_ids=IDS, excluded=IDS), "excluded is Tensor; rule: a pair of tensors"),
    (
        lambda: softmax_loss(Q, C, P, candidate_ids=IDS, excluded=(torch.tensor([0, 9, 1, 5]), IDS), row_weight=torch.tensor([0.0, 1, 1])),
        "excluded[0] is [0, 9, 1, 5]",
    ),
    (lambda: softmax_loss(Q, C, P, row_weight=torch.ones(2)), "row_weight has length 2; rule: length 3"),
    (lambda: softmax_loss(Q, C, P, row_weight=torch.tensor([1.0, -1.0, 0.0])), "row_weight["),
    (lambda: softmax_loss(Q, C, P, row_weight=torch.tensor([1.0, torch.nan, 1.0])), "row_weight[1] is NaN; rule: finite and >= 0"),
    (lambda: softmax_loss(Q, C, P, reduction="weighted_mean"), 'row_weight is missing; rule: reduction="weighted_mean" divides by its sum'),
    (lambda: softmax_loss(Q, C, P, symmetric=True), "candidates has 5 rows for 3 queries; rule: a symmetric loss needs"),
    (lambda: softmax_loss(Q, Q, torch.tensor([0, 0, 1]), symmetric=True), "positives[1] is 0; rule: a symmetric loss needs"),
    (lambda: softmax_loss(Q, Q, symmetric=True, correction="logq", log_q=torch.zeros(3)), 'correction="logq" is given but does not apply'),
    (
        lambda: softmax_loss(Q, Q, symmetric=True, candidate_ids=P, excluded=(torch.zeros(4).long(), IDS[:0])),
        "excluded is given but does not apply",
    ),
    (lambda: softmax_loss(Q[:0], C, P[:0]), "queries has shape (0, 4); rule: rows >= 1 and dim >= 1"),
    (lambda: row_statistics(Q, C, P + 9), "positives[0] is 9"),
    (lambda: top_k(Q, C, 6), "k is 6; rule: at least 1, at most 1024 and at most the number of candidates"),
    (lambda: InfoNCELoss(2.0), "temperature is 2.0; rule: from 0.01 to 1.0"),
    (lambda: InfoNCELoss()(Q, Q, mask=torch.ones(3)), "mask has elements of type torch.float32; rule: torch.bool"),
    (
        lambda: FullSoftmaxLoss()(Q, C, P, mask=torch.ones(2, dtype=torch.bool)),
        "mask has shape (2,); rule: an element for each of 3 queries",
    ),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_bad_input_says_what_is_wrong(case):
    call, message = CASES[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_device_that_cannot_be_used_has_an_error_of_its_own():
    with pytest.raises(catalog_softmax.DeviceUnavailable, match="queries is on meta; rule: the CPU, or a GPU of NVIDIA's"):
        _cuda.place_of(Q.to("meta"), "queries")
    # Either there is no driver, or no such device, or there are no kernels.
    with pytest.raises(catalog_softmax.DeviceUnavailable, match="device cuda:999 cannot be used: "):
        _core.device_fault((999, 0, True))
    assert issubclass(catalog_softmax.DeviceUnavailable, RuntimeError)
