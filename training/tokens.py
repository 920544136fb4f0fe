"""Examples as tokens: everything about an example that stays the same during a run, made once.

A data set is tokenised before the first step and kept on disk under a key of everything that decides the tokens; a
generated task, whose examples never repeat, is tokenised as it is drawn, on the prefetch thread.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentwire.bridge import chat, prompt, reader
from latentwire.bridge.config import BridgeConfig, Layout
from latentwire.bridge.detokenise import decode
from latentwire.bridge.encoder import slots_of
from latentwire.bridge.errors import LatentWireError
from latentwire.bridge.evaluation.tasks import Example
from latentwire.bridge.prompt import IGNORE, LATENT, LATENTS, TEXT, Row, compose, expand, fit
from latentwire.bridge.reader import Reader, SourceTokens, kept_layout, source_tokens, text_ids, text_offsets
from latentwire.training.config import TrainConfig
from latentwire.training.pretrain import PretrainConfig

SPARE = 8  # receiver tokens left free beside a repeated source, whose tokens can join otherwise than counted


@dataclass(frozen=True, slots=True)
class Tokens:
    """One example for one receiver.

    Attributes:
        half: Sender tokens of the source's first half, for the continuation objective.
        words: Pairs (window, receiver token that ends in it), for the warm start.
        answer: The row that is answered from soft tokens.
        reconstruction: The row that repeats the source, or None when that objective is off.
        continuation: The row that goes on after the first half.
        teacher: The row in which the receiver reads the source itself.
        prompt: What is asked, of which ``Tokeniser.several`` makes rows; this and the rest only where it is needed.
        said: The answer.
        text: The source.
    """

    source: SourceTokens
    half: int
    words: list[tuple[int, int]]
    answer: Row
    reconstruction: Row | None = None
    continuation: Row | None = None
    teacher: Row | None = None
    prompt: str = ""
    said: str = ""
    text: str = ""


ROWS = ("answer", "reconstruction", "continuation", "teacher")


@dataclass(frozen=True)
class Tokeniser:
    """Makes ``Tokens`` for one receiver; a pure function of the example and of what is held here."""

    config: TrainConfig
    bridge: BridgeConfig
    reconstruction: str
    sender: Reader
    receiver: Reader
    aligned: bool

    @property
    def layout(self) -> Layout:
        return self.bridge.heads[self.receiver.name].layout

    def __call__(self, example: Example) -> Tokens:
        """Raises InvalidRequest when the prompt and answer do not fit the receiver beside the soft tokens."""
        config, source = self.config, source_tokens(self.bridge, self.sender, example.source, truncate=True)
        slots = slots_of(self.bridge.encoder, len(source.ids))
        said = self._spoken if isinstance(config, PretrainConfig) else self._compose
        answer = said(example.prompt, slots, example.answer)
        if config.source_text:
            answer = self._reading(example, answer, soft=slots)
        half, rest = self._halves(example.source, source)
        modes, first = config.mode_tokens, slots_of(self.bridge.encoder, half)
        repeats, goes_on = config.reconstruction_weight > 0, config.continuation_weight > 0
        return Tokens(
            source=source,
            half=half,
            words=self._words(example.source, len(source.ids)) if self.aligned else [],
            answer=answer,
            reconstruction=self._spoken(self.reconstruction, slots + modes, f" {example.source}") if repeats else None,
            continuation=self._spoken(LATENT, first + modes, rest) if goes_on else None,
            teacher=self._reading(example, answer) if config.kd_weight else None,
            **self._texts(example),
        )

    def several(self, tokens: Tokens, slots: Sequence[int]) -> Row:
        """The row that is answered from several sources, each in a line behind its number (InvalidRequest: no room)."""
        prompt = tokens.prompt if LATENT in tokens.prompt else f"{LATENT}{tokens.prompt}"
        template, contents = expand(prompt.replace(LATENT, LATENTS), list(slots))
        room = self.receiver.max_tokens
        return compose(self.receiver, self.layout, template, latent=contents, answer=tokens.said, max_tokens=room)

    def _texts(self, example: Example) -> dict[str, str]:
        if self.config.sources_per_example == 1:
            return {}
        return {"prompt": example.prompt, "said": example.answer, "text": example.source}

    def _compose(self, template: str, slots: int, answer: str | None) -> Row:
        room = self.receiver.max_tokens
        return compose(self.receiver, self.layout, template, latent=slots, answer=answer, max_tokens=room)

    def _spoken(self, template: str, slots: int, answer: str) -> Row:
        """A row whose answer is a text of any length, cut to the room beside soft tokens and template."""
        if not answer.strip():
            return self._compose(template, slots, None)
        row = compose(self.receiver, self.layout, template, latent=slots, answer=answer)
        if (over := len(row) - self.receiver.max_tokens) <= 0:
            return row
        ids = text_ids(self.receiver, answer)
        text = decode(self.receiver, ids[: max(len(ids) - over - SPARE, 1)], special=True)
        return self._compose(template, slots, text)

    def _halves(self, text: str, source: SourceTokens) -> tuple[int, str]:
        """Sender tokens of the words up to the middle, and the text after them; no text where there is one word.

        A causal sender's states of a text's start are those of the whole text's: the first half needs no pass.
        """
        space = text.find(" ", len(text) // 2)
        if space < 0 or not self.config.continuation_weight:
            return len(source.ids), ""
        bos = self._opening
        start = text_ids(self.sender, text[:space])
        kept = next((i for i, (a, b) in enumerate(zip(start, source.ids[bos:], strict=False)) if a != b), None)
        kept = min(len(start), len(source.ids) - bos) if kept is None else kept
        return (kept + bos, text[space:]) if kept else (len(source.ids), "")

    @property
    def _opening(self) -> int:
        """Tokens before a source."""
        return int(kept_layout(self.bridge.source, self.sender).bos_id is not None)

    def _reading(self, example: Example, answer: Row, *, soft: int = 0) -> Row:
        """The receiver reads the source where the soft tokens stood, or behind them, and says the very same tokens."""
        ids = [label for label in answer.labels if label != IGNORE]
        room = self.receiver.max_tokens - len(ids)
        read = fit(self.receiver, self.layout, example.prompt, example.source, room, soft=soft)
        return Row(read.ids + ids, read.slots + [TEXT] * len(ids), read.labels + ids)

    def _words(self, text: str, source_tokens: int) -> list[tuple[int, int]]:
        """The two tokenizers meet at character offsets, so any pair of fast tokenizers can be aligned."""
        bos, first = self._opening, slots_of(self.bridge.encoder, 0)  # slots that cover no words stand before
        ends = np.asarray([end for _, end in text_offsets(self.sender, text)][: source_tokens - bos])
        theirs = zip(text_ids(self.receiver, text), text_offsets(self.receiver, text), strict=True)
        return [
            (first + (int(np.searchsorted(ends, end)) + bos) // self.config.ratio, token)
            for token, (_, end) in theirs
            if len(ends) and end <= ends[-1]
        ]

    def key(self, data_sha256: str, template: str, fingerprints: Sequence[str]) -> str:
        """Digest of everything that decides the tokens, this code included: another one is another cache."""
        files = (__file__, chat.__file__, prompt.__file__, reader.__file__)
        code = b"".join(Path(file).read_bytes() for file in files)
        objectives = {name: getattr(self.config, name) > 0 for name in ("reconstruction_weight", "continuation_weight")}
        described = {
            **objectives,
            "data": [data_sha256, template, self.reconstruction],
            "models": list(fingerprints),
            "layout": repr((self.bridge.source, self.layout)),
            "slots": repr((self.bridge.encoder.kind, self.bridge.encoder.ratio, self.bridge.encoder.num_latents)),
            "limits": [self.bridge.max_source_tokens, self.receiver.max_tokens, self.config.mode_tokens],
            "wanted": [
                self.aligned,
                self.config.kd_weight > 0,
                self.config.source_text,
                self.config.sources_per_example > 1,
            ],
            "code": hashlib.sha256(code).hexdigest(),
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def tokenise(tokeniser: Tokeniser, examples: Sequence[Example], key: str, cache: Path) -> Any:
    """Every example's tokens as flat records of a ``datasets.Dataset``, read from ``cache`` where it has them."""
    import datasets  # late: it takes a second, and a generated task does not need it

    (datasets.enable_progress_bars if sys.stderr.isatty() else datasets.disable_progress_bars)()

    def records() -> Iterator[dict[str, Any]]:
        for example in examples:
            yield flatten(tokeniser(example))

    chosen = hashlib.sha256("\0".join(e.source + "\1" + e.prompt + "\1" + e.answer for e in examples).encode())
    name = hashlib.sha256((key + chosen.hexdigest()).encode()).hexdigest()[:32]
    folder = str(cache.expanduser() / "tokens")
    try:
        return datasets.Dataset.from_generator(records, cache_dir=folder, fingerprint=name)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, LatentWireError | OSError):
            raise error.__cause__ from None
        raise


def flatten(tokens: Tokens) -> dict[str, Any]:
    """A record of plain lists; ``unflatten`` makes the same ``Tokens`` of it."""
    record: dict[str, Any] = {
        "source": tokens.source.ids,
        "lengths": [tokens.source.full_length, tokens.half],
        "windows": [window for window, _ in tokens.words],
        "words": [word for _, word in tokens.words],
        "texts": [tokens.prompt, tokens.said, tokens.text],
    }
    for name in ROWS:
        row: Row | None = getattr(tokens, name)
        record[name] = [] if row is None else row.ids
        record[f"{name}_shape"] = [] if row is None else _shape(row)
    return record


def _shape(row: Row) -> list[int]:
    """(first slot's place, slots, labelled tokens at the end): all that a row is beside its ids."""
    slots = sum(slot != TEXT for slot in row.slots)
    return [row.slots.index(0) if slots else 0, slots, sum(label != IGNORE for label in row.labels)]


def unflatten(record: dict[str, Any]) -> Tokens:
    """``Tokens`` of a record."""
    rows = {name: _row(record[name], record[f"{name}_shape"]) for name in ROWS}
    assert rows["answer"] is not None
    full, half = record["lengths"]
    words = list(zip(record["windows"], record["words"], strict=True))
    texts = dict(zip(("prompt", "said", "text"), record["texts"], strict=True))
    return Tokens(SourceTokens(record["source"], full), half, words, **rows, **texts)  # type: ignore[arg-type]


def _row(ids: list[int], shape: list[int]) -> Row | None:
    if not shape:
        return None
    first, slots, labelled = shape
    places = [i - first if first <= i < first + slots else TEXT for i in range(len(ids))]
    start = len(ids) - labelled
    return Row(list(ids), places, [IGNORE] * start + list(ids[start:]))
