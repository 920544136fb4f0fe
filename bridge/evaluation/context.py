"""What an evaluation runs on: a task's examples, a bridge, its two models, and what the receiver can be given.

Dimensions used in this file:
    K slots    C latent width
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentwire.bridge import engine, wire
from latentwire.bridge.checkpoint import BridgeModel, check_receiver, check_sender, folder_of_checkpoint, load_bridge
from latentwire.bridge.config import Layout, Manifest
from latentwire.bridge.devices import device_named, dtype_named
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.heldout import check_labels, held_out
from latentwire.bridge.evaluation.tasks import Example, Task, load_task
from latentwire.bridge.gate import Gate, load_gates
from latentwire.bridge.models import FrozenLM, check_role, load_model
from latentwire.bridge.prompt import IGNORE, LATENT, TEXT, Row, collate, compose, cut_text, fit, text_layout
from latentwire.bridge.reader import Reader, SourceTokens, source_tokens, text_ids, text_offsets
from latentwire.bridge.remote import is_address
from latentwire.bridge.sampling import SamplingParams

Latent = NDArray[np.float32]


class Tuned(NamedTuple):
    """A text behind soft tokens that were learnt for the task."""

    latent: Latent
    text: str


Reading = Latent | Tuned | str | None
"""What stands at ``{latent}``: soft tokens of a latent, a text, a text behind soft tokens, or nothing."""

RELAY_TOKENS = 64  # most tokens a sender writes in the relay condition
RELAY_BYTES_TOKENS = 256  # and where it may be as long as the message


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
        own_layout: How its inputs are put together, where it is not the bridge's receiver that is asked.
    """

    task: Task
    examples: Sequence[Example]
    bridge: BridgeModel
    receiver_name: str
    receiver: Reader
    lender: Lender = field(default_factory=Lender)
    own_layout: Layout | None = None

    @property
    def layout(self) -> Layout:
        return self.own_layout or self.bridge.config.heads[self.receiver_name].layout

    def rows(self, chosen: Sequence[int], readings: Sequence[Reading], answers: Sequence[str | None]) -> list[Row]:
        """Receiver inputs with each reading at ``{latent}``; a text over the receiver's context is cut at its end."""
        room = self.receiver.max_tokens - self.task.max_answer_tokens
        made = []
        for i, reading, answer in zip(chosen, readings, answers, strict=True):
            prompt = self.examples[i].prompt
            if isinstance(reading, str):
                made.append(fit(self.receiver, self.layout, prompt, reading, room, answer))
            elif isinstance(reading, Tuned):
                soft = len(reading.latent)
                made.append(fit(self.receiver, self.layout, prompt, reading.text, room, answer, soft=soft))
            else:
                slots = None if reading is None else len(reading)
                made.append(compose(self.receiver, self.layout, prompt, latent=slots, answer=answer, max_tokens=room))
        return made


@dataclass(frozen=True, kw_only=True)
class EvaluationContext(PredictionContext):
    """Everything an evaluation runs on.

    ``bridge_id`` and ``dtype`` say how latents cross the wire; ``where`` are arguments of ``load_model``; ``dropped``
    counts the test examples that were left out, by why; ``gate`` is the receiver's, where it has one.
    """

    checkpoint: str
    bridge_id: str
    sender: Reader
    dtype: wire.DType = "float16"
    where: Mapping[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    gate: Gate | None = None

    def of_sender(self) -> "EvaluationContext":
        """The same measurement in which the sender itself is asked, in plain text."""
        return replace(self, receiver=self.sender, own_layout=text_layout(self.sender))

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
        books = self.bridge.codebooks
        messages = [wire.encode(row.latent, self.bridge_id, self.dtype, codebooks=books) for row in sent]
        latents = [wire.decode(message, bridge_id=self.bridge_id, codebooks=books).latent for message in messages]
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
        return self._written(chosen, min(RELAY_TOKENS, self.sender.max_tokens // 4))

    def relay_bytes(self, chosen: Sequence[int]) -> list[str]:
        """The same, as long as the message has bytes, or ``RELAY_BYTES_TOKENS``."""
        sizes = [self.message_bytes(len(latent)) for latent in self.recall(chosen)]
        written = self._written(chosen, min(RELAY_BYTES_TOKENS, max(sizes), self.sender.max_tokens // 2))
        return [text.encode()[:size].decode(errors="ignore") for text, size in zip(written, sizes, strict=True)]

    def _written(self, chosen: Sequence[int], length: int) -> list[str]:
        layout = text_layout(self.sender)
        template = self.task.relay.replace("{source}", LATENT)
        room = self.sender.max_tokens - length
        rows = [fit(self.sender, layout, template, self.examples[i].source, room) for i in chosen]
        params = [SamplingParams(max_tokens=length)] * len(rows)
        with self.lender.lend(self.sender) as sender:
            return [g.text.strip() for g in engine.generate(sender, rows, None, params)[0]]

    def message_bytes(self, slots: int) -> int:
        """Bytes of a latent of so many slots as a message."""
        return wire.message_bytes(slots, self.bridge.config.encoder.latent_dim, self.dtype)

    def cut(self, chosen: Sequence[int]) -> list[str]:
        """Sources cut to as many receiver tokens as their latent has slots."""
        slots = [len(latent) for latent in self.recall(chosen)]
        return [cut_text(self.receiver, self.examples[i].source, K) for i, K in zip(chosen, slots, strict=True)]

    def pruned(self, chosen: Sequence[int]) -> list[str]:
        """The words of each source that surprise the sender most, in order, in as many receiver tokens as slots.

        Source: Selective Context, arXiv:2310.06201 §3: what a language model foresees need not be said.
        """
        sources = [self.examples[i].source for i in chosen]
        slots = [len(latent) for latent in self.recall(chosen)]
        surprises = self._surprises(sources)
        return [
            _fullest(self.receiver, source, scores, K)
            for source, scores, K in zip(sources, surprises, slots, strict=True)
        ]

    def _surprises(self, sources: Sequence[str]) -> list[list[float]]:
        """Nats of each word under the sender, given all that stands before it."""
        bos = self.sender.source_layout.bos_id
        first = [] if bos is None else [bos]
        ids = [text_ids(self.sender, source)[: self.sender.max_tokens - len(first)] for source in sources]
        rows = [Row(first + own, [TEXT] * len(first + own), [IGNORE] * len(first) + own) for own in ids]
        with self.lender.lend(self.sender) as sender:  # one at a time: logits take length × vocabulary
            losses = [engine.answer_losses(sender, collate([row], side="left").to(sender.device)) for row in rows]
        made = []
        for source, own, nats in zip(sources, ids, losses, strict=True):
            spans = [match.span() for match in re.finditer(r"\S+", source)]
            scores = [0.0] * len(spans)
            ends = [end for _, end in text_offsets(self.sender, source)][: len(own)]
            for end, loss in zip(ends, [0.0, *nats][-len(own) :], strict=True):
                word = next((at for at, (_, stop) in enumerate(spans) if end <= stop), None)
                if word is not None:
                    scores[word] += loss
            made.append(scores)
        return made

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
    loaded = load_task(task)
    opened = open_bridge(checkpoint, dtype=dtype, receiver=receiver, device=device, precision=precision)
    name = opened["receiver_name"]
    check_room(loaded, opened["receiver"])
    check_labels(loaded, opened["bridge"].config.heads[name].layout)
    examples = held_out(loaded, limit)
    return EvaluationContext(task=loaded, examples=examples.examples, dropped=examples.dropped, **opened)


def open_bridge(
    checkpoint: str | Path, *, dtype: wire.DType, receiver: str | None, device: str | None, precision: str | None
) -> dict[str, Any]:
    """Load a checkpoint and its models: an ``EvaluationContext`` but for the task (errors as of ``open_context``)."""
    placed = device_named(device)
    where: dict[str, Any] = {"device": placed, "dtype": dtype_named(precision, placed)}
    manifest, bridge = load_bridge(checkpoint, device=placed)
    if is_address(receiver):
        raise InvalidRequest(
            f"{receiver} generates only, and an evaluation also scores given texts; expected a receiver that runs here",
            param="receiver",
        )
    name = receiver or bridge.default_receiver
    bridge.head(name)
    wire.check_codebooks(dtype, bridge.codebooks)
    check_role(manifest.bridge.sender.name, "sender")
    check_role(name, "receiver")
    sender, lm = load_model(manifest.bridge.sender.name, **where), load_model(name, **where)
    check_sender(manifest.bridge, sender)
    check_receiver(manifest.bridge, name, lm)
    return {
        "checkpoint": str(checkpoint), "bridge": bridge, "bridge_id": manifest.bridge_id, "sender": sender,
        "receiver_name": name, "receiver": lm, "dtype": dtype, "where": where,
        "gate": load_gates(folder_of_checkpoint(checkpoint), manifest).get(name),
    }  # fmt: skip


def check_room(task: Task, receiver: Reader) -> None:
    """Refuse a task whose answers alone fill the receiver's context (InvalidRequest)."""
    if task.max_answer_tokens >= receiver.max_tokens:
        message = f"max_answer_tokens is {task.max_answer_tokens}; {receiver.name!r} reads {receiver.max_tokens} in all"
        raise InvalidRequest(message, param="task")


def _fullest(lm: Reader, text: str, scores: Sequence[float], tokens: int) -> str:
    """The best words of ``text`` by their scores, in order, as many as ``lm`` reads as at most so many tokens."""
    words = text.split()
    ranked = sorted(range(len(words)), key=lambda word: -scores[word])

    def kept(count: int) -> str:
        return " ".join(words[word] for word in sorted(ranked[:count]))

    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(text_ids(lm, kept(middle))) <= tokens else (low, middle - 1)
    return kept(low)
