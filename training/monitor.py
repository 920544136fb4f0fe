"""Watching a run: a live line on a terminal, plain lines elsewhere, JSON lines in the folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bridge.checkpoint import replace_file

LOG = "log.jsonl"
SMOOTHING = 0.95
PLAIN_LINES = 20  # lines a run prints where there is no terminal


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimiser step.

    Attributes:
        phase: ``align`` in the warm start, then ``answer``.
        loss: What was minimised: 1 - cosine while aligning, then nats.
        answer_loss: Cross-entropy of the answers, nats per token, first token weighted.
        reconstruction_loss: Cross-entropy of the repeated sources, nats per token; 0 when off.
        accuracy: Share of answers whose every token was the likeliest (teacher-forced), 0 to 1.
        gradient_norm: Before clipping.
        learning_rate: Of this step.
        seconds: Wall time of this step.
    """

    step: int
    phase: Literal["align", "answer"]
    loss: float
    answer_loss: float
    reconstruction_loss: float
    accuracy: float
    gradient_norm: float
    learning_rate: float
    seconds: float


class Monitor:
    """Takes a record per step; shows a smoothed loss and accuracy, writes every record."""

    def __init__(self, file: IO[str], progress: Progress, total: int, start: int) -> None:
        self._file, self._progress, self._total = file, progress, total
        self._bar = progress.add_task(
            "training", total=total, completed=start, phase="", loss=float("nan"), accuracy=0.0
        )
        self._smooth: tuple[float, float] | None = None
        self._phase = ""

    def log(self, record: StepRecord) -> None:
        """Write and show one step."""
        self._file.write(json.dumps(asdict(record)) + "\n")
        new = (record.loss, record.accuracy)
        old = self._smooth if self._smooth and record.phase == self._phase else new
        self._phase = record.phase
        loss, accuracy = (SMOOTHING * o + (1 - SMOOTHING) * n for o, n in zip(old, new, strict=True))
        self._smooth = (loss, accuracy)
        self._progress.update(self._bar, completed=record.step, phase=record.phase, loss=loss, accuracy=accuracy)
        every = max(1, self._total // PLAIN_LINES)
        if not self._progress.console.is_terminal and (record.step % every == 0 or record.step == self._total):
            self._progress.console.print(
                f"step {record.step}/{self._total}  {record.phase:6}  loss {loss:.3f}  answers right {accuracy:.3f}  "
                f"gradient {record.gradient_norm:.2f}  {record.seconds * 1000:.0f} ms/step",
                soft_wrap=True,
            )


def _step_of(line: str) -> int:
    """The step of a log line; 0 for what a killed run left of one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0


@contextmanager
def watch(folder: Path, console: Console, *, total: int, start: int) -> Iterator[Monitor]:
    """Open a monitor for a run that has done ``start`` of ``total`` steps; later log lines are dropped."""
    path = folder / LOG
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    replace_file(path, "".join(f"{line}\n" for line in lines if 0 < _step_of(line) <= start).encode())
    progress = Progress(
        TextColumn("{task.fields[phase]:6}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("answers right {task.fields[accuracy]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with path.open("a", buffering=1) as file, progress:
        yield Monitor(file, progress, total, start)
