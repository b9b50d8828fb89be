"""What gpu.py says: the machine, a table, a picture, errors."""

import datetime
import importlib.metadata
import json
import statistics
import subprocess

import torch

from common import MODES, ROOT, processor
from losses import PEERS

TITLES = {"statistics": "loss", "value_and_grad": "loss and gradients"}
# Design, section 5: one H100 or H200 (132 multiprocessors at 1.755 GHz), measured bf16 rate, exponentials a second.
TENSOR_FLOPS, EXPONENTIALS = 790e12, 16 * 132 * 1.755e9
# Relative difference of two right losses: sums in f32; logits in 16 bits.
AGREEMENT = {"f32": 1e-5, "f16": 1e-2, "bf16": 1e-2}


def machine(args):
    versions = {"torch": torch.__version__}
    for package in ("triton", "cut-cross-entropy", "liger-kernel"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    # A bundle says it beside its executables.
    bundled = args.bin.parent / "commit" if args.bin else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": bundled.read_text().strip() if bundled and bundled.exists() else output("git", "-C", ROOT, "describe", "--always", "--dirty"),
        "processor": processor(),
        "gpu": gpu_state(),
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def gpu_state():
    """Name, driver and clocks of the first GPU, as nvidia-smi has them now."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    lines = output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return dict(zip(query.split(","), [part.strip() for part in lines.splitlines()[0].split(",")])) if lines else None


def output(*command):
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def floor(args, mode, dim):
    """Seconds that the arithmetic takes at least: one matmul and the exponentials, with gradients four and two of them."""
    scores = args.queries * args.candidates
    matmul, exp = 2 * scores * dim / TENSOR_FLOPS, scores / EXPONENTIALS
    return max(matmul, exp) if mode == "statistics" else 2 * max(2 * matmul, exp)


def floor_is_known(args):
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return args.dtype != "f32" and any(known in name for known in ("H100", "H200"))


def progress(results):
    for result in results:
        if "mode" in result:
            took = result.get("failed") or f"{statistics.median(result['seconds']) * 1e3:.2f} ms"
            print(f"# dim {result['dim']}, {result['implementation']}, {TITLES[result['mode']]}: {took}", flush=True)


def add_differences(results):
    """To each total its relative difference from PyTorch eager's of the same loss."""
    expected = {tuple(r["without"]): r["total"] for r in results if r["implementation"] == "eager" and "total" in r}
    for result in results:
        reference = expected.get(tuple(result["without"]))
        if "total" in result and reference:
            result["difference"] = result["total"] / reference - 1


def disagreement(args, results):
    """1 where this crate's loss is not PyTorch eager's, or was not compared with it, though both were asked for."""
    if not {"eager", "ours"} <= set(args.peers):
        return 0
    ours = [result for result in results if result["implementation"] == "ours"]
    wrong = [result for result in ours if not abs(result.get("difference", float("nan"))) <= AGREEMENT[args.dtype]]
    for result in wrong:
        found = result.get("failed") or f"loss {result['total']}, relative difference {result.get('difference')}"
        print(f"dim {result['dim']}, {result['mode']}: this crate does not agree with PyTorch eager: {found}")
    return int(bool(wrong))


def write_json(path, args, about, results):
    options = {name: getattr(args, name) for name in ("queries", "candidates", "dims", "dtype", "temperature", "iterations", "logits_bytes")}
    notes = {name: {"without": PEERS[name].left_out, "note": PEERS[name].note} for name in PEERS}
    for result in results:
        if seconds := result.get("seconds"):
            result |= {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
    path.write_text(json.dumps({"machine": about, "gpu_after": gpu_state(), "options": options, "notes": notes, "results": results}, indent=1))


def print_table(args, about, results):
    gpu = about["gpu"]
    print(f"\n{about['date'][:10]}, {gpu['name'] + ', driver ' + gpu['driver_version'] if gpu else about['processor']}, commit {about['commit']}")
    print(", ".join(f"{name} {version or 'missing'}" for name, version in about["versions"].items()))
    print(f"B = {args.queries}, N = {args.candidates}, {args.dtype}, cosine, tau {args.temperature}, log_q, ids.")
    print(f"Milliseconds, median (min to max) of {args.iterations}; GiB beside the inputs, gradients included (this crate's are f32, the")
    print("others' of the inputs' type). Normalising queries and candidates is timed for all.\n")
    print("| pass | implementation | without | " + " | ".join(f"D = {dim}" for dim in args.dims) + " |")
    print("|" + "---|" * (3 + len(args.dims)))
    for mode in MODES:
        for name in args.peers:
            cells = [r for r in results if r["implementation"] == name and r.get("mode") == mode]
            without = ", ".join(PEERS[name].left_out) if name in PEERS else ""
            print(f"| {TITLES[mode]} | {name} | {without} | " + " | ".join(cell(args, r) for r in cells) + " |")
        if floor_is_known(args):
            print(f"| {TITLES[mode]} | floor | | " + " | ".join(f"{floor(args, mode, dim) * 1e3:.2f}" for dim in args.dims) + " |")
    print()
    for name in args.peers:
        if name in PEERS and PEERS[name].note:
            print(f"{name}: {PEERS[name].note}.")


def cell(args, result):
    if "failed" in result:
        return result["failed"].replace("|", "/")[:60]
    milliseconds = [second * 1e3 for second in result["seconds"]]
    text = f"{statistics.median(milliseconds):.2f} ({min(milliseconds):.2f} to {max(milliseconds):.2f})"
    if "memory_bytes" in result:
        text += f", {result['memory_bytes'] / 2**30:.2f} GiB"
    difference = result.get("difference")
    if difference is None or not abs(difference) <= AGREEMENT[args.dtype]:
        text += f"; loss differs by {difference}"
    return text


def draw(path, args, results):
    try:
        import matplotlib
    except ImportError as error:
        print(f"no picture: {error}")
        return
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, mode in zip(axes, MODES):
        for name in args.peers:
            points = [(r["dim"], statistics.median(r["seconds"]) * 1e3) for r in results
                      if r["implementation"] == name and r.get("mode") == mode and "seconds" in r]
            if points:
                without = f" (without {', '.join(PEERS[name].left_out)})" if name in PEERS and PEERS[name].left_out else ""
                axis.plot(*zip(*points), marker="o", linewidth=2.5 if name == "ours" else 1.2, label=name + without)
        if floor_is_known(args):
            axis.plot(args.dims, [floor(args, mode, dim) * 1e3 for dim in args.dims], "k--", linewidth=1, label="floor")
        axis.set(title=TITLES[mode], xlabel="D", xscale="log", yscale="log", xticks=args.dims, xticklabels=args.dims)
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
    axes[0].set_ylabel("milliseconds, median")
    axes[1].legend(fontsize=8)
    figure.suptitle(f"B = {args.queries}, N = {args.candidates}, {args.dtype}, cosine, log_q, ids")
    figure.savefig(path)
    plt.close(figure)


def print_errors(args, dim, reference, found):
    """The measures of examples/errors.rs: absolute for scores, relative to the tensor's largest and to its norm for gradients."""
    print(f"B = {args.queries}, N = {args.candidates}, D = {dim}, {args.dtype}: errors against float64")
    print(f"{'':16} " + " ".join(f"{name + suffix:>20}" for name in ("lse", "loss", "d_queries", "d_candidates") for suffix in (" max", " rms")))
    for name, tensors in found.items():
        cells = []
        for tensor in ("lse", "loss", "d_queries", "d_candidates"):
            want, got = reference[tensor].double(), tensors[tensor].double()
            error = got - want
            gradient = tensor.startswith("d_")
            largest = want.abs().max() if gradient else 1
            size = want.square().mean().sqrt() if gradient else 1
            cells += [error.abs().max() / largest, error.square().mean().sqrt() / size]
        print(f"{name:16} " + " ".join(f"{value.item():20.2e}" for value in cells))
