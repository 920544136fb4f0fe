"""Does it help to pretrain on plain text? The world's sources as text, then the world's questions, at equal steps.

Runs that are in the results file already are not made again.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from benchmarks.record import RESULTS, record
from latentwire.bridge.evaluation.conditions import CONDITIONS, predict
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.evaluation.metrics import exact_match
from latentwire.bridge.evaluation.tasks import World
from latentwire.training.config import TrainConfig
from latentwire.training.loop import train
from latentwire.training.pretrain import PretrainConfig

NAME = "pretrain-world"
PAIR = {"sender": "builtin:neox", "receiver": "builtin:llama", "batch_size": 32}
TEXTS, TEXT_SEED = 20_000, 7  # scenes of a seed of their own: not one of them is asked about in training
VARIANTS: dict[str, tuple[int, int]] = {"0 + 300": (0, 300), "150 + 150": (150, 150), "150 + 300": (150, 300)}
"""Steps of pretraining and of training."""


def right(checkpoint: Path, limit: int) -> float:
    """Exact match on held-out facts."""
    context = open_context(checkpoint, "world", limit=limit, dtype="float16", receiver=None)
    scores: list[float] = []
    for first in range(0, limit, 50):
        chosen = range(first, min(first + 50, limit))
        said = predict(context, chosen, CONDITIONS["bridge"].read(context, chosen))
        scores += [exact_match(text, context.examples[i].answer) for i, text in zip(chosen, said, strict=True)]
    return statistics.fmean(scores)


def main(seeds: int = 2, limit: int = 200, threads: int = 1) -> None:
    """Every variant with SEEDS seeds; both that pretrain share one pretraining."""
    torch.set_num_threads(threads)
    console = Console(quiet=True)
    command = f"python -m benchmarks.pretrain --seeds {seeds} --limit {limit} --threads {threads}"
    found = sorted(RESULTS.glob(f"{NAME}-20*.json"))
    runs: dict[str, Any] = json.loads(found[-1].read_text())["runs"] if found else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, scenes = folder / "world.txt", World("train", TEXTS, seed=TEXT_SEED)
        text.write_text("\n\n".join(scenes[i].source for i in range(TEXTS)))
        for seed in range(seeds):
            shared = {**PAIR, "seed": seed, "validate_every": 0, "cache": folder / "cache"}
            pretrained: dict[int, float] = {}
            for variant, (before, after) in VARIANTS.items():
                if str(seed) in runs.setdefault(variant, {}):
                    continue
                base, out = folder / f"{seed}-{before}", folder / f"{seed}-{before}-{after}"
                if before and before not in pretrained:
                    began = time.perf_counter()
                    train(PretrainConfig(**shared, text=[str(text)], out=base, max_steps=before), console)
                    pretrained[before] = time.perf_counter() - began
                began, init = time.perf_counter(), {"init": str(base)} if before else {}
                train(TrainConfig(**shared, **init, task="world", out=out, max_steps=after), console)
                runs[variant][str(seed)] = {
                    "em": right(out, limit),
                    **({"em_before": right(base, limit)} if before else {}),
                    "seconds": {"pretrain": pretrained.get(before, 0.0), "train": time.perf_counter() - began},
                }
                means = {
                    v: statistics.fmean(one["em"] for one in by_seed.values()) for v, by_seed in runs.items() if by_seed
                }
                figures = {"task": "world", "metric": "em", "examples": limit, "texts": TEXTS, "batch_size": 32}
                record(NAME, command, {**figures, "mean": means, "runs": runs})


if __name__ == "__main__":
    typer.run(main)
