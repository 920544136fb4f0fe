"""The sender's hidden states: read as they are needed, or computed once and kept on disk.

A cache is a folder named by a key (sender, layers, precision, data, longest source). ``index.json`` lists its
shards and is replaced after each one, so a build that was killed goes on where it stopped; a shard whose bytes are
not those of its digest is named, dropped and made again. A shard of the size and the time of change that it had when
it was written, or last compared with its digest, is not read again for that; and the index remembers which examples
were asked for, so that a start with the same ones reads no text and needs no sender.

Dimensions used in this file:
    B batch    S sender tokens    N widths of all layers read, side by side
"""

import hashlib
import json
import logging
from collections import ChainMap, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from torch import Tensor

from latentwire.bridge.checkpoint import read_part, write_part
from latentwire.bridge.config import Part
from latentwire.bridge.errors import CorruptCheckpoint
from latentwire.bridge.files import replace_file
from latentwire.bridge.lora import Lora
from latentwire.bridge.models import FrozenLM, hidden_states, pad_sources
from latentwire.bridge.reader import SourceTokens
from latentwire.bridge.residency import Residency
from latentwire.training.data import AHEAD
from latentwire.training.utilisation import sender_flops

log = logging.getLogger(__name__)

INDEX = "index.json"
SHARD_BYTES = 256 << 20
FETCHED = AHEAD + 3  # steps whose rows are in memory: the one in hand, those ready, and those being made
BATCH_TOKENS = 8192  # sender tokens of one pass while a cache is built

States = tuple[Float[Tensor, "B S N"], Bool[Tensor, "B S"]]


@dataclass(frozen=True)
class LiveStates:
    """Runs the sender for every batch."""

    residency: Residency
    sender: str
    layers: tuple[int, ...]
    lora: Lora | None = None

    def read(self, sources: Sequence[SourceTokens], *, multiple: int = 1) -> States:
        """States and mask of a batch, right-padded."""
        with self.residency.use(self.sender) as lm:
            ids, mask = pad_sources(lm, sources, multiple=multiple)
            return hidden_states(lm, ids, mask, self.layers, self.lora), mask

    def fetch(self, sources: Sequence[SourceTokens]) -> None:
        """Nothing is there before the sender has run."""

    def flops(self, tokens: int) -> int:
        """What the sender needs for so many tokens."""
        with self.residency.use(self.sender) as lm:
            return sender_flops(lm, tokens, self.layers, trained=self.lora is not None)


@dataclass
class CachedStates:
    """Reads what ``build`` wrote: the same numbers, without a sender in memory."""

    folder: Path
    device: torch.device
    rows: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    _open: dict[str, Any] = field(default_factory=dict)
    _ahead: deque[dict[str, Tensor]] = field(default_factory=lambda: deque(maxlen=FETCHED))

    def read(self, sources: Sequence[SourceTokens], *, multiple: int = 1) -> States:
        """States and mask of a batch, right-padded; from memory where they were fetched."""
        width = -(-max(len(source.ids) for source in sources) // multiple) * multiple
        fetched = ChainMap(*self._ahead)
        found = [fetched[d] if (d := digest_of(s)) in fetched else self._row(d) for s in sources]
        states = torch.zeros(len(sources), width, found[0].shape[1], dtype=found[0].dtype, device=self.device)
        mask = torch.zeros(len(sources), width, dtype=torch.bool)
        for i, row in enumerate(found):
            states[i, : len(row)].copy_(row, non_blocking=True)
            mask[i, : len(row)] = True
        return states, mask.to(self.device)

    def flops(self, tokens: int) -> int:
        """Nothing: the sender has read."""
        return 0

    def fetch(self, sources: Sequence[SourceTokens]) -> None:
        """Read the rows of a step to come, on the thread that prepares it, into pinned memory for an accelerator.

        Those of the last ``FETCHED`` steps are kept: the step in hand, and those made ahead of it.
        """
        digests = {digest_of(source) for source in sources}
        rows = {digest: self._row(digest) for digest in digests}
        pinned = self.device.type in ("cuda", "xpu")
        self._ahead.append({digest: row.pin_memory() if pinned else row for digest, row in rows.items()})

    def add(self, *shards: dict[str, Any]) -> None:
        """Know the rows of shards, as the index lists them."""
        for shard in shards:
            start = 0
            for digest, length in shard["rows"]:
                self.rows[digest] = (shard["file"], start, length)
                start += length

    def _row(self, digest: str) -> Float[Tensor, "S N"]:
        file, start, length = self.rows[digest]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        row: Tensor = self._open[file].get_slice("states")[start : start + length]
        return row


def digest_of(source: SourceTokens) -> str:
    """What a source is known by in a cache: its tokens."""
    return hashlib.blake2b(repr(source.ids).encode(), digest_size=12).hexdigest()


def features_key(**decides: Any) -> str:
    """Name of a cache's folder: a digest of everything that decides the states."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:32]


def build(
    lm: FrozenLM,
    layers: tuple[int, ...],
    sources: Sequence[SourceTokens],
    folder: Path,
    *,
    asked: str = "",
    progress: Callable[[int, int], None] = lambda *_: None,
) -> CachedStates:
    """States of all ``sources``, computing only what ``folder`` does not hold whole; the sender can then be freed.

    ``asked`` names these sources for ``held_whole``; ``progress`` is told how many of how many are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards, known = _whole_shards(folder)
    held = CachedStates(folder, lm.device)
    held.add(*shards)
    wanted = {digest_of(source): source for source in sources}
    missing = sorted((s for d, s in wanted.items() if d not in held.rows), key=lambda s: len(s.ids))
    done = len(wanted) - len(missing)
    progress(done, len(wanted))
    for chunk, states in _shards(lm, layers, missing):
        part = write_part(folder, "states", {"states": states})
        changed = (folder / part.file).stat().st_mtime_ns
        shards.append({**asdict(part), "changed": changed, "rows": [[digest_of(s), len(s.ids)] for s in chunk]})
        _write_index(folder, shards, known)
        held.add(shards[-1])
        done += len(chunk)
        progress(done, len(wanted))
    if asked:
        _write_index(folder, shards, [*known, asked])
    return held


def held_whole(folder: Path, device: torch.device, asked: str) -> CachedStates | None:
    """The cache, where it was built for these sources before and no shard has changed since."""
    shards, known = _whole_shards(folder)
    if asked not in known:
        return None
    held = CachedStates(folder, device)
    held.add(*shards)
    return held


def _write_index(folder: Path, shards: list[dict[str, Any]], asked: Sequence[str]) -> None:
    replace_file(folder / INDEX, json.dumps({"shards": shards, "asked": list(dict.fromkeys(asked))}).encode())


def open_cache(folder: Path, device: torch.device) -> CachedStates:
    """A cache that another process has built."""
    held = CachedStates(folder, device)
    held.add(*json.loads((folder / INDEX).read_bytes())["shards"])
    return held


def _whole_shards(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Shards of the index whose bytes are what it says, the others being named and dropped; and what was asked for.

    Nothing of what was asked for is known any more once a shard is dropped.
    """
    try:
        index = json.loads((folder / INDEX).read_bytes())
        listed, known = index["shards"], index.get("asked", [])
        parts = [Part(shard["file"], shard["sha256"], shard["bytes"]) for shard in listed]
    except FileNotFoundError:
        return [], []
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s): the sender's states are computed again", folder / INDEX, error)
        return [], []
    whole, compared = [], False
    for part, shard in zip(parts, listed, strict=True):
        path = folder / part.file
        try:
            if not path.is_file() or [path.stat().st_size, path.stat().st_mtime_ns] != [
                part.bytes,
                shard.get("changed"),
            ]:
                compared = True
                read_part(folder, part)
                shard["changed"] = path.stat().st_mtime_ns
            whole.append(shard)
        except CorruptCheckpoint as error:
            log.warning("%s: its %d sources are read by the sender again", error, len(shard["rows"]))
            path.unlink(missing_ok=True)
    known = known if len(whole) == len(listed) else []
    if compared:
        _write_index(folder, whole, known)
    return whole, known


def _shards(
    lm: FrozenLM, layers: tuple[int, ...], sources: Sequence[SourceTokens]
) -> Iterator[tuple[list[SourceTokens], Float[Tensor, "T N"]]]:
    """Sources and their states end to end, a shard at a time."""
    chunk: list[SourceTokens] = []
    states: list[Tensor] = []
    size = 0
    for batch in _batches(sources):
        ids, mask = pad_sources(lm, batch)
        read = hidden_states(lm, ids, mask, layers)
        states.append(read[mask].cpu())
        chunk += batch
        size += states[-1].nbytes
        if size >= SHARD_BYTES:
            yield chunk, torch.cat(states)
            chunk, states, size = [], [], 0
    if chunk:
        yield chunk, torch.cat(states)


def _batches(sources: Sequence[SourceTokens]) -> Iterator[list[SourceTokens]]:
    """Sources of like length, at most ``BATCH_TOKENS`` with their padding."""
    batch: list[SourceTokens] = []
    for source in sources:
        if batch and (len(batch) + 1) * len(source.ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(source)
    if batch:
        yield batch
