"""Real text between two pretrained models: SST-2 and AG News, trained and measured with every control.

Models and data are no part of the project: they are looked for in a folder beside the checkout (``--material``).
"""

import tempfile
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from benchmarks.record import record
from bridge.evaluation.conditions import open_setting
from bridge.evaluation.report import evaluate, table
from training.config import TrainConfig
from training.controls import train_controls
from training.loop import train

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
RECIPE: dict[str, Any] = {
    "encoder": "pooling", "ratio": 8, "layer": [3, 5], "max_steps": 250, "alignment_steps": 80, "alignment_weight": 1.0,
    "reconstruction_weight": 0.0, "batch_size": 32,
}  # fmt: skip


def main(material: Path = MATERIAL, limit: int = 500, task: list[str] | None = None) -> None:
    """Train a bridge for each TASK and record its report against every condition and control."""
    console = Console(width=130)
    for name in task or TASKS:
        before, after, labels = TASKS[name]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.toml"
            data = (material / "data").resolve()
            file.write_text(TASK.format(name=name, data=data, before=before, after=after, labels=labels))
            models = {"sender": str(material / "models" / SENDER), "receiver": str(material / "models" / RECEIVER)}
            config = TrainConfig.model_validate({**models, "task": str(file), "out": Path(folder) / "bridge", **RECIPE})
            train(config, console)
            setting = open_setting(str(config.out), str(file), limit=limit, dtype="float16", receiver=None)
            report = evaluate(setting, trained=train_controls(setting, console))
        console.print(table(report))
        record(
            f"real-{name.split('_')[0]}",
            f"python -m benchmarks.real --task {name} --limit {limit}",
            {"sender": SENDER, "receiver": RECEIVER, "recipe": RECIPE, "report": report},
        )


if __name__ == "__main__":
    typer.run(main)
