"""Make the gate of a bridge: from which trust on its answers may stand for those that the text would give.

The examples are of the training split and were never trained on. Trust is fitted to whether the answer from the latent
scores at least what the one from the text does; a fold's trusts come from a fit without it. The threshold then goes
down from the most trusted answers and stops before the first step whose retention, at the lower end of its interval,
falls short: tested in a fixed order, the first failure ends it, so that many steps are no more likely to pass by chance
than one (Learn then Test, Angelopoulos et al. 2021, arXiv:2110.01052 §3, fixed sequence testing).

Dimensions used in this file:
    N examples    S signals
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.model_selection import StratifiedKFold

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.config import Provenance
from latentwire.bridge.drift import LatentStatistics
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.conditions import generate
from latentwire.bridge.evaluation.context import EvaluationContext, check_room
from latentwire.bridge.evaluation.evaluate import BridgeLender
from latentwire.bridge.evaluation.gated import curve_of
from latentwire.bridge.evaluation.heldout import check_labels
from latentwire.bridge.evaluation.measure import BATCH_ROWS, Progress
from latentwire.bridge.evaluation.metrics import METRICS, metrics_of
from latentwire.bridge.evaluation.statistics import Scores, interval
from latentwire.bridge.evaluation.tasks import Example, Task, World, load_task
from latentwire.bridge.gate import SIGNALS, TOP, CurvePoint, Gate, signals_of
from latentwire.training.config import read_config
from latentwire.training.data import GROUPED, Sampler, Subset, chunks, split_off

FEWEST = 50  # examples that a gate needs
FOLDS = 5
SENSES = np.array([-1.0 if name == "first_entropy" else 1.0 for name in SIGNALS])  # more of it is more, or less, sure
FRESH = 1  # seed of a generated task's examples that no run has seen: runs draw from seed 0


@dataclass(frozen=True)
class Calibrated:
    """A gate, for which receiver, the scores it was made from, and what the latents of its examples are like."""

    gate: Gate
    receiver: str
    metric: str
    bridge: float
    direct: float
    statistics: LatentStatistics | None


def calibrate(
    bridge: Bridge,
    task: str,
    *,
    target_retention: float = 0.98,
    examples: int = 500,
    metric: str | None = None,
    receiver: str | None = None,
    progress: Progress = lambda *_: None,
) -> Calibrated:
    """Make a gate; nothing is saved.

    Args:
        bridge: The bridge whose answers are to be trusted, or not.
        task: ``world``, or a task file (.toml).
        target_retention: Least share of the text's score that all answers together keep, above 0 and below 1.
        examples: Most examples to use.
        metric: What scores an answer: em, accuracy or token_f1; the task's own, unless given.
        receiver: Which receiver answers; the first one, unless given.
        progress: Told how far it is.

    Raises:
        InvalidRequest: Too few examples are left, the text itself scores nothing, no threshold reaches the target, or
            one label begins another and nothing says where an answer ends.
        LatentWireError: A model cannot be loaded, or is not the one the bridge was trained with.
    """
    if not 0 < target_retention < 1:
        message = f"target_retention is {target_retention}; expected more than 0 and less than 1"
        raise InvalidRequest(message, param="target_retention")
    name, loaded = bridge.receiver(receiver), load_task(task)
    check_labels(loaded, bridge.model.config.heads[name].layout)
    check_room(loaded, bridge.reader(name))
    context = EvaluationContext(
        checkpoint=bridge.name,
        task=loaded,
        examples=unseen(bridge, loaded, name, examples),
        bridge=bridge.model,
        bridge_id=bridge.manifest.bridge_id,
        sender=bridge.reader(bridge.sender),
        receiver_name=name,
        receiver=bridge.reader(name),
        lender=BridgeLender(bridge),
    )
    scored_in = _metric(loaded, metric)
    latents = latents_of(context, progress)
    signals, ours, texts = answers(context, scored_in, latents, progress)
    if not texts.any():
        raise InvalidRequest(
            f"from the text itself {name!r} scores 0 on {len(texts)} examples of {loaded.name!r}: nothing to retain",
            param="task",
        )
    gate = Gate(
        head_sha256=bridge.manifest.heads[name].sha256,
        task=loaded.name,
        data_sha256=loaded.data_sha256,
        dtype=context.dtype,
        **gate_of(signals, ours, texts, target_retention),
    )
    statistics = LatentStatistics.of(latents, loaded.name, loaded.data_sha256)
    return Calibrated(gate, name, scored_in, float(ours.mean()), float(texts.mean()), statistics)


def unseen(bridge: Bridge, task: Task, receiver: str, most: int) -> Sequence[Example]:
    """Examples of the training split that neither the encoder nor the head was trained on, seeded, in any order.

    Those held out for validation are among them. A generated task makes new ones.

    Raises:
        InvalidRequest: Fewer than ``FEWEST`` are left.
    """
    if isinstance(task.train, World):
        return World("train", max(most, FEWEST), seed=FRESH)[:most]
    config = bridge.manifest.bridge
    given = (*config.earlier, config.provenance, config.heads[receiver].provenance)
    runs = [run for run in given if run is not None]
    left = set(range(len(task.train))).difference(*(drawn(run, task) for run in runs))
    if len(left) < FEWEST:
        raise InvalidRequest(
            f"the bridge was trained on all but {len(left)} of the {len(task.train)} training examples of "
            f"{task.name!r}; {FEWEST} are needed that it has not seen (--validation-examples keeps some from a run)",
            param="task",
        )
    chosen = np.random.default_rng(0).permutation(sorted(left))[:most]
    return Subset(task.train, chosen.tolist())


def drawn(run: Provenance, task: Task) -> set[int]:
    """Which of a task's training examples a run has drawn; none where it was of other data."""
    if run.data_sha256 != task.data_sha256:
        return set()
    config = read_config(None, {**run.recipe, "out": Path("unused")})
    held = config.validation_examples if run.recipe.get("validate_every") else 0  # an old run validated nothing
    train, _ = split_off(task.train, validation=held, limit=config.max_examples, seed=config.seed)
    rows = config.batch_size * config.accumulate * run.processes
    steps = -(-config.max_steps // GROUPED) * GROUPED  # the steps of a group share its examples among them
    sampler = Sampler(len(train), batch_size=rows, seed=config.seed)
    assert isinstance(train, Subset)
    if steps * rows >= len(train):
        return set(train.chosen)
    return {train.chosen[i] for step in range(steps) for i in sampler.batch(step)}


def gate_of(signals: NDArray[np.float64], ours: Scores, texts: Scores, target: float) -> dict[str, Any]:
    """The numbers of a gate, from the signals (N, S; NaN of an answer that says nothing) and both scores (N).

    Raises:
        InvalidRequest: No threshold reaches the target.
    """
    good, said = ours >= texts, np.isfinite(signals).all(axis=1)
    weights, intercept, trusts = _fitted(signals[said], good[said])
    trust = np.zeros(len(good))  # an answer that says nothing
    trust[said] = trusts
    curve = curve_of(trust, ours, texts)
    chosen = choose(curve, target)
    if chosen is None:
        best = max(curve, key=lambda point: point.low)
        raise InvalidRequest(
            f"no trust keeps {target:g} of the text's score for certain on {len(good)} examples: the best keeps at "
            f"least {best.low:.3f}, with {best.coverage:.0%} of the answers from latents; "
            "use more examples, or a lower target",
            param="target_retention",
        )
    coverage = interval((trust >= chosen.trust).astype(float).tolist()) or (0.0, 1.0)
    return {
        "examples": len(good),
        "target_retention": target,
        "weights": dict(zip(SIGNALS, (weights + 0.0).tolist(), strict=True)),
        "intercept": intercept,
        "reached": chosen,
        "coverage_low": coverage[0],
        "coverage_high": coverage[1],
        "curve": tuple(curve),
    }


def choose(curve: Sequence[CurvePoint], target: float) -> CurvePoint | None:
    """The last point before the first that misses the target; None where that is the first."""
    missed = next((at for at, point in enumerate(curve) if point.low < target), len(curve))
    return curve[missed - 1] if missed else None


def _fitted(signals: NDArray[np.float64], good: NDArray[np.bool_]) -> tuple[NDArray[np.float64], float, Scores]:
    """Weights (S) and intercept of the log-odds, and the trust of each example (N) by a fit without its fold.

    Where (nearly) all answers are alike, all are trusted alike.
    """
    rarest = min(int(good.sum()), int((~good).sum()))
    if rarest < 2:
        share = (good.sum() + 0.5) / (len(good) + 1)
        odds = float(np.log(share / (1 - share)))
        return np.zeros(len(SIGNALS)), odds, np.full(len(good), probability(odds))
    trust = np.empty(len(good))
    for rest, fold in StratifiedKFold(min(FOLDS, rarest), shuffle=True, random_state=0).split(signals, good):
        weights, intercept = regression(signals[rest], good[rest])
        trust[fold] = probability(signals[fold] @ weights + intercept)
    return *regression(signals, good), trust


def regression(signals: NDArray[np.float64], good: NDArray[np.bool_]) -> tuple[NDArray[np.float64], float]:
    """Logistic regression in nats, with a unit Gaussian prior, in which no signal counts against its sense.

    Scikit-learn's has no bounds. Without them, on signals scaled by their spread, a first-token entropy that was always
    near 0 got a weight of +568 per nat: any answer less sure than those seen would have been trusted blindly.
    """
    signed, sides = signals * SENSES, np.where(good, 1.0, -1.0)

    def loss(given: NDArray[np.float64]) -> float:
        weights, intercept = given[:-1], given[-1]
        return float(np.logaddexp(0, -sides * (signed @ weights + intercept)).sum() + weights @ weights / 2)

    bounds = [(0.0, None)] * len(SIGNALS) + [(None, None)]
    found = minimize(loss, np.zeros(len(bounds)), bounds=bounds, method="L-BFGS-B").x
    return found[:-1] * SENSES, float(found[-1])


def probability(odds: Any) -> Any:
    """Of log-odds."""
    return (1 + np.tanh(odds / 2)) / 2


def latents_of(context: EvaluationContext, progress: Progress = lambda *_: None) -> list[NDArray[np.float32]]:
    """The latents (K, C) of all examples."""
    everything, latents = range(len(context.examples)), list[NDArray[np.float32]]()
    for chosen in chunks(everything, BATCH_ROWS):
        latents += context.latents(chosen)
        progress("the sender reads", chosen[-1] + 1, len(everything))
    return latents


def answers(
    context: EvaluationContext,
    metric: str,
    latents: Sequence[NDArray[np.float32]],
    progress: Progress = lambda *_: None,
) -> tuple[NDArray[np.float64], Scores, Scores]:
    """Signals of the answers from latents (N, S), their scores, and those of the answers from texts (N)."""
    everything = range(len(context.examples))
    batches = list(chunks(everything, BATCH_ROWS))
    signals: list[list[float]] = []
    said: dict[str, list[str]] = {"from latents": [], "from texts": []}
    for chosen in batches:
        made = generate(context, chosen, latents[chosen[0] : chosen[-1] + 1], logprobs=TOP)
        silent = [np.nan] * len(SIGNALS)
        signals += [list(signals_of(one.logprobs).values()) if one.logprobs else silent for one in made]
        said["from latents"] += [one.text for one in made]
        progress("from latents", chosen[-1] + 1, len(everything))
    for chosen in batches:
        sources = [context.examples[i].source for i in chosen]
        said["from texts"] += [one.text for one in generate(context, chosen, sources)]
        progress("from texts", chosen[-1] + 1, len(everything))
    ours, texts = (_scores(context, metric, answers) for answers in said.values())
    return np.array(signals), ours, texts


def _scores(context: EvaluationContext, metric: str, texts: Sequence[str]) -> Scores:
    """A classification's answers are generated too, as requests have them: the label that one begins with counts."""
    task = context.task
    if task.labels:
        texts = [_label_in(text, task.labels) for text in texts]
    right = [(e.answer.strip(),) if task.labels else e.right for e in context.examples]
    return np.array(METRICS[metric].scores(texts, right))


def _label_in(text: str, labels: Sequence[str]) -> str:
    begins = [label.strip() for label in labels if text.strip().lower().startswith(label.strip().lower())]
    return max(begins, key=len, default="")


def _metric(task: Task, name: str | None) -> str:
    known = {metric.name: metric for metric in metrics_of(task.kind)}
    if name is not None and name not in known:
        raise InvalidRequest(f"metric is {name!r}; a {task.kind} has {', '.join(known)}", param="metric")
    return name or next(iter(known))
