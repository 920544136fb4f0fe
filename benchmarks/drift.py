"""How far the latents of texts of several kinds are from those of training texts: where to put the alert's limit.

Windows of as many texts as the service needs at least, and of as many as it keeps, are drawn from each kind.
"""

import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.record import command_of, record
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.evaluation.tasks import load_task
from latentwire.service.metrics import FEWEST, WINDOW

ROOT = Path(__file__).parents[1]
ROWS, DRAWS, CHARACTERS = 32, 100, 300


def pieces(pattern: str) -> list[str]:
    """Pieces of some hundred characters, between words, of files of this project."""
    whole = " ".join(path.read_text() for path in sorted(ROOT.glob(pattern)))
    return [piece.strip() for piece in re.findall(rf"(?s).{{{CHARACTERS}}}\S*\s", whole)]


def kinds(task: str) -> dict[str, Callable[[Random], list[str]]]:
    """Texts by their kind, at least as many as a window holds; those of a task were not trained on."""
    test = [load_task(task).test[i].source for i in range(WINDOW)]
    prose, code = pieces("docs/*.md"), pieces("bridge/*.py")
    return {
        "the task's": lambda _: test,
        "the task's, one in ten is prose": lambda _: [prose[i] if i % 10 == 0 else one for i, one in enumerate(test)],
        "the task's, every other is prose": lambda _: [prose[i] if i % 2 == 0 else one for i, one in enumerate(test)],
        "the task's, words shuffled": lambda draw: [" ".join(draw.sample(w := one.split(), len(w))) for one in test],
        "the task's, one sentence each": lambda draw: draw.sample(
            [f"{said}." for one in test for said in one.rstrip(".").split(". ")], WINDOW
        ),
        "one text, another number each": lambda _: [f"{test[0]} {i}" for i in range(WINDOW)],
        "prose": lambda draw: draw.sample(prose, WINDOW),
        "code": lambda draw: draw.sample(code, WINDOW),
        "numbers": lambda draw: [" ".join(str(draw.randint(0, 99999)) for _ in range(20)) for _ in range(WINDOW)],
    }


def slots(bridge: Bridge, texts: list[str]) -> NDArray[np.float32]:
    """The mean slot (C,) of each text's latent, as the service keeps it."""
    parts = [texts[start : start + ROWS] for start in range(0, len(texts), ROWS)]
    latents = [latent.array for part in parts for latent in bridge.encode(part, dtype="float32", truncate=True)]
    return np.stack([latent.mean(axis=0) for latent in latents])


def main(checkpoint: str = "builtin", task: str = "world") -> None:
    """Measure the drift of each kind; recorded as ``drift``."""
    bridge, draw = Bridge.load(checkpoint), Random(0)
    assert bridge.statistics is not None, "latentwire calibrate makes its statistics"
    table, rows = Table("texts", f"{FEWEST} of them: mean (least – most)", f"all {WINDOW}"), dict[str, Any]()
    for name, made in kinds(task).items():
        of = slots(bridge, made(draw))
        drawn = [bridge.statistics.drift(list(of[draw.sample(range(WINDOW), FEWEST)])) for _ in range(DRAWS)]
        rows[name] = {
            "few": {"mean": float(np.mean(drawn)), "least": min(drawn), "most": max(drawn)},
            "all": bridge.statistics.drift(list(of)),
        }
        few = f"{np.mean(drawn):.2f} ({min(drawn):.2f} – {max(drawn):.2f})"
        table.add_row(name, few, f"{rows[name]['all']:.2f}")
    Console().print(table)
    figures = {"checkpoint": checkpoint, "task": task, "statistics_of": bridge.statistics.texts, "drift": rows}
    record("drift", command_of("drift"), figures)


if __name__ == "__main__":
    typer.run(main)
