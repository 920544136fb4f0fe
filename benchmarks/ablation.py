"""Which objectives earn their place: each one added to (or taken from) the same base, several seeds, two tasks.

``encoders`` changes the encoder, the layers it reads and the head instead; ``first-k`` sweeps how many of an answer's
tokens are supervised. A run is short, so the numbers compare recipes; they are not what a bridge reaches. Runs that are
in the results file already are not made again.
"""

import json
import statistics
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.real import MATERIAL, RECEIVER, SENDER, task_file
from benchmarks.record import RESULTS, record
from latentwire.bridge.checkpoint import save_bridge
from latentwire.bridge.evaluation.conditions import CONDITIONS, predict
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.evaluation.metrics import exact_match
from latentwire.training.config import TrainConfig
from latentwire.training.monitor import StepRecord
from latentwire.training.prepare import prepare, sampler_of
from latentwire.training.run import Run
from latentwire.training.step import take_step

WORLD = {
    "sender": "builtin:neox", "receiver": "builtin:llama", "task": "world", "max_steps": 220, "batch_size": 32,
    "alignment_steps": 120, "cache_features": True,
}  # fmt: skip
REAL = {
    "max_steps": 150, "batch_size": 32, "encoder": "perceiver", "num_latents": 8, "layer": [0, 3],
    "matrix_learning_rate": 0.005, "cache_features": True,
}  # fmt: skip
BASE = {"first_token_weight": 1.0, "reconstruction_weight": 0.0, "validate_every": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "first_token_weight 4": {"first_token_weight": 4.0},
    "first_token_weight 9": {"first_token_weight": 9.0},
    "first_k 4": {"first_k": 4, "first_k_weight": 1.0},
    "kd 1": {"kd_weight": 1.0},
    "reconstruction 1": {"reconstruction_weight": 1.0},
    "reconstruction 1, mode token": {"reconstruction_weight": 1.0, "mode_tokens": 1},
    "continuation 0.5, mode token": {"continuation_weight": 0.5, "mode_tokens": 1},
    "margin 1": {"margin_weight": 1.0},
    "diversity 0.1": {"diversity_weight": 0.1},
    "no alignment": {"alignment_steps": 0},
}
K = (2, 3, 4, 6, 8, 12, 16)
GAIN: dict[str, dict[str, Any]] = {"base": {}, "gain": {"gain": True}}
FIXED = {"num_latents": 14, "alignment_steps": 0}  # as many slots as windows in the mean; no words to align
EVERY = [1, 2, 3, 4]
ENCODERS: dict[str, dict[str, Any]] = {
    "base: pooling, layer 3, head of 256": {},
    "hybrid, 2 global slots": {"encoder": "hybrid", "num_latents": 2},
    "layers 1 to 4 mixed": {"layer": EVERY, "layer_mix": True},
    "layers 1 to 4 side by side": {"layer": EVERY},
    "layer 4": {"layer": [4]},
    "pooled-perceiver": {"encoder": "pooled-perceiver", **FIXED},
    "head of 128": {"head_dim": 128},
    "head of 512": {"head_dim": 512},
    "perceiver": {"encoder": "perceiver", **FIXED},
    "gain": {"gain": True},
}
SHAPE = {"encoder", "num_latents", "layer", "layer_mix", "head_dim", "gain", "sender_lora"}
SENDER_LORA: dict[str, dict[str, Any]] = {"base": {}, "rank 8": {"sender_lora": 8, "cache_features": False}}


def steps_of(run: Run, start: int, stop: int) -> list[StepRecord]:
    """Take steps ``start`` to ``stop``."""
    sampler = sampler_of(run)
    rows = ([run.sample(run.config.receivers[0], i) for i in sampler.batch(step)] for step in range(start, stop))
    return [take_step(run, step, batch) for step, batch in enumerate(rows, start=start)]


def copy_of(run: Run) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Weights and optimiser states."""
    return [p.detach().clone() for p in run.bridge.parameters()], [deepcopy(o.state_dict()) for o in run.optimizers]


class Warm:
    """Runs that differ only in their objectives share one warm start, which knows none of them."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.kept: tuple[list[Tensor], list[dict[str, Any]]] = ([], [])

    def start(self, run: Run) -> int:
        """Bring a run behind its warm start, and return the steps done."""
        steps = run.alignment_steps
        if not steps:
            return 0
        key = (run.task.name, run.config.seed, steps, run.config.model_dump_json(include=SHAPE))
        if self.key != key:
            fresh = prepare(run.config.model_copy(update=BASE), Console(quiet=True))
            steps_of(fresh, 0, steps)
            self.key, self.kept = key, copy_of(fresh)
        weights, states = self.kept
        with torch.no_grad():
            for parameter, weight in zip(run.bridge.parameters(), weights, strict=True):
                parameter.copy_(weight)
        for optimizer, state in zip(run.optimizers, states, strict=True):
            # Learned mode tokens come after all others and have no state yet.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": deepcopy(state["state"]), "param_groups": groups})
        return steps


def run_once(settings: dict[str, Any], limit: int, warm: Warm) -> dict[str, float]:
    """Train once, and measure what crosses on ``limit`` held-out examples."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(TrainConfig(**{**settings, "out": Path(folder) / "run"}), Console(quiet=True))
        start = warm.start(run)
        began = time.perf_counter()
        last = [r for r in steps_of(run, start, run.config.max_steps) if r.delta_nats is not None][-3:]
        seconds = time.perf_counter() - began
        save_bridge(run.config.out, run.bridge)
        context = open_context(run.config.out, run.config.task, limit=limit, dtype="float16", receiver=None)
        right: list[float] = []
        for first in range(0, limit, 50):
            chosen = range(first, min(first + 50, limit))
            said = predict(context, chosen, CONDITIONS["bridge"].read(context, chosen))
            right += [exact_match(said[i - first], context.examples[i].answer) for i in chosen]
    return {
        "value": statistics.fmean(right),
        "seconds_after_warm_start": seconds,
        "delta_nats": statistics.fmean(record.delta_nats or 0.0 for record in last),
        "distinct_ratio": statistics.fmean(record.distinct_ratio or 0.0 for record in last),
        **(
            {"gain": float(torch.as_tensor(run.bridge.head(run.config.receivers[0]).gain).detach())}
            if run.config.gain
            else {}
        ),
    }


def main(
    material: Path = MATERIAL, seeds: int = 3, limit: int = 200, threads: int = 1, only: list[str] | None = None
) -> None:
    """Run every variant with SEEDS seeds on the world and on SST-2; the sweep over k and shapes on the world.

    ONLY names some of the series: ablation-world, ablation-sst2, first-k, gain, encoders, sender-lora.
    """
    torch.set_num_threads(threads)
    warm = Warm()
    with tempfile.TemporaryDirectory() as folder:
        models = material.resolve() / "models"
        real = {**REAL, "sender": str(models / SENDER), "receiver": str(models / RECEIVER)}
        real["task"] = str(task_file("sst2", material, Path(folder)))
        cache = {"cache": Path(folder) / "cache"}
        command = f"python -m benchmarks.ablation --seeds {seeds} --limit {limit} --threads {threads}"
        command += "".join(f" --only {name}" for name in only or [])
        sweep = {f"k {k}": {"answer_weight": 0.0, "first_k_weight": 1.0, "first_k": k} for k in K}
        series: list[tuple[str, str, dict[str, Any], dict[str, dict[str, Any]]]] = [
            ("ablation-world", "world", WORLD, VARIANTS),
            ("ablation-sst2", "sst2", real, {name: v for name, v in VARIANTS.items() if name != "no alignment"}),
            ("first-k", "world", WORLD, sweep),
            ("gain", "world", WORLD, GAIN),
            ("encoders", "world", WORLD, ENCODERS),
            ("sender-lora", "world", WORLD, SENDER_LORA),
        ]
        for seed in range(seeds):  # a run that is cut short has whole seeds of everything
            for name, task, base, variants in (one for one in series if one[0] in (only or [one[0]])):
                for variant, changes in variants.items():
                    settings = {**base, **BASE, **cache, **changes, "seed": seed}
                    _one(name, task, command, settings, variant, limit, warm)


def _one(name: str, task: str, command: str, settings: dict[str, Any], variant: str, limit: int, warm: Warm) -> None:
    """Add one run to the results file of today, unless it is there."""
    found = sorted(RESULTS.glob(f"{name}-20*.json"))
    figures: dict[str, Any] = json.loads(found[-1].read_text())["runs"] if found else {}
    mine = figures.setdefault(variant, {})
    if str(settings["seed"]) in mine:
        return
    mine[str(settings["seed"])] = run_once(settings, limit, warm)
    means = {v: statistics.fmean(one["value"] for one in seeds.values()) for v, seeds in figures.items()}
    steps = {"max_steps": settings["max_steps"], "batch_size": settings["batch_size"]}
    metric = "accuracy" if task == "sst2" else "em"
    record(name, command, {"task": task, "metric": metric, "examples": limit, **steps, "mean": means, "runs": figures})


if __name__ == "__main__":
    typer.run(main)
