"""One answer: its tokens, taken by the thread that makes them, and its text, read by another.

Dimensions used in this file:
    B batch    V vocabulary
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from latentwire.bridge.detokenise import Text, decode
from latentwire.bridge.reader import Reader
from latentwire.bridge.results import TokenLogprob
from latentwire.bridge.sampling import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Odds:
    """As ``TokenLogprob``, in ids."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    def told(self, lm: Reader) -> TokenLogprob:
        """With the text of its tokens."""
        top = tuple((decode(lm, [i], special=True), p) for i, p in self.top)
        return TokenLogprob(decode(lm, [self.token], special=True), self.logprob, top)


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
    """The tokens of an answer while it is generated. One thread adds to them; others may look, cut it, or give it up.

    Attributes:
        ids: Tokens said, without the one that ended the answer.
        odds: Of each of them, where log-probabilities were asked for.
        ended_by: Set by the token that ends the answer; more tokens are refused.
    """

    lm: Reader
    params: SamplingParams
    ids: list[int] = field(default_factory=list)
    odds: list[Odds] = field(default_factory=list)
    ended_by: FinishReason | None = None
    _closing: int = 0  # 1 when a token that is not text ended the answer
    _kept: int | None = None  # tokens that count, where it was cut
    _given_up: bool = False

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end the answer and are no part of it; a stop string that is one is found in no text."""
        named = (self.lm.special.get(stop) for stop in self.params.stop)
        return frozenset([*self.lm.end_ids, *self.params.stop_ids, *(i for i in named if i is not None)])

    @property
    def left(self) -> int:
        """Most tokens it can still get."""
        return self.params.max_tokens - len(self.ids)

    @property
    def over(self) -> bool:
        """Whether it takes no more tokens."""
        return self.ended_by is not None or self._kept is not None or self._given_up

    @property
    def token_count(self) -> int:
        """Tokens so far, EOS or the stop id included."""
        return len(self.ids) + self._closing if self._kept is None else self._kept

    def add(self, token: int, odds: Odds | None = None) -> bool:
        """Take the next token; True when the answer is over."""
        if self.over:  # another thread has just seen to that
            return True
        if token in self.end_ids:
            self._closing, self.ended_by = 1, "stop"
            return True
        if odds is not None:
            self.odds.append(odds)
        self.ids.append(token)
        if len(self.ids) >= self.params.max_tokens:
            self.ended_by = "length"
        return self.over

    def cut(self, tokens: int) -> None:
        """End it after so many tokens: those that are added before their maker hears of it do not count."""
        self._kept = tokens

    def give_up(self) -> None:
        """Take no more tokens: nobody waits for them."""
        self._given_up = True


class Transcript:
    """The text of an answer, with its stop strings and log-probabilities, read from its tokens at any pace.

    A stop string ends the answer after the token that completed it, however many more were added before it was read.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self._text = Text(answer.lm)
        self._logprobs: list[TokenLogprob] = []
        self._ends: list[int] = []  # where the text of each token ends, as far as it is settled
        self._read = self._shown = self._told = 0
        self._cut: int | None = None  # where a stop string begins
        self._ended_by: FinishReason | None = None

    @property
    def text(self) -> str:
        """What was read, up to a stop string."""
        return (self._text.settled + self._text.unsettled)[: self._cut]

    @property
    def generation(self) -> Generation | None:
        """The answer, once its last token was read."""
        if self._ended_by is None:
            return None
        logprobs = tuple(self._logprobs) if self.answer.params.logprobs is not None else None
        return Generation(self.text, self._ended_by, self.answer.token_count, logprobs)

    def finish(self) -> Generation:
        """The answer, of one that has ended."""
        self.read()
        generation = self.generation
        assert generation is not None
        return generation

    def read(self) -> str:
        """Text of the tokens added since the last call that no later token can change: no half of a character, no
        start of a stop string.

        The pieces of an answer, put together, are its text.
        """
        if self._ended_by is None:
            ended_by = self.answer.ended_by  # looked up first: it then speaks of all the tokens looked up next
            self._take(self.answer.ids[self._read :])
            self._ended_by = ended_by if self._cut is None else "stop"
        text = self.text if self._ended_by else self._certain()
        news = text[self._shown :]
        self._shown += len(news)
        return news

    def told(self) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of the tokens whose text ``read`` has shown, without those of the last call.

        Those of a stop string are never shown: only ``generation`` has them.
        """
        is_whole = self._ended_by is not None and self._cut is None
        end = len(self._logprobs) if is_whole else bisect_right(self._ends, self._shown)
        news = tuple(self._logprobs[self._told : end])
        self._told = end
        return news

    def _take(self, ids: Sequence[int]) -> None:
        """Read tokens: one by one where the one that completes a stop string must be known."""
        stop = self.answer.params.stop
        for some in [[token] for token in ids] if stop else [ids]:
            self._text.add(some)
            before, self._read = self._read, self._read + len(some)
            self._logprobs += [odds.told(self.answer.lm) for odds in self.answer.odds[before : self._read]]
            if stop and self._met(stop):
                self.answer.cut(self._read)
                return
            self._text.settle()
            if self._text.is_settled:
                self._ends += [len(self._text.settled)] * (self._read - len(self._ends))

    def _met(self, stop: Sequence[str]) -> bool:
        """Whether a stop string stands in the text now; none did before the newest token."""
        settled = self._text.settled
        start = max(len(settled) - max(map(len, stop)) + 1, 0)
        recent = settled[start:] + self._text.unsettled
        found = [start + recent.index(one) for one in stop if one in recent]
        self._cut = min(found, default=None)
        return self._cut is not None

    def _certain(self) -> str:
        text = self._text.settled
        return text[: len(text) - max((_overlap(text, stop) for stop in self.answer.params.stop), default=0)]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def odds_of(answers: Sequence[Answer], logits: Float[Tensor, "B V"], chosen: Float[Tensor, "B V"]) -> list[Odds | None]:
    """For each row that reports them: the log-probability of the token chosen, and the likeliest tokens with theirs."""
    return [
        None if answer.params.logprobs is None else _odds(answer.params.logprobs, row, int(choice.argmax()))
        for answer, row, choice in zip(answers, logits, chosen, strict=True)
    ]


def _odds(count: int, logits: Float[Tensor, " V"], token: int) -> Odds:
    scores = logits.float().log_softmax(dim=-1)
    likeliest = scores.topk(min(count, len(scores)))
    top = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return Odds(token, float(scores[token]), tuple(top))
