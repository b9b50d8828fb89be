#!/usr/bin/env python3
"""Machine code of Hopper's kernels: holds each to what it is built on, and counts its main loop.

    scripts/check_sass.py [FOLDER]    needs scripts/install_nvcc.sh's nvcc and cuobjdump; no GPU

FOLDER has the fat binaries that a build with CATALOG_SOFTMAX_PTXAS_REPORT=FOLDER leaves. Without it this compiles the kernels.

Fails where a kernel lacks HGMMA (the tensor cores' warpgroup matmul) or UTMALDG (the copy engine), touches local memory, or has too
long a main loop: the time that its instructions imply for B = 8192, N = 10^6 on an H200 is to be at most 1.2 times the floor, with an
output 1.25 times. That time is a bound from below, which knows no waits. The loop is taken to jump over what it can and still have
all its matmuls and exponentials: special tiles are rare.

Rows of more than 256 elements have a loop over chunks within the loop over tiles, and an output two kernels: the panel's time is its
scores' and the matmul's with it, and what adding to the output in memory takes at the memory's rate.
"""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".cuda/nvidia/cu13/bin"
# H200: multiprocessors, clock in Hz, tensor cores' measured FLOP/s, exponentials a clock and multiprocessor.
SMS, CLOCK, TENSOR, MUFU, MEMORY = 132, 1.755e9, 790e12, 16, 4.8e12
QUERIES, CANDIDATES = 8192, 1e6
SCORES = QUERIES * CANDIDATES
# Of rows of more than 256 elements: those that are counted; chunks that b's matmuls are behind (wide_scores.cuh); streamed rows of a
# panel of 8192 stationary ones (tiling.rs).
WIDE_DIMS, LAG, PANEL = (512, 1024), 2, 4096


def disassemble(source, folder):
    if folder:
        return sass(Path(folder) / (source.stem + ".fatbin"))
    cubin = ROOT / "target" / (source.stem + ".cubin")
    cubin.parent.mkdir(exist_ok=True)
    flags = ["-cubin", "-std=c++17", "-O3", f"-I{ROOT / 'kernels'}", "-gencode=arch=compute_90a,code=sm_90a"]
    subprocess.run([TOOLS / "nvcc", *flags, "-o", cubin, source], check=True)
    return sass(cubin)


def sass(image):
    return subprocess.run([TOOLS / "cuobjdump", "-sass", image], check=True, capture_output=True, text=True).stdout


def functions(sass):
    """name -> [(address, instruction)]"""
    found, code = {}, None
    for line in sass.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            code = found.setdefault(match[1], [])
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            code.append((int(match[1], 16), match[2]))
    return found


def opcode(instruction):
    return instruction.split()[1 if instruction.startswith("@") else 0].split(".")[0]


def target(instruction):
    match = re.search(r"\bBRA(?:\.\S+)? .*?0x([0-9a-f]+)", instruction)
    return int(match[1], 16) if match else None


def count(code, name):
    return sum(opcode(text) == name for _, text in code)


def exponentials(code):
    return sum("MUFU.EX2" in text for _, text in code)


def loops(code):
    """The spans of backward branches that have matmuls, the shortest first."""
    spans = []
    for address, text in code:
        to = target(text)
        if to is not None and to < address:
            span = [(a, t) for a, t in code if to <= a <= address]
            if count(span, "HGMMA"):
                spans.append(span)
    return sorted(spans, key=len)


def main_loop(code, scores):
    """The shortest one with a tile's exponentials."""
    return next(span for span in loops(code) if exponentials(span) >= scores)


def plain_path(loop, scores):
    """The loop's instructions in a tile with nothing special."""
    path, at, spare = [], 0, exponentials(loop) - scores
    addresses = [address for address, _ in loop]
    while at < len(loop):
        address, text = loop[at]
        path.append(loop[at])
        to = target(text)
        if to in addresses and to > address:
            skipped = loop[at + 1 : addresses.index(to)]
            if not text.startswith("@") or (not count(skipped, "HGMMA") and exponentials(skipped) <= spare):
                spare -= exponentials(skipped)
                at = addresses.index(to)
                continue
        at += 1
    return path


def flops(path):
    """Of a warpgroup."""
    shapes = re.findall(r"HGMMA\.(\d+)x(\d+)x(\d+)", "\n".join(text for _, text in path))
    return sum(2 * int(m) * int(n) * int(k) for m, n, k in shapes)


def bounds(path, scores, times=1):
    """Seconds that the instructions of `scores` scores of a thread imply at least, by what; `times` for all of them."""
    issue = len(path) / scores
    return {
        "issue": times * SCORES / 32 * issue / (4 * SMS * CLOCK),
        "exp": times * SCORES * exponentials(path) / scores / (MUFU * SMS * CLOCK),
        "matmul": times * SCORES * flops(path) / (128 * scores) / TENSOR,
    }


def missing(name, code):
    problems = [f"{name} has no {needed}" for needed in ("HGMMA", "UTMALDG") if not count(code, needed)]
    return problems + [f"{name} touches local memory ({bad})" for bad in ("LDL", "STL") if count(code, bad)]


def line(name, dim, path, scores, bound, by, output):
    """Prints a kernel's line, and says what is wrong with it."""
    floor = max(SCORES / (MUFU * SMS * CLOCK), SCORES * 2 * dim * (2 if output else 1) / TENSOR)
    print(f"{name:38} {dim:4} {len(path) / scores:7.2f} {exponentials(path) / scores:6.2f} {count(path, 'FFMA') / scores:6.2f}"
          f" {count(path, 'HGMMA'):5} {1e3 * bound:8.2f} {by:>7} {1e3 * floor:8.2f} {bound / floor:6.2f}")
    limit = 1.25 if output else 1.2
    return [f"{name}: the count implies {bound / floor:.2f} times the floor, more than {limit}"] if bound > limit * floor else []


def has_output(name):
    return "expected" in name or "gradient" in name


def report(name, code):
    chunks, output = int(re.search(r"_(\d)_", name)[1]), has_output(name)
    # A thread's scores of an iteration (StatisticsShape, OutputShape).
    scores = 128 if not output else 32 if chunks == 4 else 64
    path = plain_path(main_loop(code, scores), scores)
    times = bounds(path, scores)
    by = max(times, key=times.get)
    return line(name, 64 * chunks, path, scores, times[by], by, output)


def report_wide(name, code, outputs):
    """A kernel of wide rows' scores; where it has an output, with the kernel that multiplies its panel."""
    scores, problems, output = 128, [], has_output(name)
    tile = main_loop(code, scores)
    chunk = next(span for span in loops(tile) if not exponentials(span))
    # A branch within a group of matmuls divides it, and waits for "all but the last group" wait for more than was meant.
    if sum("HGMMA" in text and "gsb0" in text for _, text in chunk) != 1:
        problems.append(f"{name}: the matmuls of a round over chunks are no single group")
    for dim in WIDE_DIMS:
        path = plain_path(tile, scores) + chunk * (dim // 64 - LAG - 1)
        times = bounds(path, scores)
        by = max(times, key=times.get)
        bound = times[by]
        if output:
            # An iteration: 64 x 128 pairs of a warpgroup, for 256 columns.
            product = outputs[name.split("_")[-1]]
            product_path = plain_path(loops(product)[0], 0)
            bound += max(bounds(product_path, 64, dim // 256).values())
            rows, streamed = (QUERIES, CANDIDATES) if "expected" in name else (CANDIDATES, QUERIES)
            bound += rows * dim * 4 * (2 * streamed / PANEL - 1) / MEMORY
        problems += line(name, dim, path, scores, bound, by, output)
    return problems


def main():
    print(f"{'kernel':38} {'D':>4} {'instr.':>7} {'exp':>6} {'FFMA':>6} {'HGMMA':>5} {'ms':>8} {'by':>7} {'floor':>8} {'ratio':>6}")
    problems = []
    kernels = {}
    folder = sys.argv[1] if len(sys.argv) > 1 else None
    for source in sorted((ROOT / "kernels").glob("**/*_sm90a.cu")):
        kernels |= functions(disassemble(source, folder))
    assert kernels, "no kernel for Hopper was disassembled"
    outputs = {name.split("_")[-1]: code for name, code in kernels.items() if "wide_output" in name}
    for name, code in kernels.items():
        problems += missing(name, code)
        if "wide" not in name:
            problems += report(name, code)
        elif "wide_output" not in name:
            problems += report_wide(name, code, outputs)
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(bool(problems))


main()
