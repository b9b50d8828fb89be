#!/usr/bin/env python3
"""Counts what the kernels of a step over a table do on the emulated device: instructions, and bytes of global memory.

Runs examples/count_table.rs with CUDA_EMULATOR_COUNT (emulator/README.md) and prints a markdown table for docs/benchmarks.md. Beside the
bytes that each kernel fetches and stores stand the least that its work needs: each named row once for each use of a pass, the lists that
name rows once, and its outputs. No time follows from any of this.

    scripts/count_tables.py                              8.0, float32
    scripts/count_tables.py --capability 90 --bf16

Needs what scripts/test_emulated.sh needs.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from count_instructions import build, run

GOAL = 1.3


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--per-row", type=int, default=256)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--candidates", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--capability", type=int, default=80)
    parser.add_argument("--profile", default="test", help="cargo's, of the example")
    return parser.parse_args()


def count(args, executable, driver, sizes, gradient):
    """What the example says, and of each kernel its launches, instructions, and bytes loaded, fetched and stored."""
    command = [executable, "--gradient", gradient]
    for option, value in sizes.items():
        command += [f"--{option}", str(value)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counts"
        libraries = f"{driver}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        environment = {"CUDA_EMULATOR_COUNT": str(file), "CUDA_EMULATOR_CC": str(args.capability), "LD_LIBRARY_PATH": libraries}
        said = run(command + (["--bf16"] if args.bf16 else []), {**os.environ, **environment})
        lines = [line.split("\t") for line in file.read_text().splitlines()[1:]]
    return json.loads(said), {kernel: [int(number) for number in numbers] for kernel, *numbers in lines}


def least(kernel, sizes, gradient, said, element):
    """Bytes that the work of a kernel needs; None where it is not a kernel of tables."""
    b, k, m, n, dim = (sizes[name] for name in ("queries", "per-row", "rows", "candidates", "dim"))
    row, out, uses, named = dim * element, dim * 4, said["uses"], said["named_rows"]
    backward = gradient != "none"
    if kernel.startswith("stream_own"):  # negatives and their list, queries; max, sum, masked, and expected negatives
        return b * k * (row + 4) + b * row + b * (12 + (out if backward else 0))
    if kernel.startswith("finish_table"):  # rows, of each use the query or the pool's partial gradient, entries; results
        return named * row + b * (k + 1) * row + n * out + uses * 8 + named * out
    return {
        "check_rows": uses * 8,
        "list_uses": uses * 12,
        "sort_count": 2 * uses * 8, "sort_scatter": 2 * 2 * uses * 8,  # two digits of a row below 2^16
        "count_rows": uses * 8, "place_rows": uses * 8 + named * 8,
    }.get(kernel)


def main():
    args = arguments()
    executable, driver = build(args.profile, "count_table")
    element = 2 if args.bf16 else 4
    common = {"queries": args.queries, "rows": args.rows, "dim": args.dim}
    shapes = {"own negatives": {**common, "per-row": args.per_row, "candidates": 0},
              "a pool by reference": {**common, "per-row": 0, "candidates": args.candidates}}
    print(f"B = {args.queries}, K = {args.per_row}, N = {args.candidates}, M = {args.rows}, D = {args.dim}, "
          f"{'bf16' if args.bf16 else 'f32'}, {args.capability / 10:.1f}; millions\n")
    print("| step | kernel | launches | instructions | loaded | fetched | stored | least | fetched and stored, times the least |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    past = []
    for name, sizes in shapes.items():
        for gradient in ("none", "dense", "row-sparse"):
            said, counts = count(args, executable, driver, sizes, gradient)
            for kernel, (launches, instructions, loaded, fetched, stored) in counts.items():
                need = least(kernel, sizes, gradient, said, element)
                times = (fetched + stored) / need if need else None
                cells = [f"{name}, {gradient}", f"`{kernel}`", str(launches)]
                cells += [f"{number / 1e6:.2f}" for number in (instructions, loaded, fetched, stored)]
                cells += [f"{need / 1e6:.2f}", f"{times:.2f}"] if need else ["", ""]
                print("| " + " | ".join(cells) + " |", flush=True)
                if times and times > GOAL:
                    past.append(f"{kernel} ({name}, {gradient}): {times:.2f}")
    print(f"\nPast {GOAL} times the least: {'; '.join(past) or 'none'}.")


if __name__ == "__main__":
    sys.exit(main())
