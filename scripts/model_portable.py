#!/usr/bin/env python3
"""A model of the machine code of the portable kernels: which share of the arithmetic's rate the main loop of each reaches
on a device, and what binds it.

    scripts/model_portable.py [CUBIN] [--only TEXT] [--device NAME] [--apart]    needs scripts/install_nvcc.sh's nvcc
                                                                                 and cuobjdump; no GPU

CUBIN is that of kernels/portable/stream_sm80.cu for the device (DEVICES); without it this compiles it. For each kernel
and D it prints the blocks that a multiprocessor holds (by registers and shared memory), then cycles of a multiprocessor
for one tile of each of these blocks:

* counts: issue slots, FMA, ALU, exponentials (MUFU), shared memory, tensor cores, each if nothing waits;
* the model: all warps of one scheduler issue the instructions of the loop's plain iteration in order, by the compiler's
  own control codes (sass.py), with assumed times for what these leave open. Blocks meet at their barriers, and copies
  arrive after a latency. Its least, median and most are those of every combination of latencies, choice between ready
  warps, and offsets between blocks.
* shares: cycles of the tensor cores over the model's most, median and least. The first is the pessimistic end. Kernels
  of plain multiply-adds (kernels/portable/plain.cuh) have none: there it is the cycles that the matmuls' multiply-adds
  take at the least. The last column is the median's cycles of one block.

What it is: a way to rank versions of a kernel, and to see what binds them. What it is not: a measurement, or a bound in
either direction. No GPU has confirmed it. Left out: bandwidth of the L2 cache and of memory, bank conflicts beyond a
load's passes, caches of instructions, the start and end of a block, special tiles, the last wave. The four schedulers
are taken to run in step, so whatever they share is four times as slow for the one that is simulated.
"""
import argparse
import heapq
import itertools
import random
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import sass

SCHEDULERS = 4
REGISTERS = 65536

# Assumptions: value, source. "Guide": CUDA C++ Programming Guide, table "Throughput of Native Arithmetic Instructions",
# results a clock and multiprocessor; a warp's instruction keeps one of four schedulers' pipes busy for
# 32 / (results / 4) cycles. What differs between devices is in DEVICES.
ASSUMED = {
    "alu": (2, "Guide: 64 integer additions, comparisons, shifts, logic, conversions, at 8.0 as at 8.6 and 8.9"),
    "imad": (2, "Guide: 64 integer multiply-adds, on the pipe of f32; at 8.6 and 8.9 half of that pipe has none"),
    "paired": (True, "An answer of NVIDIA's on its forum (\"Unexpected shared memory bank conflict\", 77228), for"
               " capability 7: an LDS.128 takes 2 passes in place of 4 where lanes n and n ^ 1, or n and n ^ 2, read the"
               " same address throughout, as plain.cuh's do. Assumed for 8.6 and later; --apart does without"),
    "mufu": (8, "Guide: 16 exponentials"),
    "uniform": (2, "guess: the unit for values that a warp shares"),
    "mufu latency": (22, "guess"),
    "shared latency": ((23, 33), "Abdelkhalik et al., arXiv 2208.11174, from memory and not read again: 23 cycles of an"
                       " LDS. LDSM with four matrices: a guess, 33"),
    "shuffle latency": (24, "guess"),
    "barrier latency": (20, "guess: from the last warp's arrival"),
    "other latency": (22, "guess: S2R, votes, B2R"),
    "global latency": ((300, 700), "guess: a copy from the L2 cache, or from memory"),
    "oldest": ((False, True), "guess: whether the warp that issued last goes on, or the oldest ready one does"),
    "phases": ((0, 0.3, 0.5), "nothing fixes the offset between blocks; of the tensor cores' time"),
    "jitter": (24, "guess: cycles, at most, that an iteration starts late"),
}
value = {name: entry[0] for name, entry in ASSUMED.items()}


@dataclass(frozen=True)
class Device:
    """Cycles that an instruction keeps its scheduler's pipe, and what a multiprocessor holds."""

    architecture: str
    tensor: int  # m16n8k16 of 16 bits (2048 multiply-adds), sums in f32
    tf32: int  # m16n8k8 of tf32 (1024)
    fma: int  # an instruction of f32
    shared_bytes: int  # each block takes 1 KiB more than it asks for
    warps: int


# A100's whitepaper: 1024 multiply-adds of 16 bits, 512 of tf32, a clock and multiprocessor; the compiler's control codes
# for sm_80 say 8, too. Guide: 64 of f32 at 8.0, 128 at 8.6, 8.9 and 12.0.
# The whitepapers of GA102 and AD102, from memory and not read again: GeForce has 256 of 16 bits with sums in f32 and 128 of
# tf32, dense (RTX 3090: 35.6 Tflop/s of tf32 as of f32; RTX 4090: 82.6 of both). CUTLASS's maintainers say the same of an
# RTX 3080, and that three tf32 products have no point there (NVIDIA/cutlass, discussion 390). Professional cards of the same
# capability have twice the tensor rates (RTX A6000: 77.4 of tf32, 38.7 of f32).
DEVICES = {
    "a100": Device("sm_80", tensor=8, tf32=8, fma=2, shared_bytes=164 << 10, warps=64),
    "geforce": Device("sm_86", tensor=32, tf32=32, fma=1, shared_bytes=100 << 10, warps=48),
    "professional": Device("sm_86", tensor=16, tf32=16, fma=1, shared_bytes=100 << 10, warps=48),
}
device = DEVICES["a100"]

FMA = {"FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2"}
NO_PIPE = {"BRA", "NOP", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "BSSY", "BSYNC", "BAR", "CALL", "EXIT"}
UNIFORM = {"S2R", "S2UR", "R2UR", "LDC", "B2R"}
ITERATIONS, WARM_UP = 9, 3


@dataclass(frozen=True, slots=True)
class Step:
    """An instruction, as the machine sees it."""

    stall: int
    waits: tuple
    writes: int | None
    reads: int | None
    pipe: str = ""
    cycles: int = 1
    latency: float = 0
    wavefronts: int = 0  # of shared memory, for all four schedulers
    copies: bool = False
    commits: bool = False
    groups: int | None = None  # waits until at most so many groups of copies are on their way
    barrier: bool = False


def never(i):
    return i.text.startswith("@!PT")


def wavefronts(i, paired=False):
    """Passes of a warp's instruction over shared memory: 128 bytes each, which it returns to registers. `paired`: the kernel's
    LDS.128 read one address for two neighbours. (Its few loads of columns' terms, which do not, are taken for such, too.)"""
    if never(i):
        return 0
    if i.opcode == "LDSM":
        return int(i.name[-1])
    if i.opcode == "LDGSTS":
        return 4 if ".128" in i.name else 1
    if paired and i.opcode == "LDS" and ".128" in i.name:
        return 2
    if i.opcode in ("LDS", "STS"):
        return next((int(bits) // 32 for bits in ("64", "128") if f".{bits}" in i.name), 1)
    return 1 if i.opcode == "SHFL" else 0


def pipe_of(i):
    if i.opcode == "HMMA":
        return "tensor", device.tf32 if "TF32" in i.name else device.tensor
    if i.opcode in FMA:
        return "fma", value["imad"] if i.opcode == "IMAD" else device.fma
    if i.opcode == "MUFU":
        return "mufu", value["mufu"]
    if i.opcode in NO_PIPE or wavefronts(i) or never(i) or i.opcode in ("LDG", "STG"):
        return "", 1
    if i.opcode in UNIFORM or i.opcode.startswith("U"):
        return "uniform", value["uniform"]
    return "alu", value["alu"]


def step(i, shared_latency, global_latency, paired=False):
    pipe, cycles = pipe_of(i)
    asks = dict(stall=max(i.stall, 1), waits=i.waits, writes=i.writes, reads=i.reads, pipe=pipe, cycles=cycles)
    if i.opcode == "LDGSTS":
        return Step(**asks, wavefronts=SCHEDULERS * wavefronts(i), latency=global_latency, copies=True)
    if i.opcode == "LDGDEPBAR":
        return Step(**asks, commits=True)
    if i.opcode == "DEPBAR":
        return Step(**asks, groups=int(i.text.split(",")[-1], 16))
    if i.opcode == "BAR":
        return Step(**asks, barrier=True, latency=value["barrier latency"])
    if i.opcode == "LDG":
        return Step(**asks, latency=global_latency)
    latency = {"MUFU": value["mufu latency"], "SHFL": value["shuffle latency"], "LDS": shared_latency,
               "LDSM": shared_latency, "STS": 0}.get(i.opcode, value["other latency"])
    return Step(**asks, wavefronts=SCHEDULERS * wavefronts(i, paired), latency=latency)


class Warp:
    def __init__(self, block, start):
        self.block, self.at, self.bound = block, 0, start
        self.boards = [0.0] * 6
        self.copied, self.groups = 0.0, []  # when the last copy is there; when each group's are
        self.ends = []  # of its iterations
        self.barriers = 0  # that it has come to


class Machine:
    """One scheduler of a multiprocessor, with the warps that it has of each block."""

    def __init__(self, steps, blocks, warps, offset, oldest):
        self.steps, self.oldest = steps, oldest
        self.warps = [Warp(block, block * offset) for block in range(blocks) for _ in range(warps)]
        self.of_block = [[w for w in self.warps if w.block == block] for block in range(blocks)]
        self.pipes = Counter()
        self.slot = self.shared = 0.0
        self.last = None
        self.chance = random.Random(0)

    def time_of(self, warp):
        """When the warp's next instruction may issue."""
        step = self.steps[warp.at]
        time = max(warp.bound, self.slot, self.pipes[step.pipe] if step.pipe else 0)
        if step.groups is not None and len(warp.groups) > step.groups:
            time = max(time, warp.groups[-1 - step.groups])
        return time

    def issue(self, warp, at):
        step = self.steps[warp.at]
        self.slot, self.last = at + 1, warp
        if step.pipe:
            self.pipes[step.pipe] = at + step.cycles
        read, result = at + step.cycles, at + step.cycles + step.latency
        if step.wavefronts:
            self.shared = read = max(self.shared, at) + step.wavefronts
            result = read + step.latency
        if step.copies:
            warp.copied = max(warp.copied, result)
        if step.commits:
            warp.groups = [*warp.groups[-8:], warp.copied]
        for board, time in ((step.writes, result), (step.reads, read)):
            if board is not None and not step.commits:
                warp.boards[board] = max(warp.boards[board], time)
        warp.at += 1
        if warp.at == len(self.steps):
            warp.at = 0
            warp.ends.append(at)
            at += self.chance.uniform(0, value["jitter"])
        warp.bound = at + step.stall
        if step.barrier:
            self.meet(warp, at + step.latency)
        else:
            self.wait(warp)

    def wait(self, warp):
        """For the scoreboards of its next instruction."""
        for board in self.steps[warp.at].waits:
            warp.bound = max(warp.bound, warp.boards[board])

    def meet(self, warp, released):
        """At a barrier: the last of the block's warps lets all go."""
        warp.barriers += 1
        group = self.of_block[warp.block]
        last = all(w.barriers >= warp.barriers for w in group)
        warp.arrived = max(warp.bound, released)
        warp.bound = float("inf")
        if last:
            together = max(w.arrived for w in group)
            for w in group:
                w.bound = together
                self.wait(w)

    def next(self):
        # Blocks drift apart freely, but none starves.
        first, chosen, last = float("inf"), None, min(len(warp.ends) for warp in self.warps)
        for warp in self.warps:
            if len(warp.ends) > last + ITERATIONS:
                continue
            time = self.time_of(warp)
            if time < first or time == first and warp is self.last and not self.oldest:
                first, chosen = time, warp
        self.issue(chosen, first)

    def period(self):
        """Cycles of an iteration of all warps, once some have passed."""
        while min(len(warp.ends) for warp in self.warps) < ITERATIONS:
            self.next()
        begin, end = (max(warp.ends[count - 1] for warp in self.warps) for count in (WARM_UP, ITERATIONS))
        done = sum(begin < at <= end for warp in self.warps for at in warp.ends)
        return (end - begin) * len(self.warps) / done


# ---- the way through a loop

# Plain kernels have loads of operands in place of HMMA.
KINDS = ("MATMUL", "EX2", "LDGSTS", "LDGDEPBAR", "VOTE")


def target(i):
    """CALL without a return is a jump."""
    match = re.search(r"\b(?:BRA|CALL\.REL\.NOINC)\S* .*?0x([0-9a-f]+)", i.text)
    return int(match[1], 16) if match else None


def basic_blocks(code):
    """address -> (instructions, addresses of what may follow)"""
    leaders = {code[0].address} | {t for i in code if (t := target(i)) is not None}
    leaders |= {after.address for i, after in zip(code, code[1:]) if target(i) is not None or i.opcode in ("EXIT", "RET")}
    found, block = {}, []
    for i, after in zip(code, [*code[1:], None]):
        block.append(i)
        if after is not None and after.address not in leaders:
            continue
        to = target(i)
        plain = i.name == "BRA" or i.name.startswith("CALL")
        ends = not i.conditional and (i.opcode in ("EXIT", "RET") or (to is not None and plain))
        follow = [to] if to is not None else []
        found[block[0].address] = block, follow + ([after.address] if after and not ends else [])
        block = []
    return found


def is_plain(code):
    return not any(i.opcode == "HMMA" for i in code)


def kind(i, plain):
    if "MUFU.EX2" in i.text:
        return "EX2"
    return "MATMUL" if (i.name == "LDS.128" if plain else i.opcode == "HMMA") else i.opcode


def kind_counts(block, plain):
    kinds = Counter(kind(i, plain) for i in block)
    return tuple(kinds[name] for name in KINDS)


def walk(code, work):
    """The shortest way from the head of the loop over tiles back to it that does exactly `work` (by KINDS): what an
    iteration issues that has nothing special. Parts of the loop lie behind its branch back."""
    blocks, plain = basic_blocks(code), is_plain(code)
    counts = {address: kind_counts(block, plain) for address, (block, _) in blocks.items()}
    backward = [(target(i), i.address) for i in code if i.name == "BRA" and target(i) is not None and target(i) < i.address]
    matmuls = [i.address for i in code if kind(i, plain) == "MATMUL"]
    head = min(to for to, at in backward if any(to <= address <= at for address in matmuls))
    # The head must be a block's start: it is a target.
    zero = (0,) * len(KINDS)
    queue, before, done = [(0, head, zero)], {(head, zero): None}, set()
    while queue:
        length, address, did = heapq.heappop(queue)
        if (address, did) in done:
            continue
        done.add((address, did))
        block, follow = blocks[address]
        after = tuple(a + b for a, b in zip(did, counts[address]))
        if any(a > b for a, b in zip(after, work)):
            continue
        for to in follow:
            if to == head:
                if after == tuple(work):
                    return unwind(blocks, before, (address, did))
                continue
            if (to, after) not in done and to in blocks:
                if (to, after) not in before or before[to, after][0] > length + len(block):
                    before[to, after] = length + len(block), (address, did)
                    heapq.heappush(queue, (length + len(block), to, after))
    raise ValueError(f"no way through the loop at {head:#x} does {dict(zip(KINDS, work))}")


def unwind(blocks, before, state):
    path = []
    while state is not None:
        path.append(blocks[state[0]][0])
        entry = before[state]
        state = entry[1] if entry else None
    return [i for block in path[::-1] for i in block]


# ---- the kernels

class Kernel:
    """What a tile of its main loop does, from its name and D: stream_sm80.cu, tile_stream.cuh, tiling.rs."""

    CHUNK = 128
    BLOCK_X, BLOCK_Y = 128, 64

    def __init__(self, name, dim, online, code, registers):
        self.name, self.dim, self.registers = name, dim, registers
        element = name.split("_")[-1]
        size = 4 if element in ("f32", "tf32") else 2
        products = 3 if element == "f32" else 1
        self.chunks = -(-dim * size // self.CHUNK)
        output = re.search(r"_(\d)_", name)
        self.output_chunks = int(output[1]) if output else 0
        self.slabs = slabs(name)
        self.threads = 2 * self.BLOCK_X // self.slabs
        # A stage of the ring holds a whole tile, once for both matmuls, or chunks come one by one.
        holds_tile = self.output_chunks in (1, 2)
        self.stage_chunks = self.output_chunks if holds_tile else 1
        copies = self.chunks + (0 if holds_tile else self.output_chunks)
        self.plain = is_plain(code)
        hmma = self.slabs * 32 * products * (self.chunks + self.output_chunks)
        # A warp with an output of two slabs works on half of a tile's rows at a time.
        halves = 2 if holds_tile and self.slabs == 2 else 1
        # Of a chunk: X for each half and Y for its scores, Y for its output. Of a tile: columns' terms, two columns at a time.
        loads = 8 * (2 * self.slabs * halves + 16) * self.chunks + 2 * 64 * self.output_chunks + (16 if output else 8)
        # A lane has 2 rows of each slab: by 16 columns and 32 elements of a chunk, by 8 columns and 64 rows of an output's.
        multiply_adds = self.slabs * 2 * (16 * 32 * self.chunks + 8 * 64 * self.output_chunks)
        # No row's maximum moves: a vote on whether one does is all that a running maximum takes.
        votes = halves if online else 0
        units = self.BLOCK_Y * 8 // self.threads
        cycles_of_hmma = device.tf32 if size == 4 else device.tensor
        self.arithmetic = multiply_adds * device.fma if self.plain else hmma * cycles_of_hmma
        self.paired = self.plain and value["paired"]
        self.label = name.removeprefix("stream_") + ("" if online or output else " bounded")
        copied = units * copies
        if not is_resident(self):
            copied += self.BLOCK_X * 8 // self.threads * self.chunks
        matmul, exponentials = loads if self.plain else hmma, self.slabs * 32
        self.walk = walk(code, (matmul, exponentials, copied, 1 if holds_tile else copies, votes))

    def blocks(self):
        """Of a multiprocessor."""
        shared = shared_bytes(self)
        registers = -(-self.registers // 8) * 8 * self.threads
        return max(1, min(REGISTERS // registers, device.shared_bytes // (shared + 1024), device.warps * 32 // self.threads))

    def warps(self):
        """Of a scheduler, all blocks'."""
        return self.blocks() * self.threads // 32 // SCHEDULERS

    def counts(self):
        """Cycles of a scheduler for all its warps, of shared memory for all schedulers' warps."""
        pipes = Counter()
        for i in self.walk:
            pipe, cycles = pipe_of(i)
            pipes[pipe] += cycles
        warps = self.warps()
        return {
            "issue": warps * len(self.walk),
            "fma": warps * pipes["fma"],
            "alu": warps * pipes["alu"],
            "mufu": warps * pipes["mufu"],
            "shared": warps * SCHEDULERS * sum(wavefronts(i, self.paired) for i in self.walk),
            "matmul": warps * self.arithmetic,
        }

    def model(self):
        periods = []
        for shared_latency, global_latency in zip(value["shared latency"], value["global latency"]):
            steps = [step(i, shared_latency, global_latency, self.paired) for i in self.walk]
            for oldest, phase in itertools.product(value["oldest"], value["phases"]):
                machine = Machine(steps, self.blocks(), self.warps() // self.blocks(), phase * self.arithmetic, oldest)
                periods.append(machine.period())
        return min(periods), median(periods), max(periods)

    def line(self):
        counted, ends = self.counts(), self.model()
        cells = [f"{counted[part]:6.0f}" for part in ("issue", "fma", "alu", "mufu", "shared", "matmul")]
        cells += [f"{cycles:6.0f}" for cycles in ends]
        cells += [f"{100 * counted['matmul'] / cycles:4.0f}%" for cycles in reversed(ends)]
        binds = max(counted, key=counted.get) + (" + waits" if ends[1] > 1.05 * max(counted.values()) else "")
        return (f"{self.label:24} {self.dim:4} {self.registers:4} {self.blocks():2} {self.warps():2} "
                f"{' '.join(cells)} {ends[1] / self.blocks():8.0f}  {binds}")


def slabs(name):
    """Slabs of 16 stationary rows of a warp: SLABS in stream_sm80.cu."""
    return 1 if re.search("_4_|_2_t?f32|detail|paired|topk", name) else 2


def shared_bytes(kernel):
    """tiling.rs: X as a whole where that fits, else its ring."""
    columns, rows = (28, 12) if kernel.output_chunks else (8, 0)
    storage = 2 * kernel.BLOCK_Y * (kernel.stage_chunks * kernel.CHUNK + columns) + kernel.BLOCK_X * rows
    resident, ring = (storage + chunks * kernel.BLOCK_X * kernel.CHUNK for chunks in (kernel.chunks, 2))
    return resident if resident + 1024 <= device.shared_bytes else ring


def is_resident(kernel):
    return shared_bytes(kernel) >= kernel.chunks * kernel.BLOCK_X * kernel.CHUNK


HEAD = (f"{'kernel':24} {'D':>4} {'regs':>4} {'blk':>2} {'w':>1} {'issue':>6} {'fma':>6} {'alu':>6} {'mufu':>6}"
        f" {'shared':>6} {'matmul':>6} {'model: cycles':>20} {'of its rate':>17} {'a block':>8}  binds")


def registers(cubin):
    """name -> registers of a thread"""
    command = [sass.TOOLS / "cuobjdump", "-res-usage", cubin]
    text = subprocess.run(command, check=True, capture_output=True, text=True)
    return {name: int(count) for name, count in re.findall(r"Function (\w+):\s+REG:(\d+)", text.stdout + text.stderr)}


def cases(functions, only):
    for name in functions:
        element = name.split("_")[-1]
        if only not in name or element == "bf16" or not re.search("statistics|expected|gradient", name):
            continue
        output = re.search(r"_(\d)_", name)
        wide = 32 if element in ("f32", "tf32") else 64
        if output:
            chunks = int(output[1])
            # The widest kernels have slices of wider rows' outputs.
            yield from ((name, dim, True) for dim in ((chunks * wide, 2 * chunks * wide) if chunks == 4 else (chunks * wide,)))
        else:
            for dim in (32, 64, 128, 256):
                yield from ((name, dim, online) for online in (False, True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cubin", nargs="?", type=Path)
    parser.add_argument("--only", default="", help="kernels whose names contain this")
    parser.add_argument("--device", default="a100", choices=DEVICES)
    parser.add_argument("--apart", action="store_true", help="no load serves two neighbouring lanes at once")
    given = parser.parse_args()
    global device
    device = DEVICES[given.device]
    value["paired"] = not given.apart
    cubin = given.cubin
    if not cubin:
        source = sass.ROOT / "kernels/portable/stream_sm80.cu"
        sass.disassemble(source, None, device.architecture)
        cubin = sass.ROOT / f"target/stream_sm80.{device.architecture}.cubin"
    functions, used = sass.functions(sass.listing(cubin)), registers(cubin)
    print(HEAD)
    for name, dim, online in cases(functions, given.only):
        if unguarded := sass.check_waits(functions[name]):
            raise SystemExit(f"{name}: control codes are not what sass.py takes them for: {unguarded[0]}")
        print(Kernel(name, dim, online, functions[name], used[name]).line(), flush=True)


if __name__ == "__main__":
    main()
