"""What a receiver has said so far in one answer: where it ends, and which part of it can be shown already.

Dimensions used in this file:
    B batch    V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from bridge.reader import Reader
from bridge.sampling import SamplingParams

FinishReason = Literal["stop", "length"]
UNFINISHED = "\ufffd"  # what a decoder shows for the first bytes of a character


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token said, with its log-probability in nats under the model alone (temperature 1, nothing filtered).

    ``top`` holds the likeliest tokens as (text, logprob), the likeliest first.
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """What a receiver said. ``finish_reason`` is ``stop`` at EOS, a stop id or a stop string, ``length`` at the limit.

    ``token_count`` counts EOS or the stop id too, where one was said; ``logprobs`` has an entry for each token of the
    text when they were asked for.
    """

    text: str
    finish_reason: FinishReason
    token_count: int
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(eq=False)
class Answer:
    """One answer while it is generated, token by token.

    Attributes:
        ids: Tokens said, without the one that ended the answer.
        ended_by: Set by the token that ends the answer; more tokens are refused.
    """

    lm: Reader
    params: SamplingParams
    ids: list[int] = field(default_factory=list)
    ended_by: FinishReason | None = None
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _closing: int = 0  # 1 when a token that is not text ended the answer
    _cut: int | None = None  # where a stop string begins
    _shown: int = 0

    @property
    def left(self) -> int:
        """Most tokens it can still get."""
        return self.params.max_tokens - len(self.ids)

    @property
    def token_count(self) -> int:
        """Tokens so far, EOS or the stop id included."""
        return len(self.ids) + self._closing

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end the answer and are no part of it."""
        return [*self.lm.end_ids, *self.params.stop_ids]

    def add(self, token: int, logprob: TokenLogprob | None = None) -> bool:
        """Take the next token; True when it ends the answer."""
        if self.ended_by is not None:  # given up by another thread just now
            return True
        if token in self.end_ids:
            self._closing, self.ended_by = 1, "stop"
            return True
        self.ids.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        if self._met_a_stop():
            self.ended_by = "stop"
        elif len(self.ids) >= self.params.max_tokens:
            self.ended_by = "length"
        return self.ended_by is not None

    @property
    def text(self) -> str:
        """What was said, up to a stop string."""
        return self._decode(self.ids)[: self._cut]

    def news(self) -> str:
        """Text since the last call that no later token can change: no half of a character, no start of a stop string.

        The pieces of an answer, put together, are its text.
        """
        text = self.text
        if self.ended_by is None:
            text = text.rstrip(UNFINISHED)
            held = max((self._overlap(text, stop) for stop in self.params.stop), default=0)
            text = text[: len(text) - held]
        fresh = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return fresh

    def finish(self) -> Generation:
        """The answer as it stands."""
        logprobs = tuple(self._logprobs) if self.params.logprobs is not None else None
        return Generation(self.text, self.ended_by or "length", len(self.ids) + self._closing, logprobs)

    def _met_a_stop(self) -> bool:
        """Whether the newest token completed a stop string; looks at no more than that takes."""
        if not self.params.stop:
            return False
        tail = 4 * max(map(len, self.params.stop)) + 8  # a character takes four bytes, a byte takes a token
        recent = self._decode(self.ids[-tail:])
        if not any(stop in recent for stop in self.params.stop):
            return False
        text = self._decode(self.ids)
        found = [text.index(stop) for stop in self.params.stop if stop in text]
        self._cut = min(found, default=None)
        return self._cut is not None

    def _decode(self, ids: list[int]) -> str:
        return str(self.lm.tokenizer.decode(ids, skip_special_tokens=True))

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that ``stop`` begins with."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def logprobs_of(
    answers: Sequence[Answer], logits: Float[Tensor, "B V"], chosen: Float[Tensor, "B V"]
) -> list[TokenLogprob | None]:
    """For each row that reports them: the log-probability of the token chosen, and the likeliest tokens with theirs."""
    return [
        None if answer.params.logprobs is None else _logprob(answer, row, int(choice.argmax()))
        for answer, row, choice in zip(answers, logits, chosen, strict=True)
    ]


def _logprob(answer: Answer, logits: Float[Tensor, " V"], token: int) -> TokenLogprob:
    scores = logits.float().log_softmax(dim=-1)
    likeliest = scores.topk(min(answer.params.logprobs or 0, len(scores)))
    decode = answer.lm.tokenizer.decode
    top = [(str(decode([i])), p) for i, p in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)]
    return TokenLogprob(str(decode([token])), float(scores[token]), tuple(top))
