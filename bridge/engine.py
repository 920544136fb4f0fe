"""Run the two halves of a bridge for many requests at once: ``encode`` and ``generate``.

Both take rows in any number and lengths and give each row what it would get alone.

Dimensions used in this file:
    B batch    K slots    C latent width    D receiver width    W one of these    V vocabulary    A answer columns
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, StoppingCriteriaList

from latentwire.bridge.checkpoint import BridgeModel
from latentwire.bridge.devices import in_background
from latentwire.bridge.generation.output import (
    Generation,
    IdLogprob,
    OutputText,
    OutputTokens,
    entropies_of,
    logprobs_of,
)
from latentwire.bridge.models import FrozenLM, hidden_states, pad_sources
from latentwire.bridge.prompt import IGNORE, Batch, Row, collate, embed
from latentwire.bridge.reader import SourceTokens
from latentwire.bridge.sampling import SamplingParams, choose


@dataclass(frozen=True, eq=False)
class Encoded:
    """A source as the bridge sends it: latent float32 (K, C), and the source's length in sender tokens."""

    latent: NDArray[np.float32]
    source_tokens: int
    truncated: bool


@torch.inference_mode()
def encode(bridge: BridgeModel, sender: FrozenLM, sources: Sequence[SourceTokens]) -> list[Encoded]:
    """Latents of tokenised sources, in order: one pass of the sender, no cache, up to the layer read.

    On a CPU a latent equals the one of its source alone within 1e-5 (slots have RMS 1; 2.4e-6 was the most measured),
    not bit for bit: attention sums over a padded width in another order, products of few rows use another kernel, and
    several threads split by rows. The same batch gives the same bits each time.
    """
    with in_background(sender.device):
        ids, mask = pad_sources(sender, sources)
        states = hidden_states(sender, ids, mask, bridge.config.layers, bridge.encoder.lora)
        latents, slots = bridge.encoder(states, mask)
        rows = [latent[real].cpu().numpy() for latent, real in zip(latents.float(), slots, strict=True)]
    return [
        Encoded(row, len(source.ids), source.full_length > len(source.ids))
        for row, source in zip(rows, sources, strict=True)
    ]


@torch.inference_mode()
def soften(
    bridge: BridgeModel, receiver_name: str, receiver: FrozenLM, latents: Sequence[NDArray[np.float32] | None]
) -> Float[Tensor, "B K D"] | None:
    """Soft tokens of latents of any length, right-padded; None stands for a row without a latent."""
    padded = pad_rows([None if latent is None else torch.tensor(latent) for latent in latents])
    return None if padded is None else cast(Tensor, bridge.head(receiver_name)(padded.to(receiver.device)))


def pad_rows(rows: Sequence[Float[Tensor, "_ W"] | None]) -> Float[Tensor, "B K W"] | None:
    """Latents or soft tokens of any length, right-padded with zeros; None stands for a row without."""
    first = next((row for row in rows if row is not None), None)
    if first is None:
        return None
    return pad_sequence([first[:0] if row is None else row for row in rows], batch_first=True)


@dataclass(frozen=True, eq=False)
class LatentPrompt:
    """One output to generate: the composed row, the latent for its slots, and how to sample."""

    row: Row
    latent: NDArray[np.float32] | None
    params: SamplingParams


def generate_from_latents(
    bridge: BridgeModel, receiver_name: str, receiver: FrozenLM, prompts: Sequence[LatentPrompt]
) -> tuple[list[Generation], float]:
    """``soften`` latents, then ``generate``."""
    soft = soften(bridge, receiver_name, receiver, [prompt.latent for prompt in prompts])
    return generate(receiver, [prompt.row for prompt in prompts], soft, [prompt.params for prompt in prompts])


def generate(
    receiver: FrozenLM,
    rows: Sequence[Row],
    soft_tokens: Float[Tensor, "B K D"] | None,
    params: Sequence[SamplingParams],
) -> tuple[list[Generation], float]:
    """Generations of rows, none influenced by its neighbours, and the seconds until the first token was chosen.

    Rows are left-padded and run through the library's own ``generate``, with explicit positions: exact for every
    decoder family, and the reference for faster engines.
    """
    outputs = [OutputText(OutputTokens(receiver, p)) for p in params]

    def look_for_stops(row: int) -> None:
        if params[row].stop:
            outputs[row].read()

    seconds = run(receiver, rows, soft_tokens, [output.tokens for output in outputs], look_for_stops)
    return [output.finish() for output in outputs], seconds


@torch.inference_mode()
def run(
    receiver: FrozenLM,
    rows: Sequence[Row],
    soft_tokens: Float[Tensor, "B K D"] | None,
    outputs: Sequence[OutputTokens],
    on_token: Callable[[int], None] = lambda row: None,
) -> float:
    """Generate outputs to their ends, and return the seconds until the first token of the first batch was chosen.

    One that has begun is continued, one that is ended meanwhile is left alone. ``on_token`` is called with a row's
    number after each of its tokens.
    """
    seconds: list[float] = []
    rows = [row.after(output.ids) for row, output in zip(rows, outputs, strict=True)]
    for group in _within_context(rows, outputs, receiver.max_tokens):
        soft = None if soft_tokens is None else soft_tokens[group]
        watch = _Watch([outputs[i] for i in group], [partial(on_token, i) for i in group])
        _generate(receiver, [rows[i] for i in group], soft, watch)
        seconds.append(watch.first_token_seconds)
    return seconds[0]


def _within_context(rows: Sequence[Row], outputs: Sequence[OutputTokens], limit: int) -> list[list[int]]:
    """Rows that can share a batch, nearly always all: its longest row and its longest output must fit together,
    since a finished row goes on taking positions until the batch ends."""
    groups: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: outputs[i].left):
        for group in groups:
            if max(len(rows[j]) for j in [*group, i]) + outputs[i].left <= limit:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def _generate(
    receiver: FrozenLM, rows: Sequence[Row], soft_tokens: Float[Tensor, "B K D"] | None, watch: "_Watch"
) -> None:
    batch = collate(rows, side="left").to(receiver.device)
    eos, pad = receiver.tokenizer.eos_token_id, receiver.tokenizer.pad_token_id
    cast(Any, receiver.model).generate(
        inputs_embeds=embed(receiver, batch, soft_tokens),
        attention_mask=batch.mask.long(),
        position_ids=batch.positions,
        max_new_tokens=max(output.left for output in watch.outputs),
        do_sample=False,
        num_beams=1,
        eos_token_id=list(receiver.end_ids) or None,
        pad_token_id=eos if pad is None else pad,
        logits_processor=LogitsProcessorList([watch.choose]),
        stopping_criteria=StoppingCriteriaList([watch.hand_over]),
    )


def answer_logits(
    receiver: FrozenLM, batch: Batch, soft_tokens: Float[Tensor, "B K D"] | None, *, multiple: int = 1
) -> tuple[Float[Tensor, "B A V"], Int[Tensor, "B A"]]:
    """Logits and (unshifted) labels of the last A columns: from one before the first label to the end.

    Memory grows with answer × V, not with input × V. Differentiable in ``soft_tokens``. A is rounded up to a
    ``multiple``, so that a compiled receiver meets few shapes.
    """
    keep = answer_columns(batch, multiple)
    logits: Tensor = receiver.model(**inputs_of(receiver, batch, soft_tokens), logits_to_keep=keep).logits
    return logits, batch.labels[:, -keep:]


def answer_columns(batch: Batch, multiple: int = 1) -> int:
    """How many of the last columns hold the answers: from one before the first label, rounded up to a ``multiple``."""
    labelled, T = (batch.labels != IGNORE).any(dim=0), batch.labels.shape[1]
    first = int(labelled.int().argmax()) if bool(labelled.any()) else T - 1
    return min(-(-(T - max(first - 1, 0)) // multiple) * multiple, T)


def inputs_of(receiver: FrozenLM, batch: Batch, soft_tokens: Float[Tensor, "B K D"] | None) -> dict[str, Any]:
    """What the receiver's forward pass is given for a batch."""
    # A row of padding only still needs one position to attend to.
    empty = ~batch.mask.any(dim=1, keepdim=True)
    return {
        "inputs_embeds": embed(receiver, batch, soft_tokens),
        "attention_mask": (batch.mask | empty).long(),
        "position_ids": batch.positions,
        "use_cache": False,
    }


@torch.inference_mode()
def answer_losses(receiver: FrozenLM, batch: Batch) -> list[float]:
    """Nats of each labelled token of a batch of text, row after row."""
    logits, labels = answer_logits(receiver, batch, None)
    nats: list[float] = token_losses(logits, labels)[labels[:, 1:] != IGNORE].tolist()
    return nats


def token_losses(logits: Float[Tensor, "B A V"], labels: Int[Tensor, "B A"]) -> Float[Tensor, "B A-1"]:
    """Cross-entropy in nats of each labelled token given what stands before it; 0 where nothing is labelled.

    The labels move and the logits stay as they lie in memory: sliced or transposed, they would be copied, and take
    twice as long.
    """
    return cross_entropy(logits, following(labels))[:, :-1]


def following(labels: Int[Tensor, "B A"]) -> Int[Tensor, "B A"]:
    """The label that each column's logits foretell: the next column's; the last column foretells none.

    The one place where labels are shifted.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def cross_entropy(logits: Float[Tensor, "B A V"], wanted: Int[Tensor, "B A"]) -> Float[Tensor, "B A"]:
    """Nats of the token wanted in each column; 0 where none is."""
    flat = logits.float().flatten(0, 1)
    losses = F.cross_entropy(flat, wanted.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view_as(wanted)


class _Watch:
    """Goes along with a batch of ``generate``: chooses each row's next token, times the first, and ends the batch."""

    def __init__(self, outputs: Sequence[OutputTokens], on_token: Sequence[Callable[[], None]]) -> None:
        self.outputs, self.on_token = outputs, on_token
        self.params = [output.params for output in outputs]
        self.logprobs: list[IdLogprob | None] = []
        self.entropies = torch.empty(0)
        self.started = time.perf_counter()
        self.first_token_seconds = 0.0

    def choose(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits processor: scores whose argmax is the choice."""
        chosen = choose(scores, self.params, [len(output.ids) for output in self.outputs])
        self.logprobs, self.entropies = logprobs_of(self.outputs, scores, chosen), entropies_of(scores)
        if not self.first_token_seconds:
            chosen.argmax(dim=-1).tolist()  # wait for the device: this is the moment a user sees a token
            self.first_token_seconds = time.perf_counter() - self.started
        return chosen

    def hand_over(self, input_ids: Tensor, scores: Tensor | None, **_: object) -> Tensor:
        """The stopping criterion: each row gets its token; the batch ends when its last row has ended."""
        tokens, entropies = input_ids[:, -1].tolist(), self.entropies.tolist()
        for row, (output, token) in enumerate(zip(self.outputs, tokens, strict=True)):
            if not output.over:
                output.add(token, self.logprobs[row], entropies[row])
                self.on_token[row]()
        return torch.tensor([output.over for output in self.outputs], device=input_ids.device)
