"""PyTorch beside this crate's CPU backend: same inputs, same machine, one run, alternating.

    python3 -m venv .venv-peers && .venv-peers/bin/pip install torch numpy
    .venv-peers/bin/python benches/peers/cpu.py

The loss is sampled softmax with cosine similarity, temperature, logQ on negatives and positive, and accidental hits
masked by id. Two eager versions of it run: `plain` as it is usually written, `tuned` with what a careful user saves
(one addmm for matmul and log_q, hits found by sorting instead of a B x N comparison). `F.linear_cross_entropy` runs in
chunks of rows, with -log_q as its bias; it has no place for masks, so its step does less work than the others'. Its
automatic chunk is one row for catalogues, and takes seconds; --automatic shows it all the same.

PyTorch gets huge pages and memory that is kept between steps; with --default-memory it runs as it comes, and page faults
in the B x N arrays take most of its time. Inputs go to `examples/measure.rs` in a golden batch's file; losses must agree
to 1e-5, and PyTorch's to 0.1 with --dtype bfloat16, where it rounds logits. Prints a row of a markdown table for each mode
and implementation, for docs/benchmarks.md.
"""

import argparse
import datetime
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

# With --default-memory PyTorch runs as it comes.
DEFAULT_MEMORY = "--default-memory" in sys.argv
if not DEFAULT_MEMORY:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for tensors; read when torch is imported

import torch
import torch.nn.functional as F

from common import MODES, build_examples, hits_by_sorting, make_inputs, processor, write_golden
from memory import forget_peak, keep_freed_memory, status



# How far PyTorch's losses may be from those of the same numbers in float32, relative. It rounds logits of bfloat16 embeddings to
# bfloat16; `linear_cross_entropy` rounds its loss, too, and was 5% off at 4096 x 4096 x 64. Ours is held to float32's.
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.1}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--candidates", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="alternations between the implementations")
    parser.add_argument("--iterations", type=int, default=5, help="counted calls per implementation and round")
    parser.add_argument("--default-memory", action="store_true", help="no huge pages, freed memory goes back: as PyTorch comes")
    parser.add_argument("--chunks", type=int, nargs="*", default=[64, 256], help="rows in linear_cross_entropy's chunks")
    parser.add_argument("--automatic", action="store_true", help="linear_cross_entropy's automatic chunks too: one call a round")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32", help="element type of the embeddings")
    parser.add_argument("--compile", action="store_true", help="the plain version by torch.compile, too")
    parser.add_argument("--measure", help="the built examples/measure; built with cargo where not given")
    return parser.parse_args()


def plain(t, tau):
    queries, candidates = F.normalize(t["queries"], dim=1), F.normalize(t["candidates"], dim=1)
    logits = queries @ candidates.T / tau - t["log_q"]
    rows = torch.arange(len(queries))
    hits = t["candidate_ids"][t["positives"]][:, None] == t["candidate_ids"][None, :]
    hits[rows, t["positives"]] = False
    return F.cross_entropy(logits.masked_fill(hits, -math.inf), t["positives"])


def tuned(t, tau):
    queries, candidates = F.normalize(t["queries"], dim=1), F.normalize(t["candidates"], dim=1)
    logits = torch.addmm(-t["log_q"].to(queries.dtype), queries / tau, candidates.T)
    logits[hits_by_sorting(t["candidate_ids"], t["positives"])] = -math.inf
    return F.cross_entropy(logits, t["positives"])


def unmasked(t, tau):
    """What `chunked` computes, as it is usually written. Not timed."""
    queries, candidates = F.normalize(t["queries"], dim=1), F.normalize(t["candidates"], dim=1)
    return F.cross_entropy(queries @ candidates.T / tau - t["log_q"], t["positives"])


def chunked(options):
    def loss(t, tau):
        queries, candidates = F.normalize(t["queries"], dim=1), F.normalize(t["candidates"], dim=1)
        bias = -t["log_q"].to(queries.dtype)
        return F.linear_cross_entropy(queries / tau, candidates, t["positives"], linear_bias=bias, options=options)

    return loss


class Torch:
    """One version in both modes. `agrees_with`: the loss that its own is compared with."""

    def __init__(self, loss, inputs, args, agrees_with=plain, iterations=None):
        self.loss, self.args, self.agrees_with = loss, args, agrees_with
        self.tensors = inputs
        self.iterations = iterations or args.iterations

    def step(self, mode):
        learned = [self.tensors["queries"], self.tensors["candidates"]]
        if mode == "statistics":
            with torch.no_grad():
                return self.loss(self.tensors, self.args.temperature).item()
        for tensor in learned:
            tensor.requires_grad_(True)
            tensor.grad = None
        loss = self.loss(self.tensors, self.args.temperature)
        loss.backward()
        return loss.item()

    def round(self, mode):
        total = self.step(mode)
        seconds = []
        for _ in range(self.iterations):
            start = time.perf_counter()
            self.step(mode)
            seconds.append(time.perf_counter() - start)
        for tensor in self.tensors.values():
            tensor.grad = None
        return total, seconds


class Ours:
    """examples/measure, a process of its own; its seconds are those of the calls alone."""

    agrees_with = staticmethod(plain)

    def __init__(self, measure, file, args):
        self.command = [measure, "--inputs", file, "--iterations", args.iterations, "--threads", args.threads, "--json"]

    def round(self, mode):
        command = [str(part) for part in [*self.command, "--mode", mode]]
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        self.memory = report["peak_resident_bytes"] - report["input_bytes"]
        return report["total"], report["seconds"]


def check_agreement(totals, implementations, references, dtype):
    for name, total in totals.items():
        reference = references[implementations[name].agrees_with]
        tolerance = TOLERANCES["float32" if name == "ours" else dtype]
        assert abs(total - reference) <= tolerance * abs(reference), f"{name} has the loss {total}, not {reference}"


def compare(mode, implementations, references, args):
    """Seconds of every counted call, the implementations alternating; and the peak memory beside the inputs."""
    seconds, memory = {name: [] for name in implementations}, {}
    for _ in range(args.rounds):
        totals = {}
        for name, implementation in implementations.items():
            time.sleep(0.3)  # let the other's idle threads stop spinning
            resident = forget_peak()
            totals[name], taken = implementation.round(mode)
            seconds[name] += taken
            memory[name] = getattr(implementation, "memory", status("VmHWM") - resident)
        check_agreement(totals, implementations, references, args.dtype)
    return seconds, memory


def print_rows(mode, seconds, memory, args):
    """A row for each implementation. The ratio is of medians, and of best calls in brackets."""
    milliseconds = lambda name: (statistics.median(seconds[name]) * 1e3, min(seconds[name]) * 1e3)
    ours = milliseconds("ours")
    shape = f"{args.queries} x {args.candidates} x {args.dim}"
    for name in seconds:
        median, best = milliseconds(name)
        ratio = "" if name == "ours" else f"{median / ours[0]:.1f} ({best / ours[1]:.1f})"
        cells = [datetime.date.today().isoformat(), shape, mode, name, f"{median:.1f} ({best:.1f})", ratio]
        print("| " + " | ".join([*cells, f"{memory[name] / 2**20:.0f}"]) + " |", flush=True)


def build_implementations(inputs, file, args):
    options = torch.nn.LinearCrossEntropyOptions
    of_rows = lambda rows: chunked(options(batch_chunk_size=rows, chunking_method=None))
    implementations = {"plain": Torch(plain, inputs, args), "tuned": Torch(tuned, inputs, args)}
    if args.compile:
        implementations["plain, compiled"] = Torch(torch.compile(plain), inputs, args)
    for rows in args.chunks:
        name = f"linear_cross_entropy, chunks of {rows}"
        implementations[name] = Torch(of_rows(rows), inputs, args, agrees_with=unmasked)
    if args.automatic:
        automatic = Torch(chunked(options()), inputs, args, agrees_with=unmasked, iterations=1)
        implementations["linear_cross_entropy, automatic chunks"] = automatic
    measure = args.measure or build_examples("measure")["measure"]
    implementations["ours"] = Ours(measure, file, args)
    return implementations


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    if not args.default_memory:
        keep_freed_memory()
    inputs = make_inputs(args.queries, args.candidates, args.dim, getattr(torch, args.dtype))
    with torch.no_grad():
        exact = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        references = {loss: loss(exact, args.temperature).item() for loss in (plain, unmasked)}
    print(f"{processor()}, {args.threads} threads; PyTorch {torch.__version__}, {args.dtype}; milliseconds are median (best) of")
    print(f"{args.rounds} alternating rounds of {args.iterations} calls; MiB are the peak beside the inputs, outputs")
    memory = "as it comes" if args.default_memory else "with huge pages, kept between steps"
    print(f"included; PyTorch's memory {memory}; load average at the start {os.getloadavg()[0]:.1f}\n")
    print("| date | B x N x D | mode | implementation | ms | times ours | MiB |")
    print("|" + "---|" * 7)
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / "inputs.safetensors"
        write_golden(file, inputs, args.temperature)
        implementations = build_implementations(inputs, file, args)
        for mode in MODES:
            print_rows(mode, *compare(mode, implementations, references, args), args)


if __name__ == "__main__":
    main()
