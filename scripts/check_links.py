#!/usr/bin/env python3
"""Checks the links of all Markdown pages in this repository: the file must be there, and the heading, and every chapter
of the guide must be in its SUMMARY.md. Needs git and nothing else. Addresses of other sites are not looked up.

    scripts/check_links.py
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs/guide/src"
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
ELSEWHERE = re.compile(r"[a-z]+:")


def pages():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [ROOT / path for path in listed if (ROOT / path).exists()]


def anchors(page):
    """What GitHub and mdBook make of headings: lower case, no punctuation, hyphens for spaces, a number for a repetition."""
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", FENCE.sub("", page.read_text()), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = "".join(c for c in words if c.isalnum() or c in " -_").replace(" ", "-")
        found.add(next(s for s in (slug, *(f"{slug}-{n}" for n in range(1, 100))) if s not in found))
    return found


def broken(page):
    for target in LINK.findall(CODE.sub("", FENCE.sub("", page.read_text()))):
        if ELSEWHERE.match(target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.is_relative_to(ROOT):
            yield target, "outside of the repository"
        elif not file.exists():
            yield target, "no such file"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            yield target, "no such heading"


def missing_chapters():
    listed = set(LINK.findall((GUIDE / "SUMMARY.md").read_text()))
    return sorted({path.name for path in GUIDE.glob("*.md")} - listed - {"SUMMARY.md"})


def main():
    problems = [f"{page.relative_to(ROOT)}: {target}: {why}" for page in pages() for target, why in broken(page)]
    problems += [f"docs/guide/src/SUMMARY.md: {name} is not in it" for name in missing_chapters()]
    print("\n".join(problems) or f"the links of {len(pages())} pages lead somewhere")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
