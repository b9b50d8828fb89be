"""The same loss by each peer: sampled softmax with cosine similarity, temperature, logQ, accidental hits masked by id.

What a peer's interface has no place for is left out, and `left_out` says so: its step then does less work than the others',
and its loss is compared with PyTorch's own without that. All normalise queries and candidates inside the timed step, with
the chain rule in the backward, as a training loop must; this crate does it in its kernels.
"""

import math

import torch
import torch.nn.functional as F

from common import hits_by_sorting


class Peer:
    """A step on tensors that are on the device. `left_out`: names of what the loss lacks."""

    left_out = ()
    note = ""

    def __init__(self, tensors, temperature, logits_bytes):
        self.tensors, self.tau, self.logits_bytes = tensors, temperature, logits_bytes
        self.learned = [tensors["queries"], tensors["candidates"]]

    def forget_gradients(self):
        for tensor in self.learned:
            tensor.grad = None

    def step(self, gradients):
        """The loss; gradients end in `.grad` of queries and candidates."""
        self.forget_gradients()
        for tensor in self.learned:
            tensor.requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            return self.loss(gradients).detach()

    def units(self):
        return [F.normalize(tensor, dim=1) for tensor in self.learned]

    def loss(self, gradients):
        loss = self.fused(*self.units())
        if gradients:
            loss.backward()
        return loss


class Eager(Peer):
    """Matmul and cross-entropy on as many rows at a time as `logits_bytes` has room for in f32."""

    note = "rows in chunks; gradients of candidates are summed over chunks in their own type"

    def __init__(self, *args, log_q=True, masks=True):
        super().__init__(*args)
        self.with_log_q, self.with_masks = log_q, masks

    def loss(self, gradients):
        queries, candidates = self.units()
        # Leaves of each chunk's graph, so that the candidates are normalised once.
        q, c = (unit.detach().requires_grad_(gradients) for unit in (queries, candidates))
        total = torch.zeros((), device=q.device)
        hits = self.hits()
        for first in range(0, len(q), self.rows()):
            loss = self.chunk(q, c, slice(first, min(first + self.rows(), len(q))), hits) / len(q)
            if gradients:
                loss.backward()
            total += loss.detach()
        if gradients:
            torch.autograd.backward([queries, candidates], [q.grad, c.grad])
        return total

    def rows(self):
        """A power of two, so that chunks are of one size for usual batches."""
        fit = max(1, self.logits_bytes // (4 * len(self.tensors["candidates"])))
        return min(1 << (fit.bit_length() - 1), len(self.tensors["queries"]))

    def hits(self):
        return hits_by_sorting(self.tensors["candidate_ids"], self.tensors["positives"]) if self.with_masks else None

    def chunk(self, q, c, rows, hits):
        return F.cross_entropy(self.logits(q, c, rows, hits), self.tensors["positives"][rows], reduction="sum")

    def logits(self, q, c, rows, hits):
        logits = (q[rows] / self.tau) @ c.T
        # log_q is f32, and so the logits are from here on.
        logits = logits - self.tensors["log_q"] if self.with_log_q else logits.float()
        if self.with_masks:
            row, column = hits
            mine = (row >= rows.start) & (row < rows.stop)
            logits[row[mine] - rows.start, column[mine]] = -math.inf
        return logits

    def results(self):
        """Everything that errors are taken of, by the names of a golden batch's results."""
        self.step(True)
        q, c = (unit.detach() for unit in self.units())
        logits = self.logits(q, c, slice(0, len(q)), self.hits()).detach()
        positives = self.tensors["positives"]
        loss = F.cross_entropy(logits, positives, reduction="none")
        logits[torch.arange(len(q)), positives] = -math.inf
        gradients = {f"d_{name}": self.tensors[name].grad for name in ("queries", "candidates")}
        return {"loss": loss, "lse": logits.logsumexp(1), **gradients}


def compiled_chunk(q, c, log_q, ids, positive_ids, positives, tau):
    logits = (q / tau) @ c.T - log_q
    # A comparison for each pair: the compiler fuses it into the passes that it makes anyway.
    hits = (ids == positive_ids[:, None]) & (torch.arange(len(c), device=c.device) != positives[:, None])
    return F.cross_entropy(logits.masked_fill(hits, -math.inf), positives, reduction="sum")


class Compiled(Eager):
    """The same rows at a time, by torch.compile."""

    def __init__(self, *args):
        super().__init__(*args)
        self.compiled = torch.compile(compiled_chunk, dynamic=False)

    def hits(self):
        return None

    def chunk(self, q, c, rows, _hits):
        positives, ids = self.tensors["positives"], self.tensors["candidate_ids"]
        of_rows = positives[rows]
        return self.compiled(q[rows], c, self.tensors["log_q"], ids, ids[of_rows], of_rows, self.tau)


class Cce(Peer):
    """Apple's cut-cross-entropy. By default it leaves out gradients of probabilities below a threshold."""

    left_out = ("log_q", "masks")
    note = "drops gradients of probabilities below eps / 32 of the type (filter_eps): 2^-12 for bf16"
    options = {}

    def fused(self, queries, candidates):
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(queries / self.tau, candidates, self.tensors["positives"], **self.options)


class CceUnfiltered(Cce):
    note = "filter_eps=None"
    options = {"filter_eps": None}


class Liger(Peer):
    """Liger's fused linear cross-entropy: matmuls and Triton on chunks of rows, gradients in the forward."""

    left_out = ("masks",)
    note = "log_q as a bias in the embeddings' type"

    def fused(self, queries, candidates):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        bias = -self.tensors["log_q"].to(queries.dtype)
        scaled = queries / self.tau
        return liger_fused_linear_cross_entropy(scaled, candidates, self.tensors["positives"], bias, **self.options())

    def options(self):
        return {}


class LigerLargeChunks(Liger):
    """Its default chunk holds as many logits as queries have elements: one row at N / D > B."""

    note = Liger.note + "; chunk_mem_const raised to chunks of --logits-bytes"

    def options(self):
        size = self.tensors["queries"].element_size() * self.tensors["queries"].numel()
        return {"chunk_mem_const": max(1, self.logits_bytes // size)}


PEERS = {
    "eager": Eager,
    "compiled": Compiled,
    "cce": Cce,
    "cce_unfiltered": CceUnfiltered,
    "liger": Liger,
    "liger_large_chunks": LigerLargeChunks,
}
