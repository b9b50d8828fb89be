#!/usr/bin/env python3
"""The figures of the guide, from the tables of docs/results.md.

    scripts/guide_figures.py            # writes docs/guide/src/figures/*.svg
    scripts/guide_figures.py --check    # fails where they are not what the tables say

Needs nothing but Python. A figure is a row of panels that share their labels. Each panel has one column of a table, as
dots with the standard deviation or the standard error that stands behind the ±.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from guide_decision import decision
from guide_svg import Chart, Dot, Panel, dots, scatter

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs/guide/src/figures"


@dataclass(frozen=True)
class Table:
    """A table of a Markdown page: its columns' names and its rows, as text."""

    columns: list[str]
    rows: list[list[str]]

    def column(self, name):
        at = self.columns.index(name)
        return [row[at] for row in self.rows]


def tables_of(section):
    """The tables below a heading of docs/results.md, in their order."""
    text = (ROOT / "docs/results.md").read_text()
    start = text.index(f"\n## {section}\n") + 1
    end = text.find("\n## ", start)
    found, lines = [], []
    for line in [*text[start : end if end >= 0 else len(text)].splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
        elif lines:
            found.append(Table(lines[0], lines[2:]))
            lines = []
    return found


def number(text):
    """`0.160 ± 0.004` as (0.16, 0.004), `1060 s` as (1060, 0)."""
    match = re.match(r"([\d.,]+)(?: ± ([\d.]+))?", text)
    return float(match[1].replace(",", "")), float(match[2] or 0.0)


def panel(title, rows, series=("",), log=False):
    """`rows` has the texts of each row's numbers, one for each series."""
    return Panel(title, [[Dot(*number(text)) for text in row] for row in rows], list(series), log)


def bias():
    table = tables_of("Bias of the gradient by kind of negatives")[0]
    names = ["B = 32", "B = 256", "B = 1024"]
    rows = list(zip(*(table.column(name) for name in names)))
    title = "relative distance from the full softmax's"
    of_batches = panel(title, rows, names, log=True)
    return dots(Chart("Mean gradient of sampled negatives", table.column("negatives"), [of_batches]))


def columns(title, table, names, labels="negatives"):
    """A panel for each of the named columns."""
    panels = [panel(name, [[text] for text in table.column(name)]) for name in names]
    return dots(Chart(title, table.column(labels), panels))


def losses():
    table = tables_of("Online Retail, every loss, three seeds")[0]
    names = ["Recall@10", "popularity of the top ten"]
    return columns("Online Retail, 3,659 items, three seeds", table, names, "loss")


def pools():
    table = tables_of("Online Retail, pools of negatives and sources of Q, three seeds")[0]
    return columns("Online Retail, three seeds", table, ["Recall@10", "NDCG@10"], "negatives, Q")


def own_negatives():
    section = "Online Retail, over the item table: negatives of each row's own, several positives, a filter"
    table = tables_of(section)[0]
    return columns("Online Retail, over the item table, three seeds", table, ["Recall@10", "Recall@100"])


def million():
    times, metrics = tables_of("A catalogue of a million items, sampled and full softmax")
    seconds = {name: number(text)[0] for name, text in zip(times.column("negatives"), times.column("training"))}
    recall = {name: Dot(*number(text)) for name, text in zip(metrics.column("negatives"), metrics.column("Recall@10"))}
    points = [(name, seconds[name], recall[name]) for name in seconds]
    return scatter("A million items, one epoch, two cores", "seconds of training", "Recall@10", points)


def drawn():
    return {
        "bias": bias(),
        "decision": decision(),
        "losses": losses(),
        "million": million(),
        "pools": pools(),
        "tables": own_negatives(),
    }


def main():
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        sys.exit(__doc__)
    FIGURES.mkdir(exist_ok=True)
    stale = []
    for name, svg in drawn().items():
        path = FIGURES / f"{name}.svg"
        if not check:
            path.write_text(svg)
        elif not path.exists() or path.read_text() != svg:
            stale.append(path.name)
    if stale:
        sys.exit(f"{', '.join(stale)}: not what docs/results.md says; run scripts/guide_figures.py")


if __name__ == "__main__":
    main()
