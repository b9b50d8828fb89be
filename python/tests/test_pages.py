"""The Python of the READMEs, the guide and docs/ runs: the blocks of a page one after the other, in one namespace.

A block that begins with ```python no-run needs what tests have not (a GPU, a checkpoint) and is compiled alone.
"""

import pathlib
import re

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
GLOBS = ["README.md", "python/README.md", "docs/*.md", "docs/guide/src/*.md"]
PAGES = [page for pattern in GLOBS for page in sorted(ROOT.glob(pattern))]
BLOCK = re.compile(r"^```python( no-run)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """Of each block, whether it runs, and its code: on the lines that it has in the page, which errors then name."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        lines_before = text.count("\n", 0, found.start(2))
        yield found[1] is None, compile("\n" * lines_before + found[2], str(page), "exec")


@pytest.fixture
def torchrun(monkeypatch):
    """The environment of a process that torchrun starts alone."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_the_page(page, torchrun, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # what a page saves
    names = {"__name__": "page"}
    for runs, code in blocks(page):
        if runs:
            exec(code, names)


def test_pages_have_blocks():
    """The pattern finds what is there: most pages of the guide have Python."""
    found = [page for page in PAGES if any(runs for runs, _ in blocks(page))]
    assert len(found) >= 10
