#!/usr/bin/env python3
"""Machine code of Hopper's kernels: holds each to what it is built on, and counts its main loop. And of the portable
ones: whether f32 has tensor cores or plain multiply-adds on each architecture.

    scripts/check_sass.py [FOLDER]    needs scripts/install_nvcc.sh's nvcc and cuobjdump; no GPU

FOLDER has the fat binaries that a build with CATALOG_SOFTMAX_PTXAS_REPORT=FOLDER leaves. Without it this compiles the
kernels.

Fails where a kernel lacks HGMMA (the tensor cores' warpgroup matmul) or UTMALDG (the copy engine), touches local
memory, or has too long a main loop: the time that its instructions imply for B = 8192, N = 10^6 on an H200 is to be at
most 1.05 times the floor, with an output 1.25 times. That time is a bound from below, which knows no waits: of issue
slots, exponentials, matmuls, and shared memory where each load of a warp is one pass. The loop is taken to jump over
what it can and still have all its matmuls and exponentials: special tiles are rare. model_sass.py knows waits, and
does not fail.

Rows of more than 256 elements have a loop over chunks within the loop over tiles, and an output two kernels: the
panel's time is its scores' and the matmul's with it, and what adding to the output in memory takes at the memory's
rate.
"""
import re
import sys
from pathlib import Path

import model_sass
import sass
from sass import count, exponentials, flops

# H200: multiprocessors, clock in Hz, tensor cores' measured FLOP/s, exponentials a clock and multiprocessor, memory's
# bytes a second.
SMS, CLOCK, TENSOR, MUFU, MEMORY = model_sass.SMS, model_sass.CLOCK, model_sass.TENSOR, 16, 4.8e12
QUERIES, CANDIDATES = 8192, 1e6
SCORES = QUERIES * CANDIDATES
# Of rows of more than 256 elements: those that are counted; streamed rows of a panel of 8192 stationary ones
# (tiling.rs).
WIDE_DIMS, PANEL = (512, 1024), 4096


def bounds(walk, copied, scores, times=1):
    """Seconds that the instructions of `scores` scores of a thread imply at least, by what; `times` for all of them.
    `copied` bytes of shared memory are written meanwhile."""
    # Two consumer warpgroups of 128 threads.
    iterations = times * SCORES / (256 * scores) / SMS
    return {
        "issue": iterations * 2 * len(walk) / CLOCK,
        "exp": iterations * 256 * exponentials(walk) / MUFU / CLOCK,
        "shared": iterations * model_sass.counts(walk, copied, 1)["shared"] / CLOCK,
        "matmul": times * SCORES * flops(walk) / (128 * scores) / TENSOR,
    }


def missing(name, code):
    problems = [f"{name} has no {needed}" for needed in ("HGMMA", "UTMALDG") if not count(code, needed)]
    return problems + [f"{name} touches local memory ({bad})" for bad in ("LDL", "STL") if count(code, bad)]


def line(name, dim, path, scores, bound, by, output):
    """Prints a kernel's line, and says what is wrong with it."""
    floor = max(SCORES / (MUFU * SMS * CLOCK), SCORES * 2 * dim * (2 if output else 1) / TENSOR)
    counted = [len(path), exponentials(path), count(path, "FFMA")]
    print(f"{name:38} {dim:4} {counted[0] / scores:7.2f} {counted[1] / scores:6.2f} {counted[2] / scores:6.2f}"
          f" {count(path, 'HGMMA'):5} {1e3 * bound:8.2f} {by:>7} {1e3 * floor:8.2f} {bound / floor:6.2f}")
    limit = 1.25 if output else 1.05
    excess = f"{name}: the count implies {bound / floor:.2f} times the floor, more than {limit}"
    return [excess] if bound > limit * floor else []


def has_output(name):
    return "expected" in name or "gradient" in name


def report(name, code):
    kernel = model_sass.Kernel(name)
    walk = kernel.walk(code)
    times = bounds(walk, kernel.copied, kernel.scores)
    by = max(times, key=times.get)
    return line(name, kernel.dim, walk, kernel.scores, times[by], by, has_output(name))


def report_wide(name, code, outputs):
    """A kernel of wide rows' scores; where it has an output, with the kernel that multiplies its panel."""
    problems = []
    chunk = next(span for span in sass.loops(code) if not exponentials(span))
    # A branch within a group of matmuls divides it, and waits for "all but the last group" wait for more than was
    # meant.
    if sum("HGMMA" in i.text and "gsb0" in i.text for i in chunk) != 1:
        problems.append(f"{name}: the matmuls of a round over chunks are no single group")
    for dim in WIDE_DIMS:
        kernel = model_sass.Kernel(name, dim)
        walk = kernel.walk(code)
        times = bounds(walk, kernel.copied, kernel.scores)
        by = max(times, key=times.get)
        bound = times[by]
        if has_output(name):
            # Each chunk of 64 streamed rows has 32 scores of a thread, for 256 columns.
            product_name = next(other for other in outputs if other.split("_")[-1] == name.split("_")[-1])
            product = model_sass.Kernel(product_name)
            product_walk = product.walk(outputs[product_name])
            scores = 32 * count(product_walk, "HGMMA") // 4
            bound += max(bounds(product_walk, product.copied, scores, dim // 256).values())
            rows, streamed = (QUERIES, CANDIDATES) if "expected" in name else (CANDIDATES, QUERIES)
            bound += rows * dim * 4 * (2 * streamed / PANEL - 1) / MEMORY
        problems += line(name, dim, walk, kernel.scores, bound, by, has_output(name))
    return problems


# Architectures on which f32 has tensor cores (kernels/portable/fragments.cuh).
HAS_TENSOR_CORES_FOR_F32 = {"sm_80": True, "sm_86": False, "sm_89": False, "sm_90": True, "sm_100": True, "sm_120": False}


def wrong_products(folder):
    """Of a build for all architectures. A wrong condition for one would be slow there and show nowhere else."""
    problems = []
    for file, name in (("stream_sm80", "stream_statistics"), ("topk", "stream_topk")):
        for architecture, expected in HAS_TENSOR_CORES_FOR_F32.items():
            for element, has in (("f32", expected), ("tf32", True)):
                code = sass.listing(Path(folder) / f"{file}.fatbin", architecture, f"{name}_{element}")
                if ("HMMA" in code) != has or (not has and "FFMA" not in code):
                    wanted = "tensor cores" if has else "plain multiply-adds"
                    problems.append(f"{name}_{element} for {architecture} is not multiplied by {wanted}")
    return problems


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else None
    print(f"{'kernel':38} {'D':>4} {'instr.':>7} {'exp':>6} {'FFMA':>6} {'HGMMA':>5}"
          f" {'ms':>8} {'by':>7} {'floor':>8} {'ratio':>6}")
    problems = []
    kernels = model_sass.kernels(folder)
    assert kernels, "no kernel for Hopper was disassembled"
    outputs = {name: code for name, code in kernels.items() if "wide_output" in name}
    for name, code in kernels.items():
        problems += missing(name, code)
        if "wide" not in name:
            problems += report(name, code)
        elif "wide_output" not in name:
            problems += report_wide(name, code, outputs)
    if folder:
        problems += wrong_products(folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(bool(problems))


main()
