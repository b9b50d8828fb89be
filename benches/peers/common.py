"""What the peers' scripts share: inputs, their file for this crate's examples, and the built examples."""

import json
import math
import pathlib
import struct
import subprocess

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODES = ["statistics", "value_and_grad"]
TYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


def make_inputs(queries, candidates, dim, dtype=torch.float32):
    """Tensors of one step by the names of a golden batch."""
    rng = np.random.default_rng(1)
    b, n, d = queries, candidates, dim
    ids, log_q = zipf_ids(rng, n, n)
    embeddings = lambda rows: torch.from_numpy(rng.standard_normal((rows, d), dtype=np.float32)).to(dtype)
    return {
        "queries": embeddings(b),
        "candidates": embeddings(n),
        "positives": torch.from_numpy(rng.integers(0, n, b)),
        "candidate_ids": torch.from_numpy(ids),
        "log_q": torch.from_numpy(log_q.astype(np.float32)),
    }


def zipf_ids(rng, count, items):
    """Ids drawn with replacement, item k with a probability of about 1 / (k + 1), and their log-probabilities.

    Few items are popular and most are rare, as in a log of interactions, so that popular positives have many accidental hits.
    """
    ids = np.floor(np.exp(rng.random(count) * math.log(items + 1))).astype(np.int64) - 1
    ids = np.clip(ids, 0, items - 1)
    return ids, np.log(np.log1p(1 / (ids + 1)) / math.log(items + 1))


def write_golden(path, inputs, temperature):
    """A golden batch's file (safetensors): header length, JSON header, tensors."""
    options = {"similarity": "cosine", "temperature": repr(temperature), "loss": "softmax", "reduction": "mean"}
    write_safetensors(path, inputs, options)


def write_safetensors(path, tensors, metadata=None):
    header, start = {"__metadata__": metadata or {}}, 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def read_safetensors(path):
    """Tensors by name."""
    data = np.memmap(path, dtype=np.uint8, mode="c")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    header, start = json.loads(data[8 : 8 + length].tobytes()), 8 + length
    types = {name: dtype for dtype, name in TYPES.items()}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, end = entry["data_offsets"]
            tensor = torch.from_numpy(data[start + first : start + end]).view(types[entry["dtype"]])
            tensors[name] = tensor.reshape(entry["shape"])
    return tensors


def hits_by_sorting(ids, positives):
    """(row, candidate) of each candidate that has the id of the row's positive and is not the positive."""
    ids_sorted, order = torch.sort(ids)
    wanted = ids[positives]
    first = torch.searchsorted(ids_sorted, wanted)
    counts = torch.searchsorted(ids_sorted, wanted, right=True) - first
    rows = torch.repeat_interleave(torch.arange(len(positives), device=ids.device), counts)
    within = torch.arange(len(rows), device=ids.device) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    candidates = order[first[rows] + within]
    keep = candidates != positives[rows]
    return rows[keep], candidates[keep]


def build_examples(*names):
    """Paths of the built examples, by name."""
    command = ["cargo", "build", "--release", "--message-format=json-render-diagnostics"]
    command += [part for name in names for part in ("--example", name)]
    lines = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    messages = [message for message in map(json.loads, lines) if message.get("executable")]
    return {message["target"]["name"]: message["executable"] for message in messages}


def processor():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
