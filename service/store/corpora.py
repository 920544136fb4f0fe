"""Corpora of a folder, served read-only: a document ID of NAME.lw is the latent NAME/ID of every tenant."""

import asyncio
from collections.abc import Collection
from pathlib import Path

from latentwire.bridge import wire
from latentwire.bridge.corpus import Corpus, Document
from latentwire.bridge.errors import IncompatibleBridge, InvalidRequest, shorten
from latentwire.service.store.latents import KeptLatent

SUFFIX = ".lw"


class Corpora:
    """Every corpus of a folder, by name; documents are read from the disk when they are asked for."""

    def __init__(self, folder: Path | None, bridge_ids: Collection[str], signing_key: bytes | None = None) -> None:
        """Open them; what nobody could ever ask stops the start.

        Args:
            folder: Where they lie; None for no corpora.
            bridge_ids: Of the bridges that are served.
            signing_key: Signs messages as they are given out: they lie in the folder as the operator put them there.

        Raises:
            InvalidRequest: The folder cannot be read, or a corpus in it is no whole one.
            CorruptCheckpoint: A corpus is damaged.
            IncompatibleBridge: A corpus is of a bridge that is not served.
        """
        self._key = signing_key
        self._corpora: dict[str, Corpus] = {}
        try:
            files = sorted(path for path in folder.iterdir() if path.suffix == SUFFIX) if folder else []
        except OSError as error:
            raise InvalidRequest(f"LW_CORPUS_DIR {folder}: {error.strerror}", param="corpus_dir") from None
        for path in files:
            corpus = self._corpora[path.stem] = Corpus(path)
            if corpus.bridge_id not in bridge_ids:
                served = ", ".join(sorted(bridge_ids))
                raise IncompatibleBridge(
                    f"corpus {path}: it is of bridge {corpus.bridge_id}; served are {served}", param="corpus_dir"
                )

    def __len__(self) -> int:
        return len(self._corpora)

    def holds(self, name: str) -> bool:
        """Whether an id is in the name of one of these corpora, there or not."""
        return "/" in name and name.partition("/")[0] in self._corpora

    async def get(self, name: str) -> KeptLatent | None:
        """The latent of an id, None where there is none (CorruptCheckpoint)."""
        return await asyncio.to_thread(self._get, name)

    async def page(self, after: str, limit: int) -> list[KeptLatent]:
        """The next latents, corpus by corpus, in the order of their documents, with the headers of their messages.

        Raises:
            InvalidRequest: ``after`` is no id of one of these corpora, nor empty.
        """
        return await asyncio.to_thread(self._page, after, limit)

    def _get(self, name: str) -> KeptLatent | None:
        stem, _, id = name.partition("/")
        try:
            corpus = self._corpora[stem]
            latent, document = corpus[id], corpus.document(id)
        except KeyError:
            return None
        message = latent.data if self._key is None else wire.sign(latent.data, self._key)
        return _kept(stem, document, message, len(message))

    def _page(self, after: str, limit: int) -> list[KeptLatent]:
        stem, _, id = after.partition("/")
        try:
            row = self._corpora[stem].row(id) + 1 if after else 0
        except KeyError:
            raise InvalidRequest(
                f"after is {shorten(repr(after), 80)}; expected the `next` of a page", param="after"
            ) from None
        kept: list[KeptLatent] = []
        for name, corpus in self._corpora.items():
            if name < stem:
                continue
            for document, head, length in corpus.documents(row if name == stem else 0):
                if len(kept) == limit:
                    return kept
                signature = 0 if self._key is None else wire.SIGNATURE_BYTES
                kept.append(_kept(name, document, head, length + signature))
        return kept


def _kept(stem: str, document: Document, message: bytes, length: int) -> KeptLatent:
    return KeptLatent(
        f"{stem}/{document.id}",
        message,
        length,
        document.source_tokens,
        document.source_bytes,
        document.truncated,
        metadata=document.metadata,
        text=document.text,
    )
