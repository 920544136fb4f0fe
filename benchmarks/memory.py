"""Measured peak memory of a real training step beside what ``latentwire plan`` predicts from the configurations.

Each case is a process of its own: random models of 58 to 124 M weights, prepared as a run prepares them, and the real
step. On a CPU the measure is the high-water mark of the resident set over what was resident before the models came; on
an accelerator the allocator's own.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, PretrainedConfig

from benchmarks.record import record
from latentwire.bridge.models import BUILTIN
from latentwire.training import prepare as preparing
from latentwire.training.config import TrainConfig
from latentwire.training.plan import plan
from latentwire.training.prepare import prepare
from latentwire.training.run import Run
from latentwire.training.simulate import Lengths, tokens_of
from latentwire.training.step import take_step

# Freed memory goes back at once, so that the resident set follows what is alive; a serving heap would keep holes.
GLIBC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(
        hidden_size=512, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2, intermediate_size=1536,
        vocab_size=32000, max_position_embeddings=2048,
    ),
    "neox": lambda: GPTNeoXConfig(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048, vocab_size=32000,
        max_position_embeddings=2048,
    ),
    "gpt2": lambda: GPT2Config(n_embd=768, n_layer=12, n_head=12, vocab_size=50257, n_positions=1024),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One measured step."""

    sender: str
    receiver: str
    batch: int
    source: int
    settings: dict[str, Any] = field(default_factory=dict)
    prompt: int = 32
    answer: int = 32

    def config(self, models: Path) -> TrainConfig:
        """The run: every objective as by default, the probe in every step."""
        return TrainConfig.model_validate(
            {
                "sender": str(models / self.sender),
                "receiver": str(models / self.receiver),
                "task": "world",
                "out": models / "out",
                "batch_size": self.batch,
                "alignment_steps": 0,
                "probe_every": 1,
                "max_source_tokens": self.source,
                "max_steps": 1,
                "validate_every": 0,
                "precision": "fp32",
                **self.settings,
            }
        )

    def lengths(self) -> dict[str, int]:
        """What ``plan`` is told."""
        return {"source_tokens": self.source, "prompt_tokens": self.prompt, "answer_tokens": self.answer}


CHECKPOINTED, TAUGHT, SHORT = {"gradient_checkpointing": True}, {"kd_weight": 1.0}, {"reconstruction_weight": 0.0}
CASES = [
    Case("neox", "llama", 4, 256),
    Case("neox", "llama", 8, 256),
    Case("neox", "llama", 4, 512),
    Case("neox", "llama", 4, 256, CHECKPOINTED),
    Case("neox", "llama", 4, 256, TAUGHT),
    Case("neox", "llama", 4, 256, {**TAUGHT, **CHECKPOINTED, **SHORT}),
    Case("llama", "neox", 8, 256, SHORT),
    Case("llama", "neox", 8, 256, {"margin_weight": 1.0, "continuation_weight": 1.0}),
    Case("llama", "gpt2", 4, 256),
    Case("gpt2", "llama", 2, 512, {"encoder": "perceiver", "layer": [4, 8, 12]}),
    Case("neox", "llama", 4, 512, SHORT, answer=16),
    Case("neox", "llama", 4, 512, {**SHORT, **TAUGHT}, answer=16),
]


def distillation_ratio(folder: Path) -> dict[str, float]:
    """Peak of a step with distillation over the same step without: answer 16, source 512, vocabulary 32,000."""
    for name in ("neox", "llama"):
        _write(name, folder)
    without, taught = (_measured(str(folder), number)["peak_bytes"] for number in (len(CASES) - 2, len(CASES) - 1))
    return {"peak_bytes": without, "peak_bytes_with_kd": taught, "ratio": taught / without}


def _measured(folder: str, number: int) -> dict[str, Any]:
    """A case's figures, from a process of its own."""
    environment = {**os.environ, **GLIBC, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.memory", folder, str(number)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure every case in a process of its own and record the errors."""
    with tempfile.TemporaryDirectory() as folder:
        weights = {name: _write(name, Path(folder)) for name in MODELS}
        measured = []
        for number, case in enumerate(CASES):
            found = _measured(folder, number)
            predicted = plan(case.config(Path(folder)), **case.lengths()).peak_bytes()
            error = predicted / found["peak_bytes"] - 1
            print(f"{case}: measured {found['peak_bytes'] / 1e9:.3f} GB, predicted {predicted / 1e9:.3f}, {error:+.1%}")
            measured.append({**asdict(case), **found, "predicted_bytes": predicted, "error_percent": 100 * error})
    worst = max(measured, key=lambda case: abs(case["error_percent"]))["error_percent"]
    figures = {"weights": weights, "worst_error_percent": worst, "cases": measured, "environment": GLIBC}
    record("memory", "python -m benchmarks.memory", figures)


def _write(name: str, folder: Path) -> int:
    """A random model with the built-in tokenizer, as an ordinary folder; the number of its weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]())
    model.save_pretrained(folder / name)
    for file in (BUILTIN / "llama").glob("tokenizer*.json"):
        shutil.copy(file, folder / name)
    return sum(p.numel() for p in model.parameters())


def measure(models: Path, case: Case) -> dict[str, Any]:
    """Peak bytes of the case's second step over what was there before its models."""
    preparing.CHECKED = 1  # the rows of the step are made here
    console, lengths = Console(quiet=True), Lengths(case.source, case.prompt, case.answer)
    small = Case("neox", "llama", 2, 16, {**case.settings, "sender": "builtin:neox", "receiver": "builtin:llama"})
    if "layer" in case.settings:
        small.settings["layer"] = [1, 2, 3]
    _steps(prepare(small.config(models), console), Lengths(16, 8, 8))  # kernels and code pages are no part of a plan
    before = _resident("VmRSS")
    run = prepare(case.config(models), console)
    if torch.cuda.is_available():
        before = 0
    for name in (case.sender, case.receiver):  # a mapped file is resident once it was read
        with run.residency.use(str(models / name)) as lm:
            sum(float(p.sum()) for p in lm.model.parameters())
    _steps(run, lengths, count=1)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")
    _steps(run, lengths, count=1)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")
    return {
        "peak_bytes": peak - before,
        "before_bytes": before,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def _steps(run: Run, lengths: Lengths, count: int = 2) -> None:
    for _ in range(count):
        take_step(run, 0, [tokens_of(run, lengths, i) for i in range(run.config.batch_size)])


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(f"{name}:"))


def command(models: str = "", case: int = -1) -> None:
    """Without arguments the whole benchmark; the arguments are those of its own processes."""
    if case < 0:
        main()
    else:
        print(json.dumps(measure(Path(models), CASES[case])))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    command(arguments[0], int(arguments[1])) if arguments else typer.run(main)
