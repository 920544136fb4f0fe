"""What the built-in pair reaches, from seeds: bridges of several ratios, for several sources, to a new receiver.

Asked, on held-out facts of the world: of the better of direct and direct_tuned 1.00, .95 and .85 at 4, 8 and 16 sender
tokens to a soft token; content share .95; mismatched at most none + .01; half of the gain over none not reached by an
untrained sender; with four sources within 3 points of their texts; a new receiver's head .90 of its own direct. Each
part is recorded once it is done, with the command that makes it; none that is in the newest results file is made again,
unless ``--again`` says so.
"""

import json
import tempfile
import time
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, command_of, record
from benchmarks.several import SOURCES, among
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.evaluation.evaluate import progress_bar
from latentwire.bridge.evaluation.measure import measure
from latentwire.training.config import TrainConfig, read_config
from latentwire.training.controls import train_controls
from latentwire.training.loop import train

RECIPE = Path(__file__).resolve().parents[1] / "training" / "builtin" / "bridge.toml"
RATIOS = (4, 8, 16)
MEASURED = ("bridge", "direct", "none", "mismatched", "noise", "same_budget")
CONTROLS = ("random_sender",)  # direct is 1.00 here: learning the task first could add nothing to it
Figures = dict[str, Any]
console = Console()


def recipe(out: Path, steps: int, **changes: Any) -> TrainConfig:
    """That of the built-in bridge, changed."""
    values = {**tomllib.loads(RECIPE.read_text()), "out": out, "max_steps": steps, "validate_every": 0, **changes}
    return read_config(None, values)


def at_ratio(folder: Path, ratio: int, steps: int, limit: int) -> Figures:
    """Train at a ratio, and measure; at the first one beside a bridge trained as long on an untrained sender."""
    train(recipe(folder / "bridge", steps, ratio=ratio, alignment_steps=None), console)  # a third of the steps
    context = open_context(folder / "bridge", "world", limit=limit, dtype="float16", receiver=None)
    trained = train_controls(context, console, CONTROLS) if ratio == RATIOS[0] else {}
    with progress_bar(console) as progress:
        report = measure(context, conditions=MEASURED, trained=trained, progress=progress)
    return {"ratio": ratio, "steps": steps, "report": {**report, "checkpoint": "runs/bridge"}}


def several(limit: int) -> Figures:
    """Ask the shipped bridge of an example's own source among others."""
    bridge = Bridge.load("builtin")
    return {"bridge_id": bridge.manifest.bridge_id, "shipped": [among(bridge, count, limit) for count in SOURCES]}


def new_receiver(folder: Path, steps: int, limit: int) -> Figures:
    """A head for a receiver that the built-in bridge has never met, the sender's own model, on the frozen encoder."""
    receiver = "builtin:neox"
    kept = {key: value for key, value in tomllib.loads(RECIPE.read_text()).items() if key not in ("sender", "receiver")}
    added = {"add_receiver": receiver, "bridge": "builtin", "max_steps": steps, "out": folder / "bridge"}
    train(read_config(None, {**kept, **added, "validate_every": 0}), console)
    context = open_context(folder / "bridge", "world", limit=limit, dtype="float16", receiver=receiver)
    with progress_bar(console) as progress:
        report = measure(context, conditions=MEASURED, progress=progress)
    return {"receiver": receiver, "steps": steps, "report": {**report, "checkpoint": "runs/bridge"}}


def main(steps: int = 2400, limit: int = 300, part: list[str] | None = None, again: bool = False) -> None:
    """Make and record each PART (all): ratio4, ratio8, ratio16, several, receiver; STEPS of training for each.

    What is recorded is not made again, unless asked for AGAIN.
    """
    parts: dict[str, Callable[[Path], Figures]] = {
        **{f"ratio{ratio}": partial(at_ratio, ratio=ratio, steps=steps, limit=limit) for ratio in RATIOS},
        "several": lambda _: several(limit),
        "receiver": partial(new_receiver, steps=steps // 2, limit=limit),
    }
    written = sorted(RESULTS.glob("quality-20*.json"))
    done: dict[str, Figures] = json.loads(written[-1].read_text())["parts"] if written else {}
    for name in part or parts:
        if name in done and not again:
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            made = parts[name](Path(folder))
        typed = command_of("quality", steps=steps, limit=limit, part=name, again=again)
        done[name] = {**made, "command": typed, "seconds": round(time.perf_counter() - began, 1)}
        record(
            "quality", command_of("quality", steps=steps, limit=limit, part=part, again=again), {"parts": done}, RESULTS
        )
    console.print(table(done))


def table(done: dict[str, Figures]) -> Table:
    """Asked beside measured."""
    shown = Table("what", "asked", "measured")
    for ratio, asked in zip(RATIOS, ("1.00", ".95", ".85"), strict=True):
        if found := done.get(f"ratio{ratio}"):
            report = found["report"]
            best, share = report["headline"]["ratio"], report["content_share"]
            shown.add_row(f"bridge / better of direct and direct_tuned at {ratio}×", f"≥ {asked}", f"{best:.3f}")
            shown.add_row(f"content share at {ratio}×", "≥ .95", f"{share:.3f}")
    for one in done.get("several", {}).get("shipped", []):
        asked = "within .03 of the texts" if one["sources"] == 4 else ""
        shown.add_row(
            f"{one['sources']} sources", asked, f"{one['bridge']['em']:.3f} (texts {one['direct']['em']:.3f})"
        )
    if found := done.get("receiver"):
        score = {name: row["value"] for name, row in found["report"]["conditions"].items()}
        shown.add_row("new receiver / its own direct", "≥ .90", f"{score['bridge'] / score['direct']:.3f}")
    return shown


if __name__ == "__main__":
    typer.run(main)
