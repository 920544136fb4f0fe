"""What the receiver gets to see in an evaluation: a bridge's number means nothing without these beside it.

Dimensions used in this file:
    K slots    C latent width
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from latentwire.bridge import engine, scoring, wire
from latentwire.bridge.checkpoint import BridgeModel, check_receiver, check_sender, load_bridge
from latentwire.bridge.config import Layout, Manifest
from latentwire.bridge.devices import device_named, dtype_named
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.tasks import Example, Task, answer_text, load_task
from latentwire.bridge.models import FrozenLM, check_role, load_model
from latentwire.bridge.prompt import LATENT, Row, compose, cut_text, fit, text_layout
from latentwire.bridge.reader import Reader, SourceTokens, source_tokens
from latentwire.bridge.sampling import SamplingParams

Latent = NDArray[np.float32]
Reading = Latent | str | None
"""What stands at ``{latent}``: soft tokens of a latent, a text, or nothing."""

RELAY_TOKENS = 64  # most tokens a sender writes in the relay condition


class Lender:
    """Hands out a model for each pass of it: here one that is in memory anyway; a service lends between requests.

    No loan is asked for while another is held, nor is a model kept after it: models can take turns in memory.

    Attributes:
        batch_rows: Most rows of one pass; None where nobody waits for the device meanwhile.
        waited_seconds: How long loans took to come, in all; no timing counts that.
    """

    batch_rows: int | None = None
    waited_seconds: float = 0.0

    def lend(self, reader: Reader) -> AbstractContextManager[FrozenLM]:
        """The model that ``reader`` reads for, while the block runs."""
        assert isinstance(reader, FrozenLM), f"{reader.name!r} is not in memory, and this lender loads nothing"
        return nullcontext(reader)


@dataclass(frozen=True, kw_only=True)
class PredictionContext:
    """What it takes to ask a receiver about examples, whatever it reads of them.

    Attributes:
        receiver: Its tokenizer; the model is lent where it runs.
    """

    task: Task
    examples: Sequence[Example]
    bridge: BridgeModel
    receiver_name: str
    receiver: Reader
    lender: Lender = field(default_factory=Lender)

    @property
    def layout(self) -> Layout:
        return self.bridge.config.heads[self.receiver_name].layout

    def rows(self, chosen: Sequence[int], readings: Sequence[Reading], answers: Sequence[str | None]) -> list[Row]:
        """Receiver inputs with each reading at ``{latent}``; a text over the receiver's context is cut at its end."""
        room = self.receiver.max_tokens - self.task.max_answer_tokens
        made = []
        for i, reading, answer in zip(chosen, readings, answers, strict=True):
            prompt = self.examples[i].prompt
            if isinstance(reading, str):
                made.append(fit(self.receiver, self.layout, prompt, reading, room, answer))
            else:
                slots = None if reading is None else len(reading)
                made.append(compose(self.receiver, self.layout, prompt, latent=slots, answer=answer, max_tokens=room))
        return made


@dataclass(frozen=True, kw_only=True)
class EvaluationContext(PredictionContext):
    """Everything an evaluation runs on.

    ``bridge_id`` and ``dtype`` say how latents cross the wire; ``where`` are arguments of ``load_model``.
    """

    checkpoint: str
    bridge_id: str
    sender: Reader
    dtype: wire.DType = "float16"
    where: Mapping[str, Any] = field(default_factory=dict)

    def with_bridge(self, checkpoint: Path, manifest: Manifest) -> "EvaluationContext":
        """The same measurement of another bridge to the same receiver."""
        return replace(
            self,
            checkpoint=str(checkpoint),
            bridge=load_bridge(checkpoint, device=self.where.get("device"))[1],
            bridge_id=manifest.bridge_id,
            sender=load_model(manifest.bridge.sender.name, **self.where),
        )

    def sources(self, chosen: Sequence[int]) -> list[SourceTokens]:
        """Sender tokens of the chosen examples, cut to what the bridge reads."""
        config, sender = self.bridge.config, self.sender
        return [source_tokens(config, sender, self.examples[i].source, truncate=True) for i in chosen]

    def latents(self, chosen: Sequence[int]) -> list[Latent]:
        """Latents of the chosen examples as the receiver's side decodes them, after the wire."""
        sources = self.sources(chosen)
        with self.lender.lend(self.sender) as sender:
            sent = engine.encode(self.bridge, sender, sources)
        messages = [wire.encode(row.latent, self.bridge_id, self.dtype) for row in sent]
        latents = [wire.decode(message, bridge_id=self.bridge_id).latent for message in messages]
        self.known.update(zip(chosen, latents, strict=True))
        return latents

    @cached_property
    def known(self) -> dict[int, Latent]:
        """Latents computed so far, by example."""
        return {}

    def recall(self, chosen: Sequence[int]) -> list[Latent]:
        """``latents`` without the sender where it ran before: for rivals that need only their number or moments."""
        missing = [i for i in chosen if i not in self.known]
        rows = self.lender.batch_rows or len(missing)
        for start in range(0, len(missing), rows or 1):
            self.latents(missing[start : start + rows])
        return [self.known[i] for i in chosen]

    def partner(self, index: int) -> int:
        """Another example, with another source: the next but half the set that differs."""
        count = len(self.examples)
        order = ((index + count // 2 + step) % count for step in range(count))
        own = self.examples[index].source
        return next((other for other in order if self.examples[other].source != own), index)

    @cached_property
    def moments(self) -> tuple[Latent, Latent]:
        """Mean and standard deviation of each latent channel (C), over up to 64 examples."""
        numbers = np.concatenate(self.recall(range(min(64, len(self.examples)))))
        return numbers.mean(axis=0), numbers.std(axis=0)

    def relay(self, chosen: Sequence[int]) -> list[str]:
        """What the sender writes about each source, greedily: the latent's rival in words."""
        layout = text_layout(self.sender)
        template = self.task.relay.replace("{source}", LATENT)
        length = min(RELAY_TOKENS, self.sender.max_tokens // 4)
        room = self.sender.max_tokens - length
        rows = [fit(self.sender, layout, template, self.examples[i].source, room) for i in chosen]
        params = [SamplingParams(max_tokens=length)] * len(rows)
        with self.lender.lend(self.sender) as sender:
            return [g.text.strip() for g in engine.generate(sender, rows, None, params)[0]]

    def cut(self, chosen: Sequence[int]) -> list[str]:
        """Sources cut to as many receiver tokens as their latent has slots."""
        slots = [len(latent) for latent in self.recall(chosen)]
        return [cut_text(self.receiver, self.examples[i].source, K) for i, K in zip(chosen, slots, strict=True)]

    def noise(self, chosen: Sequence[int]) -> list[Latent]:
        """Gaussian latents with the moments of real ones, of the same lengths."""
        mean, std = self.moments
        rows = []
        for i, latent in zip(chosen, self.recall(chosen), strict=True):
            draw = np.random.default_rng(i).normal(mean, std, latent.shape).astype(np.float32)
            rows.append(draw / np.sqrt(np.square(draw).mean(axis=1, keepdims=True)))
        return rows


def open_context(
    checkpoint: str | Path, task: str, *, limit: int | None, dtype: wire.DType, receiver: str | None,
    device: str | None = None, precision: str | None = None,
) -> EvaluationContext:  # fmt: skip
    """Load a checkpoint, its models and a task's test split.

    ``device`` and ``precision`` are those of ``bridge.devices``; the best there is, unless given.

    Raises:
        LatentWireError: Any of them is missing, damaged or another one than the checkpoint knows.
    """
    placed = device_named(device)
    where: dict[str, Any] = {"device": placed, "dtype": dtype_named(precision, placed)}
    manifest, bridge = load_bridge(checkpoint, device=placed)
    name = receiver or bridge.default_receiver
    bridge.head(name)
    loaded = load_task(task)
    check_role(manifest.bridge.sender.name, "sender")
    check_role(name, "receiver")
    sender, lm = load_model(manifest.bridge.sender.name, **where), load_model(name, **where)
    check_sender(manifest.bridge, sender)
    check_receiver(manifest.bridge, name, lm)
    check_room(loaded, lm)
    return EvaluationContext(
        checkpoint=str(checkpoint),
        task=loaded,
        examples=loaded.test[: limit or len(loaded.test)],
        bridge=bridge,
        bridge_id=manifest.bridge_id,
        sender=sender,
        receiver_name=name,
        receiver=lm,
        dtype=dtype,
        where=where,
    )


def check_room(task: Task, receiver: Reader) -> None:
    """Refuse a task whose answers alone fill the receiver's context (InvalidRequest)."""
    if task.max_answer_tokens >= receiver.max_tokens:
        message = f"max_answer_tokens is {task.max_answer_tokens}; {receiver.name!r} reads {receiver.max_tokens} in all"
        raise InvalidRequest(message, param="task")


@dataclass(frozen=True)
class Condition:
    """What the receiver gets to see of the chosen examples.

    Attributes:
        name: In reports, and wherever one is asked for.
        meaning: What the receiver gets, in a few words.
        read: What stands at ``{latent}``, for each of the chosen examples.
    """

    name: str
    meaning: str
    read: Callable[[EvaluationContext, Sequence[int]], Sequence[Reading]]


def _by_name(*conditions: Condition) -> dict[str, Condition]:
    return {condition.name: condition for condition in conditions}


CONDITIONS = _by_name(
    Condition("bridge", "soft tokens from the sender's reading", EvaluationContext.latents),
    Condition("direct", "the receiver reads the source", lambda c, chosen: [c.examples[i].source for i in chosen]),
    Condition("relay", "the receiver reads what the sender wrote about it", EvaluationContext.relay),
    Condition("same_budget", "the source cut to as many receiver tokens", EvaluationContext.cut),
    Condition("none", "the prompt alone", lambda _, chosen: [None] * len(chosen)),
    Condition("mismatched", "another example's latent", lambda c, chosen: c.latents([c.partner(i) for i in chosen])),
    Condition("noise", "random latents with the same moments", EvaluationContext.noise),
)
TRAINED = _by_name(
    Condition("prompt", "learned soft tokens, no sender", EvaluationContext.latents),
    Condition("random_sender", "the same bridge trained on an untrained sender", EvaluationContext.latents),
)
"""Conditions that are bridges of their own, trained like the one measured: run when asked for."""


def meaning_of(name: str) -> str:
    """What the receiver gets under a condition, in a few words; nothing of one that is not known here."""
    found = CONDITIONS.get(name) or TRAINED.get(name)
    return found.meaning if found else ""


def predict(context: PredictionContext, chosen: Sequence[int], readings: Sequence[Reading]) -> list[str]:
    """What the receiver answers: the likeliest label of a classification, else greedy text."""
    return (_generate if context.task.kind == "generation" else _choose)(context, chosen, readings)


def _generate(context: PredictionContext, chosen: Sequence[int], readings: Sequence[Reading]) -> list[str]:
    rows = context.rows(chosen, readings, [None] * len(chosen))
    params = [SamplingParams(max_tokens=context.task.max_answer_tokens)] * len(rows)
    with context.lender.lend(context.receiver) as receiver:
        soft = soft_tokens(context, receiver, readings)
        return [g.text for g in engine.generate(receiver, rows, soft, params)[0]]


def _choose(context: PredictionContext, chosen: Sequence[int], readings: Sequence[Reading]) -> list[str]:
    labels, count = context.task.labels, len(context.task.labels)
    texts = [answer_text(context.examples[i].prompt, label) for i in chosen for label in labels]
    rows = context.rows([i for i in chosen for _ in labels], [r for r in readings for _ in labels], texts)
    questions, scores = [rows[at : at + count] for at in range(0, len(rows), count)], list[float]()
    for numbers, part in scoring.passes(questions, context.lender.batch_rows):
        with context.lender.lend(context.receiver) as receiver:
            soft = soft_tokens(context, receiver, readings[numbers.start : numbers.stop])
            scores += [scored.logprob for question in scoring.score(receiver, part, soft) for scored in question]
    best = np.reshape(scores, (len(chosen), count)).argmax(axis=1).tolist()
    return [texts[at * count + label] for at, label in enumerate(best)]


def soft_tokens(context: PredictionContext, receiver: FrozenLM, readings: Sequence[Reading]) -> Tensor | None:
    """Soft tokens of those readings that are latents; None where none is."""
    latents = [reading if isinstance(reading, np.ndarray) else None for reading in readings]
    return engine.soften(context.bridge, context.receiver_name, receiver, latents)
