"""What the receiver gets to see in an evaluation: a bridge's number means nothing without these beside it.

Dimensions used in this file:
    K slots    C latent width
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bridge import engine, wire
from bridge.checkpoint import Bridge
from bridge.config import Layout
from bridge.evaluation.tasks import Example, Task
from bridge.models import FrozenLM, tokenize_sources
from bridge.prompt import Row, collate, compose
from bridge.sampling import SamplingParams

Latent = NDArray[np.float32]
Reading = Latent | str | None
"""What stands at ``{latent}``: soft tokens of a latent, a text, or nothing."""

RELAY_TOKENS = 64  # most tokens a sender writes in the relay condition


@dataclass(frozen=True)
class Setting:
    """Everything an evaluation runs on. ``bridge_id`` and ``dtype`` say how latents cross the wire."""

    task: Task
    examples: Sequence[Example]
    bridge: Bridge
    bridge_id: str
    sender: FrozenLM
    receiver_name: str
    receiver: FrozenLM
    dtype: wire.DType = "float16"

    @property
    def layout(self) -> Layout:
        return self.bridge.config.heads[self.receiver_name].layout

    def latents(self, chosen: Sequence[int]) -> list[Latent]:
        """Latents of the chosen examples as the receiver's side decodes them, after the wire."""
        sources = [self.examples[i].source for i in chosen]
        sent = engine.encode(self.bridge, self.sender, sources, truncate=True)
        messages = [wire.encode(row.latent, self.bridge_id, self.dtype) for row in sent]
        return [wire.decode(message, bridge_id=self.bridge_id).latent for message in messages]

    def partner(self, index: int) -> int:
        """Another example, with another source: the next but half the set that differs."""
        count = len(self.examples)
        order = ((index + count // 2 + step) % count for step in range(count))
        own = self.examples[index].source
        return next((other for other in order if self.examples[other].source != own), index)

    @cached_property
    def moments(self) -> tuple[Latent, Latent]:
        """Mean and standard deviation of each latent channel (C), over up to 64 examples."""
        numbers = np.concatenate(self.latents(range(min(64, len(self.examples)))))
        return numbers.mean(axis=0), numbers.std(axis=0)

    def relay(self, chosen: Sequence[int]) -> list[str]:
        """What the sender writes about each source, greedily: the latent's rival in words."""
        said = []
        room = self.sender.max_tokens - RELAY_TOKENS
        for i in chosen:
            template = self.task.relay.replace("{source}", "{latent}")
            sender_layout = Layout("", self.sender.tokenizer.bos_token_id, self.sender.tokenizer.eos_token_id)
            said.append(compose(self.sender, sender_layout, template, latent=self.examples[i].source, max_tokens=room))
        params = [SamplingParams(max_tokens=RELAY_TOKENS)] * len(said)
        return [g.text.strip() for g in engine.generate(self.sender, said, None, params)[0]]

    def cut(self, chosen: Sequence[int]) -> list[str]:
        """Sources cut to as many receiver tokens as their latent has slots."""
        rows = []
        for i, latent in zip(chosen, self.latents(chosen), strict=True):
            ids = self.receiver.tokenizer(self.examples[i].source, add_special_tokens=False)["input_ids"]
            rows.append(self.receiver.tokenizer.decode(ids[: len(latent)]))
        return rows

    def noise(self, chosen: Sequence[int]) -> list[Latent]:
        """Gaussian latents with the moments of real ones, of the same lengths."""
        mean, std = self.moments
        rows = []
        for i, latent in zip(chosen, self.latents(chosen), strict=True):
            draw = np.random.default_rng(i).normal(mean, std, latent.shape).astype(np.float32)
            rows.append(draw / np.sqrt(np.square(draw).mean(axis=1, keepdims=True)))
        return rows

    def rows(self, chosen: Sequence[int], readings: Sequence[Reading], answers: Sequence[str | None]) -> list[Row]:
        """Receiver inputs with each reading at ``{latent}``; a source over the context is cut, as users would."""
        made = []
        for i, reading, answer in zip(chosen, readings, answers, strict=True):
            latent = len(reading) if isinstance(reading, np.ndarray) else reading
            made.append(compose(self.receiver, self.layout, self.examples[i].prompt, latent=latent, answer=answer))
        return made


Condition = Callable[[Setting, Sequence[int]], Sequence[Reading]]

CONDITIONS: dict[str, Condition] = {
    "bridge": lambda s, chosen: s.latents(chosen),
    "direct": lambda s, chosen: [s.examples[i].source for i in chosen],
    "relay": lambda s, chosen: s.relay(chosen),
    "same_budget": lambda s, chosen: s.cut(chosen),
    "none": lambda s, chosen: [None] * len(chosen),
    "mismatched": lambda s, chosen: s.latents([s.partner(i) for i in chosen]),
    "noise": lambda s, chosen: s.noise(chosen),
}
TRAINED = ("prompt", "random_sender")
"""Conditions that are bridges of their own, trained like the one measured: run when asked for."""


def source_tokens(setting: Setting, chosen: Sequence[int]) -> list[int]:
    """Sender tokens of each source, BOS included, as ``/encode`` counts them."""
    limit = setting.bridge.config.max_source_tokens
    texts = [setting.examples[i].source for i in chosen]
    lengths = tokenize_sources(setting.sender, texts, max_tokens=limit, truncate=True)[2]
    return [min(length, limit) for length in lengths]


def answer(setting: Setting, chosen: Sequence[int], readings: Sequence[Reading]) -> list[str]:
    """What the receiver answers: the likeliest label of a classification, else greedy text."""
    latents = [reading if isinstance(reading, np.ndarray) else None for reading in readings]
    if setting.task.kind == "generation":
        soft = engine.soften(setting.bridge, setting.receiver_name, setting.receiver, latents)
        rows = setting.rows(chosen, readings, [None] * len(chosen))
        params = [SamplingParams(max_tokens=setting.task.max_answer_tokens)] * len(rows)
        return [g.text for g in engine.generate(setting.receiver, rows, soft, params)[0]]
    labels, count = setting.task.labels, len(setting.task.labels)
    soft = engine.soften(setting.bridge, setting.receiver_name, setting.receiver, latents)
    rows = setting.rows(
        [i for i in chosen for _ in labels], [r for r in readings for _ in labels], list(labels) * len(chosen)
    )
    batch = collate(rows, side="left").to(setting.receiver.device)
    scores = engine.answer_scores(
        setting.receiver, batch, None if soft is None else soft.repeat_interleave(count, dim=0)
    )
    return [labels[best] for best in scores.reshape(len(chosen), count).argmax(dim=1).tolist()]
