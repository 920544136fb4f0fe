"""Score given continuations of a receiver's input: what they share is read once, however many there are.

A pass has two forwards: one over the inputs, whose keys and values stay, and one over all continuations, from copies
of these. Rows are composed whole (``bridge.prompt``) and parted afterwards, so that every token is the one that it
would be in one piece.

Dimensions used in this file:
    B rows    K slots    D receiver width    P tokens read so far, padded    T new tokens, padded
    N continuations    A tokens scored, padded    V vocabulary
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from latentwire.bridge.checkpoint import BridgeModel
from latentwire.bridge.detokenise import decode
from latentwire.bridge.engine import answer_logits, soften
from latentwire.bridge.generation.output import IMPOSSIBLE
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import IGNORE, Batch, Row, collate, embed
from latentwire.bridge.reader import Reader
from latentwire.bridge.results import AnsweredFrom, Score, ScoredChoice, TokenLogprob

Judged = tuple[int, float, bool]
"""A token, its log-probability in nats, and whether it was the likeliest."""

PADDED = 4 / 3  # tokens fed for each that is needed, at most, where continuations are grouped by length
SCORED_ROWS = 64  # continuations in one pass: memory grows with these × vocabulary
COPIED = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
"""Layers of a cache that rows can be copied out of. A recurrent state is written in place and holds no rows to copy:
models that keep one score whole rows."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """A continuation's tokens and what the receiver gives each, in nats; ``greedy``: each was the likeliest."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    greedy: bool

    @classmethod
    def of(cls, told: Sequence[Judged]) -> "Continuation":
        """From its tokens one by one."""
        return cls(tuple(one[0] for one in told), tuple(one[1] for one in told), all(one[2] for one in told))

    @property
    def logprob(self) -> float:
        """Log-probability of all its tokens."""
        return sum(self.logprobs)


@dataclass(eq=False)
class WarmRows:
    """Rows that a receiver has begun to read: keys and values of their tokens, and which columns hold a token."""

    receiver: FrozenLM
    cache: DynamicCache
    mask: Bool[Tensor, "B P"]

    @classmethod
    def none(cls, receiver: FrozenLM, count: int) -> "WarmRows":
        """Rows of which nothing was read."""
        mask = torch.zeros(count, 0, dtype=torch.bool, device=receiver.device)
        return cls(receiver, DynamicCache(config=receiver.model.config), mask)

    def copied(self, owners: Sequence[int]) -> "WarmRows":
        """The rows of these numbers, each as often as it is named; they grow apart from the ones kept."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(torch.tensor(owners, device=self.receiver.device))
        return WarmRows(self.receiver, cache, self.mask[list(owners)])

    @torch.inference_mode()
    def read(
        self, batch: Batch, soft_tokens: Float[Tensor, "B K D"] | None = None, *, keep: int = 1
    ) -> Float[Tensor, "B A V"]:
        """Read on, and return the logits of the last ``keep`` columns.

        No padding may stand between two tokens of a row, since windows of attention are counted in columns: the first
        batch is padded on the left, the last one on the right, one between them not at all.
        """
        seen = self.mask.sum(dim=1, keepdim=True)
        self.mask = torch.cat([self.mask, batch.mask], dim=1)
        logits: Tensor = self.receiver.model(
            inputs_embeds=embed(self.receiver, batch, soft_tokens),
            attention_mask=self.mask.long(),
            position_ids=seen + batch.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return logits


def is_copied(receiver: FrozenLM) -> bool:
    """Whether what a receiver has read can be copied; see ``COPIED``."""
    return all(type(layer) in COPIED for layer in DynamicCache(config=receiver.model.config).layers)


def score_from_latents(
    bridge: BridgeModel,
    receiver_name: str,
    receiver: FrozenLM,
    latents: Sequence[NDArray[np.float32] | None],
    questions: Sequence[Sequence[Row]],
) -> list[list[Continuation]]:
    """``score`` in as many passes as it takes, each with the soft tokens of its latents; None: without."""
    found: list[list[Continuation]] = [[] for _ in questions]
    for numbers, rows in passes(questions):
        soft = soften(bridge, receiver_name, receiver, latents[numbers.start : numbers.stop])
        for number, scored in zip(numbers, score(receiver, rows, soft), strict=True):
            found[number] += scored
    return found


def score_of(
    lm: Reader,
    choices: Sequence[str],
    found: Sequence[Continuation],
    answered_from: AnsweredFrom | None = None,
    trust: float | None = None,
    *,
    logprobs: bool,
) -> Score:
    """Continuations as a caller sees them: beside each other, with the texts of their tokens."""
    nats = np.maximum([one.logprob for one in found], IMPOSSIBLE)
    shares = np.exp(nats - nats.max())
    shares /= shares.sum()
    told = [
        tuple(TokenLogprob(decode(lm, [i], special=True), nat) for i, nat in zip(one.ids, one.logprobs, strict=True))
        for one in found
    ]
    made = tuple(
        ScoredChoice(text, float(nat), len(one.ids), float(share), tokens if logprobs else None)
        for text, one, nat, share, tokens in zip(choices, found, nats, shares, told, strict=True)
    )
    return Score(made, int(nats.argmax()), answered_from, trust)


@torch.inference_mode()
def score(
    receiver: FrozenLM, questions: Sequence[Sequence[Row]], soft_tokens: Float[Tensor, "B K D"] | None
) -> list[list[Continuation]]:
    """Scores of the labelled tokens of rows; a question has a row for each of its continuations, and one latent.

    Equal to those of whole rows within 1e-4 nats. All is one pass: ``passes`` cuts what does not fit.
    """
    owners = [question for question, rows in enumerate(questions) for _ in rows]
    rows = [row for rows in questions for row in rows]
    lengths = [shared(rows) for rows in questions]
    each = None if soft_tokens is None else soft_tokens[owners]
    told: list[list[Judged]] = [[] for _ in rows]
    if len(rows) == len(questions) or not min(lengths) or not is_copied(receiver):
        logits, labels = answer_logits(receiver, collate(rows, side="left").to(receiver.device), each)
        _judge(logits[:, :-1], labels[:, 1:], told)
    else:
        begun = WarmRows.none(receiver, len(questions))
        shares = [rows[0][:length] for rows, length in zip(questions, lengths, strict=True)]
        first = begun.read(collate(shares, side="left").to(receiver.device), soft_tokens)[owners]
        rests = [row[lengths[owner] :] for row, owner in zip(rows, owners, strict=True)]
        for part in _alike([len(rest) for rest in rests], receiver.device):
            # What is fed stands one behind what is scored: the first token of a rest is predicted by what is shared,
            # and the last predicts nothing.
            labels = collate([rests[i] for i in part], side="right").labels.to(receiver.device)
            mine = [told[i] for i in part]
            _judge(first[part], labels[:, :1], mine)
            if scored := labels.shape[1] - max(min(_labelled(rests[i]) for i in part), 1):
                fed = collate([rests[i][:-1] for i in part], side="right").to(receiver.device)
                on = begun.copied([owners[i] for i in part])
                soft = None if each is None else each[part]
                _judge(on.read(fed, soft, keep=scored), labels[:, -scored:], mine)
    found = map(Continuation.of, told)
    return [[next(found) for _ in rows] for rows in questions]


def passes(questions: Sequence[Sequence[Row]], most: int | None = None) -> Iterator[tuple[range, list[list[Row]]]]:
    """Questions in passes of at most ``most`` rows: their numbers, and the rows of each; one may go on in the next."""
    each = [(number, row) for number, rows in enumerate(questions) for row in rows]
    most = most or SCORED_ROWS
    for start in range(0, len(each), most):
        part = each[start : start + most]
        numbers = range(part[0][0], part[-1][0] + 1)
        yield numbers, [[row for owner, row in part if owner == number] for number in numbers]


def shared(rows: Sequence[Row]) -> int:
    """Tokens that all rows begin with, those that are scored left out."""
    first, length = rows[0], min(map(_labelled, rows))
    for row in rows[1:]:
        same = (row.ids[t] == first.ids[t] and row.slots[t] == first.slots[t] for t in range(length))
        length = next((t for t, is_same in enumerate(same) if not is_same), length)
    return length


def _labelled(row: Row) -> int:
    """Where the first labelled token stands; the row's length where none is."""
    return next((t for t, label in enumerate(row.labels) if label != IGNORE), len(row))


def _alike(lengths: Sequence[int], device: torch.device) -> list[list[int]]:
    """Numbers of rows in groups of like length: a CPU takes longer for padding than for a forward more."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    if device.type != "cpu":
        return [order]
    groups, real = [order[:1]], lengths[order[0]]
    for i in order[1:]:
        real += lengths[i]
        if lengths[i] * (len(groups[-1]) + 1) > real * PADDED:
            groups.append([])
            real = lengths[i]
        groups[-1].append(i)
    return groups


def _judge(logits: Float[Tensor, "N A V"], labels: Int[Tensor, "N A"], told: Sequence[list[Judged]]) -> None:
    """Tell of each row's labels what the logits where they stand say of them."""
    said = labels.clamp(min=0)[..., None]
    logprobs = logits.float().log_softmax(dim=-1).gather(-1, said)[..., 0]
    columns = zip(labels.tolist(), logprobs.tolist(), logits.argmax(dim=-1).tolist(), told, strict=True)
    for wanted, logprob, likeliest, row in columns:
        row += [
            (label, p, label == best)
            for label, p, best in zip(wanted, logprob, likeliest, strict=True)
            if label != IGNORE
        ]
