"""What the receiver gets to see in an evaluation: a bridge's number means nothing without these beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from latentwire.bridge import engine, scoring
from latentwire.bridge.evaluation.context import EvaluationContext, PredictionContext, Reading, Tuned
from latentwire.bridge.evaluation.probe import ProbeContext
from latentwire.bridge.evaluation.tasks import answer_text
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import Row
from latentwire.bridge.sampling import SamplingParams


def predict(context: PredictionContext, chosen: Sequence[int], readings: Sequence[Reading]) -> list[str]:
    """What the receiver answers: the likeliest label of a classification, else greedy text."""
    return (_generate if context.task.kind == "generation" else _choose)(context, chosen, readings)


def _generate(context: PredictionContext, chosen: Sequence[int], readings: Sequence[Reading]) -> list[str]:
    return [generation.text for generation in generate(context, chosen, readings)]


def generate(
    context: PredictionContext, chosen: Sequence[int], readings: Sequence[Reading], *, logprobs: int | None = None
) -> list[Generation]:
    """Greedy answers, with the log-probabilities of so many of the likeliest tokens where these are wanted."""
    rows = context.rows(chosen, readings, [None] * len(chosen))
    params = [SamplingParams(max_tokens=context.task.max_answer_tokens, logprobs=logprobs)] * len(rows)
    with context.lender.lend(context.receiver) as receiver:
        return engine.generate(receiver, rows, soft_tokens(context, receiver, readings), params)[0]


def _choose(context: PredictionContext, chosen: Sequence[int], readings: Sequence[Reading]) -> list[str]:
    labels, count = context.task.labels, len(context.task.labels)
    texts = [answer_text(context.examples[i].prompt, label) for i in chosen for label in labels]
    rows = context.rows([i for i in chosen for _ in labels], [r for r in readings for _ in labels], texts)
    found = scored(context, readings, [rows[at : at + count] for at in range(0, len(rows), count)])
    best = [int(np.argmax([continuation.logprob for continuation in one])) for one in found]
    return [texts[at * count + label] for at, label in enumerate(best)]


def scored(
    context: PredictionContext, readings: Sequence[Reading], questions: Sequence[Sequence[Row]]
) -> list[list[scoring.Continuation]]:
    """Scores of the rows of each question, which has one reading; the receiver is lent anew for each pass."""
    found: list[list[scoring.Continuation]] = [[] for _ in questions]
    for numbers, rows in scoring.passes(questions, context.lender.batch_rows):
        with context.lender.lend(context.receiver) as receiver:
            soft = soft_tokens(context, receiver, readings[numbers.start : numbers.stop])
            for number, part in zip(numbers, scoring.score(receiver, rows, soft), strict=True):
                found[number] += part
    return found


def soft_tokens(context: PredictionContext, receiver: FrozenLM, readings: Sequence[Reading]) -> Tensor | None:
    """Soft tokens of those readings that are latents; None where none is."""
    latents = [
        reading.latent if isinstance(reading, Tuned) else None if isinstance(reading, str) else reading
        for reading in readings
    ]
    return engine.soften(context.bridge, context.receiver_name, receiver, latents)


@dataclass(frozen=True)
class Condition:
    """What the receiver gets to see of the chosen examples.

    Attributes:
        name: In reports, and wherever one is asked for.
        meaning: What the receiver gets, in a few words.
        read: What stands at ``{latent}``, for each of the chosen examples.
        asked: On what the condition runs, given what the bridge runs on: another model may be asked.
        answer: What is said to the chosen examples, given what was read.
        missing: Why an evaluation cannot have the condition at all; None where it can.
        speaks: Whether a model writes the answer, token by token.
    """

    name: str
    meaning: str
    read: Callable[[EvaluationContext, Sequence[int]], Sequence[Any]]
    asked: Callable[[EvaluationContext], EvaluationContext] = lambda context: context
    answer: Callable[[PredictionContext, Sequence[int], Sequence[Any]], list[str]] = lambda *asked: predict(*asked)
    missing: Callable[[EvaluationContext], str | None] = lambda context: None
    speaks: bool = True


def _by_name(*conditions: Condition) -> dict[str, Condition]:
    return {condition.name: condition for condition in conditions}


def _sources(context: EvaluationContext, chosen: Sequence[int]) -> list[str]:
    return [context.examples[i].source for i in chosen]


def _tuned(context: EvaluationContext, chosen: Sequence[int]) -> list[Tuned]:
    return [Tuned(*both) for both in zip(context.recall(chosen), _sources(context, chosen), strict=True)]


def _probed(context: EvaluationContext, chosen: Sequence[int]) -> list[NDArray[np.float32]]:
    assert isinstance(context, ProbeContext)
    return context.pooled(chosen)


def _classified(context: PredictionContext, chosen: Sequence[int], states: Sequence[Any]) -> list[str]:
    assert isinstance(context, ProbeContext)
    return context.classified(chosen, states)


CONDITIONS = _by_name(
    Condition("bridge", "soft tokens from the sender's reading", EvaluationContext.latents),
    Condition("direct", "the receiver reads the source", _sources),
    Condition("sender", "the sender itself reads the source and answers", _sources, EvaluationContext.of_sender),
    Condition("relay", "the receiver reads what the sender wrote about it", EvaluationContext.relay),
    Condition("relay_bytes", "the same, as long as the message has bytes", EvaluationContext.relay_bytes),
    Condition("same_budget", "the source cut to as many receiver tokens", EvaluationContext.cut),
    Condition(
        "token_pruned", "its most surprising words, in as many tokens", EvaluationContext.pruned,
        missing=lambda context: (
            None if context.sender.tokenizer.is_fast else "the sender's tokenizer says of no token where it stands"
        ),
    ),
    Condition("none", "the prompt alone", lambda _, chosen: [None] * len(chosen)),
    Condition(
        "mismatched", "another example's latent", lambda c, chosen: c.latents([c.partner(i) for i in chosen]),
        missing=lambda context: (
            None if len({example.source for example in context.examples}) > 1 else "the examples have one source alone"
        ),
    ),
    Condition("noise", "random latents with the same moments", EvaluationContext.noise),
)  # fmt: skip
TRAINED = _by_name(
    Condition("direct_tuned", "the source behind soft tokens learnt for the task", _tuned),
    Condition("receiver_lora", "the source, read by a fine-tuned receiver", _sources),
    Condition(
        "probe", "a linear probe of the sender's states answers", _probed, answer=_classified, speaks=False,
        missing=lambda context: None if isinstance(context, ProbeContext) else "the task has no labels",
    ),
    Condition("prompt", "learned soft tokens, no sender", EvaluationContext.recall),
    Condition("random_sender", "the same bridge trained on an untrained sender", EvaluationContext.latents),
)  # fmt: skip
"""Conditions that are trained first, with the examples and steps of the bridge measured: run when asked for."""


def meaning_of(name: str) -> str:
    """What the receiver gets under a condition, in a few words; nothing of one that is not known here."""
    found = CONDITIONS.get(name) or TRAINED.get(name)
    return found.meaning if found else ""
