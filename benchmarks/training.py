"""Training: what a step costs beside the bare receiver, what saving and waiting cost, and that no kill changes the end.

Asked: a step with cached features at 0.85 of the tokens/s of the frozen receiver's forward and backward on the same
shapes; waiting for data under 5 % of the step; saves under 10 % of the run; weights bit-equal after 20 kills; memory
flat over 2,000 steps.
"""

import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.memory import distillation_ratio
from benchmarks.record import command_of, record
from latentwire.bridge.engine import answer_logits
from latentwire.bridge.models import BUILTIN
from latentwire.bridge.prompt import collate
from latentwire.training.config import TrainConfig
from latentwire.training.loop import train
from latentwire.training.monitor import EVENTS, read_jsonl, records_of
from latentwire.training.objectives import answer_loss
from latentwire.training.prepare import prepare, sampler_of
from latentwire.training.step import take_step

BUILT_IN = {"sender": "builtin:neox", "receiver": "builtin:llama", "task": "world", "reconstruction_weight": 0.0}
QUICK = {"validate_every": 0, "probe_every": 0, "alignment_steps": 0}
TINY = {**BUILT_IN, "max_steps": 40, "batch_size": 4, "save_every": 3, "hidden_dim": 64, "depth": 1, **QUICK}


def larger_pair(folder: Path) -> dict[str, str]:
    """Two random models of about 50 million weights, built-in tokenizers: larger than a bridge, as real ones are."""
    torch.manual_seed(0)
    shape = {"hidden_size": 640, "num_hidden_layers": 10, "num_attention_heads": 10, "intermediate_size": 1728}
    made = {
        "neox": GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=1024, max_position_embeddings=512, **shape)),
        "llama": LlamaForCausalLM(LlamaConfig(vocab_size=1024, max_position_embeddings=512, **shape)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name / file).write_bytes((BUILTIN / name / file).read_bytes())
    return {"sender": str(folder / "neox"), "receiver": str(folder / "llama")}


def throughput(models: dict[str, Any], folder: Path, *, batch_size: int, steps: int = 12) -> dict[str, float]:
    """Seconds of a step with cached features, with a live sender, and of the bare receiver on the same rows."""
    seconds: dict[str, float] = {}
    shape = {**BUILT_IN, **models, **QUICK, "max_steps": steps, "batch_size": batch_size, "cache": folder / "cache"}
    for name, cached in (("cached", True), ("live", False)):
        config = TrainConfig(**{**shape, "out": folder / name, "cache_features": cached})
        run = prepare(config, Console(quiet=True))
        sampler = sampler_of(run)
        rows = [[run.sample(config.receivers[0], i) for i in sampler.batch(step)] for step in range(steps)]
        seconds[name] = _median([partial(take_step, run, step, rows[step]) for step in range(steps)])
    with run.residency.use(config.receivers[0]) as receiver:
        passes: list[Callable[[], Any]] = []
        for step in range(steps):
            batch = collate([row.answer for row in rows[step]], side="left")
            soft = torch.randn(batch_size, max(int(batch.slots.max()) + 1, 1), receiver.width, requires_grad=True)

            def bare(batch: Any = batch, soft: Any = soft) -> None:
                torch.autograd.backward(answer_loss(*answer_logits(receiver, batch, soft)).mean())

            passes.append(bare)
        seconds["bare"] = _median(passes)
    for parameter in run.parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    seconds["optimiser"] = _median([run.optimizers[0].step] * 4) + _median([run.optimizers[1].step] * 4)
    weights = sum(p.numel() for p in receiver.model.parameters())
    return {
        "receiver_weights": weights,
        "trained_weights": sum(p.numel() for p in run.parameters),
        "batch_size": batch_size,
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "cached_over_bare_tokens_per_second": seconds["bare"] / seconds["cached"],
        "live_over_bare_tokens_per_second": seconds["bare"] / seconds["live"],
        "cached_without_optimiser_over_bare": seconds["bare"] / (seconds["cached"] - seconds["optimiser"]),
    }


def _median(passes: list[Callable[[], Any]]) -> float:
    times = []
    for one in passes:
        started = time.perf_counter()
        one()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def of_a_run(folder: Path, steps: int) -> dict[str, Any]:
    """Shares of saving and waiting in a run like the demo's, and how memory grew."""
    config = TrainConfig(**{**BUILT_IN, "max_steps": steps, "save_every": 100, "out": folder / "demo"})
    started = time.perf_counter()
    train(config, Console(quiet=True))
    total = time.perf_counter() - started
    records = list(records_of(config.out))
    saves = [line for line in read_jsonl(config.out / EVENTS) if line["event"] == "save"]
    return {
        "steps": steps,
        "seconds": total,
        "data_wait_share": sum(r.data_wait_seconds for r in records) / sum(r.seconds for r in records),
        "save_seconds_each": statistics.fmean(line["seconds"] for line in saves),
        "save_share_of_the_run": sum(line["seconds"] for line in saves) / total,
        "state_bytes": saves[-1]["state_bytes"],
        "checkpoint_bytes": saves[-1]["checkpoint_bytes"],
    }


def flat_memory(folder: Path, steps: int) -> dict[str, float]:
    """Reserved bytes (on a CPU: resident) early and late in a long run of small steps with mixed lengths."""
    config = TrainConfig(**{**TINY, "max_steps": steps, "save_every": steps, "out": folder / "long"})
    train(config, Console(quiet=True))
    held = [record.reserved_bytes for record in records_of(config.out)]
    early, late = (statistics.median(part) for part in (held[steps // 10 : steps // 5], held[-steps // 10 :]))
    return {"steps": steps, "early_bytes": early, "late_bytes": late, "late_over_early": late / early}


def kills(folder: Path, count: int) -> dict[str, Any]:
    """Kill a run ``count`` times at random instants, resuming it each time, and compare its end with a straight one."""
    straight = TrainConfig(**{**TINY, "out": folder / "straight"})
    wanted = train(straight, Console(quiet=True))
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
    draw, equal, landed = random.Random(0), 0, []
    for number in range(count):
        out = folder / f"killed{number}"
        command = [sys.executable, "-m", "latentwire", "train", *flags, f"--out={out}", "--resume"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (out / "log.jsonl").exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 3.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        landed.append(sum(1 for _ in records_of(out)))
        subprocess.run(command, check=True, capture_output=True)
        again = json.loads((out / "config.json").read_bytes())
        equal += again["encoder"]["sha256"] == wanted.encoder.sha256 and again["bridge_id"] == wanted.bridge_id
    return {"kills": count, "bit_equal": equal, "steps_done_at_each_kill": landed, "steps": TINY["max_steps"]}


def main(steps: int = 300, long: int = 2000, count: int = 20, part: list[str] | None = None) -> None:
    """Measure and record each PART (all): throughput of steps, run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if part is None or "throughput" in part:
            pair, small = larger_pair(folder), {"hidden_dim": 128, "latent_dim": 128}
            record(
                "throughput",
                command_of("training", part="throughput"),
                {
                    "threads": torch.get_num_threads(),
                    "built_in_pair": throughput({}, folder / "a", batch_size=32),
                    "larger_pair": throughput(pair, folder / "b", batch_size=16),
                    "larger_pair_small_bridge": throughput({**pair, **small}, folder / "c", batch_size=16),
                },
            )
        if part is None or "run" in part:
            record(
                "training",
                command_of("training", steps=steps, long=long, count=count, part="run"),
                {
                    "run": of_a_run(folder, steps),
                    "memory": flat_memory(folder, long),
                    "distillation": distillation_ratio(folder / "kd"),
                    "resume": kills(folder, count),
                },
            )


if __name__ == "__main__":
    typer.run(main)
