"""A bridge gets a receiver that it has never met: its encoder stays as it is, and a head is trained for the new one.

Between every two models of a folder, in both directions, and the new receiver is the sender's own model: asked is .85
of what it answers from the text itself. A direction that is in the newest results file is not made again.
"""

import json
import re
import tempfile
import time
from itertools import permutations
from pathlib import Path

import typer

from benchmarks.real import MATERIAL, TASKS, Row, console, task_file, typed
from benchmarks.record import RESULTS, record
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.evaluation.evaluate import progress_bar
from latentwire.bridge.evaluation.measure import measure

MEASURED = ("bridge", "direct", "none", "mismatched")


def with_head(pair: tuple[Path, Path], task: str, ratio: int, limit: int, material: Path, folder: Path) -> Row:
    """Train a bridge between a pair and a head for the new receiver, and measure both with their receivers."""
    sender, receiver = pair
    file = task_file(task, material, folder)
    same = f"--task {file} {TASKS[task].recipe} --precision fp32 --cache-features --validate-every 0"
    runs = {
        "bridge": f"--sender {sender} --receiver {receiver} --ratio {ratio} --max-source-tokens 256",
        "extended": f"--bridge {folder}/bridge --add-receiver {sender}",
    }
    made: Row = {"task": task, "ratio": ratio}
    for (name, flags), answers in zip(runs.items(), (receiver, sender), strict=True):
        command, began = f"latentwire train {flags} --out {folder}/{name} {same}", time.perf_counter()
        typed(command)
        seconds = round(time.perf_counter() - began, 1)
        context = open_context(
            folder / name, file, limit=limit, dtype="float16", receiver=str(answers), precision="fp32"
        )
        with progress_bar(console) as progress:
            report = measure(context, conditions=MEASURED, progress=progress)
        made[name] = {"typed": command, "train_seconds": seconds, "report": {**report, "checkpoint": f"runs/{name}"}}
    paths = {str(folder): "runs", str(sender.parent): "models"}
    shown: Row = json.loads(re.sub("|".join(map(re.escape, paths)), lambda found: paths[found[0]], json.dumps(made)))
    return shown


def main(models: Path, material: Path = MATERIAL, task: str = "agnews", ratio: int = 8, limit: int = 200) -> None:
    """Measure new receivers on TASK between all models in the folder MODELS."""
    written = sorted(RESULTS.glob("receivers-20*.json"))
    done: dict[str, Row] = json.loads(written[-1].read_text())["directions"] if written else {}
    for sender, receiver in permutations(sorted(path.parent.resolve() for path in models.glob("*/config.json")), 2):
        direction = f"{task} at {ratio}: {sender.name} to {receiver.name}, then {sender.name}"
        if direction in done:
            continue
        console.print(direction, markup=False, highlight=False)
        with tempfile.TemporaryDirectory() as folder:
            done[direction] = with_head((sender, receiver), task, ratio, limit, material, Path(folder))
        command = f"python -m benchmarks.receivers models --task {task} --ratio {ratio} --limit {limit}"
        record("receivers", command, {"directions": done})
        score = {name: row["value"] for name, row in done[direction]["extended"]["report"]["conditions"].items()}
        console.print(f"bridge {score['bridge']:.3f}, of its own direct {score['direct']:.3f} (asked .85 of it)")


if __name__ == "__main__":
    typer.run(main)
