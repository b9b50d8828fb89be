#!/usr/bin/env python3
"""Counts the instructions of a step on the emulated device, for each kind of ids: what masks cost where items are popular.

Runs examples/measure.rs with CUDA_EMULATOR_COUNT (emulator/README.md) and prints a markdown table for docs/benchmarks.md:
instructions of the streaming kernels and of all kernels of a step with gradients, and how many times those of unique ids
without histories they are. Counts are of PTX instructions; no time follows from them.

    scripts/count_instructions.py                                    every kind of ids, 8.0 and 9.0
    scripts/count_instructions.py --capabilities 90 --ids zipf       some of them
    scripts/count_instructions.py --kernels                          and each kernel's

Needs what scripts/test_emulated.sh needs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IDS = ["none", "unique", "zipf", "equal"]
GOAL = 1.3


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--candidates", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--ids", nargs="+", choices=IDS, default=IDS)
    parser.add_argument("--histories", type=int, nargs="+", default=[0, 50], help="excluded ids of a row")
    parser.add_argument("--kernels", action="store_true", help="print each kernel's counts, too")
    parser.add_argument("--profile", default="test", help="cargo's, of the example")
    return parser.parse_args()


def build(profile, example="measure"):
    """An example, with kernels as PTX, and the folder of the emulated driver."""
    environment = {**os.environ, "CATALOG_SOFTMAX_CUDA_ARCHS": "compute_80,compute_90a", "CATALOG_SOFTMAX_REQUIRE_NVCC": "1"}
    command = ["cargo", "build", "--profile", profile, "--example", example, "--message-format=json-render-diagnostics"]
    lines = run(command, environment).splitlines()
    executables = [message["executable"] for message in map(json.loads, lines) if message.get("executable")]
    driver = run([ROOT / "emulator/scripts/build.sh"], {**os.environ, "CARGO_TARGET_DIR": str(ROOT / "target/emulator")})
    return executables[-1], driver.strip()


def run(command, environment):
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def count(args, executable, driver, capability, ids, history):
    """Instructions of a step by kernel."""
    steps = 2  # one that measure.rs does not time, and one that it does
    command = [executable, "--backend", "cuda", "--mode", "value_and_grad", "--iterations", steps - 1]
    for option in ("queries", "candidates", "dim", "dtype"):
        command += [f"--{option}", getattr(args, option)]
    command += ["--ids", ids, "--history", history]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counts"
        libraries = f"{driver}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        environment = {"CUDA_EMULATOR_COUNT": str(file), "CUDA_EMULATOR_CC": str(capability), "LD_LIBRARY_PATH": libraries}
        run([str(part) for part in command], {**os.environ, **environment})
        lines = [line.split("\t") for line in file.read_text().splitlines()[1:]]
    return {kernel: (int(launches) / steps, int(instructions) / steps) for kernel, launches, instructions, *_ in lines}


def main():
    args = arguments()
    executable, driver = build(args.profile)
    print(f"B = {args.queries}, N = {args.candidates}, D = {args.dim}, {args.dtype}, cosine, loss and gradients; millions\n")
    print("| capability | ids | excluded ids a row | streaming kernels | times unique | all kernels | times unique |")
    print("|---|---|---|---|---|---|---|", flush=True)
    details, worst = [], 0.0
    for capability in args.capabilities:
        unique = totals(count(args, executable, driver, capability, "unique", 0))
        for history in args.histories:
            for ids in args.ids:
                if ids == "none" and history:
                    continue
                counts = count(args, executable, driver, capability, ids, history)
                cells = [f"{capability / 10:.1f}", ids, str(history)]
                for total, base in zip(totals(counts), unique):
                    cells += [f"{total / 1e6:.2f}", f"{total / base:.2f}"]
                print("| " + " | ".join(cells) + " |", flush=True)
                worst = max(worst, totals(counts)[0] / unique[0])
                details.append((capability, ids, history, counts))
    print(f"\nThe streaming kernels execute at most {worst:.2f} times what they do for unique ids (goal: {GOAL}).")
    if args.kernels:
        for capability, ids, history, counts in details:
            print(f"\n{capability / 10:.1f}, ids {ids}, {history} excluded ids a row")
            for kernel, (launches, instructions) in counts.items():
                print(f"{kernel:45} {launches:5.1f} launches {instructions:14.1f}")


def totals(counts):
    """Instructions of the streaming kernels, and of all."""
    streaming = sum(instructions for kernel, (_, instructions) in counts.items() if kernel.startswith("stream_"))
    return streaming, sum(instructions for _, instructions in counts.values())


if __name__ == "__main__":
    sys.exit(main())
