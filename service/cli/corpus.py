"""Commands about corpora: ``encode --input``, ``corpus export`` and ``corpus check``."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

app = typer.Typer(name="corpus", no_args_is_help=True, help="Look at corpora that 'latentwire encode --input' made.")
File = Annotated[Path, typer.Argument(metavar="CORPUS", help="A file that 'latentwire encode --input' made.")]


def encode_here(
    checkpoint: str, file: Path, out: Path, *, dtype: str, truncate: bool, keep_text: bool, overwrite: bool,
    text_field: str, id_field: str | None, keep: tuple[str, ...],
) -> None:  # fmt: skip
    """Encode the documents of a file into a corpus, with a bar; killed and run again, it goes on."""
    from latentwire.bridge.bridge import Bridge
    from latentwire.bridge.bulk import JsonLines, encode_corpus

    bridge = Bridge.load(checkpoint)
    with _bar("documents") as bar:
        line = bar.add_task("", total=None)

        def show(done: int, total: int, source_tokens: int) -> None:
            if bar.tasks[line].total is None:  # what was done before is no part of the rate
                bar.reset(line, total=total, completed=done)
            seconds = bar.tasks[line].elapsed or 0
            rate = f"{source_tokens / seconds:,.0f} sender tokens/s" if seconds and source_tokens else ""
            bar.update(line, completed=done, description=rate)

        corpus = encode_corpus(
            bridge, JsonLines(file, text_field, id_field, keep), out, dtype=dtype, truncate=truncate,
            keep_text=keep_text, overwrite=overwrite, on_progress=show,
        )  # fmt: skip
    typer.echo(f"{out}: {len(corpus):,} documents, {corpus.dtype}, {out.stat().st_size:,} bytes")


@app.command()
def export(
    corpus: File,
    parquet: Annotated[Path, typer.Option(help="File for a table with a row for each document.")],
) -> None:
    """Write a corpus as Parquet: ids, latents as float32, counts, metadata as JSON, and texts where it keeps them."""
    from latentwire.bridge.bulk import write_parquet
    from latentwire.bridge.corpus import Corpus

    found = Corpus(corpus)
    with _bar("documents") as bar:
        line = bar.add_task("", total=len(found))
        write_parquet(found, parquet, on_progress=lambda done: bar.update(line, completed=done))
    typer.echo(f"{parquet}: {len(found):,} rows, {parquet.stat().st_size:,} bytes")


@app.command()
def check(corpus: File) -> None:
    """Read every latent of a corpus, and say what it is; one that is damaged is named."""
    from latentwire.bridge.corpus import Corpus
    from latentwire.bridge.wire import CODED

    found, tokens, numbers = Corpus(corpus), 0, 0
    with _bar("documents") as bar:
        for latent in bar.track(found.values(), total=len(found)):
            # Decoding checks a message; codes, which only their bridge decodes, had their checksum when they were read.
            numbers += math.prod(latent.shape) if found.dtype in CODED else latent.array.size
            tokens += latent.source_tokens
    typer.echo(
        f"{corpus}: {len(found):,} documents of {tokens:,} sender tokens, {numbers:,} numbers in {found.dtype}, "
        f"of bridge {found.bridge_id}; every one is as it was written"
    )


@contextmanager
def _bar(what: str) -> Iterator[Progress]:
    console = Console(stderr=True)
    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn(f"{what} · {{task.description}}"), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar
