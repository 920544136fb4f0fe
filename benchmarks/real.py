"""Real text between two pretrained models: SST-2 and AG News, trained and measured with every control.

Models and data are no part of the project: they are looked for in a folder beside the checkout (``--material``).
What runs is the command line, as a user types it.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import typer

from benchmarks.record import record

TASKS = {
    "sst2": ("Review", "Sentiment", ["negative", "positive"]),
    "agnews_small": ("News", "Topic", ["world", "sports", "business", "technology"]),
}
TASK = """name = "{name}"
kind = "classification"
train = "{data}/{name}.train.jsonl.gz"
test = "{data}/{name}.test.jsonl.gz"
source = "{{text}}"
prompt = "{before}: {{latent}}\\n{after}:"
label = "label"
labels = {labels}
"""
MATERIAL = Path(__file__).resolve().parents[2] / "shared"
SENDER, RECEIVER = "stories260k-llama", "gpt2-mini-2m"
RECIPE = (
    "--encoder perceiver --num-latents 8 --layer 0 --layer 3 --max-steps 600 --batch-size 32 "
    "--matrix-learning-rate 0.005 --first-token-weight 1 --reconstruction-weight 0"
)


def task_file(name: str, material: Path, folder: Path) -> Path:
    """Write the task file of one of ``TASKS`` into ``folder``."""
    before, after, labels = TASKS[name]
    file, data = folder / f"{name}.toml", material.resolve() / "data"
    file.write_text(TASK.format(name=name, data=data, before=before, after=after, labels=json.dumps(labels)))
    return file


def main(material: Path = MATERIAL, limit: int = 1000, task: list[str] | None = None) -> None:
    """Train a bridge for each TASK and record its report against every condition and control."""
    models = material.resolve() / "models"
    for name in task or TASKS:
        with tempfile.TemporaryDirectory() as folder:
            file = task_file(name, material, Path(folder))
            commands = [
                f"latentwire train --sender {models}/{SENDER} --receiver {models}/{RECEIVER} "
                f"--task {file} --out {folder}/bridge {RECIPE}",
                f"latentwire evaluate {folder}/bridge --task {file} --limit {limit} --controls "
                f"--out {folder}/report.json",
            ]
            for command in commands:
                arguments = shlex.split(command)[1:]
                subprocess.run([sys.executable, "-m", "latentwire", *arguments], check=True)
            report = json.loads((Path(folder) / "report.json").read_text())
            typed = [line.replace(folder, "runs").replace(str(models), "models") for line in commands]
        record(
            f"real-{name.split('_')[0]}",
            f"python -m benchmarks.real --task {name} --limit {limit}",
            {"sender": SENDER, "receiver": RECEIVER, "typed": typed, "report": {**report, "checkpoint": "runs/bridge"}},
        )


if __name__ == "__main__":
    typer.run(main)
