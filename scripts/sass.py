"""Machine code as cuobjdump prints it: instructions with their control codes, loops, and the way through a loop's
plain iteration.

A control code is what the compiler tells the scheduler about an instruction, in bits 105 to 125 of its 128: how many
cycles later the warp's next instruction may issue, which of six scoreboards its result and its operands' reads count
on, and which it waits for. NVIDIA does not document them. The layout is that of Jia et al., "Dissecting the NVIDIA
Volta GPU architecture via microbenchmarking", 2018. `check_waits` tests it on each kernel.
"""
import heapq
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".cuda/nvidia/cu13/bin"
# Instructions whose results take unknown time: each has a scoreboard where something reads the result.
VARIABLE = ("MUFU", "LDS", "LDSM", "SHFL", "LDG")


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    stall: int = 1  # cycles until the warp's next instruction
    writes: int | None = None  # scoreboard that is released with the result
    reads: int | None = None  # scoreboard that is released when operands are read
    waits: tuple = ()  # scoreboards

    @property
    def conditional(self):
        return self.text.startswith("@")

    @property
    def name(self):
        """With its modifiers."""
        return self.text.split()[1 if self.conditional else 0]

    @property
    def opcode(self):
        return self.name.split(".")[0]

    @property
    def target(self):
        match = re.search(r"\bBRA(?:\.\S+)? .*?0x([0-9a-f]+)", self.text)
        return int(match[1], 16) if match else None

    @property
    def registers(self):
        return re.findall(r"\bU?R\d+\b", self.text)


def decode(address, text, high):
    """Of the upper 64 bits."""
    field = lambda bit, width: high >> (bit - 64) & (1 << width) - 1
    board = lambda bit: None if field(bit, 3) == 7 else field(bit, 3)
    waits = tuple(i for i in range(6) if field(116, 6) >> i & 1)
    return Instruction(address, text, field(105, 4), board(110), board(113), waits)


def disassemble(source, folder, architecture="sm_90a"):
    """The listing of a source's fat binary in `folder`, or compiled here."""
    if folder:
        return listing(Path(folder) / (source.stem + ".fatbin"), architecture)
    cubin = ROOT / "target" / f"{source.stem}.{architecture}.cubin"
    cubin.parent.mkdir(exist_ok=True)
    gencode = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
    flags = ["-cubin", "-std=c++17", "-O3", f"-I{ROOT / 'kernels'}", gencode]
    subprocess.run([TOOLS / "nvcc", *flags, "-o", cubin, source], check=True)
    return listing(cubin)


def listing(image, architecture=None, function=None):
    only = ["-arch", architecture] if architecture else []
    only += ["-fun", function] if function else []
    command = [TOOLS / "cuobjdump", *only, "-sass", image]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def functions(sass):
    """name -> its instructions"""
    found, code, first = {}, None, None
    for line in sass.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            code = found.setdefault(match[1], [])
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            first = int(match[1], 16), match[2]
        elif first and (match := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line)):
            code.append(decode(*first, int(match[1], 16)))
            first = None
    return found


def count(code, opcode):
    return sum(i.opcode == opcode for i in code)


def exponentials(code):
    return sum("MUFU.EX2" in i.text for i in code)


def flops(code):
    """Of a warpgroup's matmuls."""
    shapes = re.findall(r"HGMMA\.(\d+)x(\d+)x(\d+)", "\n".join(i.text for i in code))
    return sum(2 * int(m) * int(n) * int(k) for m, n, k in shapes)


def check_waits(code):
    """Results of unknown time that the next reader in line does not wait for, although no branch lies between: none,
    if control codes are read rightly."""
    unguarded, open_results = [], {}
    for i in code:
        if i.target is not None or i.opcode in ("BRA", "EXIT", "BSYNC", "RET", "WARPSYNC", "CALL"):
            open_results.clear()
        for board in i.waits:
            open_results = {register: b for register, b in open_results.items() if b[0] != board}
        unguarded += [(i, r) for r in i.registers if r in open_results and not opposite(open_results[r][1], i)]
        if i.opcode in VARIABLE and i.writes is not None:
            open_results[i.registers[0]] = i.writes, i
    return unguarded


def opposite(one, other):
    """Whether only one of the two can happen: their predicates are each other's negations."""
    predicates = [i.text.split()[0] for i in (one, other) if i.conditional]
    return len(predicates) == 2 and sorted(len(p) for p in predicates) == [3, 4] and predicates[0][-2:] == predicates[1][-2:]


def loops(code, opcode="HGMMA"):
    """The spans of backward branches that have matmuls, the shortest first."""
    spans = []
    for i in code:
        if i.target is not None and i.target < i.address:
            span = [j for j in code if i.target <= j.address <= i.address]
            if count(span, opcode):
                spans.append(span)
    return sorted(spans, key=len)


def main_loop(code, scores, opcode="HGMMA"):
    """The shortest one with a tile's exponentials."""
    return next(span for span in loops(code, opcode) if exponentials(span) >= scores)


def plain_walk(loop, work):
    """The shortest walk from the loop's first instruction to its branch back that does at least `work` (a Counter of
    names, as `kind_of` has them): what an iteration issues that has nothing special."""
    index = {i.address: at for at, i in enumerate(loop)}
    last = len(loop) - 1
    kinds = sorted(work)
    start = (0, (0,) * len(kinds))
    queue, before, done = [(0, *start)], {start: (0, None)}, set()
    while queue:
        length, at, did = heapq.heappop(queue)
        if (at, did) in done:
            continue
        done.add((at, did))
        after = did
        if (kind := kind_of(loop[at])) in kinds:
            k = kinds.index(kind)
            after = did[:k] + (min(did[k] + 1, work[kind]),) + did[k + 1 :]
        if at == last and all(a >= work[kind] for a, kind in zip(after, kinds)):
            return unwind(loop, before, (at, did))
        for to in successors(loop[at], at, index, len(loop)):
            state = (to, after)
            if (at, to) != (last, 0) and (state not in before or length + 1 < before[state][0]):
                before[state] = (length + 1, (at, did))
                heapq.heappush(queue, (length + 1, *state))
    raise ValueError(f"no way through the loop at {loop[0].address:#x} does {dict(work)}")


def kind_of(instruction):
    return "EX2" if "MUFU.EX2" in instruction.text else instruction.opcode


def successors(instruction, at, index, length):
    to = instruction.target
    ends = instruction.opcode in ("EXIT", "RET") and not instruction.conditional
    falls = not ends and (to is None or instruction.conditional or instruction.name != "BRA")
    if falls and at + 1 < length:
        yield at + 1
    if to in index:
        yield index[to]


def unwind(loop, before, state):
    walk = []
    while state is not None:
        walk.append(loop[state[0]])
        state = before[state][1]
    return walk[::-1]
