"""One output: its tokens, added by the thread that generates them, and its text, read by another thread.

Dimensions used in this file:
    B batch    V vocabulary
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latentwire.bridge.detokenise import Text, decode
from latentwire.bridge.reader import Reader
from latentwire.bridge.results import TokenLogprob
from latentwire.bridge.sampling import CACHED, HELD, SamplingParams

FinishReason = Literal["stop", "length"]
IMPOSSIBLE = -9999.0  # nats of what cannot be said, where an infinite number is none: in JSON, and times zero


@dataclass(frozen=True, slots=True)
class IdLogprob:
    """As ``TokenLogprob``, with token ids in the place of texts."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    def decoded(self, lm: Reader) -> TokenLogprob:
        """The same with the texts of its tokens."""
        top = tuple((decode(lm, [i], special=True), p) for i, p in self.top)
        return TokenLogprob(decode(lm, [self.token], special=True), self.logprob, top)


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished output. ``finish_reason`` is ``stop`` at EOS, a stop id or a stop string, ``length`` at the limit.

    ``token_count`` includes EOS or the stop id; ``logprobs``, where requested, has an entry for each token of the text,
    and ``end_logprob`` is that of EOS or the stop id. ``entropy_nats`` is how unsure the receiver was, mean over its
    tokens: a measurement beside the answer, and None where the receiver runs elsewhere.
    """

    text: str
    finish_reason: FinishReason
    token_count: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    end_logprob: float | None = None
    entropy_nats: float | None = field(default=None, compare=False)


@dataclass(eq=False)
class OutputTokens:
    """The tokens of an output while it is generated. One thread adds tokens; others may read, cut or cancel them.

    Attributes:
        ids: Generated tokens, without the one that ended the output.
        logprobs: Of each of them, where log-probabilities were requested.
        end_logprob: Of the token that ended the output, where one did.
        entropies: In nats, of what each token was chosen from, the one that ended the output included.
        ended_by: Set by the token that ends the output; more tokens are refused.
    """

    lm: Reader
    params: SamplingParams
    ids: list[int] = field(default_factory=list)
    logprobs: list[IdLogprob] = field(default_factory=list)
    end_logprob: float | None = None
    entropies: list[float] = field(default_factory=list)
    ended_by: FinishReason | None = None
    _closing: int = 0  # 1 when a token that is not text ended the output
    _kept: int | None = None  # tokens that count, where it was cut
    _cancelled: bool = False

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end the output and are no part of it; a stop string that is one is found in no text."""
        named = (self.lm.special.get(stop) for stop in self.params.stop)
        return frozenset([*self.lm.end_ids, *self.params.stop_ids, *(i for i in named if i is not None)])

    @property
    def left(self) -> int:
        """Most tokens that can still be added."""
        return self.params.max_tokens - len(self.ids)

    @property
    def over(self) -> bool:
        """Whether no more tokens are added."""
        return self.ended_by is not None or self._kept is not None or self._cancelled

    @property
    def token_count(self) -> int:
        """Tokens so far, EOS or the stop id included."""
        return len(self.ids) + self._closing if self._kept is None else self._kept

    @property
    def entropy_nats(self) -> float | None:
        """Mean of ``entropies`` over the tokens that count."""
        counted = self.entropies[: self.token_count]
        return sum(counted) / len(counted) if counted else None

    def add(self, token: int, logprob: IdLogprob | None = None, entropy: float | None = None) -> bool:
        """Add the next token; True when the output is over."""
        if self.over:  # another thread has just cut or cancelled it
            return True
        if entropy is not None:
            self.entropies.append(entropy)
        if token in self.end_ids:
            self.end_logprob = None if logprob is None else logprob.logprob
            self._closing, self.ended_by = 1, "stop"
            return True
        if logprob is not None:
            self.logprobs.append(logprob)
        self.ids.append(token)
        if len(self.ids) >= self.params.max_tokens:
            self.ended_by = "length"
        return self.over

    def cut(self, tokens: int) -> None:
        """End the output after so many tokens; those that were added meanwhile do not count."""
        self._kept = tokens

    def cancel(self) -> None:
        """Add no more tokens: nobody waits for them."""
        self._cancelled = True


class OutputText:
    """The text of an output, with its stop strings and log-probabilities, read from its tokens at any pace.

    A stop string ends the output after the token that completed it, however many more were added before it was read.
    """

    def __init__(self, tokens: OutputTokens) -> None:
        self.tokens = tokens
        self._text = Text(tokens.lm)
        self._logprobs: list[TokenLogprob] = []
        self._ends: list[int] = []  # where the text of each token ends, as far as it is settled
        self._read = self._shown = self._reported = 0
        self._cut: int | None = None  # where a stop string begins
        self._ended_by: FinishReason | None = None

    @property
    def text(self) -> str:
        """The text read so far, up to a stop string."""
        return (self._text.settled + self._text.unsettled)[: self._cut]

    @property
    def generation(self) -> Generation | None:
        """The finished output, once its last token was read."""
        if self._ended_by is None:
            return None
        logprobs = tuple(self._logprobs) if self.tokens.params.logprobs is not None else None
        end_logprob = self.tokens.end_logprob if self._cut is None else None
        count, entropy = self.tokens.token_count, self.tokens.entropy_nats
        return Generation(self.text, self._ended_by, count, logprobs, end_logprob, entropy)

    def finish(self) -> Generation:
        """Read the rest of an output that has ended."""
        self.read()
        generation = self.generation
        assert generation is not None
        return generation

    def read(self) -> str:
        """The next piece of the text that no later token changes: no half of a character, no start of a stop string."""
        if self._ended_by is None:
            ended_by = self.tokens.ended_by  # read before the tokens: it then holds for all of them
            self._decode(self.tokens.ids[self._read :])
            self._ended_by = ended_by if self._cut is None else "stop"
        text = self.text if self._ended_by else self._certain()
        piece = text[self._shown :]
        self._shown += len(piece)
        return piece

    def new_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of the tokens whose text ``read`` has returned since the last call.

        Those of a stop string are left out: only ``generation`` has them.
        """
        is_whole = self._ended_by is not None and self._cut is None
        end = len(self._logprobs) if is_whole else bisect_right(self._ends, self._shown)
        logprobs = tuple(self._logprobs[self._reported : end])
        self._reported = end
        return logprobs

    def _decode(self, ids: Sequence[int]) -> None:
        """Decode tokens: one by one where the one that completes a stop string must be known."""
        stop = self.tokens.params.stop
        for some in [[token] for token in ids] if stop else [ids]:
            self._text.add(some)
            before, self._read = self._read, self._read + len(some)
            self._logprobs += [one.decoded(self.tokens.lm) for one in self.tokens.logprobs[before : self._read]]
            if stop and self._stopped(stop):
                self.tokens.cut(self._read)
                return
            self._text.settle()
            if self._text.is_settled:
                self._ends += [len(self._text.settled)] * (self._read - len(self._ends))

    def _stopped(self, stop: Sequence[str]) -> bool:
        """Whether the text holds a stop string now; it held none before the newest token."""
        settled = self._text.settled
        start = max(len(settled) - max(map(len, stop)) + 1, 0)
        recent = settled[start:] + self._text.unsettled
        found = [start + recent.index(one) for one in stop if one in recent]
        self._cut = min(found, default=None)
        return self._cut is not None

    def _certain(self) -> str:
        text = self._text.settled
        return text[: len(text) - max((_overlap(text, stop) for stop in self.tokens.params.stop), default=0)]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def logprobs_of(
    outputs: Sequence[OutputTokens], logits: Float[Tensor, "B V"], chosen: Float[Tensor, "B V"]
) -> list[IdLogprob | None]:
    """For each row that reports them: the log-probability of the chosen token, and the likeliest tokens with theirs."""
    counts = {row: count for row, output in enumerate(outputs) if (count := output.params.logprobs) is not None}
    if not counts:
        return [None] * len(outputs)
    tokens = chosen[list(counts)].argmax(dim=1)
    report = Report.of(logits[list(counts)], tokens, max(counts.values()))
    ids = tokens.tolist()  # and with this the device has made the report too
    found = {row: report.row(i, ids[i], counts[row]) for i, row in enumerate(counts)}
    return [found.get(row) for row in range(len(outputs))]


def entropies_of(logits: Float[Tensor, "B V"]) -> Float[Tensor, " B"]:
    """Entropy in nats of each row's next token as the model has it, before temperature, top-k and top-p."""
    rows = max(1, (CACHED if logits.device.type == "cpu" else HELD) // logits.shape[1])
    found = []
    for part in torch.split(logits, rows):
        scores = part.float().log_softmax(dim=-1).clamp(min=IMPOSSIBLE)
        found.append(-(scores.exp() * scores).sum(dim=-1))
    return torch.cat(found)


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """Log-probabilities of some rows: of the token chosen, then of the likeliest; and which these are."""

    values: Float[Tensor, "B _"]
    tokens: Int[Tensor, "B _"]

    @classmethod
    def of(cls, logits: Float[Tensor, "B V"], chosen: Int[Tensor, " B"], count: int) -> "Report":
        """Made on the device; on the host once the device has done what it was asked until now."""
        scores = logits.float().log_softmax(dim=-1)
        likeliest = scores.topk(min(count, scores.shape[1]))
        values = torch.cat([scores.gather(1, chosen[:, None]), likeliest.values], dim=1)
        return cls(*(found.to("cpu", non_blocking=True) for found in (values, likeliest.indices)))  # into pinned memory

    def row(self, row: int, token: int, count: int) -> IdLogprob:
        """Of one row, with so many of the likeliest tokens."""
        own, *others = self.values[row, : 1 + count].tolist()
        return IdLogprob(token, own, tuple(zip(self.tokens[row, :count].tolist(), others, strict=True)))
