"""Answers from latents where they are trusted, else from texts: what is kept of the text's score, and how often.

Dimensions used in this file:
    N examples
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from latentwire.bridge.evaluation.conditions import generate
from latentwire.bridge.evaluation.context import EvaluationContext, Reading
from latentwire.bridge.evaluation.statistics import Scores, ratio, resampled
from latentwire.bridge.evaluation.tasks import answer_text
from latentwire.bridge.gate import TOP, CurvePoint, Gate, answer_tokens

STEPS = 40  # thresholds of a curve, each with as many more answers from latents


def curve_of(trust: Scores, ours: Scores, texts: Scores) -> list[CurvePoint]:
    """From few answers from latents to all, given the trust in each and both scores (all N)."""
    ordered = np.sort(trust)[::-1]
    ranks = sorted({max(1, round(len(trust) * step / STEPS)) for step in range(1, STEPS + 1)})
    curve: list[CurvePoint] = []
    last, ends = texts, retention_interval(texts, texts)
    for threshold in dict.fromkeys(ordered[rank - 1] for rank in ranks):  # equal trusts stand or fall together
        trusted = trust >= threshold
        given = np.where(trusted, ours, texts)
        if (given != last).any():  # most steps add answers that both give
            last, ends = given, retention_interval(given, texts)
        curve.append(CurvePoint(float(threshold), float(trusted.mean()), float(ratio(given, texts)), *ends))
    return curve


def retention_interval(given: Scores, texts: Scores) -> tuple[float, float]:
    """95 % interval of what is kept of the text's score (both N).

    One lost answer is added to those seen. Otherwise none lost among a few would count as none ever lost: resampled,
    what did not happen has no chance. With it the lower end is near the exact binomial one (ours).
    """
    found = resampled((np.append(given, 0.0), np.append(texts, 1.0)), ratio)
    return found or (0.0, float(ratio(given, texts)))


def at_trust(trust: Scores, ours: Scores, texts: Scores, least: float) -> CurvePoint:
    """What is given when answers of this trust or more come from latents."""
    given = np.where(trust >= least, ours, texts)
    low, high = retention_interval(given, texts)
    return CurvePoint(least, float((trust >= least).mean()), float(ratio(given, texts)), low, high)


def gated(
    context: EvaluationContext, gate: Gate, readings: Sequence[Reading], ours: Sequence[float], texts: Sequence[float]
) -> dict[str, Any] | None:
    """A gate on an evaluation's examples, given the latents that ``bridge`` read and the scores of it and ``direct``.

    Where labels are scored, the gate judges what the receiver says itself, as ``Bridge.score`` has it.

    Returns:
        What the gate was calibrated for, what it reaches here (``reached``), and the ``curve``; None where the text
        scores nothing.
    """
    if not any(texts):
        return None
    asked, task = context, context.task
    if task.labels:
        choices = {answer_text(example.prompt, label) for example in context.examples for label in task.labels}
        most = answer_tokens(context.receiver, choices, end=True)
        asked = replace(context, task=replace(task, max_answer_tokens=most))
    answers = [
        answer
        for chosen in _batches(context)
        for answer in generate(asked, chosen, readings[chosen.start : chosen.stop], logprobs=TOP)
    ]
    trust = np.array(gate.judge(answers).trusts)
    scores = np.asarray(ours, dtype=np.float64), np.asarray(texts, dtype=np.float64)
    return {
        "task": gate.task,
        "target_retention": gate.target_retention,
        "reached": asdict(at_trust(trust, *scores, gate.reached.trust)),
        "curve": [asdict(point) for point in curve_of(trust, *scores)],
    }


def _batches(context: EvaluationContext) -> Iterator[range]:
    rows, count = context.lender.batch_rows or 32, len(context.examples)
    return (range(start, min(start + rows, count)) for start in range(0, count, rows))
