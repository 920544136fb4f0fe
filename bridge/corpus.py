"""A corpus: the latents of many documents in one file, found by their ids, asked as often as one likes.

The file is a safetensors file, which any of its readers opens. Its tensors, for N documents in the order of the input:

    records   U8  [bytes]   of each document its message (see ``bridge.wire``), then its facts, a JSON object
    spans     I64 [N, 5]    where its message starts, where that ends, where its facts end; CRC-32 of either
    keys      I64 [N]       digests of the ids, ascending
    rows      I64 [N]       the document of each key

Its metadata say of which bridge it is. Opening reads the last three tensors alone, so the file may be larger than
memory. The header has its room at the start and is written last: while it is made, the file is called FILE.part and no
reader takes it. Beside it FILE.part.journal has a line, with a checksum, for each batch of documents that is on the
disk; what follows the last whole line is dropped when the same call goes on.
"""

import fcntl
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from latentwire.bridge.errors import CorruptCheckpoint, IncompatibleBridge, InvalidRequest
from latentwire.bridge.files import sync_folder
from latentwire.bridge.results import Latent
from latentwire.bridge.wire import HEADER, header_of

KIND, VERSION = "latentwire corpus", "1"
HEADER_BYTES = 4096  # what stands before the records
LENGTH = struct.Struct("<Q")
INDEX = ("spans", "keys", "rows")
NUMBER = np.dtype("<i8")
BEGUN = "it is not finished; run the same 'latentwire encode' again, which goes on where it stopped"


@dataclass(frozen=True)
class Document:
    """What a corpus says of a document beside its latent.

    Attributes:
        id: What it is found by.
        source_tokens: Sender tokens read.
        source_bytes: Length of the text in UTF-8.
        truncated: Whether the text was cut.
        digest: SHA-256 of the text, in hex.
        metadata: What the input said of it.
        text: The text, where the corpus keeps texts.
    """

    id: str
    source_tokens: int
    source_bytes: int
    truncated: bool
    digest: str
    metadata: dict[str, Any]
    text: str | None = None


class Corpus(Mapping[str, Latent]):
    """The latents of a corpus by id, in the order of the input; each is read from the file when it is asked for.

    >>> bridge = latentwire.Bridge.load("builtin")
    >>> documents = {"ben": "Ben lives in Rome.", "mara": "Mara wants a cup of tea."}
    >>> _ = latentwire.encode_corpus(bridge, documents, out)
    >>> corpus = latentwire.Corpus(out, bridge_id=bridge.manifest.bridge_id)
    >>> list(corpus), corpus["ben"].shape
    (['ben', 'mara'], (2, 128))
    >>> bridge.generate(corpus["ben"], "Question: Where does Ben live?\\nAnswer:").texts
    [' Ben lives in Rome.']

    Attributes:
        path: The file.
        bridge_id: Of which bridge it is.
        dtype: What its latents are kept in.
    """

    def __init__(self, path: str | Path, *, bridge_id: str | None = None) -> None:
        """Open a corpus.

        Raises:
            InvalidRequest: It is not there, not finished, or no corpus.
            CorruptCheckpoint: It is damaged.
            IncompatibleBridge: It is of another bridge than ``bridge_id``.
        """
        self.path = Path(path)
        if not self.path.is_file():
            begun = f"; {BEGUN}" if _part(self.path).exists() else ""
            raise InvalidRequest(f"corpus {self.path}: there is no such file{begun}", param="corpus")
        if self.path.suffix == ".part":
            raise InvalidRequest(f"corpus {self.path}: {BEGUN}", param="corpus")
        try:
            file = cast(Any, safe_open(self.path, "np"))
            about = file.metadata() or {}
            if about.get("format") != KIND or about.get("version") != VERSION:
                met = f"{about.get('format')!r} of version {about.get('version')!r}"
                raise InvalidRequest(f"corpus {self.path}: it is {met}; expected {KIND!r} of version {VERSION!r}")
            self._spans, self._keys, self._rows = (file.get_tensor(name) for name in INDEX)
            self._records = file.get_slice("records")
        except OSError as error:
            raise InvalidRequest(f"corpus {self.path}: {error.strerror or error}", param="corpus") from None
        except SafetensorError as error:
            raise CorruptCheckpoint(f"corpus {self.path}: it is no whole corpus: {error}", param="corpus") from None
        if about["index"] != (found := _checksum(self._spans, self._keys, self._rows)):
            raise CorruptCheckpoint(
                f"corpus {self.path}: its index is damaged: the checksum is {found}, not {about['index']}",
                param="corpus",
            )
        self.bridge_id, self.dtype = about["bridge_id"], about["dtype"]
        if bridge_id not in (None, self.bridge_id):
            raise IncompatibleBridge(
                f"corpus {self.path}: it is of bridge {self.bridge_id}; this bridge is {bridge_id}", param="corpus"
            )

    def __repr__(self) -> str:
        return f"Corpus({str(self.path)!r}: {len(self)} latents of bridge {self.bridge_id})"

    def __len__(self) -> int:
        return len(self._spans)

    def __iter__(self) -> Iterator[str]:
        """The ids, in the order of the input."""
        return (self._document(row).id for row in range(len(self)))

    def __getitem__(self, id: str) -> Latent:
        """The latent of a document (KeyError; CorruptCheckpoint where it is damaged)."""
        return self._latent(self.row(id))

    def document(self, id: str) -> Document:
        """What is known of a document (errors as for its latent)."""
        return self._document(self.row(id))

    def documents(self, start: int = 0) -> Iterator[tuple[Document, bytes, int]]:
        """Documents in the order of the input, with the headers and the lengths of their messages; reads no latent."""
        for row in range(start, len(self)):
            at, middle = map(int, self._spans[row, :2])
            yield self._document(row), self._records[at : at + HEADER.size].tobytes(), middle - at

    def row(self, id: str) -> int:
        """Which document of the input has an id, from 0 (KeyError)."""
        key = key_of(id)
        for at in range(int(np.searchsorted(self._keys, key)), len(self._keys)):
            if self._keys[at] != key:
                break
            row = int(self._rows[at])
            if self._document(row).id == id:
                return row
        raise KeyError(id)

    def _latent(self, row: int) -> Latent:
        document, message = self._document(row), self._bytes(row, 0)
        header = header_of(message)
        return Latent(
            data=message, shape=header.shape, source_tokens=document.source_tokens, dtype=header.dtype,
            source_bytes=document.source_bytes, truncated=document.truncated, id=document.id,
        )  # fmt: skip

    def _document(self, row: int) -> Document:
        return Document(**json.loads(self._bytes(row, 1)))

    def _bytes(self, row: int, part: int) -> bytes:
        """The message (0) or the facts (1) of a document, checked (CorruptCheckpoint)."""
        start, end = map(int, self._spans[row, part : part + 2])
        found: bytes = self._records[start:end].tobytes()
        if (checksum := zlib.crc32(found)) != (expected := int(self._spans[row, 3 + part])):
            raise CorruptCheckpoint(
                f"corpus {self.path}: document {row} is damaged: its checksum is {checksum:08x}, not {expected:08x}",
                param="corpus",
            )
        return found


@dataclass(frozen=True)
class Record:
    """A document to be written: its place in the input from 0, its message, and what is known of it.

    ``fingerprint`` is of the source, by which a later run knows that it is still the same.
    """

    row: int
    message: bytes
    document: Document
    fingerprint: str


class CorpusWriter:
    """Writes a corpus that can be gone on with: what ``append`` has returned for survives whatever comes.

    Attributes:
        done: The fingerprints of the documents that are written, by their place in the input.
    """

    def __init__(self, path: Path, about: Mapping[str, str]) -> None:
        """Begin, or go on with what was begun; use it in a ``with``.

        Args:
            path: The corpus.
            about: What it is of: ``bridge_id``, ``dtype`` and all that decides about its bytes.

        Raises:
            InvalidRequest: It was begun with something else, another process writes it, or it cannot be written.
        """
        self._path, self._about = path, dict(about)
        self.done: dict[int, str] = {}
        self._spans: dict[int, list[int]] = {}
        self._keys: dict[int, int] = {}  # the row of each
        self._end = 0
        with self._written(), ExitStack() as opened:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._journal: IO[bytes] = opened.enter_context(_journal(path).open("a+b"))
            self._file: IO[bytes] = opened.enter_context(_part(path).open("a+b"))
            self._begin()
            self._opened = opened.pop_all()

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def append(self, records: Sequence[Record]) -> None:
        """Write documents; they are on the disk when this returns (InvalidRequest: no room)."""
        entries, data, end = [], list[bytes](), self._end
        for record in records:
            document = {name: value for name, value in vars(record.document).items() if value is not None}
            facts = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
            ends = [end, end + len(record.message), end + len(record.message) + len(facts)]
            checksums = [zlib.crc32(record.message), zlib.crc32(facts)]
            entries.append([record.row, key_of(record.document.id), record.fingerprint, *ends, *checksums])
            data += record.message, facts
            end = ends[-1]
        with self._written():
            self._file.write(b"".join(data))
            _flush(self._file)
            self._journal.write(_line(entries))
            _flush(self._journal)
        self._add(entries)

    def finish(self) -> None:
        """Make the file a corpus, under its name, whole or not at all (InvalidRequest: it cannot be written)."""
        spans = np.array([self._spans[row] for row in sorted(self._spans)], NUMBER).reshape(-1, 5)
        keys = np.array(sorted(self._keys), NUMBER)
        rows = np.array([self._keys[key] for key in sorted(self._keys)], NUMBER)
        tensors: dict[str, Any] = {"records": ("U8", [self._end], self._end)}
        tensors |= {name: ("I64", list(t.shape), t.nbytes) for name, t in zip(INDEX, (spans, keys, rows), strict=True)}
        about = {"format": KIND, "version": VERSION, **self._about, "index": _checksum(spans, keys, rows)}
        header: dict[str, Any] = {"__metadata__": about}
        at = 0
        for name, (dtype, shape, size) in tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        packed = json.dumps(header, separators=(",", ":")).encode().ljust(HEADER_BYTES - LENGTH.size)
        assert len(packed) == HEADER_BYTES - LENGTH.size
        with self._written():
            self._file.write(b"".join(tensor.tobytes() for tensor in (spans, keys, rows)))
            _flush(self._file)
            with _part(self._path).open("r+b") as start:  # one that was opened to append writes at the end alone
                start.write(LENGTH.pack(len(packed)) + packed)
                _flush(start)
            _part(self._path).replace(self._path)
            sync_folder(self._path.parent)
            _journal(self._path).unlink()

    def _begin(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequest(f"corpus {self._path}: another process is writing it", param="out") from None
        self._journal.seek(0)
        kept = 0
        for number, line in enumerate(self._journal):
            entries = _entries(line)
            if entries is None:
                break
            if number == 0 and entries != self._about:
                name = next(name for name in {**entries, **self._about} if entries.get(name) != self._about.get(name))
                raise InvalidRequest(
                    f"corpus {self._path}: it was begun with {name} {entries.get(name)}, not {self._about.get(name)}; "
                    "say --overwrite to begin anew",
                    param="out",
                )
            if number:
                self._add(entries)
            kept += len(line)
        self._journal.truncate(kept)
        self._file.truncate(HEADER_BYTES + self._end)  # where it was shorter, with zeros: a header that no reader takes
        with _part(self._path).open("r+b") as start:
            start.write(bytes(HEADER_BYTES))
        _flush(self._file)
        if kept == 0:
            self._journal.write(_line(self._about))
            _flush(self._journal)
            sync_folder(self._path.parent)

    def _add(self, entries: list[list[Any]]) -> None:
        for row, key, fingerprint, *span in entries:
            self._spans[row], self._keys[key], self.done[row] = span, row, fingerprint
            self._end = span[2]

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InvalidRequest(
                f"corpus {self._path}: {error.strerror}; what is written stays, and the same call goes on from there",
                param="out",
            ) from None


def discard(path: Path) -> None:
    """Remove a corpus, and what was begun of one."""
    for file in (path, _journal(path), _part(path)):
        file.unlink(missing_ok=True)


def key_of(id: str) -> int:
    """The number that an id is looked up by."""
    digest = hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def digest_of(text: str) -> str:
    """SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}.part.journal")


def _line(entries: object) -> bytes:
    packed = json.dumps(entries, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(packed), packed)


def _entries(line: bytes) -> Any:
    """What a line of a journal holds; None where it is not whole."""
    checksum, _, packed = line.rstrip(b"\n").partition(b" ")
    whole = line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(packed)
    return json.loads(packed) if whole else None


def _checksum(*tensors: NDArray[np.int64]) -> str:
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(np.ascontiguousarray(tensor, NUMBER).tobytes(), checksum)
    return f"{checksum:08x}"


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
