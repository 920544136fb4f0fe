"""When a run goes wrong without stopping, say so: which number, which limit, what to try.

Each condition is judged on means, because a single batch lies: a small one has few answers, and any one can be odd.
Answers are judged only after the warm-up and once a window of steps has passed, by the window and by its last steps:
an untrained bridge makes every receiver say the same thing, and one that learns leaves that behind.

Two limits follow the task, since a perfect receiver looks like a collapsed one where every answer is "yes": with two
labels the *wanted* answers have at most ln 2 = 0.69 nat. The limit of the entropy is half of theirs where that is less
than 1 nat; that of the commonest output is one and a half times the share of the commonest answer where that is more
than 50 %, up to 95 %.

A gradient norm has no limit of its own. It grows with the widths of the models (at the first step of a bridge from
Gemma-3-270M to SmolLM2-135M it is 200, between the built-in pair 12, and both learn), and the step is clipped anyway.
What tells a run that diverges is a norm far above the run's own, with a loss that rises with it.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentwire.training.monitor import StepRecord

GRADIENT_TIMES = 5.0  # the run's own norm before, both as medians
RECENT = 10  # steps that are held against those before them
FIRST_TOKEN_TOP1 = 0.10
ENTROPY_NATS = 1.0
WANTED_ENTROPY_PART = 0.5
TOP_SHARE = 0.50
WANTED_SHARE_TIMES = 1.5
MOST_TOP_SHARE = 0.95
DELTA_NATS = 0.01
LEAST_PROGRESS = 0.001  # of the mean loss, from PLATEAU steps to the next
TINY_LOSS = 0.01  # what is solved need not fall further
MEMORY_SHARE = 0.94  # 75 of 80 GB
WINDOW = 50  # steps of a mean, and for how long a condition must have cleared before it can alarm again
PLATEAU = 200
PROBES = 5
LEAST_ROWS = 4  # with fewer, shares and entropies of a batch say nothing

LENGTHS = {
    "first_token_top1": WINDOW,
    "entropy_nats": WINDOW,
    "wanted_entropy_nats": WINDOW,
    "top_share": WINDOW,
    "wanted_top_share": WINDOW,
    "delta_nats": PROBES,
    "loss": 2 * PLATEAU,
}


@dataclass(frozen=True, slots=True)
class Alarm:
    """The beginning of something wrong.

    Attributes:
        step: The optimiser step at which it began, from 1.
        name: Of its condition, one of ``CONDITIONS``.
        message: One sentence: the measured value, the limit, and what to try.
        collapse: Whether the bridge carries nothing, or the receiver says one thing to everything: a dead run.
    """

    step: int
    name: str
    message: str
    collapse: bool


@dataclass
class History:
    """What is known about one receiver: its latest step, and the last finite values of what is judged as a mean.

    ``last_held`` is, by condition, the step of this receiver at which it was last met; ``path`` holds gradient norm and
    loss of the last steps of the phase.
    """

    rows: int
    warm_up_steps: int
    record: "StepRecord" = field(init=False)
    phase: str = ""
    path: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    steps: int = 0
    answer_steps: int = 0
    last_held: dict[str, int] = field(default_factory=dict)
    values: dict[str, deque[float]] = field(default_factory=lambda: {k: deque(maxlen=n) for k, n in LENGTHS.items()})

    def add(self, record: "StepRecord") -> None:
        """Take a step. Those of the warm start, of the warm-up, and refused ones belong to no mean."""
        self.record, self.steps = record, self.steps + 1
        if record.phase != self.phase:
            self.phase = record.phase
            self.path.clear()
        if not record.refused:
            self.path.append((record.gradient_norm, record.loss))
        if record.phase != "answer" or record.refused:
            return
        self.answer_steps += 1
        if self.answer_steps <= self.warm_up_steps:
            return
        for name, values in self.values.items():
            value: float | None = getattr(record, name)
            if value is not None and math.isfinite(value):
                values.append(value)

    def means(self, *names: str) -> list[float]:
        """Means over the window; NaN, which passes no limit, while one of them is not full."""
        full = all(len(self.values[name]) == LENGTHS[name] for name in names)
        return [fmean(self.values[name]) if full else math.nan for name in names]

    def recent(self, name: str) -> float:
        """Mean of the last steps of the window: a run that is leaving a state is not stuck in it."""
        return fmean(list(self.values[name])[-RECENT:] or [math.nan])


Judged = tuple[bool, str]
"""Whether a condition holds, and what was measured."""


def _gradient_norm(history: History) -> Judged:
    if len(history.path) < 2 * RECENT:
        return False, ""
    norms, losses = zip(*history.path, strict=True)
    norm, usual = median(norms[-RECENT:]), median(norms[:-RECENT])
    loss, before = fmean(losses[-RECENT:]), fmean(losses[:-RECENT])
    return norm > GRADIENT_TIMES * usual and loss > before, (
        f"the gradient norm before clipping is {norm:.4g} (median of {RECENT} steps), more than {GRADIENT_TIMES:g} "
        f"times the {usual:.4g} before, and the loss rose from {before:.3f} to {loss:.3f}"
    )


def _first_token(history: History) -> Judged:
    (share,) = history.means("first_token_top1")
    return share < FIRST_TOKEN_TOP1 and history.recent("first_token_top1") < FIRST_TOKEN_TOP1, (
        f"the first token of only {share:.1%} of the answers is the likeliest (mean of {WINDOW} steps), "
        f"below {FIRST_TOKEN_TOP1:.0%}"
    )


def _low_entropy(history: History) -> Judged:
    entropy, wanted = history.means("entropy_nats", "wanted_entropy_nats")
    limit = min(ENTROPY_NATS, WANTED_ENTROPY_PART * wanted)
    return history.rows >= LEAST_ROWS and entropy < limit and history.recent("entropy_nats") < limit, (
        f"the entropy of the first answer token is {entropy:.2f} nat (mean of {WINDOW} steps), below {limit:.2f} "
        f"(the wanted answers have {wanted:.2f})"
    )


def _one_output(history: History) -> Judged:
    share, wanted = history.means("top_share", "wanted_top_share")
    # Where nearly every answer is the same, saying it as often as it is wanted is right.
    limit = max(TOP_SHARE, min(MOST_TOP_SHARE, WANTED_SHARE_TIMES * wanted), wanted)
    return history.rows >= LEAST_ROWS and share > limit and history.recent("top_share") > limit, (
        f"{share:.1%} of a batch get the same output (mean of {WINDOW} steps), above {limit:.1%} "
        f"(the commonest answer has {wanted:.1%})"
    )


def _flat_delta(history: History) -> Judged:
    (delta,) = history.means("delta_nats")
    return delta < DELTA_NATS and history.answer_steps >= history.warm_up_steps + WINDOW, (
        f"another text's latent costs the receiver only {delta:.3f} nat (Δ, mean of {PROBES} probes), "
        f"below {DELTA_NATS:g}: nothing crosses"
    )


def _loss_plateau(history: History) -> Judged:
    losses = list(history.values["loss"])
    if len(losses) < 2 * PLATEAU:
        return False, ""
    before, after = fmean(losses[:PLATEAU]), fmean(losses[PLATEAU:])
    return abs(after) >= TINY_LOSS and before - after < LEAST_PROGRESS * abs(before), (
        f"the mean loss of the last {PLATEAU} steps is {after:.4f}, after {before:.4f} in the {PLATEAU} before: "
        f"not {LEAST_PROGRESS:.1%} less"
    )


def _memory(history: History) -> Judged:
    peak, device = history.record.peak_bytes, history.record.device_bytes
    share = peak / device if device else 0.0
    message = f"the memory peak is {peak / 1e9:.1f} of {device / 1e9:.1f} GB ({share:.1%}), above {MEMORY_SHARE:.0%}"
    return device > 0 and peak > MEMORY_SHARE * device, message


def _non_finite(history: History) -> Judged:
    loss, norm = history.record.loss, history.record.gradient_norm
    return history.record.refused, f"the loss is {loss} and its gradient norm {norm}, not finite: the step was refused"


@dataclass(frozen=True, slots=True)
class Condition:
    """What may go wrong: ``judge`` says whether it does, ``advice`` what to try."""

    name: str
    judge: Callable[[History], Judged]
    advice: str
    collapse: bool = False


CONDITIONS = (
    Condition("gradient_norm", _gradient_norm, "lower the learning rates or lengthen --warmup-steps"),
    Condition("first_token", _first_token, "raise --first-token-weight, or lengthen --alignment-steps", collapse=True),
    Condition("low_entropy", _low_entropy, "lower --first-token-weight, or set --diversity-weight", collapse=True),
    Condition("one_output", _one_output, "set --margin-weight or --diversity-weight", collapse=True),
    Condition("flat_delta", _flat_delta, "set --margin-weight, or read another --layer", collapse=True),
    Condition("loss_plateau", _loss_plateau, "change the learning rates, or stop here"),
    Condition("memory", _memory, "lower --batch-size and raise --accumulate, or lower --max-source-tokens"),
    Condition("non_finite", _non_finite, "if more follow, lower the learning rates or use --precision bf16"),
)


class Alarms:
    """Judges every step of a run; a condition alarms when it begins, not at every step while it lasts.

    It alarms again only after ``WINDOW`` steps without it, so that a value around its limit alarms once. Receivers are
    judged apart: a dead head must not hide behind a live one. A resumed run replays its log and saves no state.
    """

    def __init__(self, *, rows: int, warm_up_steps: int) -> None:
        """Judge records of ``rows`` answers each; answers not before ``warm_up_steps`` steps of the answer phase."""
        self._rows, self._warm_up_steps = rows, warm_up_steps
        self._histories: dict[str, History] = {}

    def observe(self, record: "StepRecord") -> list[Alarm]:
        """Alarms that begin with this step, in the order of ``CONDITIONS``."""
        history = self._histories.setdefault(record.receiver, History(self._rows, self._warm_up_steps))
        history.add(record)
        alarms = []
        for condition in CONDITIONS:
            holds, measured = condition.judge(history)
            if not holds:
                continue
            last = history.last_held.get(condition.name, -math.inf)
            if history.steps - last > WINDOW:
                whose = f"{record.receiver}: " if len(self._histories) > 1 else ""
                message = f"{whose}{measured}; {condition.advice}"
                alarms.append(Alarm(record.step, condition.name, message, condition.collapse))
            history.last_held[condition.name] = history.steps
        return alarms

    def replay(self, records: Iterable["StepRecord"]) -> None:
        """Take the steps a run has done before, whose alarms were raised then."""
        for record in records:
            self.observe(record)
