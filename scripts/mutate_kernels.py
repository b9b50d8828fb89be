#!/usr/bin/env python3
"""Puts faults of synchronisation into the kernels, one at a time, and looks which of them the race detector finds.

Each fault (kernel_faults.py) is a search and a replacement with a unique anchor in a copy of `kernels/`; the script
fails where an anchor is not there exactly once, so that whoever changes a kernel changes the fault with it. The files
that include it are compiled to PTX and given to the emulated driver in place of the ones in the test executable
(CUDA_EMULATOR_PTX); then the fault's tests run with the race detector, and without it. A fault counts as found where a
test fails. Compiled kernels are kept in target/mutants/.

    scripts/mutate_kernels.py                     everything, as a table for docs/emulator.md
    scripts/mutate_kernels.py --anchors           only looks whether each fault has its anchor
    scripts/mutate_kernels.py --only wide_output  faults whose names begin with that

Needs nvcc (NVCC, CUDA_HOME, PATH or .cuda/), cargo, and for each fault some seconds to a minute.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kernel_faults import FAULTS

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "target/mutants"


def mutated(text, fault):
    """The file with the fault in it; exits where an anchor is not there exactly once."""

    def once(anchor, where):
        if where.count(anchor) != 1:
            sys.exit(f"{fault.name}: {anchor!r} is in {fault.file} {where.count(anchor)} times, not once")

    edits = zip(fault.old, fault.new) if isinstance(fault.old, tuple) else [(fault.old, fault.new)]
    for old, new in edits:
        if fault.after:
            once(fault.after, text)
            at = text.find(old, text.index(fault.after))
        else:
            once(old, text)
            at = text.index(old)
        if at < 0:
            sys.exit(f"{fault.name}: {old!r} is not in {fault.file} behind {fault.after!r}")
        text = text[:at] + new + text[at + len(old) :]
    return text


def sources(kernels):
    """All files of the kernels: their names say in which of the folders they are."""
    return sorted(kernels.glob("*/*"))


def source(kernels, name):
    return next(path for path in sources(kernels) if path.name == name)


def users(kernels, name):
    """The .cu files that include a file, directly or not, or are it."""
    include = re.compile(r'#include "\w+/([^"]+)"')
    direct = {path.name: set(include.findall(path.read_text())) for path in sources(kernels)}
    reached = {name}
    while more := {file for file, included in direct.items() if included & reached} - reached:
        reached |= more
    return sorted(file for file in reached if file.endswith(".cu"))


def find_nvcc():
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates = [
        os.environ.get("NVCC"),
        *(home / "nvcc" for home in homes),
        shutil.which("nvcc"),
        ROOT / ".cuda/nvidia/cu13/bin/nvcc",
    ]
    for candidate in candidates:
        if candidate and Path(candidate).is_file():
            return str(candidate)
    sys.exit("no nvcc: scripts/install_nvcc.sh installs one")


def compile_ptx(nvcc, kernels, name):
    """The PTX of a file, kept for the next run under a name that depends on all that it may include."""
    texts = [path.read_bytes() for path in sources(kernels) if path.suffix != ".cu" or path.name == name]
    to = CACHE / f"{Path(name).stem}-{hashlib.sha256(b''.join(texts)).hexdigest()[:16]}.ptx"
    if not to.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        architecture = "compute_90a" if Path(name).stem.endswith("_sm90a") else "compute_80"
        target = f"arch={architecture},code={architecture}"
        unfinished = to.with_suffix(f".{os.getpid()}")
        command = [
            nvcc,
            "-ptx",
            "-std=c++17",
            "-O3",
            f"-I{kernels}",
            "-gencode",
            target,
            "-o",
            unfinished,
            source(kernels, name),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"nvcc refused {name}:\n{done.stderr}")
        unfinished.rename(to)
    return to


def ptx_of(nvcc, kernels, fault, text, folder):
    """A folder with the PTX of the kernels that the fault's tests launch, with the fault in them."""
    copy, ptx = folder / "kernels", folder / "ptx"
    shutil.copytree(kernels, copy)
    ptx.mkdir()
    source(copy, fault.file).write_text(text)
    names = [name for name in users(copy, fault.file) if launched(name, fault)]
    if not names:
        sys.exit(f"{fault.name}: no kernel of {fault.tests} uses {fault.file}")
    for name in names:
        shutil.copy(compile_ptx(nvcc, copy, name), ptx)
    return ptx


def launched(name, fault):
    """Whether the fault's tests launch kernels of this file."""
    if fault.capability < 90:
        return not name.endswith("_sm90a.cu")
    if fault.tests == "small::narrow":
        return name in ("statistics_sm90a.cu", "output_sm90a.cu")
    return name.startswith("wide_") or fault.tests != "small::wide"


def build(target):
    """The test executable without faults, and the folder of the emulated driver."""
    environment = {
        **os.environ,
        "CATALOG_SOFTMAX_CUDA_ARCHS": "compute_80,compute_90a",
        "CATALOG_SOFTMAX_REQUIRE_NVCC": "1",
    }
    command = ["cargo", "test", "--no-run", "--test", "gpu", "--message-format=json-render-diagnostics"]
    lines = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    executables = [m["executable"] for m in map(json.loads, lines) if m.get("executable")]
    environment = {**os.environ, "CARGO_TARGET_DIR": str(target)}
    driver = subprocess.run(
        [ROOT / "emulator/scripts/build.sh"], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return executables[-1], driver.stdout.strip()


class Runner:
    def __init__(self, executable, driver, timeout):
        self.executable, self.timeout = executable, timeout
        self.environment = {
            **os.environ,
            "LD_LIBRARY_PATH": f"{driver}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "REQUIRE_GPU": "1",
            # Two multiprocessors: blocks go round their rings in problems half as large.
            "CUDA_EMULATOR_SM": "2",
            "CUDA_EMULATOR_TIMEOUT": str(timeout),
        }

    def run(self, tests, capability, races, ptx=None):
        """How the tests end: None where all pass, else what was seen."""
        environment = {**self.environment, "CUDA_EMULATOR_CC": str(capability), "CUDA_EMULATOR_RACES": races}
        if ptx:
            environment["CUDA_EMULATOR_PTX"] = str(ptx)
        try:
            done = subprocess.run(
                [self.executable, tests, "--test-threads", "1"],
                env=environment,
                capture_output=True,
                text=True,
                timeout=3 * self.timeout,
            )
        except subprocess.TimeoutExpired:
            return "does not end"
        text = done.stdout + done.stderr
        if ptx and "cuda-emulator: kernels from" not in text:
            sys.exit(f"the changed kernels were not loaded:\n{text[-2000:]}")
        if not re.search(r"running [1-9]\d* test", text):
            sys.exit(f"no test is called {tests}")
        return None if done.returncode == 0 else kind(text)


def kind(text):
    """What made a test fail, in a word or two."""
    for pattern, words in [
        (r"race: CTA|race at", "race"),
        (r"missing fence\.proxy\.async", "missing fence"),
        (r"has exited|exited", "access to a block that has ended"),
        (r"still running|no warp can move|deadlock", "hang"),
        (r"arrivals? beyond|arrivals", "arrivals"),
        (r"in flight|on its way", "copy or matmul on its way"),
        (r"cuda-emulator: .*fault|ILLEGAL_ADDRESS|returned error", "other fault"),
    ]:
        if re.search(pattern, text):
            return words
    return "wrong result"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose names begin with this")
    parser.add_argument("--anchors", action="store_true", help="only look whether each fault has its anchor")
    parser.add_argument("--timeout", type=int, default=120, help="seconds after which a kernel counts as hung")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults tried at a time")
    parser.add_argument("--target", type=Path, default=ROOT / "target/emulator", help="where the emulator is built")
    arguments = parser.parse_args()
    kernels = ROOT / "kernels"
    chosen = [fault for fault in FAULTS if fault.name.startswith(arguments.only)]
    texts = [mutated(source(kernels, fault.file).read_text(), fault) for fault in chosen]
    if arguments.anchors:
        print(f"{len(chosen)} faults have their anchors")
        return
    runner = Runner(*build(arguments.target), arguments.timeout)
    for tests, capability, races in sorted({(fault.tests, fault.capability, fault.races) for fault in chosen}):
        found = runner.run(tests, capability, races)
        if found:
            sys.exit(f"{tests} fails without a fault at capability {capability}, races {races}: {found}")
    nvcc, missed = find_nvcc(), []

    def try_fault(fault, text):
        with tempfile.TemporaryDirectory() as folder:
            ptx = ptx_of(nvcc, kernels, fault, text, Path(folder))
            return [runner.run(fault.tests, fault.capability, races, ptx) for races in (fault.races, "0")]

    print("| # | fault | tests, capability | with the detector | without |\n|---|---|---|---|---|")
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for number, (fault, (found, plain)) in enumerate(zip(chosen, pool.map(try_fault, chosen, texts)), 1):
            mode = " by the letter" if fault.races == "2" else ""
            tests = f"`{fault.tests}`, {fault.capability / 10:.1f}"
            seen = found + mode if found else f"harmless: {fault.harmless}" if fault.harmless else "**missed**"
            print(f"| {number} | {fault.name} | {tests} | {seen} | {plain or 'missed'} |", flush=True)
            if not found and not fault.harmless:
                missed.append(fault.name)
    print(f"\n{len(missed)} of {len(chosen)} faults are missed with the detector.")
    if missed:
        sys.exit("missed: " + "; ".join(missed))


if __name__ == "__main__":
    main()
