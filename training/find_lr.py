"""A learning-rate range test: one run under rates that grow until its loss blows up.

Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186 §3.3. Both rates of a run
(of matrices and of vectors) grow together, and so keep the ratio that the configuration gives them.
"""

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.files import replace_file
from latentwire.training.base import completed
from latentwire.training.config import TrainConfig
from latentwire.training.curves import BLUE, GREEN, RED, STYLE
from latentwire.training.prepare import prepare, sampler_of
from latentwire.training.run import Run
from latentwire.training.step import take_step

STEPS = 80
WARM = 40  # most steps of a warm start before them, at the configured rates
RATES = ("learning_rate", "matrix_learning_rate")
LOWEST, HIGHEST = 1e-3, 1e2  # times the configured rates
SMOOTHING = 0.9
WINDOW = 16  # steps, a decade of rates, through which a slope is fitted: single batches lie
FIRST = 10  # steps before anything is judged
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class RangeTest:
    """Loss by learning rate.

    Attributes:
        learning_rates: Of vectors (AdamW), growing.
        matrix_learning_rates: Of matrices (Muon), step by step with them.
        losses: As they were.
        smoothed: The same, as a running mean.
        blown_up: Whether the last loss is one that blew up, which ended the test.
        best: The step whose rates are suggested.
    """

    learning_rates: list[float]
    matrix_learning_rates: list[float]
    losses: list[float]
    smoothed: list[float]
    blown_up: bool
    best: int

    @property
    def flags(self) -> str:
        """The suggestion as flags of ``latentwire train``."""
        vectors, matrices = self.learning_rates[self.best], self.matrix_learning_rates[self.best]
        return f"--learning-rate {vectors:.2g} --matrix-learning-rate {matrices:.2g}"

    @property
    def curve(self) -> str:
        """The smoothed loss as a line of bars."""
        low, high = min(self.smoothed), max(self.smoothed)
        heights = [(loss - low) / max(high - low, 1e-9) for loss in self.smoothed]
        return "".join(BARS[min(int(height * len(BARS)), len(BARS) - 1)] for height in heights)


def find_lr(config: TrainConfig, console: Console) -> RangeTest:
    """Run the test on a run's own data, models and batches, and write ``OUT.find-lr.json`` and ``.png``.

    A warm start is kept short and comes first: its loss is another one, which no rate blows up.

    Raises:
        InvalidRequest: A model or a task does not do, as in ``prepare``; or the loss was not finite from the start.
    """
    only = {"max_steps": WARM + STEPS, "warmup_steps": 0, "validate_every": 0, "probe_every": 0}
    run = prepare(completed(config).model_copy(update=only), console)
    warm, factors = min(run.alignment_steps, WARM), np.geomspace(LOWEST, HIGHEST, STEPS).tolist()
    losses: list[float] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for number in progress.track(range(warm + STEPS), description="learning rates grow"):
            if number < warm:
                _step(run, number)
                continue
            run.alignment_steps, run.config = 0, config_at(run.config, config, factors[number - warm])
            losses.append(_step(run, number))
            if blew_up(losses):
                break
    found = judged(config, factors, losses)
    for suffix, data in ((".json", json.dumps(asdict(found), indent=2).encode()), (".png", picture(found))):
        replace_file(beside(config.out, suffix), data)
    return found


def _step(run: Run, number: int) -> float:
    """The loss of a step on batch ``number``, taken as the first one: at the peak of the schedule."""
    name = run.receiver_of(number)
    rows = [run.sample(name, i) for i in run.ranks.share(sampler_of(run).batch(number))]
    return take_step(run, 0, rows).loss


def beside(out: Path, suffix: str) -> Path:
    """A file of the test beside the folder of the run."""
    return out.with_name(f"{out.name}.find-lr{suffix}")


def config_at(config: TrainConfig, asked: TrainConfig, factor: float) -> TrainConfig:
    """The configuration with the rates that were asked for, times ``factor``."""
    return config.model_copy(update={name: getattr(asked, name) * factor for name in RATES})


def smooth(losses: Sequence[float]) -> Iterator[float]:
    """Exponential running mean, without the pull to zero that it begins with."""
    mean = 0.0
    for number, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        yield mean / (1 - SMOOTHING**number)


def blew_up(losses: Sequence[float]) -> bool:
    """Whether the last loss is not finite, or the smoothed one is twice its best or a fifth above its first."""
    if not math.isfinite(losses[-1]):
        return True
    smoothed = list(smooth(losses))
    return len(losses) > FIRST and smoothed[-1] > min(2 * min(smoothed), 1.2 * smoothed[0])


def judged(config: TrainConfig, factors: Sequence[float], losses: Sequence[float]) -> RangeTest:
    """The suggestion: where the smoothed loss falls most steeply, and at most a tenth of where it blew up.

    Raises:
        InvalidRequest: The loss was not finite before anything could be judged.
    """
    blown, finite = blew_up(losses), [loss for loss in losses if math.isfinite(loss)]
    if len(finite) <= FIRST:
        raise InvalidRequest(f"--find-lr: the loss is {losses[-1]} after {len(losses)} steps of the lowest rates")
    smoothed = list(smooth(finite))
    last, width = len(finite) - 1, min(WINDOW, len(finite))
    windows = np.lib.stride_tricks.sliding_window_view(np.array(finite), width)
    slopes = np.polyfit(np.arange(width), windows.T, 1)[0]  # by step, which is a fixed part of a decade
    steepest = int(np.argmin(slopes)) + width // 2
    tenth = max(i for i in range(last + 1) if factors[i] <= max(factors[last] / 10, factors[0]))
    vectors, matrices = ([getattr(config, name) * f for f in factors[: last + 1]] for name in RATES)
    return RangeTest(vectors, matrices, finite, smoothed, blown, min(steepest, tenth) if blown else steepest)


def picture(found: RangeTest) -> bytes:
    """The curve as a PNG."""
    file = io.BytesIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(6.2, 3.4), layout="constrained")
        ax = figure.subplots()
        ax.plot(found.matrix_learning_rates, found.losses, color=BLUE, linewidth=0.6, alpha=0.3)
        ax.plot(found.matrix_learning_rates, found.smoothed, color=BLUE, label="loss, smoothed")
        ax.axvline(found.matrix_learning_rates[found.best], color=GREEN, linestyle="--", label="suggested")
        if found.blown_up:
            ax.axvline(found.matrix_learning_rates[-1], color=RED, linestyle=":", label="blew up")
        ax.set_xscale("log")
        share = found.learning_rates[0] / found.matrix_learning_rates[0]
        ax.set_xlabel(f"learning rate of matrices; that of vectors is {share:.2g} of it")
        ax.set_title(found.flags)
        ax.legend()
        figure.savefig(file, dpi=150)
    return file.getvalue()
