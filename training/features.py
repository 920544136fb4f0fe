"""The sender's hidden states: read as they are needed, or computed once and kept on disk.

A cache is a folder named by a key (sender, layers, precision, data, longest source). ``index.json`` lists its
shards and is replaced after each one, so a build that was killed goes on where it stopped; a shard whose bytes are
not those of its digest is named, dropped and made again.

Dimensions used in this file:
    B batch    S sender tokens    N widths of all layers read, side by side
"""

import hashlib
import json
import logging
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

log = logging.getLogger(__name__)

INDEX = "index.json"
SHARD_BYTES = 256 << 20
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


@dataclass
class CachedStates:
    """Reads what ``build`` wrote: the same numbers, without a sender in memory."""

    folder: Path
    device: torch.device
    rows: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    _open: dict[str, Any] = field(default_factory=dict)

    def read(self, sources: Sequence[SourceTokens], *, multiple: int = 1) -> States:
        """States and mask of a batch, right-padded."""
        width = -(-max(len(source.ids) for source in sources) // multiple) * multiple
        found = [self._row(source) for source in sources]
        states = torch.zeros(len(sources), width, found[0].shape[1], dtype=found[0].dtype)
        mask = torch.zeros(len(sources), width, dtype=torch.bool)
        for i, row in enumerate(found):
            states[i, : len(row)], mask[i, : len(row)] = row, True
        return states.to(self.device), mask.to(self.device)

    def add(self, *shards: dict[str, Any]) -> None:
        """Know the rows of shards, as the index lists them."""
        for shard in shards:
            start = 0
            for digest, length in shard["rows"]:
                self.rows[digest] = (shard["file"], start, length)
                start += length

    def _row(self, source: SourceTokens) -> Float[Tensor, "S N"]:
        file, start, length = self.rows[digest_of(source)]
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
    progress: Callable[[int, int], None] = lambda *_: None,
) -> CachedStates:
    """States of all ``sources``, computing only what ``folder`` does not hold whole; the sender can then be freed.

    ``progress`` is told how many sources of how many are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _whole_shards(folder)
    held = CachedStates(folder, lm.device)
    held.add(*shards)
    wanted = {digest_of(source): source for source in sources}
    missing = sorted((s for d, s in wanted.items() if d not in held.rows), key=lambda s: len(s.ids))
    done = len(wanted) - len(missing)
    progress(done, len(wanted))
    for chunk, states in _shards(lm, layers, missing):
        part = write_part(folder, "states", {"states": states})
        shards.append({**asdict(part), "rows": [[digest_of(s), len(s.ids)] for s in chunk]})
        replace_file(folder / INDEX, json.dumps({"shards": shards}).encode())
        held.add(shards[-1])
        done += len(chunk)
        progress(done, len(wanted))
    return held


def open_cache(folder: Path, device: torch.device) -> CachedStates:
    """A cache that another process has built."""
    held = CachedStates(folder, device)
    held.add(*json.loads((folder / INDEX).read_bytes())["shards"])
    return held


def _whole_shards(folder: Path) -> list[dict[str, Any]]:
    """Shards of the index whose bytes are what the index says; the others are named and will be made again."""
    try:
        listed = json.loads((folder / INDEX).read_bytes())["shards"]
        parts = [Part(shard["file"], shard["sha256"], shard["bytes"]) for shard in listed]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s): the sender's states are computed again", folder / INDEX, error)
        return []
    whole = []
    for part, shard in zip(parts, listed, strict=True):
        try:
            read_part(folder, part)
            whole.append(shard)
        except CorruptCheckpoint as error:
            log.warning("%s: its %d sources are read by the sender again", error, len(shard["rows"]))
            (folder / part.file).unlink(missing_ok=True)
    return whole


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
