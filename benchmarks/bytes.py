"""How many bytes a latent needs: bridges of several widths on the world, each sent as float16, int8 and int4.

Beside them stand the source as text, the same packed by zlib, and cut to as many bytes as a message has. A width that
is in the results file of today already is not trained again.
"""

import json
import statistics
import tempfile
import zlib
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
from latentwire.bridge.wire import DType
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
    found = []
    for dtype in DTYPES:
        context = open_context(out, "world", limit=limit, dtype=dtype, receiver=None)
        latents = read(context, "bridge")
        size = statistics.fmean(context.message_bytes(len(latent)) for latent in latents)
        found.append({"latent_dim": width, "dtype": dtype, "bytes": size, **scored(context, latents)})
        budget = [context.message_bytes(len(latent)) for latent in latents]
        sources = [example.source for example in context.examples]
        cut = [text.encode()[:most].decode(errors="ignore") for text, most in zip(sources, budget, strict=True)]
        found[-1]["text_cut_to_as_many_bytes"] = scored(context, cut)
    return found


def main(steps: int = 440, seed: int = 0, limit: int = 300, width: list[int] | None = None) -> None:
    """Train for STEPS at each WIDTH, and measure LIMIT held-out examples."""
    console = Console()
    written = sorted(RESULTS.glob(f"{NAME}-20*.json"))
    rows: list[dict[str, Any]] = json.loads(written[-1].read_text())["rows"] if written else []
    texts: dict[str, Any] = {}
    for wide in width or WIDTHS:
        if not any(row["latent_dim"] == wide for row in rows):
            with tempfile.TemporaryDirectory() as folder:
                rows += measured(Path(folder) / "run", wide, steps, seed, limit, console)
        context = open_context("builtin", "world", limit=limit, dtype="float16", receiver=None)
        sources = [example.source.encode() for example in context.examples]
        texts = {
            "text": statistics.fmean(map(len, sources)),
            "text_zlib": statistics.fmean(len(zlib.compress(source, 9)) for source in sources),
            "direct": texts.get("direct") or scored(context, read(context, "direct")),
        }
        best = max(row["em"] for row in rows if row["dtype"] == "float16")
        figures = {"steps": steps, "seed": seed, "examples": limit, "source_bytes": texts, "best_float16": best}
        record(NAME, f"python -m benchmarks.bytes --steps {steps} --limit {limit}", {**figures, "rows": rows})
    shown = Table("C", "dtype", "bytes", "bytes / text", "EM", "interval", "text of as many bytes")
    for row in rows:
        low, high = row["interval"]
        share = row["bytes"] / texts["text"]
        cells = (row["latent_dim"], row["dtype"], f"{row['bytes']:.0f}", f"{share:.2f}", f"{row['em']:.3f}")
        cut = row["text_cut_to_as_many_bytes"]["em"]
        shown.add_row(*map(str, cells), f"{low:.3f} – {high:.3f}", f"{cut:.3f}")
    console.print(shown)


if __name__ == "__main__":
    typer.run(main)
