"""faiss's flat index beside this crate's exact top-K: same inputs, same machine, one run, alternating.

    python3 -m venv .venv-peers && .venv-peers/bin/pip install faiss-cpu numpy safetensors
    .venv-peers/bin/python benches/peers/topk.py

Both are exact, by inner product, in f32: `faiss.IndexFlatIP` and `examples/measure.rs --mode topk`, which gets the inputs
in a golden batch's file. The sums of the scores that they find must agree to 1e-5. faiss runs as it comes, and with its matmul by
BLAS, which this version of it takes for 128,000 queries and more unless told otherwise.
Prints a row of a markdown table for each K, for docs/benchmarks.md.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

import faiss
import numpy as np
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--candidates", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--k", type=int, nargs="+", default=[100])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="alternations between the two")
    parser.add_argument("--iterations", type=int, default=3, help="counted calls of each in a round")
    parser.add_argument("--measure", help="the built examples/measure; built with cargo where not given")
    return parser.parse_args()


def write_golden(path, queries, candidates):
    inputs = {"queries": queries, "candidates": candidates, "positives": np.zeros(len(queries), dtype=np.int64)}
    options = {"similarity": "dot", "temperature": "1", "loss": "softmax", "reduction": "mean"}
    save_file(inputs, path, metadata=options)


class Faiss:
    def __init__(self, index, queries, blas_from, args):
        self.index, self.queries, self.blas_from, self.iterations = index, queries, blas_from, args.iterations

    def round(self, k):
        faiss.cvar.distance_compute_blas_threshold = self.blas_from
        scores, _ = self.index.search(self.queries, k)
        seconds = []
        for _ in range(self.iterations):
            start = time.perf_counter()
            self.index.search(self.queries, k)
            seconds.append(time.perf_counter() - start)
        return float(scores.sum(dtype=np.float64)), seconds


class Ours:
    """examples/measure, a process of its own; its seconds are those of the calls alone."""

    def __init__(self, measure, file, args):
        self.command = [measure, "--mode", "topk", "--inputs", file, "--threads", args.threads, "--json"]
        self.command += ["--iterations", args.iterations]

    def round(self, k):
        command = [str(part) for part in [*self.command, "--k", k]]
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return report["total"], report["seconds"]


def build_measure():
    command = ["cargo", "build", "--release", "--example", "measure", "--message-format=json-render-diagnostics"]
    lines = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    executables = [json.loads(line).get("executable") for line in lines]
    return next(path for path in executables if path)


def compare(k, implementations, rounds):
    """Seconds of every counted call, the implementations alternating."""
    seconds = {name: [] for name in implementations}
    for _ in range(rounds):
        totals = {}
        for name, implementation in implementations.items():
            time.sleep(0.3)  # let the other's idle threads stop spinning
            totals[name], taken = implementation.round(k)
            seconds[name] += taken
        for total in totals.values():
            assert abs(total - totals["faiss"]) <= 1e-5 * abs(totals["faiss"]), f"scores disagree: {totals}"
    return seconds


def print_row(k, seconds, args):
    cells = [datetime.date.today().isoformat(), f"{args.queries} x {args.candidates} x {args.dim}", str(k)]
    for taken in seconds.values():
        cells.append(f"{statistics.median(taken) * 1e3:.0f} ({min(taken) * 1e3:.0f})")
    for statistic in (statistics.median, min):
        faiss_best = min(statistic(seconds["faiss"]), statistic(seconds["faiss, BLAS"]))
        cells.append(f"{faiss_best / statistic(seconds['ours']):.2f}")
    print("| " + " | ".join(cells) + " |", flush=True)


def processor():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main():
    args = arguments()
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((args.queries, args.dim), dtype=np.float32)
    candidates = rng.standard_normal((args.candidates, args.dim), dtype=np.float32)
    measure = args.measure or build_measure()
    print(f"{processor()}, {args.threads} threads; faiss-cpu {faiss.__version__} ({faiss.get_compile_options().strip()}),")
    print(f"IndexFlatIP, f32; milliseconds are median (best) of {args.rounds} alternating rounds of {args.iterations} calls;")
    print(f"load average at the start {os.getloadavg()[0]:.1f}\n")
    print("| date | B x N x D | K | faiss, ms | faiss by BLAS, ms | this crate, ms | faster than the better one: medians | best |")
    print("|" + "---|" * 8)
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / "inputs.safetensors"
        write_golden(file, queries, candidates)
        faiss.omp_set_num_threads(args.threads)
        index = faiss.IndexFlatIP(args.dim)
        index.add(candidates)
        implementations = {
            "faiss": Faiss(index, queries, faiss.cvar.distance_compute_blas_threshold, args),
            "faiss, BLAS": Faiss(index, queries, 1, args),
            "ours": Ours(measure, file, args),
        }
        for k in args.k:
            print_row(k, compare(k, implementations, args.rounds), args)


if __name__ == "__main__":
    main()
