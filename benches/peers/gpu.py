"""PyTorch eager, torch.compile, cut-cross-entropy, Liger and this crate on one GPU: same inputs, one run.

    scripts/peers_gpu.sh [--dims 64 128 256 512 1024] [--out FOLDER] ...      gets what is missing, then runs this

Each implementation runs in a process of its own, on inputs read from one file for each shape, so that one that fails takes
none along; it is recorded with its reason, and the run goes on. Prints a markdown table; writes peers.json (every figure,
versions, clocks) and peers.svg to --out. With no GPU, tiny shapes run on the CPU: PyTorch eager and this crate, whose losses
must agree, and the others are recorded as in need of a GPU. Exits with 1 where those losses disagree.

--errors compares results in place of times: errors of PyTorch and of this crate against this crate's float64 reference.
`losses.py` says what each implementation computes.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import torch

import report
from common import MODES, build_examples, make_inputs, read_safetensors, write_golden, write_safetensors
from losses import PEERS, Eager

ON_GPU = torch.cuda.is_available()
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
WARM_UP = 2  # tuners and compilers run in the first; the second has their results


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=8192 if ON_GPU else 64)
    parser.add_argument("--candidates", type=int, default=1_000_000 if ON_GPU else 2_000)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256, 512, 1024] if ON_GPU else [16, 32])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if ON_GPU else "f32")
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--iterations", type=int, default=10, help="timed calls")
    parser.add_argument("--peers", nargs="+", choices=[*PEERS, "ours"], default=[*PEERS, "ours"])
    parser.add_argument("--logits-bytes", type=int, default=4 << 30, help="chunks' size where logits are materialised")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one implementation and shape")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    parser.add_argument("--bin", type=pathlib.Path, help="folder of the built examples; built with cargo where not given")
    parser.add_argument("--errors", action="store_true", help="errors in place of times; holds B x N float32")
    parser.add_argument("--worker", nargs=2, metavar=("PEER", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- a worker: one implementation on one shape, a line of JSON for each result


def worker(args):
    name, file = args.worker
    tensors = {name: tensor.to("cuda" if ON_GPU else "cpu") for name, tensor in read_safetensors(file).items()}
    make = lambda kind, **options: kind(tensors, args.temperature, args.logits_bytes, **options)
    peer = make(PEERS[name])
    for mode in MODES:
        gradients = mode == "value_and_grad"
        try:
            total = [peer.step(gradients) for _ in range(WARM_UP)][-1].item()
            print_result({"mode": mode, "total": total, **measure(peer, gradients, args.iterations)})
        except Exception as error:  # whatever a peer may raise, compilers' errors among them
            print_result({"mode": mode, "failed": reason(str(error), type(error).__name__)})
    if name == "eager":
        for without in ["masks"], ["log_q", "masks"]:
            variant = make(Eager, log_q="log_q" not in without, masks="masks" not in without)
            print_result({"without": without, "total": variant.step(False).item()})


def measure(peer, gradients, iterations):
    """Seconds of each call; on a GPU the peak of memory beside what was held before, gradients included."""
    peer.forget_gradients()
    if not ON_GPU:
        seconds = []
        for _ in range(iterations):
            start = time.perf_counter()
            peer.step(gradients)
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(iterations)]
    for start, end in events:
        start.record()
        peer.step(gradients)
        end.record()
    torch.cuda.synchronize()
    seconds = [start.elapsed_time(end) * 1e-3 for start, end in events]
    return {"seconds": seconds, "memory_bytes": torch.cuda.max_memory_allocated() - held}


def print_result(result):
    print("result " + json.dumps(result), flush=True)


def reason(text, default="no message"):
    """One line of an error's text."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{default}: {lines[0]}"[:300] if lines else default


# ---- the parent: every implementation on every shape


def run_peer(name, file, args):
    """Results of a worker, and for each mode that is missing, why."""
    if not ON_GPU and name != "eager":
        return [{"mode": mode, "failed": "needs a GPU"} for mode in MODES]
    options = ["temperature", "iterations", "logits_bytes"]
    command = [sys.executable, __file__, "--worker", name, file]
    command += [part for option in options for part in ("--" + option.replace("_", "-"), str(getattr(args, option)))]
    output, error = run(command, args.timeout)
    results = [json.loads(line.removeprefix("result ")) for line in output.splitlines() if line.startswith("result ")]
    done = {result.get("mode") for result in results}
    return results + [{"mode": mode, "failed": error or "no result"} for mode in MODES if mode not in done]


def run_ours(file, args):
    results = []
    for mode in MODES:
        command = [args.examples["measure"], "--backend", "cuda" if ON_GPU else "cpu", "--inputs", file, "--mode", mode]
        output, error = run([*command, "--iterations", str(args.iterations), "--json"], args.timeout)
        if error:
            results.append({"mode": mode, "failed": error})
            continue
        measured = json.loads(output)
        result = {"mode": mode, "total": measured["total"], "seconds": measured["seconds"]}
        if ON_GPU:
            result["memory_bytes"] = measured["workspace_bytes"] + measured["output_bytes"]
        results.append(result)
    return results


def run(command, timeout):
    """What a command prints, and why it failed where it did."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode(), f"took more than {timeout:.0f} s"
    last = "\n".join(done.stderr.strip().splitlines()[-1:])
    return done.stdout, None if done.returncode == 0 else reason(last, f"exit code {done.returncode}")


def compare(args, folder):
    """Results of all implementations on all shapes, each with its shape. The files have what is done so far."""
    about, results = report.machine(args), []
    for dim in args.dims:
        file = folder / "inputs.safetensors"
        write_golden(file, make_inputs(args.queries, args.candidates, dim, DTYPES[args.dtype]), args.temperature)
        of_shape = []
        for name in args.peers:
            found = run_ours(file, args) if name == "ours" else run_peer(name, file, args)
            left_out = list(PEERS[name].left_out) if name != "ours" else []
            of_shape += [{"implementation": name, "without": left_out, "dim": dim, **result} for result in found]
            report.progress([result for result in of_shape if result["implementation"] == name])
        report.add_differences(of_shape)
        results += of_shape
        file.unlink()
        report.write_json(args.out / "peers.json", args, about, results)
        report.draw(args.out / "peers.svg", args, results)
    report.print_table(args, about, results)
    return results


def errors(args, folder):
    """Prints the errors of PyTorch's and this crate's results against this crate's reference in float64."""
    for dim in args.dims:
        files = {name: folder / f"{name}.safetensors" for name in ("inputs", "reference", "ours", "PyTorch eager")}
        inputs = make_inputs(args.queries, args.candidates, dim, DTYPES[args.dtype])
        write_golden(files["inputs"], inputs, args.temperature)
        for name, backend in [("reference", "reference"), ("ours", "cuda" if ON_GPU else "cpu")]:
            command = [args.examples["replay"], files["inputs"], "--backend", backend, "--out", files[name]]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        tensors = {name: tensor.to("cuda" if ON_GPU else "cpu") for name, tensor in inputs.items()}
        eager = Eager(tensors, args.temperature, args.logits_bytes).results()
        write_safetensors(files["PyTorch eager"], {name: tensor.float().cpu() for name, tensor in eager.items()})
        found = {name: read_safetensors(files[name]) for name in ("PyTorch eager", "ours")}
        report.print_errors(args, dim, read_safetensors(files["reference"]), found)


def main():
    args = arguments()
    if args.worker:
        return worker(args)
    if args.bin:
        args.examples = {name: args.bin / name for name in ("measure", "replay")}
    else:
        args.examples = build_examples("measure", "replay")
    with tempfile.TemporaryDirectory() as folder:
        if args.errors:
            return errors(args, pathlib.Path(folder))
        args.out.mkdir(parents=True, exist_ok=True)
        return report.disagreement(args, compare(args, pathlib.Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
