"""The examples run, and learn what is there to learn, on data of a few hundred users."""

import os
import subprocess
import sys

EXAMPLES = os.path.join(os.path.dirname(__file__), "..", "examples")


def run(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=EXAMPLES, check=True, timeout=120, stdout=subprocess.PIPE, text=True).stdout


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
