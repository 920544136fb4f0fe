"""Real text between two pretrained models, where that material, no part of the project, lies beside the checkout."""

import gzip
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from latentwire.bridge.evaluation.conditions import CONDITIONS, TRAINED
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.evaluation.measure import measure
from latentwire.bridge.evaluation.tasks import load_task
from latentwire.training.config import TrainConfig
from latentwire.training.controls import train_controls
from latentwire.training.loop import train

MATERIAL = Path(__file__).resolve().parents[3] / "shared"
TASK = """
name = "sst2"
kind = "classification"
train = "sst2.train.jsonl"
test = "sst2.test.jsonl"
source = "{text}"
prompt = "Review: {latent}\\nSentiment:"
label = "label"
labels = ["negative", "positive"]
"""
pytestmark = pytest.mark.skipif(not MATERIAL.is_dir(), reason=f"no {MATERIAL}")


def some_rows(folder: Path) -> str:
    """The task on the first rows of each split: under the tests' type checks, all of them take a minute to read."""
    for split in ("train", "test"):
        with gzip.open(MATERIAL / "data" / f"sst2.{split}.jsonl.gz", "rt") as file:
            (folder / f"sst2.{split}.jsonl").write_text("".join(next(file) for _ in range(64)))
    (folder / "sst2.toml").write_text(TASK)
    return str(folder / "sst2.toml")


def numbers(value: Any) -> list[float]:
    """Every number of a report."""
    if isinstance(value, dict):
        return [number for inner in value.values() for number in numbers(inner)]
    return [float(value)] if isinstance(value, int | float) else []


def test_a_bridge_between_pretrained_models_is_trained_and_measured_beside_every_condition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where tokens are kept
    task = some_rows(tmp_path)
    config = TrainConfig(
        sender=str(MATERIAL / "models" / "stories260k-llama"), receiver=[str(MATERIAL / "models" / "gpt2-mini-2m")],
        task=task, out=tmp_path / "bridge", ratio=8, layer=[3, 5], max_steps=2, batch_size=4, alignment_steps=1,
        reconstruction_weight=0.5, validation_examples=4,
    )  # fmt: skip
    console = Console(quiet=True)
    manifest = train(config, console)
    assert manifest.bridge.provenance.data_sha256 == load_task(task).data_sha256
    setting = open_context(config.out, task, limit=8, dtype="float16", receiver=None)
    assert {example.answer for example in setting.examples} == {" negative", " positive"}
    report = measure(setting, trained=train_controls(setting, console))
    assert list(report["conditions"]) == [*CONDITIONS, *TRAINED] and report["n"] == 8
    assert all(row["metric"] == "accuracy" for row in report["conditions"].values())
    assert len(numbers(report)) > 40 and all(math.isfinite(number) for number in numbers(report))
    assert report["receiver_tokens_per_soft_token"] > 1 and report["bytes"]["latent"] > 0
