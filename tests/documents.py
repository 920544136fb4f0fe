"""The documents a user reads, and what stands in their blocks of code."""

import re
import shlex
from contextlib import suppress
from dataclasses import dataclass
from itertools import dropwhile, groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(ROOT / "deploy" / name for name in ("README.md", "SCALING.md", "ray/README.md", "slurm/README.md")),
    ROOT / "training" / "NOTES.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
VARIABLE = re.compile(r"export$|[A-Z_]+=")
FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?', re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code: its language, the file it is, and the block of ``text`` after it: what it prints."""

    page: str
    kind: str
    file: str
    code: str
    prints: str | None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block, without comments, redirections and variables before it."""
        typed, begun = [], ""
        for line in self.code.replace("\\\n", " ").splitlines() if self.kind == "sh" else ():
            begun += line + "\n"
            with suppress(ValueError):  # a quotation that goes on in the next line
                words, begun = shlex.split(begun, comments=True), ""
                parts = [list(part) for end, part in groupby(words, "&&".__eq__) if not end]
                typed += [list(dropwhile(VARIABLE.match, part)) for part in parts]
        return [words[: words.index(">>")] if ">>" in words else words for words in typed if words]


def blocks(page: Path | None = None) -> list[Block]:
    """Every block of a page, or of all of them."""
    return [
        Block(str(path.relative_to(ROOT)), *(found or "" for found in match[:3]), match[3] or None)
        for path in ([page] if page else PAGES)
        for match in FENCE.findall(path.read_text())
    ]


def commands(program: str) -> list[list[str]]:
    """Every command of every page that runs ``program``."""
    return [words for block in blocks() for words in block.commands if words[0] == program]
