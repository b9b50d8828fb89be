"""The examples run, and learn what is there to learn, on data of a few hundred users."""

import os
import subprocess
import sys

EXAMPLES = os.path.join(os.path.dirname(__file__), "..", "examples")


def run(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=EXAMPLES, check=True, timeout=300, stdout=subprocess.PIPE, text=True).stdout


def test_sasrec_prints_a_table_and_beats_chance(tmp_path):
    data = tmp_path / "taken.csv"
    # Each user walks along the items: what comes next is certain. Sequences of 4 to 11 are padded to 12.
    lines = (f"u{user},i{(7 * user + at) % 50},{at}" for user in range(240) for at in range(4 + user % 8))
    data.write_text("user,item,time\n" + "\n".join(lines) + "\n")
    sizes = "--epochs 6 --length 12 --dim 16 --sampled 32 --learning-rate 0.02".split()
    out = run("sasrec.py", "--data", str(data), *sizes)
    header, *rows = out.splitlines()[-4:]
    assert header.split() == ["loss", "Recall@10", "NDCG@10", "MRR"]
    assert [row.split()[0] for row in rows] == ["full", "sampled", "corrected-logq"]
    for row in rows:
        name, recall, ndcg, _ = row.split()
        # Of 50 items, fewer the ones taken: 0.2 to 0.26 by chance.
        assert 0.5 < float(recall) <= 1.0 and 0.0 < float(ndcg) <= float(recall), out


def test_catalog_parallel_is_the_same_on_one_process_and_on_two():
    sizes = "catalog_parallel.py --users 200 --items 301 --dim 16 --epochs 2 --batch 256".split()
    two = run("-m", "torch.distributed.run", "--nproc-per-node", "2", *sizes)
    found = [metrics_of(run(*sizes)), metrics_of(two)]
    (loss, metrics), (of_two, metrics_of_two) = found
    # Sums in another order, over some steps.
    assert all(abs(a - b) < 1e-3 for a, b in zip(loss, of_two)) and loss[1] < loss[0]
    assert all(abs(a - b) < 0.02 for a, b in zip(metrics, metrics_of_two))
    assert 0.0 < metrics[0] <= metrics[1] <= 1.0
    assert [line.split()[:2] for line in two.splitlines()[-2:]] == [["0", "150"], ["1", "151"]]


def metrics_of(out):
    lines = out.splitlines()
    at = next(at for at, line in enumerate(lines) if line.startswith("Recall@10"))
    loss = [float(line.split()[3]) for line in lines if line.startswith("epoch")]
    return loss, [float(x) for x in lines[at + 1].split()]
