"""How long a run takes: a few of its own steps, timed, before it starts or as it goes."""

import time
from collections import Counter
from dataclasses import dataclass, field
from statistics import median

from rich.console import Console
from rich.progress import Progress

from latentwire.training.base import completed
from latentwire.training.config import TrainConfig
from latentwire.training.monitor import StepRecord
from latentwire.training.prepare import prepare, sampler_of
from latentwire.training.run import Phase, Run
from latentwire.training.step import take_step

MEASURED = 3  # steps of each kind; their median forgives the first, which loads models
WORTH_SAYING = 60.0  # seconds; nobody plans for less


@dataclass(frozen=True, slots=True)
class Part:
    """Steps of one kind: how many a run has, and the seconds of one."""

    phase: Phase
    steps: int
    seconds: float

    def __str__(self) -> str:
        whose = " of the warm start" if self.phase == "align" else ""
        return f"{self.steps:,} step{'s' * (self.steps != 1)}{whose} of {words(self.seconds)}"


@dataclass(frozen=True, slots=True)
class Duration:
    """How long a run takes without its validations and saves; with cached features, what the sender reads before."""

    parts: tuple[Part, ...]
    reading_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.reading_seconds + sum(part.steps * part.seconds for part in self.parts)

    def __str__(self) -> str:
        read = [f"the sender reads for {words(self.reading_seconds)}"] if self.reading_seconds else []
        return f"about {words(self.seconds)}: {', '.join([*read, *map(str, self.parts)])} (measured on {MEASURED})"


def words(seconds: float) -> str:
    """A time in the unit in which people would say it."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}" if unit == "h" else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def measure(config: TrainConfig, console: Console) -> Duration:
    """Take ``MEASURED`` steps of each phase and receiver of a run, and keep nothing of them (errors as ``prepare``)."""
    config = completed(config)
    run = prepare(config.model_copy(update={"cache_features": False}), console)
    kinds: dict[tuple[Phase, str], list[int]] = {}
    for step in range(config.max_steps):
        kinds.setdefault((run.phase(step), run.receiver_of(step)), []).append(step)
    parts, reading, rows = [], 0.0, 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("taking a few steps", total=sum(min(len(s), MEASURED) for s in kinds.values()))
        for (phase, _), steps in kinds.items():
            taken, read = [], []
            for step in steps[:MEASURED]:
                record, seconds = _one(run, step)
                taken.append(record.seconds)
                read.append(seconds)
                progress.advance(bar)
            spared = median(read) if config.cache_features else 0.0
            parts.append(Part(phase, len(steps), max(median(taken) - spared, 0.0)))
            reading, rows = reading + median(read), rows + run.rows_per_step
    sampler = sampler_of(run)
    seen = Counter(i for step in range(config.max_steps) for i in sampler.batch(step)) if config.cache_features else {}
    return Duration(tuple(parts), reading / rows * len(seen))


def _one(run: Run, step: int) -> tuple[StepRecord, float]:
    """A step, and the seconds in which the sender reads its sources once more."""
    name = run.receiver_of(step)
    rows = [run.sample(name, i) for i in run.ranks.share(sampler_of(run).batch(step))]
    record, started = take_step(run, step, rows), time.perf_counter()
    run.states.read([row.source for row in rows], multiple=run.multiple)
    return record, time.perf_counter() - started


@dataclass
class Pace:
    """Says once in each phase of a run, after its first steps, how long the rest of the phase takes."""

    run: Run
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def after(self, record: StepRecord) -> str | None:
        """What is to be said after a step, if it is time and worth it."""
        taken = self.seconds.setdefault(record.phase, [])
        taken.append(record.seconds)
        end = self.run.alignment_steps if record.phase == "align" else self.run.config.max_steps
        rest = Duration((Part(record.phase, end - record.step, median(taken)),))
        return f"to go: {rest}" if len(taken) == MEASURED and rest.seconds >= WORTH_SAYING else None
