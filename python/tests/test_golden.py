"""The golden batches of the Rust suite (docs/replay.md describes the files): results in float64 by another implementation."""

import json
import pathlib
import struct

import pytest
import torch
from safetensors.torch import load_file

import common
from catalog_softmax.torch import row_statistics, softmax_loss

FILES = sorted((pathlib.Path(__file__).parents[2] / "tests" / "golden").glob("*.safetensors"))


def options_of(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)).get("__metadata__", {})


def correction(tensors, options):
    if "log_q" not in tensors:
        return "none"
    if options["loss"] == "corrected_logq":
        return "corrected_logq"
    return "logq" if options.get("correct_positive", "true") == "true" else "logq_negatives_only"


def test_there_are_golden_batches():
    assert len(FILES) >= 15


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_batch(path):
    tensors, options = load_file(path), options_of(path)
    expected = {name.removeprefix("expected."): tensors.pop(name) for name in list(tensors) if name.startswith("expected.")}
    queries, candidates = tensors.pop("queries").requires_grad_(), tensors.pop("candidates").requires_grad_()
    temperature = torch.tensor(float(options["temperature"]), dtype=torch.float64, requires_grad=True)
    arguments = {name: tensors[name] for name in ("candidate_ids", "positive_ids") if name in tensors}
    if "exclude_offsets" in tensors:
        arguments["excluded"] = tensors["exclude_offsets"], tensors["exclude_ids"]
    positive_embeddings = tensors.get("positive_embeddings")
    if positive_embeddings is not None:
        arguments["positive_embeddings"] = positive_embeddings.requires_grad_()
    arguments |= {"similarity": options["similarity"], "temperature": temperature}
    batch = queries, candidates, tensors.get("positives")
    rows = row_statistics(*batch, **arguments, log_q=tensors.get("log_q"))
    arguments |= {name: tensors[name] for name in ("log_q", "positive_log_q", "row_weight") if name in tensors}
    arguments |= {"correction": correction(tensors, options), "symmetric": options.get("symmetric") == "true"}
    reduction = options.get("reduction", "mean")
    total = softmax_loss(*batch, **arguments, reduction=reduction).sum()
    total.backward()
    found = {"total": total, "d_queries": queries.grad, "d_candidates": candidates.grad, "d_temperature": temperature.grad}
    found |= {"lse": rows.lse, "positive": rows.positive, "num_negatives": rows.num_negatives}
    arguments.pop("row_weight", None)
    with torch.no_grad():
        found["loss"] = softmax_loss(*batch, **arguments, reduction="none")
    if positive_embeddings is not None:
        found["d_positive_embeddings"] = positive_embeddings.grad
    assert len(expected) >= 5
    # Scores are of size 1/temperature, and their rounding is: of f32 cosines, a few times 2^-24 / temperature.
    rounding = 2.0**-21 / float(temperature.detach())
    for name, wanted in expected.items():
        wanted, result = wanted.double(), found[name].detach().double()
        if name == "num_negatives":
            assert torch.equal(result, wanted)
            continue
        finite = wanted.isfinite()
        assert torch.equal(result.reshape(wanted.shape)[~finite], wanted[~finite]), name
        result, wanted = result.reshape(wanted.shape)[finite], wanted[finite]
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        if name in ("loss", "lse", "positive", "total"):
            scale = max(scale, 1.0)
        elif common.ON_DEVICE and queries.shape[1] == 1 and name.startswith("d_") and options["similarity"] == "cosine":
            # All cosines are 1 or -1: a gradient is the difference of two numbers of size 1 / |x|, rounded apart.
            scale = 1.0 / min(queries.detach().abs().min().item(), candidates.detach().abs().min().item())
        tolerance = rounding * scale
        assert (result - wanted).abs().le(tolerance + 1e-12).all(), f"{name}: {(result - wanted).abs().max()} > {tolerance}"
