"""How many bytes a latent needs: bridges of several widths on the world, each sent as float16, int8 and int4.

Beside them stand the source as text, the same packed by zlib, and cut to as many bytes as a message has. A bridge that
is there and has codebooks (``latentwire quantise``) is measured in these too (``--checkpoint``). A width that is in the
results file of today already is not trained again.
"""

import json
import statistics
import tempfile
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, record
from latentwire.bridge.evaluation.conditions import CONDITIONS, predict
from latentwire.bridge.evaluation.context import EvaluationContext, open_context
from latentwire.bridge.evaluation.metrics import exact_match
from latentwire.bridge.evaluation.statistics import interval
from latentwire.bridge.wire import CODED, DType
from latentwire.training.config import demo_config
from latentwire.training.loop import train

WIDTHS = (8, 16, 32, 64, 128)
DTYPES: tuple[DType, ...] = ("float16", "int8", "int4")
BATCH = 50
NAME = "bytes-world"


def scored(context: EvaluationContext, readings: list[Any]) -> dict[str, Any]:
    """Exact match of the answers from readings, with its interval."""
    said: list[str] = []
    for start in range(0, len(readings), BATCH):
        chosen = range(start, min(start + BATCH, len(readings)))
        said += predict(context, chosen, readings[start : chosen.stop])
    right = [exact_match(text, example.answer) for text, example in zip(said, context.examples, strict=True)]
    return {"em": statistics.fmean(right), "interval": interval(right)}


def read(context: EvaluationContext, condition: str) -> list[Any]:
    """What a condition gives the receiver, for every example."""
    parts = (
        range(start, min(start + BATCH, len(context.examples))) for start in range(0, len(context.examples), BATCH)
    )
    return [reading for part in parts for reading in CONDITIONS[condition].read(context, part)]


def measured(out: Path, width: int, steps: int, seed: int, limit: int, console: Console) -> list[dict[str, Any]]:
    """Train a bridge whose latent is so wide, and measure it in each dtype."""
    train(demo_config(out, steps).model_copy(update={"latent_dim": width, "seed": seed}), console)
    return sent(out, DTYPES, limit)


def sent(checkpoint: str | Path, dtypes: Sequence[DType], limit: int) -> list[dict[str, Any]]:
    """Measure a bridge in each dtype, beside its receiver reading as many bytes of the text."""
    found = []
    for dtype in dtypes:
        context = open_context(checkpoint, "world", limit=limit, dtype=dtype, receiver=None)
        latents, width = read(context, "bridge"), context.bridge.config.encoder.latent_dim
        size = statistics.fmean(context.message_bytes(len(latent)) for latent in latents)
        found.append({"latent_dim": width, "dtype": dtype, "bytes": size, **scored(context, latents)})
        budget = [context.message_bytes(len(latent)) for latent in latents]
        sources = [example.source for example in context.examples]
        cut = [text.encode()[:most].decode(errors="ignore") for text, most in zip(sources, budget, strict=True)]
        found[-1]["text_cut_to_as_many_bytes"] = scored(context, cut)
    return found


def main(
    steps: int = 440, seed: int = 0, limit: int = 300, width: list[int] | None = None, checkpoint: str | None = None
) -> None:
    """Train for STEPS at each WIDTH, and measure LIMIT held-out examples; or those of a quantised CHECKPOINT."""
    console = Console()
    if checkpoint is not None:
        rows = sent(checkpoint, [*DTYPES, *CODED], limit)
        texts = texts_of(limit)
        record(
            f"bytes-{Path(checkpoint).name}",
            f"python -m benchmarks.bytes --checkpoint {checkpoint} --limit {limit}",
            {"examples": limit, "source_bytes": texts, "rows": rows},
        )
        console.print(table(rows, texts))
        return
    written = sorted(RESULTS.glob(f"{NAME}-20*.json"))
    rows = json.loads(written[-1].read_text())["rows"] if written else []
    for wide in width or WIDTHS:
        if not any(row["latent_dim"] == wide for row in rows):
            with tempfile.TemporaryDirectory() as folder:
                rows += measured(Path(folder) / "run", wide, steps, seed, limit, console)
        texts = texts_of(limit)
        best = max(row["em"] for row in rows if row["dtype"] == "float16")
        figures = {"steps": steps, "seed": seed, "examples": limit, "source_bytes": texts, "best_float16": best}
        record(NAME, f"python -m benchmarks.bytes --steps {steps} --limit {limit}", {**figures, "rows": rows})
    console.print(table(rows, texts_of(limit)))


@cache
def texts_of(limit: int) -> dict[str, Any]:
    """Bytes of the sources as text and packed, and what the receiver answers from them."""
    context = open_context("builtin", "world", limit=limit, dtype="float16", receiver=None)
    sources = [example.source.encode() for example in context.examples]
    return {
        "text": statistics.fmean(map(len, sources)),
        "text_zlib": statistics.fmean(len(zlib.compress(source, 9)) for source in sources),
        "direct": scored(context, read(context, "direct")),
    }


def table(rows: list[dict[str, Any]], texts: dict[str, Any]) -> Table:
    """Every row, for people."""
    shown = Table("C", "dtype", "bytes", "bytes / text", "EM", "interval", "text of as many bytes")
    for row in rows:
        low, high = row["interval"]
        share = row["bytes"] / texts["text"]
        cells = (row["latent_dim"], row["dtype"], f"{row['bytes']:.0f}", f"{share:.2f}", f"{row['em']:.3f}")
        cut = row["text_cut_to_as_many_bytes"]["em"]
        shown.add_row(*map(str, cells), f"{low:.3f} – {high:.3f}", f"{cut:.3f}")
    return shown


if __name__ == "__main__":
    typer.run(main)
