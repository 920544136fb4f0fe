"""What the tests of training share: quiet consoles, what a run left in its folder, tasks of a few rows."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from latentwire.bridge.config import Manifest
from latentwire.bridge.evaluation.tasks import Example
from latentwire.bridge.models import FrozenLM
from latentwire.training import loop
from latentwire.training.config import TrainConfig
from latentwire.training.monitor import StepRecord
from latentwire.training.prepare import prepare, sampler_of
from latentwire.training.run import Run
from latentwire.training.step import take_step
from latentwire.training.tokens import Tokens

ROOT = Path(__file__).resolve().parents[2]

TIMES = {
    "seconds", "data_wait_seconds", "flops_per_second", "allocated_bytes", "reserved_bytes", "peak_bytes",
}  # fmt: skip
"""What differs from run to run."""

WEIGHTS = {
    "answer": 0.7, "first_k": 0.3, "kd": 0.4, "reconstruction": 0.6, "continuation": 0.2, "margin": 0.9,
    "diversity": 0.8, "alignment": 0.5,
}  # fmt: skip
"""A weight of its own for every objective there is."""

LOGS = {".jsonl", ".log"}


class Stopped(Exception):
    """The run was interrupted on purpose."""


def quiet() -> Console:
    return Console(file=io.StringIO())


def said(console: Console) -> str:
    """What a quiet console took, in one line."""
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def prepared(config: TrainConfig) -> Run:
    return prepare(config, quiet())


def step_of(run: Run, step: int) -> StepRecord:
    """Take one step as the loop would."""
    name = run.receiver_of(step)
    return take_step(run, step, [run.sample(name, i) for i in run.ranks.share(sampler_of(run).batch(step))])


def tokens_of(run: Run, examples: Sequence[Example]) -> list[Tokens]:
    """The examples as the first receiver will read them."""
    return [run.tokenisers[run.config.receivers[0]](example) for example in examples]


def examples_of(run: Run, count: int = 3) -> list[Example]:
    return [run.train[i] for i in range(count)]


def receiver_of(run: Run) -> FrozenLM:
    """The first receiver, loaded."""
    with run.residency.use(run.config.receivers[0]) as lm:
        return lm


class Noting(torch.optim.Optimizer):
    """Moves nothing and keeps the gradients it was given."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.seen: dict[int, Tensor] = {}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.seen[id(p)] = torch.zeros_like(p) if p.grad is None else p.grad.clone()


def measured(run: Run, rows: Sequence[Tokens], *, step: int = 1000, **changes: Any) -> tuple[StepRecord, list[Tensor]]:
    """What a step of these rows records, and its gradients before clipping; it changes nothing.

    ``changes`` are settings of this step alone; ``step`` 1000 lies behind any warm start.
    """
    noting = [Noting(optimizer.param_groups[0]["params"]) for optimizer in run.optimizers]
    shape = {"batch_size": len(rows), "accumulate": 1, "clip_norm": 1e9, "max_steps": 2000, **changes}
    config = run.config.model_copy(update=shape)
    record = take_step(replace(run, config=config, optimizers=list(noting), micro_batch=len(rows)), step, rows)
    seen = noting[0].seen | noting[1].seen
    return record, [seen[id(p)] for p in run.parameters]


def stop_before(patch: pytest.MonkeyPatch, fatal: int) -> None:
    """Interrupt a run when it takes step ``fatal``, counted from 0."""

    def stopping(run: Run, step: int, rows: Sequence[Tokens], *, waited: float) -> StepRecord:
        if step == fatal:
            raise Stopped
        return take_step(run, step, rows, waited=waited)

    patch.setattr(loop, "take_step", stopping)


def interrupted(config: TrainConfig, fatal: int, *, resume: bool = False) -> None:
    """Run ``config`` until it takes step ``fatal``, counted from 0."""
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, fatal)
        with pytest.raises(Stopped):
            loop.train(config, quiet(), resume=resume)


def steps_taken(patch: pytest.MonkeyPatch) -> list[int]:
    """The steps that the runs to come will take, as they take them."""
    taken: list[int] = []

    def counting(run: Run, step: int, rows: Sequence[Tokens], *, waited: float) -> StepRecord:
        taken.append(step)
        return take_step(run, step, rows, waited=waited)

    patch.setattr(loop, "take_step", counting)
    return taken


def states_of(folder: Path) -> list[str]:
    """Names of the states in a run's folder, oldest first."""
    return sorted(path.name for path in folder.glob("state-*.json"))


def events_of(folder: Path, event: str) -> list[dict[str, Any]]:
    """A run's events of one kind."""
    return [line for line in log_of(folder, "events.jsonl") if line["event"] == event]


def weights_of_run(run: Run) -> list[Tensor]:
    return [p.detach().clone() for p in run.parameters]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two lists of tensors agree bit for bit."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def parts(manifest: Manifest) -> list[str]:
    """Digests of all trained weights."""
    return [manifest.encoder.sha256, *(part.sha256 for part in manifest.heads.values())]


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything a run keeps, by name, but for its logs."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix not in LOGS}


def log_of(folder: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    """A run's records without what differs from one machine's moment to the next."""
    records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def write_toml(path: Path, config: TrainConfig) -> Path:
    values = config.model_dump(mode="json", exclude_none=True)
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return path


def task_of(folder: Path, *rows: tuple[str, str, str]) -> str:
    """A task whose rows are (source, what follows the latent, answer); the test sources are in other words."""
    for name in ("rows", "test"):
        told = [source if name == "rows" else f"So {' '.join(reversed(source.split()))}" for source, _, _ in rows]
        lines = [
            json.dumps({"t": t, "q": asked, "a": answer}) for t, (_, asked, answer) in zip(told, rows, strict=True)
        ]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "task.toml").write_text(
        'name = "few"\nkind = "generation"\ntrain = "rows.jsonl"\ntest = "test.jsonl"\n'
        'source = "{t}"\nprompt = "{latent}{q}"\nanswer = "{a}"\n'
    )
    return str(folder / "task.toml")
