"""PyTorch eager beside this crate's CPU backend: same inputs, same machine, one run, alternating.

    python3 -m venv .venv-peers && .venv-peers/bin/pip install torch numpy
    .venv-peers/bin/python benches/peers/cpu.py

The loss is sampled softmax with cosine similarity, temperature, logQ on negatives and positive, and accidental hits
masked by id. Two eager versions of it run: `plain` as it is usually written, `tuned` with what a careful user saves
(one addmm for matmul and log_q, hits found by sorting instead of a B x N comparison). Both get huge pages and memory that
is kept between steps; with --default-memory PyTorch runs as it comes, and page faults in the B x N arrays take most of
its time. Inputs go to `examples/measure.rs` in a golden batch's file; losses must agree to 1e-5.
Prints a row of a markdown table for each mode, for docs/benchmarks.md.
"""

import argparse
import ctypes
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

LIBC = ctypes.CDLL(None)


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
    logits = torch.addmm(-t["log_q"], queries / tau, candidates.T)
    logits[hits_by_sorting(t["candidate_ids"], t["positives"])] = -math.inf
    return F.cross_entropy(logits, t["positives"])


class Torch:
    """One eager version in both modes."""

    def __init__(self, loss, inputs, args):
        self.loss, self.args = loss, args
        self.tensors = inputs

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
        for _ in range(self.args.iterations):
            start = time.perf_counter()
            self.step(mode)
            seconds.append(time.perf_counter() - start)
        for tensor in self.tensors.values():
            tensor.grad = None
        return total, seconds


class Ours:
    """examples/measure, a process of its own; its seconds are those of the calls alone."""

    def __init__(self, measure, file, args):
        self.command = [measure, "--inputs", file, "--iterations", args.iterations, "--threads", args.threads, "--json"]

    def round(self, mode):
        command = [str(part) for part in [*self.command, "--mode", mode]]
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        self.memory = report["peak_resident_bytes"] - report["input_bytes"]
        return report["total"], report["seconds"]


def status(field):
    """Bytes of a field of /proc/self/status."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def forget_peak():
    """Gives back what is free, starts the peak afresh and returns what is resident."""
    LIBC.malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def keep_freed_memory():
    """Tells glibc to keep what is freed for the next step, as PyTorch's own allocator does on a GPU."""
    m_trim_threshold, m_mmap_max = -1, -4
    LIBC.mallopt(m_mmap_max, 0)
    LIBC.mallopt(m_trim_threshold, -1)


def check_agreement(totals):
    reference = totals["plain"]
    for name, total in totals.items():
        assert abs(total - reference) <= 1e-5 * abs(reference), f"losses disagree: {totals}"


def compare(mode, implementations, args):
    """Seconds of every counted call, the implementations alternating; and PyTorch's peak memory beside its inputs."""
    seconds, memory = {name: [] for name in implementations}, {}
    for _ in range(args.rounds):
        totals = {}
        for name, implementation in implementations.items():
            time.sleep(0.3)  # let the other's idle threads stop spinning
            resident = forget_peak()
            totals[name], taken = implementation.round(mode)
            seconds[name] += taken
            memory[name] = getattr(implementation, "memory", status("VmHWM") - resident)
        check_agreement(totals)
    return seconds, memory, totals


def print_row(mode, seconds, memory, totals, args):
    cells = [datetime.date.today().isoformat(), f"{args.queries} x {args.candidates} x {args.dim}", mode]
    for name in seconds:
        median, best = statistics.median(seconds[name]), min(seconds[name])
        cells.append(f"{median * 1e3:.1f} ({best * 1e3:.1f})")
    ours = statistics.median(seconds["ours"])
    peers = [name for name in seconds if name != "ours"]
    cells.append(f"{min(statistics.median(seconds[name]) for name in peers) / ours:.2f}")
    cells.append(f"{min(min(seconds[name]) for name in peers) / min(seconds['ours']):.2f}")
    cells += [f"{memory[name] / 2**20:.0f}" for name in seconds]
    cells.append(f"{abs(totals['ours'] / totals['plain'] - 1):.0e}")
    print("| " + " | ".join(cells) + " |", flush=True)


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    if not args.default_memory:
        keep_freed_memory()
    inputs = make_inputs(args.queries, args.candidates, args.dim)
    measure = args.measure or build_examples("measure")["measure"]
    print(f"{processor()}, {args.threads} threads; PyTorch {torch.__version__} eager, f32; milliseconds are median")
    print(f"(best) of {args.rounds} alternating rounds of {args.iterations} calls; MiB are the peak beside the inputs,")
    print(f"outputs included; load average at the start {os.getloadavg()[0]:.1f}\n")
    print("| date | B x N x D | mode | PyTorch plain, ms | PyTorch tuned, ms | this crate, ms | faster than the better one:"
          " medians | best | plain, MiB | tuned, MiB | this crate, MiB | losses differ by |")
    print("|" + "---|" * 12)
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / "inputs.safetensors"
        write_golden(file, inputs, args.temperature)
        implementations = {
            "plain": Torch(plain, inputs, args),
            "tuned": Torch(tuned, inputs, args),
            "ours": Ours(measure, file, args),
        }
        for mode in MODES:
            print_row(mode, *compare(mode, implementations, args), args)


if __name__ == "__main__":
    main()
