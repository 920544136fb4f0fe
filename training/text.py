"""Plain text to pretrain on: files → texts → a task of which each source is to be repeated.

A text is a paragraph of a .txt file (what stands between blank lines) or a line of a .jsonl file. One that is too long
for a source becomes several, cut between words; nothing of it is lost.
"""

import hashlib
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from latentwire.bridge.bulk import JsonLines, reason_of
from latentwire.bridge.config import BridgeConfig
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.tasks import Example, Task
from latentwire.bridge.prompt import REPEAT
from latentwire.bridge.readback import as_said
from latentwire.bridge.reader import Reader, kept_layout, text_ids
from latentwire.training.pretrain import PretrainConfig

PARAGRAPH = re.compile(r"\n\s*\n")
SPACE, BETWEEN_WORDS = re.compile(r"\s*"), re.compile(r".*\S(?=\s)", re.DOTALL)
CHARACTERS = 8  # of a text that are looked at for each token of a source; few tokens are longer on average
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")


def text_task(config: PretrainConfig, console: Console) -> Task:
    """The texts of a run's files, whole, each once: none held out is trained on. ``cut`` makes sources of them.

    Raises:
        InvalidRequest: A file cannot be read, a line has no text, or there is no text at all.
    """
    digest, texts, left = hashlib.sha256(), dict[str, None](), Counter[str]()
    for name in config.text:
        for text in map(str.strip, _texts(Path(name), config.text_field)):
            if not text or text in texts:
                left["repeated" if text else "blank"] += 1
                continue
            texts[text] = None
            digest.update(f"{text}\0".encode())
    names = ", ".join(Path(name).name for name in config.text)
    left_out = ", ".join(f"{count:,} {why} ones left out" for why, count in left.items())
    left_out = f" ({left_out})" if left_out else ""
    if not texts:
        raise InvalidRequest(f"--text: there is no text in {names}{left_out}; expected at least one", param="text")
    console.print(f"{len(texts):,} texts{left_out}", highlight=False)
    return Task(
        name=names,
        kind="generation",
        train=[_example(text) for text in texts],
        test=[],
        template=REPEAT,
        data_sha256=digest.hexdigest(),
        max_answer_tokens=1,
    )


def _example(text: str) -> Example:
    return Example(text, REPEAT, as_said(text))


def _texts(path: Path, field: str) -> Iterator[str]:
    if path.is_dir():
        raise InvalidRequest(f"--text {path} is a folder; expected a file", param="text")
    if not path.name.endswith(SUFFIXES):
        raise InvalidRequest(f"--text {path}: expected a file that ends in {', '.join(SUFFIXES)}", param="text")
    if path.suffix != ".txt":
        yield from (source.text for source in JsonLines(path, field, flag="text"))
        return
    try:
        written = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--text {path}: {reason_of(error)}", param="text") from None
    yield from filter(None, map(str.strip, PARAGRAPH.split(written)))


def cut(task: Task, described: BridgeConfig, sender: Reader, console: Console) -> Task:
    """The same texts as sources that the sender reads whole."""
    layout = kept_layout(described.source, sender)
    around = sum(i is not None for i in (layout.bos_id, layout.eos_id))
    room, made = max(described.max_source_tokens - around, 1), list[Example]()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for example in progress.track(task.train, description="texts are cut"):
            made += map(_example, pieces(sender, example.source, room))
    longest = described.max_source_tokens
    console.print(f"{len(made):,} sources of at most {longest:,} sender tokens", highlight=False)
    return replace(task, train=made)


def pieces(lm: Reader, text: str, tokens: int) -> Sequence[str]:
    """A text in pieces that a model reads as at most ``tokens`` tokens, cut between words where there are words."""
    made, start = list[str](), 0
    while start < len(text):
        window = text[start : start + CHARACTERS * tokens]
        fits = len(text_ids(lm, window)) <= tokens
        length = len(window) if fits else max(1, _longest(lm, window, tokens))
        if start + length < len(text) and not text[start + length].isspace():
            words = BETWEEN_WORDS.match(window[:length])
            length = words.end() if words else length
        made.append(window[:length])
        start = SPACE.match(text, start + length).end()  # type: ignore[union-attr]  # it matches nothing too
    return made


def _longest(lm: Reader, text: str, tokens: int) -> int:
    """Characters of the longest start that is read as so many tokens."""
    return bisect_right(range(1, len(text) + 1), tokens, key=lambda length: len(text_ids(lm, text[:length])))
