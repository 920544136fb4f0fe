"""Watching a run: a live view on a terminal, plain lines elsewhere, JSON lines in the folder, trackers when asked.

Dimensions used in this file:
    B batch    A answer columns    V vocabulary
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Literal

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from latentwire.bridge.devices import device_named
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.files import replace_file
from latentwire.training.config import TrainConfig
from latentwire.training.journal import EVENTS, LOG, read_jsonl
from latentwire.training.objectives import answer_mask, answers_right, first_said
from latentwire.training.said import Said

SMOOTHING = 0.95
PLAIN_LINES = 20  # lines a run prints where there is no terminal
TOP = 5  # first-token accuracy is also counted among so many


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimiser step. Measures of the answers are None in the warm start, which has none.

    Attributes:
        phase: ``align`` in the warm start, then ``answer``.
        loss: What was minimised: 1 - cosine while aligning, then weighted nats.
        losses: The objectives that are on, unweighted, means over the step's rows.
        accuracy: Share of answers whose every token was the likeliest (teacher-forced), 0 to 1.
        first_token_top1: Share of answers whose first token was the likeliest; ``top5``: among the five likeliest.
        entropy_nats: Entropy of the first answer token's distribution, averaged over the rows first.
        wanted_entropy_nats: The same of the tokens wanted there: what a perfect receiver would show.
        distinct_ratio: Different outputs / rows, teacher-forced.
        top_share: Share of the commonest output; ``wanted_top_share``: of the commonest answer.
        delta_nats: loss(mismatched latent) - loss(matched), on steps where it was probed.
        gradient_norm: Before clipping.
        seconds: Wall time, waiting for data included; ``data_wait_seconds`` is that part.
        tokens: Sender and receiver tokens that were read, padding not counted.
        flops_per_second: What the models needed for the step, in operations, over ``seconds``; see ``utilisation``.
        mfu: That over the peak of the devices, 0 to 1; None on a CPU, or a GPU whose peak is not known.
        refused: The step was not finite and changed no weight.
    """

    step: int
    phase: Literal["align", "answer"]
    receiver: str
    loss: float
    losses: dict[str, float]
    accuracy: float | None = None
    first_token_top1: float | None = None
    first_token_top5: float | None = None
    entropy_nats: float | None = None
    wanted_entropy_nats: float | None = None
    distinct_ratio: float | None = None
    top_share: float | None = None
    wanted_top_share: float | None = None
    delta_nats: float | None
    gradient_norm: float
    learning_rate: float
    seconds: float
    data_wait_seconds: float
    flops_per_second: float
    mfu: float | None
    tokens: int
    allocated_bytes: int
    reserved_bytes: int
    inactive_bytes: int
    peak_bytes: int
    device_bytes: int
    micro_batch: int
    out_of_memory_count: int
    refused: bool


@dataclass
class AnswerStats:
    """Collects what the answers of a step look like, over all of its forward passes."""

    rows: int = 0
    right: float = 0.0
    top1: int = 0
    top5: int = 0
    first: Tensor | None = None
    outputs: Counter[tuple[int, ...]] = field(default_factory=Counter)
    wanted: Counter[tuple[int, ...]] = field(default_factory=Counter)

    @torch.no_grad()
    def add(self, said: Said) -> None:
        """Count the rows of one forward pass."""
        labels, (first, wanted) = said.labels, first_said(said)
        best = first.topk(min(TOP, first.shape[-1]), dim=-1).indices == wanted[:, None]
        token_ids, mask = said.likeliest(), answer_mask(labels)
        self.rows += len(labels)
        self.right += float(answers_right(token_ids, labels).sum())
        self.top1, self.top5 = self.top1 + int(best[:, 0].sum()), self.top5 + int(best.sum())
        mean = first.float().softmax(dim=-1).sum(dim=0)
        self.first = mean if self.first is None else self.first + mean
        for row, target, real in zip(token_ids.tolist(), labels[:, 1:].tolist(), mask.tolist(), strict=True):
            self.outputs[tuple(token for token, is_real in zip(row, real, strict=True) if is_real)] += 1
            self.wanted[tuple(token for token, is_real in zip(target, real, strict=True) if is_real)] += 1

    def summary(self) -> dict[str, float]:
        """The fields of a record that the answers decide; none where there were no answers."""
        if self.first is None:
            return {}
        starts = Counter(answer[:1] for answer in self.wanted.elements())
        p = self.first / self.rows
        return {
            "accuracy": self.right / self.rows,
            "first_token_top1": self.top1 / self.rows,
            "first_token_top5": self.top5 / self.rows,
            "entropy_nats": float(torch.special.entr(p).sum()),
            "wanted_entropy_nats": -sum(n / self.rows * math.log(n / self.rows) for n in starts.values()) + 0.0,
            "distinct_ratio": len(self.outputs) / self.rows,
            "top_share": max(self.outputs.values()) / self.rows,
            "wanted_top_share": max(self.wanted.values()) / self.rows,
        }


class Monitor:
    """Takes a record per step and the events between them; shows a smoothed loss and accuracy, writes everything."""

    def __init__(self, log: IO[str], events: IO[str], view: "View", *, total: int, trackers: Any = None) -> None:
        self._log, self._events, self._view, self._total, self._trackers = log, events, view, total, trackers
        self._smooth: tuple[float, float] | None = None
        self._phase = ""

    def log(self, record: StepRecord) -> None:
        """Write and show one step."""
        self._log.write(json.dumps(asdict(record)) + "\n")
        if self._trackers is not None:
            self._trackers.log(_numbers(record), step=record.step)
        new = (record.loss, record.accuracy or 0.0)
        old = self._smooth if self._smooth and record.phase == self._phase else new
        loss, accuracy = (SMOOTHING * o + (1 - SMOOTHING) * n for o, n in zip(old, new, strict=True))
        if not record.refused:
            self._smooth, self._phase = (loss, accuracy), record.phase
        right = "–" if record.accuracy is None else f"{accuracy:.3f}"
        self._view.show(record, loss, right)
        every = max(1, self._total // PLAIN_LINES)
        if not self._view.console.is_terminal and (record.step % every == 0 or record.step == self._total):
            self._view.console.print(
                f"step {record.step}/{self._total}  {record.phase:6}  loss {loss:.3f}  answers right {right}  "
                f"gradient {record.gradient_norm:.2f}  {record.seconds * 1000:.0f} ms/step",
                soft_wrap=True,
            )

    def event(self, step: int, event: str, **values: Any) -> None:
        """Write what happened beside the steps: a validation, an alarm, a save, a lack of memory."""
        self._events.write(json.dumps({"step": step, "event": event, **values}) + "\n")
        if self._trackers is not None and event == "validation":
            self._trackers.log({f"validation/{values['metric']}": values["value"]}, step=step)

    def say(self, line: str) -> None:
        """Print a line above the live view."""
        self._view.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _numbers(record: StepRecord) -> dict[str, int | float]:
    flat = {**asdict(record), **{f"loss/{name}": value for name, value in record.losses.items()}}
    return {name: value for name, value in flat.items() if type(value) in (int, float)}


class View:
    """What a terminal shows while a run goes on: a bar, and the numbers that tell a live run from a dead one."""

    def __init__(self, console: Console, *, total: int, start: int) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.fields[phase]:6}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("answers right {task.fields[right]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        shown: dict[str, Any] = {"phase": "", "loss": math.nan, "right": "–"}
        self._bar = self._progress.add_task("training", total=total, completed=start, **shown)
        self._delta: float | None = None
        self.live = Live(self._progress, console=console, refresh_per_second=4, transient=False)

    def show(self, record: StepRecord, loss: float, right: str) -> None:
        """Bring the view to a step."""
        self._progress.update(self._bar, completed=record.step, phase=record.phase, loss=loss, right=right)
        self._delta = self._delta if record.delta_nats is None else record.delta_nats
        if self.console.is_terminal:
            self.live.update(Group(self._progress, self._numbers(record)))

    def _numbers(self, record: StepRecord) -> Table:
        table = Table.grid(padding=(0, 3))
        seconds = max(record.seconds, 1e-9)
        cells = {
            **{name: f"{value:.3f}" for name, value in record.losses.items()},
            "Δ": _or_dash(self._delta, "{:+.2f}"),
            "first token": _or_dash(record.first_token_top1, "{:.2f}"),
            "entropy": _or_dash(record.entropy_nats, "{:.1f}"),
            "distinct": _or_dash(record.distinct_ratio, "{:.2f}"),
            "gradient": f"{record.gradient_norm:.2f}",
            "tokens/s": f"{record.tokens / seconds:,.0f}",
            "MFU": _or_dash(record.mfu, "{:.0%}"),
            "waiting": f"{record.data_wait_seconds / seconds:.0%}",
            "memory": f"{record.peak_bytes / 1e9:.1f} GB",
        }
        for name in cells:
            table.add_column(name, no_wrap=True)
        table.add_row(*[f"[dim]{name}[/dim]" for name in cells])
        table.add_row(*cells.values())
        return table


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


@contextmanager
def watch(folder: Path | None, console: Console, *, total: int, start: int, trackers: Any = None) -> Iterator[Monitor]:
    """Open a monitor for a run that has done ``start`` of ``total`` steps; later lines are dropped.

    Without a folder nothing is written: of several processes one keeps the logs.
    """
    paths = [folder / name if folder else Path(os.devnull) for name in (LOG, EVENTS)]
    for path in paths if folder else ():
        kept = (line for line in read_jsonl(path) if line["step"] <= start)
        replace_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    view = View(console, total=total, start=start)
    with ExitStack() as stack:
        log, events = (stack.enter_context(path.open("a", buffering=1)) for path in paths)
        if console.is_terminal:
            stack.enter_context(view.live)
        yield Monitor(log, events, view, total=total, trackers=trackers)


def records_of(folder: Path) -> Iterator[StepRecord]:
    """The records of a run's log, from its first step."""
    names = {f.name for f in fields(StepRecord)}
    return (StepRecord(**line) for line in read_jsonl(folder / LOG) if line.keys() == names)


def open_trackers(config: TrainConfig) -> Any:
    """Accelerate's trackers, or None where none is asked for.

    Raises:
        InvalidRequest: A tracker's package is not installed.
    """
    if not config.log_with:
        return None
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    there = {str(name) for name in get_available_trackers()}
    if missing := [name for name in config.log_with if name not in there]:
        raise InvalidRequest(f"--log-with {missing[0]}: its package is not installed", param="log_with")
    on_cpu = device_named(config.device).type == "cpu"
    accelerator = Accelerator(cpu=on_cpu, log_with=config.log_with, project_dir=str(config.out))
    plain = {k: v if type(v) in (int, float, str, bool) else str(v) for k, v in config.model_dump(mode="json").items()}
    accelerator.init_trackers("latentwire", config=plain)
    return accelerator
