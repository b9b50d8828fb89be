#!/usr/bin/env python3
"""model_portable.py's model on FlashAttention-2's machine code for sm_80, whose speed on an A100 is published: is it
plausible at all?

    pip download --no-deps --only-binary :all: --python-version 3.10 --platform manylinux2014_x86_64 xformers==0.0.23
    unzip xformers-*.whl xformers/_C_flashattention.so
    cuobjdump -arch sm_80 -xelf all xformers/_C_flashattention.so
    scripts/model_attention_sm80.py _C_flashattention.{30,18,26}.sm_80.cubin

Each cubin holds the forward kernels of one head dimension in f16 (64, 128, 256). The one for an A100 without masks is
taken. Its loop is that of a tile of keys: its scores, a softmax, and its output.

Published: Dao, "FlashAttention-2" (arXiv 2307.08691): 50 to 73% of the A100's rate over all its cases, the latter
forward at D = 128. The measurements include what the model leaves out, as the start and end of each block of queries.
"""
import itertools
import re
import sys
from collections import Counter
from statistics import median

import model_portable
import sass
from model_portable import SCHEDULERS, Machine, pipe_of, step, value, wavefronts

# Of csrc/flash_attn/src/flash_fwd_launch_template.h: queries and keys of a tile, and warps of a block.
TILES = {64: (128, 128, 4), 128: (128, 64, 4), 256: (128, 64, 8)}


def kernel(image):
    """Head dimension, machine code and registers of the plain forward kernel."""
    functions, used = sass.functions(sass.listing(image)), model_portable.registers(image)
    for name, code in functions.items():
        dim, queries, keys, warps = map(int, re.search(r"traitsILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E", name).groups())
        # Dropout, causal, local, whole tiles of keys (known up to D = 128 only), whole rows, scores returned.
        flags = f"EELb0ELb0ELb0ELb{int(dim <= 128)}ELb1ELb0EEv16Flash_fwd_params"
        if TILES[dim] == (queries, keys, warps) and name.endswith(flags):
            return dim, code, used[name]
    raise SystemExit(f"{image} has no plain forward kernel")


def blocks(dim, registers):
    queries, keys, warps = TILES[dim]
    shared = 2 * dim * (queries + 2 * keys)
    return min(model_portable.REGISTERS // (registers + 7 & ~7) // (32 * warps), model_portable.SHARED_BYTES // (shared + 1024))


def main_loop(code, dim):
    """The way through an iteration that has a whole tile's matmuls, exponentials and copies."""
    queries, keys, warps = TILES[dim]
    rows = queries // warps
    hmma = 2 * rows * keys * dim // (16 * 8 * 16)
    # Two rows of 8 of a slab each have a factor for what came before.
    exponentials = (rows * keys + 2 * rows // 16 * 32) // 32
    units = 2 * keys * dim * 2 // 16 // (32 * warps)
    return model_portable.walk(code, (hmma, exponentials, units, 2)), hmma


HEAD = (f"{'D':>4} {'blk':>3} {'w':>1} {'issue':>6} {'fma':>6} {'alu':>6} {'mufu':>6} {'shared':>6} {'tensor':>6}"
        f" {'model: cycles':>20} {'of tensor rate':>17}")


def main():
    print(HEAD)
    for image in sys.argv[1:]:
        dim, code, registers = kernel(image)
        assert not sass.check_waits(code), f"{image}: control codes are not what sass.py takes them for"
        way, hmma = main_loop(code, dim)
        count = blocks(dim, registers)
        warps = TILES[dim][2] // SCHEDULERS
        pipes = Counter()
        for i in way:
            pipe, cycles = pipe_of(i)
            pipes[pipe] += cycles
        ends = []
        for shared, copies in zip(value["shared latency"], value["global latency"]):
            steps = [step(i, shared, copies) for i in way]
            for oldest, phase in itertools.product(value["oldest"], value["phases"]):
                ends.append(Machine(steps, count, warps, phase * hmma * value["tensor"], oldest).period())
        ends = min(ends), median(ends), max(ends)
        all_warps = count * warps
        counts = [len(way), *(pipes[pipe] for pipe in ("fma", "alu", "mufu")), SCHEDULERS * sum(map(wavefronts, way))]
        cells = [f"{all_warps * number:6.0f}" for number in (*counts, pipes["tensor"])]
        cells += [f"{cycles:6.0f}" for cycles in ends]
        cells += [f"{100 * all_warps * pipes['tensor'] / cycles:4.0f}%" for cycles in reversed(ends)]
        print(f"{dim:4} {count:3} {all_warps:1} {' '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
