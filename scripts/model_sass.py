#!/usr/bin/env python3
"""A model of the machine code of Hopper's kernels: what an iteration of each main loop takes, and what binds it.

    scripts/model_sass.py [FOLDER] [--only TEXT]    needs scripts/install_nvcc.sh's nvcc and cuobjdump; no GPU

FOLDER is check_sass.py's. For each kernel it prints cycles of a multiprocessor for an iteration of both consumer
warpgroups:

* counts: issue slots, exponentials (MUFU), FMA, ALU, tensor cores, and shared memory (operands of wgmma, what the copy
  engine writes, loads of threads, shuffles, which share its pipe). The range of shared memory is that of the passes
  that a load takes.
* the model: both warpgroups issue their instructions in order (sass_pipeline.py), by the compiler's own control codes,
  with assumed times for what these leave open. Its least, median and most are those of every combination of passes of
  a load, choice between ready warps, and four offsets of the second warpgroup.
* all three relative to the floor, which is check_sass.py's: exponentials or matmuls alone, at the rate that tensor
  cores sustain. The model's clock falls from CLOCK to that rate's as the tensor cores are busier.

What it is: a way to rank versions of a kernel, and to see what binds them. What it is not: a measurement, or a bound
in either direction. No GPU has confirmed it. Left out: the producer's instructions, data that arrives late, caches,
the start and end of a unit of work, special tiles, bank conflicts beyond a load's passes, and the kernels before and
behind. No millisecond that follows from it may be quoted without the word "model".
"""
import argparse
import itertools
import re
from collections import Counter
from pathlib import Path
from statistics import median

import sass
from sass_pipeline import Scheduler, Step

SMS, CLOCK, TENSOR = 132, 1.755e9, 790e12
FLOPS = 4096  # of 16 bits, dense: a clock and multiprocessor
SCHEDULERS = 4
BYTES = 128  # of shared memory, a clock

# Assumptions: value, source. "Guide": CUDA C++ Programming Guide, table "Throughput of Native Arithmetic Instructions",
# capability 9.0, results a clock and multiprocessor; a warp's instruction keeps one of four schedulers' pipes busy for
# 32 / (results / 4) cycles.
ASSUMED = {
    "fma": (1, "Guide: 128 f32 additions, multiplications, multiply-adds"),
    "imad": (2, "Guide: 64 integer multiply-adds, on the same pipe"),
    "alu": (2, "Guide: 64 integer additions, comparisons, shifts, logic; a guess for F2FP (two numbers to 16 bits)"),
    "mufu": (8, "Guide: 16 exponentials"),
    "uniform": (2, "guess: the unit for values that a warp shares, R2UR and S2UR included"),
    "mufu latency": (22, "guess, between the 18 to 40 that are published for older architectures"),
    "shared latency": (29, "Luo et al., arXiv 2501.12084, from memory and not read again: about 29 cycles of an LDS"),
    "shuffle latency": (24, "guess"),
    "barrier latency": (22, "guess: SYNCS, a try at an mbarrier"),
    "other latency": (22, "guess: S2UR, S2R, votes"),
    "drain": (32, "guess: from a matmul's last cycle to its result in registers"),
    "passes": ((1, None), "LDS of 8 and 16 bytes a lane: one pass at best, as few different bytes are read; else one"
               " for each 4 bytes of a lane, as NVIDIA says of capability 7.x for lanes without equal neighbours:"
               " forums.developer.nvidia.com/t/unexpected-shared-memory-bank-conflict/77228"),
    "line": (None, "a warp goes on however many of its matmuls wait. FlashAttention-3's paper, ablation: 661 TFLOP/s"
             " with softmax beside the same warpgroup's matmuls, 570 without (from memory); a short line prevented it"),
    "greedy": ((True, False), "guess: which of two ready warps issues"),
    "phases": ((0, 0.25, 0.5, 0.75), "nothing fixes them; of the floor"),
    "jitter": (24, "guess: cycles, at most, that an iteration starts late. Copies and other warps are not punctual"),
    "operands": (None, "guess: shared memory serves loads before operands; a matmul's operands may come while its"
                 " predecessor runs; what the copy engine writes takes as many cycles as a read"),
}
value = {name: entry[0] for name, entry in ASSUMED.items()}

FMA = {"FFMA", "FMUL", "FADD", "FFMA2", "HFMA2", "HADD2", "HMUL2"}
SHARED = {"LDS", "STS", "LDSM", "STSM", "SHFL"}
ITERATIONS, WARM_UP = 14, 5


def wavefronts(i, passes):
    """Of a warp's instruction; `passes` None: as many as the registers of a lane."""
    if i.opcode == "SHFL":
        return 1
    if i.opcode in ("LDSM", "STSM"):
        return int(i.name[-1]) if i.name[-1].isdigit() else 1
    registers = next((int(bits) // 32 for bits in ("64", "128") if f".{bits}" in i.name), 1)
    return min(registers, passes or registers)


def matmul(i):
    """Cycles of the tensor cores and of shared memory. An operand A in registers costs the latter nothing."""
    m, n, k = map(int, re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", i.text).groups())
    from_shared = re.search(r"HGMMA\S+ R\d+, (U?R\d+|gdesc)", i.text)[1] == "gdesc"
    return 2 * m * n * k / FLOPS, 2 * k * (n + (m if from_shared else 0)) / BYTES


def step(i, passes):
    """What an instruction asks of the machine."""
    asks = dict(stall=i.stall, waits=i.waits, writes=i.writes, reads=i.reads)
    if i.opcode == "HGMMA":
        return Step(**asks, matmul=matmul(i), commits="gsb0" in i.text)
    if i.text.find("DEPBAR.LE gsb0") >= 0:
        return Step(**asks, groups=int(i.text.split(",")[-1], 16))
    if i.opcode in SHARED:
        latency = value["shuffle latency" if i.opcode == "SHFL" else "shared latency"]
        return Step(**asks, wavefronts=SCHEDULERS * wavefronts(i, passes), latency=latency)
    if i.opcode == "BAR" and (".ARV" in i.name or ".SYNC" in i.name):
        return Step(**asks, barrier="arrive" if ".ARV" in i.name else "sync")
    pipe, cycles = pipe_of(i)
    latency = {"MUFU": "mufu latency", "SYNCS": "barrier latency"}.get(i.opcode, "other latency")
    return Step(**asks, pipe=pipe, cycles=cycles, latency=value[latency])


def pipe_of(i):
    if i.opcode in FMA:
        return "fma", value["fma"]
    if i.opcode == "IMAD":
        return "fma", value["imad"]
    if i.opcode == "MUFU":
        return "mufu", value["mufu"]
    if i.opcode in ("BRA", "NOP", "DEPBAR", "WARPGROUP", "WARPSYNC", "SYNCS", "BSSY", "BSYNC", "BAR"):
        return "", 1
    uniform = i.opcode in ("R2UR", "S2UR", "S2R", "LDC") or i.opcode.startswith("U")
    return ("uniform", value["uniform"]) if uniform else ("alu", value["alu"])


def counts(walk, copied, passes, warpgroups=2):
    """Cycles of a multiprocessor that all warpgroups' iterations need of each part, if nothing waits. `copied` bytes
    of shared memory are written by the copy engine meanwhile."""
    pipes = Counter()
    for i in walk:
        pipe, cycles = pipe_of(i)
        pipes[pipe] += cycles
    matmuls = [matmul(i) for i in walk if i.opcode == "HGMMA"]
    loads = SCHEDULERS * sum(wavefronts(i, passes) for i in walk if i.opcode in SHARED)
    return {
        "issue": warpgroups * len(walk),
        "mufu": warpgroups * pipes["mufu"],
        "fma": warpgroups * pipes["fma"],
        "alu": warpgroups * pipes["alu"],
        "tensor": warpgroups * sum(tensor for tensor, _ in matmuls),
        "shared": warpgroups * (loads + sum(shared for _, shared in matmuls)) + copied / BYTES,
    }


def model(walk, copied, warpgroups=2):
    """Cycles of an iteration: the least, the median and the most of the combinations."""
    periods = []
    for passes in value["passes"]:
        steps = [step(i, passes) for i in walk]
        needed = counts(walk, copied, passes, warpgroups)
        background = copied / BYTES / max(needed.values())
        for greedy, phase in itertools.product(value["greedy"], value["phases"]):
            starts = [group * phase * max(needed.values()) for group in range(warpgroups)]
            options = dict(background=background, greedy=greedy, drain=value["drain"], jitter=value["jitter"])
            machine = Scheduler([steps] * warpgroups, starts, **options)
            periods.append(machine.period(ITERATIONS, WARM_UP))
    return min(periods), median(periods), max(periods)


def clock(tensor_share):
    return CLOCK + (TENSOR / (SMS * FLOPS) - CLOCK) * tensor_share


def binds(low, high, median):
    """What needs the most at each end of the passes, and whether the model's median is beyond both."""
    most = [max(needed, key=needed.get) for needed in (low, high)]
    names = most[0] if most[0] == most[1] else f"{most[0]} to {most[1]}"
    return names + (" + waits" if median > 1.05 * max(high.values()) else "")


class Kernel:
    """What an iteration of its main loop does, from its name: see StatisticsShape and OutputShape, wide_scores.cuh,
    wide_output_sm90a.cu."""

    def __init__(self, name, dim=None):
        self.name = name
        output = "expected" in name or "gradient" in name
        if "wide_output" in name:
            # A chunk of 64 streamed rows, for 256 columns; or two.
            self.dim, self.scores, self.matmuls, self.copied = 256, 0, 4, 64 * 2 * (128 + 256)
            self.floor_exponentials = 0
            return
        if "wide" in name:
            self.dim, self.scores, self.matmuls = dim, 128, dim // 8
            self.copied = 2 * dim * (256 + 128)
        else:
            chunks = int(re.search(r"_(\d)_", name)[1])
            block_y = 64 if output and chunks == 4 else 128
            self.dim = 64 * chunks
            self.scores = 128 if not output else block_y // 2
            self.matmuls = 4 * chunks + block_y // 16 if output else 8 * chunks
            self.copied = 2 * self.dim * block_y
        self.floor_exponentials = self.scores * value["mufu"] * 2

    def walk(self, code):
        loop = sass.main_loop(code, self.scores) if self.scores else sass.loops(code)[0]
        matmuls = self.matmuls if self.scores else sass.count(loop, "HGMMA")
        self.copied *= matmuls // self.matmuls
        return sass.plain_walk(loop, Counter(EX2=self.scores, HGMMA=matmuls))

    def line(self, code):
        walk = self.walk(code)
        low, high = (counts(walk, self.copied, passes) for passes in value["passes"])
        ends = model(walk, self.copied)
        # Seconds of an iteration, up to a factor: the floor's matmuls run at the sustained rate.
        floor = max(self.floor_exponentials / CLOCK, low["tensor"] / clock(1))
        ratios = [cycles / clock(low["tensor"] / cycles) / floor for cycles in ends]
        cells = [f"{low[part]:6.0f}" for part in ("issue", "mufu", "fma", "alu", "tensor")]
        shared = f"{low['shared']:5.0f}..{high['shared']:5.0f}"
        cells += [f"{low['shared']:6.0f} {high['shared']:5.0f} "] + [f"{cycles:6.0f}" for cycles in ends]
        cells += [f"{ratio:5.2f}" for ratio in ratios]
        name = self.name.removeprefix("stream_hopper_")
        return f"{name:24} {self.dim:4} {' '.join(cells)}  {binds(low, high, ends[1])}"


HEAD = (f"{'kernel':24} {'D':>4} {'issue':>6} {'mufu':>6} {'fma':>6} {'alu':>6} {'tensor':>6} {'shared memory':>13}"
        f" {'model: cycles':>20} {'of the floor':>17}  binds")


def kernels(folder):
    found = {}
    for source in sorted((sass.ROOT / "kernels").glob("**/*_sm90a.cu")):
        found |= sass.functions(sass.disassemble(source, folder))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--only", default="", help="kernels whose names contain this")
    given = parser.parse_args()
    print(HEAD)
    for name, code in kernels(given.folder).items():
        if given.only not in name:
            continue
        if unguarded := sass.check_waits(code):
            raise SystemExit(f"{name}: control codes are not what sass.py takes them for: {unguarded[0]}")
        for dim in (512, 1024) if "wide" in name and "wide_output" not in name else (None,):
            print(Kernel(name, dim).line(code), flush=True)


if __name__ == "__main__":
    main()
