"""What the built-in pair reaches, from seeds: bridges of several ratios, for several sources, to a new receiver.

Asked, on held-out facts of the world: of the better of direct and direct_tuned 1.00, .95 and .85 at 4, 8 and 16 sender
tokens to a soft token; content share .95; mismatched at most none + .01; half of the gain over none not reached by an
untrained sender; with four sources within 3 points of their texts; a new receiver's head .90 of its own direct. Each
part is recorded once it is done, and none that is in the newest results file is made again.
"""

import json
import re
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.real import typed
from benchmarks.record import RESULTS, record
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.evaluation import world
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.evaluation.evaluate import progress_bar
from latentwire.bridge.evaluation.measure import measure
from latentwire.bridge.evaluation.metrics import exact_match
from latentwire.bridge.evaluation.statistics import interval
from latentwire.bridge.sampling import SamplingParams
from latentwire.training.config import TrainConfig, read_config
from latentwire.training.controls import train_controls
from latentwire.training.data import chunks
from latentwire.training.loop import train

RECIPE = Path(__file__).resolve().parents[1] / "training" / "builtin" / "bridge.toml"
RATIOS = (4, 8, 16)
SOURCES = (1, 2, 4, 8)
MEASURED = ("bridge", "direct", "none", "mismatched", "noise", "same_budget")
CONTROLS = ("direct_tuned", "random_sender")
COMMON = 0.5  # of the sources: a word that more of them have tells none apart
ROWS = 16
Figures = dict[str, Any]
console = Console()


def recipe(out: Path, steps: int, **changes: Any) -> TrainConfig:
    """That of the built-in bridge, changed."""
    values = {**tomllib.loads(RECIPE.read_text()), "out": out, "max_steps": steps, "validate_every": 0, **changes}
    return read_config(None, values)


def at_ratio(folder: Path, ratio: int, steps: int, limit: int) -> Figures:
    """Train at a ratio, and measure beside the controls, trained as long."""
    train(recipe(folder / "bridge", steps, ratio=ratio), console)
    context = open_context(folder / "bridge", "world", limit=limit, dtype="float16", receiver=None)
    trained = train_controls(context, console, CONTROLS if ratio == RATIOS[0] else CONTROLS[:1])
    with progress_bar(console) as progress:
        report = measure(context, conditions=MEASURED, trained=trained, progress=progress)
    return {"ratio": ratio, "steps": steps, "report": {**report, "checkpoint": "runs/bridge"}}


def several(folder: Path, steps: int, limit: int) -> Figures:
    """Train the shipped bridge on for up to eight sources in a prompt, and ask of an example's own among others."""
    goes_on = {"init": "builtin", "alignment_steps": 0, "reconstruction_weight": 0.0}
    train(recipe(folder / "bridge", steps, sources_per_example=max(SOURCES), **goes_on), console)
    bridges = {"trained_for_it": Bridge.load(folder / "bridge"), "shipped": Bridge.load("builtin")}
    asked = {name: [among(bridge, count, limit) for count in SOURCES] for name, bridge in bridges.items()}
    return {"steps": steps, **asked}


def among(bridge: Bridge, count: int, limit: int) -> Figures:
    """Answers from so many latents, and from so many texts; the one asked about is at a place drawn by chance."""
    scenes = [world.scene("test", 0, i) for i in range(limit)]
    asked = [scene.questions[i * 7919 % len(scene.questions)] for i, scene in enumerate(scenes)]
    sources = [scene.source for scene in scenes]
    prompts = [world.QUESTION.replace("{latent}", "{latents}").replace("{question}", question) for question, _ in asked]
    given = [mixed(sources, question, i, count) for i, (question, _) in enumerate(asked)]
    right: dict[str, list[float]] = {"bridge": [], "direct": []}
    soft_tokens = 0
    for part in chunks(range(limit), ROWS):
        latents = dict(zip(part, bridge.encode([sources[i] for i in part]), strict=True))
        needed = sorted({j for i in part for j in given[i]} - latents.keys())
        latents |= zip(needed, bridge.encode([sources[j] for j in needed]), strict=True) if needed else {}
        made = bridge.generate(
            [[latents[j] for j in given[i]] for i in part], [prompts[i] for i in part], max_tokens=24, temperature=0.0
        )
        soft_tokens += made.usage.soft_tokens
        texts = [tuple(sources[j] for j in given[i]) for i in part]
        name = bridge.receivers[0]
        rows = bridge._rows(name, texts, [prompts[i] for i in part], SamplingParams(24, 0.0), 1)
        read = bridge._answers(name, rows)
        for said, answers in (("bridge", made.texts), ("direct", [one.text for one in read])):
            right[said] += [exact_match(text, f" {asked[i][1]}") for i, text in zip(part, answers, strict=True)]
    return {
        "sources": count,
        "n": limit,
        "soft_tokens": soft_tokens / limit,
        **{name: {"em": float(np.mean(scores)), "interval": interval(scores)} for name, scores in right.items()},
    }


def mixed(sources: Sequence[str], question: str, own: int, count: int) -> list[int]:
    """Which sources a prompt has, in order: its own, and others that say nothing of what is asked about."""
    words = [set(re.findall(r"\w+", source.lower())) for source in sources]
    counts = Counter(word for each in words for word in each)
    rare = {word for word in re.findall(r"\w+", question.lower()) if counts[word] <= COMMON * len(sources)}
    about = rare & words[own]
    drawn = np.random.default_rng((count, own))
    others = [int(j) for j in drawn.permutation(len(sources)) if j != own and not about & words[j]]
    return [[own, *others[: count - 1]][at] for at in drawn.permutation(count)]


def new_receiver(folder: Path, steps: int, limit: int) -> Figures:
    """A head for a model that the built-in bridge has never met, a Llama of another seed, on the frozen encoder."""
    receiver = folder / "llama"
    typed(f"latentwire.training.builtin llama --out {receiver} --seed 1")
    values = tomllib.loads(RECIPE.read_text())
    extended = {"add_receiver": str(receiver), "bridge": "builtin", "max_steps": steps, "out": folder / "bridge"}
    kept = {name: value for name, value in values.items() if name not in ("sender", "receiver")}
    train(read_config(None, {**kept, **extended, "validate_every": 0}), console)
    context = open_context(folder / "bridge", "world", limit=limit, dtype="float16", receiver=str(receiver))
    with progress_bar(console) as progress:
        report = measure(context, conditions=MEASURED, progress=progress)
    report = json.loads(json.dumps({**report, "checkpoint": "runs/bridge"}).replace(str(folder), "runs"))
    return {"receiver": "the built-in Llama from seed 1", "steps": steps, "report": report}


def main(steps: int = 2400, limit: int = 300, part: list[str] | None = None) -> None:
    """Make and record each PART (all): ratio4, ratio8, ratio16, several, receiver; STEPS of training for each."""
    parts: dict[str, Callable[[Path], Figures]] = {
        **{f"ratio{ratio}": partial(at_ratio, ratio=ratio, steps=steps, limit=limit) for ratio in RATIOS},
        "several": partial(several, steps=steps // 4, limit=limit),
        "receiver": partial(new_receiver, steps=steps // 2, limit=limit),
    }
    written = sorted(RESULTS.glob("quality-20*.json"))
    done: dict[str, Figures] = json.loads(written[-1].read_text())["parts"] if written else {}
    for name in part or parts:
        if name in done:
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            made = parts[name](Path(folder))
        done[name] = {**made, "seconds": round(time.perf_counter() - began, 1)}
        record("quality", f"python -m benchmarks.quality --steps {steps} --limit {limit}", {"parts": done})
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
    for one in done.get("several", {}).get("trained_for_it", []):
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
