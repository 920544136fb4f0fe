"""Many documents, encoded once into a corpus: in batches of like length, and gone on with where it stopped.

Which documents share a batch depends on the input alone. A run that was killed and run again therefore makes the bytes
of one that was not, although a latent depends on its batch in its last bits.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from latentwire.bridge import engine
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.corpus import Corpus, CorpusWriter, Document, Record, digest_of, discard
from latentwire.bridge.errors import InvalidRequest, shorten
from latentwire.bridge.reader import SourceTokens, check_unicode
from latentwire.bridge.wire import codebooks_id, sendable

WINDOW = 1024  # documents among which those of like length are found
BATCH_ROWS, BATCH_TOKENS = 32, 8192  # padding included
OnProgress = Callable[[int, int, int], object]


@dataclass(frozen=True)
class Source:
    """A document to encode: its id, its text, and what else is to be kept of it, as plain JSON values."""

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of all of it."""
        return digest_of(json.dumps([self.id, self.text, self.metadata], sort_keys=True))


def encode_corpus(
    bridge: Bridge,
    documents: Mapping[str, str] | Iterable[Source],
    out: str | Path,
    *,
    dtype: str = "float16",
    truncate: bool = False,
    keep_text: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress = lambda documents, of, source_tokens: None,
) -> Corpus:
    """Let a bridge's sender read documents, and keep their latents in one file.

    Killed and called again with the same documents, it goes on where it stopped, and the file is the same in the end.

    >>> bridge = latentwire.Bridge.load("builtin")
    >>> corpus = latentwire.encode_corpus(bridge, {"ben": "Ben lives in Rome."}, out, keep_text=True)
    >>> len(corpus), corpus.document("ben").text
    (1, 'Ben lives in Rome.')

    Args:
        bridge: Whose sender reads.
        documents: Texts by id, or ``Source``s with metadata; they are gone through twice.
        out: The file.
        dtype: What the numbers are kept in: float16, int8, int4 or float32; with codebooks rq2, rq4 or rq8.
        truncate: Cut texts that are longer than the bridge reads, instead of refusing them.
        keep_text: Keep the texts beside their latents.
        overwrite: Begin anew where there is such a file, or the beginning of one.
        on_progress: Called with the documents done, their number, and the sender tokens read by this call.

    Raises:
        InvalidRequest: A document is empty, too long or has the id of another, the file is there or cannot be written.
        LatentWireError: The sender cannot be loaded, or is not the one the bridge was trained with.
    """
    path, kind = Path(out), sendable(dtype, bridge.model.codebooks)
    if isinstance(documents, Mapping):
        documents = [Source(id, text) for id, text in documents.items()]
    sources = list(documents) if isinstance(documents, Iterator) else documents
    total = _checked(sources)
    if overwrite:
        discard(path)
    elif path.exists():
        raise InvalidRequest(f"corpus {path}: there is such a file; say --overwrite to replace it", param="out")
    about = {"bridge_id": bridge.manifest.bridge_id, "sender": bridge.sender, "dtype": kind, "texts": str(keep_text)}
    if codebooks := codebooks_id(kind, bridge.model.codebooks):
        about["codebooks"] = codebooks
    with CorpusWriter(path, about) as writer, bridge.lend(bridge.sender) as sender:
        read = 0
        if any(row >= total for row in writer.done):
            raise InvalidRequest(
                f"corpus {path}: it was begun with more than these {total} documents; say --overwrite to begin anew",
                param="input",
            )
        on_progress(len(writer.done), total, read)
        for rows in _batches(bridge, sources, writer.done, truncate):
            encoded = engine.encode(bridge.model, sender, [tokens for _, _, tokens in rows])
            writer.append(
                [
                    Record(
                        row,
                        bridge.message(made.latent, kind),
                        _document(source, made, keep_text),
                        source.fingerprint,
                    )
                    for (row, source, _), made in zip(rows, encoded, strict=True)
                ]
            )
            read += sum(made.source_tokens for made in encoded)
            on_progress(len(writer.done), total, read)
        writer.finish()
    return Corpus(path)


def write_parquet(corpus: Corpus, path: Path, *, on_progress: Callable[[int], object] = lambda done: None) -> None:
    """Write a corpus as a Parquet file, whole or not at all: a row for each document, its latent as K×C float32.

    Raises:
        InvalidRequest: It cannot be written.
        CorruptCheckpoint: A document of the corpus is damaged.
    """
    import pyarrow as pa  # late: half a second
    import pyarrow.parquet as pq

    kinds = {"slots": pa.int32(), "width": pa.int32(), "latent": pa.list_(pa.float32()), "source_tokens": pa.int64()}
    kinds |= {"source_bytes": pa.int64(), "truncated": pa.bool_()}
    schema = pa.schema({"id": pa.string(), **kinds, **dict.fromkeys(("digest", "metadata", "text"), pa.string())})
    about = {"bridge_id": corpus.bridge_id, "dtype": corpus.dtype}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(temporary, schema.with_metadata(about)) as writer:
            found, done = iter(corpus), 0
            while rows := [_cells(corpus, id) for id in islice(found, WINDOW)]:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                on_progress(done := done + len(rows))
        temporary.replace(path)
    except OSError as error:
        raise InvalidRequest(f"--parquet {path}: {error.strerror or error}", param="parquet") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _cells(corpus: Corpus, id: str) -> dict[str, Any]:
    latent, document = corpus[id], corpus.document(id)
    K, C = latent.shape
    metadata = json.dumps(document.metadata, ensure_ascii=False)
    return {"slots": K, "width": C, "latent": latent.array.ravel(), **vars(document), "metadata": metadata}


@dataclass(frozen=True)
class JsonLines:
    """The documents of a .jsonl or .jsonl.gz file, read each time they are gone through.

    Attributes:
        path: The file: an object in each line.
        text_field: The field that holds a text.
        id_field: The field that holds an id; without one the id of a document is the number of its line, from 1.
        keep: Fields that are kept as metadata, where a line has them.
        flag: What named the file, for errors.
    """

    path: Path
    text_field: str = "text"
    id_field: str | None = None
    keep: tuple[str, ...] = ()
    flag: str = "input"

    def __iter__(self) -> Iterator[Source]:
        """The documents; empty lines are left out (InvalidRequest: a line that holds none)."""
        opened = gzip.open if self.path.suffix == ".gz" else open
        try:
            with opened(self.path, "rt", encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield self._source(line, number)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise InvalidRequest(f"--{self.flag} {self.path}: {reason_of(error)}", param=self.flag) from None

    def _source(self, line: str, number: int) -> Source:
        where = f"--{self.flag} {self.path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{where}: it is not JSON: {error}", param=self.flag) from None
        if not isinstance(row, dict):
            raise InvalidRequest(f"{where}: it is {shorten(repr(row), 80)}; expected an object", param=self.flag)
        for name, kinds in ((self.text_field, str), (self.id_field, str | int)):
            if name is not None and (
                not isinstance(row.get(name), kinds) or (row[name] == "" and name == self.id_field)
            ):
                has = shorten(repr(row[name]), 80) if name in row else f"missing; it has {', '.join(row) or 'no field'}"
                raise InvalidRequest(f"{where}: the field {name!r} is {has}; expected a text", param=self.flag)
        try:
            check_unicode(row[self.text_field])
        except InvalidRequest as error:
            raise InvalidRequest(f"{where}: {error}", param=self.flag) from None
        id = str(number if self.id_field is None else row[self.id_field])
        return Source(id, row[self.text_field], {name: row[name] for name in self.keep if name in row})


def reason_of(error: Exception) -> str:
    """Why a file of text could not be read."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 ({error.reason} at byte {error.start:,})"
    return getattr(error, "strerror", None) or str(error)


Row = tuple[int, Source, SourceTokens]


def _checked(sources: Iterable[Source]) -> int:
    """How many documents there are; what could stop the work later stops it now (InvalidRequest)."""
    first: dict[str, int] = {}
    for row, source in enumerate(sources, 1):
        if not source.text.strip():
            raise InvalidRequest(f"document {row}, {shorten(repr(source.id), 80)}, is empty", param="input")
        if first.setdefault(source.id, row) != row:
            met = f"documents {first[source.id]} and {row} are both called {shorten(repr(source.id), 80)}"
            raise InvalidRequest(f"{met}; expected ids of their own", param="input")
    if not first:
        raise InvalidRequest("there are no documents; expected at least one", param="input")
    return len(first)


def _batches(bridge: Bridge, sources: Iterable[Source], done: Mapping[int, str], truncate: bool) -> Iterator[list[Row]]:
    """Batches that are not done, in order (InvalidRequest: a text is too long, or is not what it was when done)."""
    numbered = enumerate(sources)
    while window := list(islice(numbered, WINDOW)):
        for row, source in window:
            if row in done and done[row] != source.fingerprint:
                raise InvalidRequest(
                    f"document {row + 1}, {shorten(repr(source.id), 80)}, is not the one that was encoded before; "
                    "say --overwrite to begin anew",
                    param="input",
                )
        if all(row in done for row, _ in window):
            continue
        rows = [(row, source, _tokens(bridge, row, source, truncate)) for row, source in window]
        for batch in _of_like_length(rows):
            if batch[0][0] not in done:
                yield batch


def _of_like_length(rows: Sequence[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row[2].ids)):
        if batch and (len(batch) == BATCH_ROWS or (len(batch) + 1) * len(row[2].ids) > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _tokens(bridge: Bridge, row: int, source: Source, truncate: bool) -> SourceTokens:
    try:
        return bridge.tokenize(source.text, truncate=truncate)
    except InvalidRequest as error:
        raise InvalidRequest(f"document {row + 1}, {shorten(repr(source.id), 80)}: {error}", param="input") from None


def _document(source: Source, made: engine.Encoded, keep_text: bool) -> Document:
    return Document(
        id=source.id,
        source_tokens=made.source_tokens,
        source_bytes=len(source.text.encode()),
        truncated=made.truncated,
        digest=digest_of(source.text),
        metadata=source.metadata,
        text=source.text if keep_text else None,
    )
