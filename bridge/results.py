"""What a bridge gives back, as plain values: the same from a bridge in this process and from one over HTTP. No torch.

Dimensions used in this file:
    K slots    C latent width
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentwire.bridge.diversity import Diversity
from latentwire.bridge.wire import decode


@dataclass(frozen=True)
class Usage:
    """What was counted: sender tokens read, soft tokens given to the receiver, tokens it wrote.

    >>> latentwire.Bridge.load().generate("Mara sings.", "Who sings?", max_tokens=3).usage
    Usage(source_tokens=7, soft_tokens=2, generated_tokens=3)
    """

    source_tokens: int = 0
    soft_tokens: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True)
class Timing:
    """Milliseconds, by the service's clock.

    >>> timing = latentwire.Bridge.load().generate("Mara sings.", "Who sings?", max_tokens=3).timing
    >>> timing.total_ms >= timing.encode_ms
    True
    """

    encode_ms: float = 0.0
    generate_ms: float = 0.0
    total_ms: float = 0.0


def timing_since(started: float, encode_ms: float) -> Timing:
    """Of what began at a ``time.perf_counter()`` and ends now."""
    total_ms = ms_since(started)
    return Timing(encode_ms, round(total_ms - encode_ms, 3), total_ms)


def ms_since(started: float) -> float:
    """Milliseconds since a ``time.perf_counter()``."""
    return round((time.perf_counter() - started) * 1000, 3)


@dataclass(frozen=True)
class Latent:
    """What a sender made of a text: ``data`` is the message, ``shape`` (K, C); ``id`` is there when it was stored.

    >>> latent = latentwire.Bridge.load().encode("Mara sings.")[0]
    >>> latent.array.shape == latent.shape, latent.array.dtype, latent.dtype
    (True, dtype('float32'), 'float16')
    """

    __pydantic_config__: ClassVar = {"val_json_bytes": "base64"}  # what pydantic needs to know to read it from JSON

    data: bytes
    shape: tuple[int, int]
    source_tokens: int
    dtype: str
    source_bytes: int = 0
    truncated: bool = False
    id: str | None = None

    @property
    def array(self) -> NDArray[np.float32]:
        """The numbers (K, C), decoded and checked anew each time (InvalidMessage when the message is damaged)."""
        return decode(self.data).latent


@dataclass(frozen=True)
class Encoded:
    """Answer of ``encode``: latents in the order of the texts.

    >>> with latentwire.Client(url) as client:
    ...     encoded = client.encode(["Mara sings.", "Ben lives in Rome."])
    >>> len(encoded), [latent.truncated for latent in encoded]
    (2, [False, False])
    """

    bridge: str
    latents: tuple[Latent, ...]
    usage: Usage
    timing: Timing
    request_id: str | None = None

    def __iter__(self) -> Iterator[Latent]:
        return iter(self.latents)

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token said and its log-probability in nats; ``top`` holds the likeliest tokens, the likeliest first.

    >>> answers = latentwire.Bridge.load().generate("Mara sings.", "Who sings?", max_tokens=1, logprobs=2)
    >>> [len(token.top) for token in answers.outputs[0].logprobs]
    [2]
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


AnsweredFrom = Literal["latent", "text"]


@dataclass(frozen=True)
class Output:
    """One answer of the receiver. ``finish_reason`` is ``stop`` or ``length``.

    Where a fallback was asked for, ``answered_from`` says whether it is from the latent or the text, and ``trust`` how
    likely the latent's answer was to be as good as the text's.

    >>> latentwire.Bridge.load().generate("Mara sings.", "Who sings?", max_tokens=1).outputs[0].finish_reason
    'length'
    """

    index: int
    text: str
    finish_reason: str
    token_count: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    answered_from: AnsweredFrom | None = None
    trust: float | None = None


@dataclass(frozen=True)
class Generated:
    """Answer of ``generate``, and last event of ``stream``: outputs follow the inputs, n for each.

    >>> answers = latentwire.Bridge.load().generate("Mara sings.", "Who sings?", n=2, max_tokens=4)
    >>> len(answers.texts), answers.diversity.outputs
    (2, 2)
    """

    id: str
    bridge: str
    outputs: tuple[Output, ...]
    usage: Usage
    timing: Timing
    diversity: Diversity | None = None
    request_id: str | None = None

    @property
    def texts(self) -> list[str]:
        """The text of every output."""
        return [output.text for output in self.outputs]


@dataclass(frozen=True)
class Likelihood:
    """A text and how likely the receiver finds it: nats of all its tokens, and of the end behind them.

    >>> text = "Mara sings."
    >>> said = latentwire.Bridge.load().read(text, against=text)[0].against
    >>> said.token_count, said.mean == said.logprob / said.token_count
    (4, True)
    """

    text: str
    logprob: float
    token_count: int

    @property
    def mean(self) -> float:
        """Nats of a token, for texts of different lengths."""
        return self.logprob / self.token_count


@dataclass(frozen=True)
class Reading(Likelihood):
    """What the receiver takes a latent to say; ``finish_reason`` is ``length`` where ``max_tokens`` cut it.

    ``against`` is how likely the receiver finds the text that was given to hold it against.

    >>> reading = latentwire.Bridge.load().read("Mara wants a cup of tea.")[0]
    >>> reading.text, reading.finish_reason
    ('Mara wants a cup of tea.', 'stop')
    """

    finish_reason: str
    against: Likelihood | None = None


@dataclass(frozen=True)
class ReadBack:
    """Answer of ``read``: a ``Reading`` of each input, in order.

    ``trained`` says whether the receiver was taught to repeat sources; where not, what it says is no evidence.

    >>> back = latentwire.Bridge.load().read(["Mara sings.", "Ben lives in Rome."])
    >>> back.texts, back.trained
    (['Mara sings.', 'Ben lives in Rome.'], True)
    """

    id: str
    bridge: str
    trained: bool
    readings: tuple[Reading, ...]
    usage: Usage
    timing: Timing
    request_id: str | None = None

    @property
    def texts(self) -> list[str]:
        """The text of every reading."""
        return [reading.text for reading in self.readings]

    def __getitem__(self, number: int) -> Reading:
        return self.readings[number]

    def __len__(self) -> int:
        return len(self.readings)


@dataclass(frozen=True)
class ScoredChoice:
    """How likely the receiver finds one continuation: nats of all its tokens, the end of the answer included if asked.

    ``probability`` is its share among the choices; ``logprobs`` has each token, where that was asked for.

    >>> choice = latentwire.Bridge.load().score("Mara sings.", "Question: Who sings?\\nAnswer:", " Mara sings.")[0][0]
    >>> choice.probability, choice.mean == choice.logprob / choice.token_count
    (1.0, True)
    """

    text: str
    logprob: float
    token_count: int
    probability: float
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def mean(self) -> float:
        """Nats of a token, for choices of different lengths."""
        return self.logprob / self.token_count


@dataclass(frozen=True)
class Score:
    """The choices about one input, in their order, and the number of the likeliest.

    Where a fallback was asked for, ``answered_from`` says from which they were scored, and ``trust`` is that in what
    the receiver answers from the latent.

    >>> score = latentwire.Bridge.load().score("Ben lives in Rome.", "Question: Where does Ben live?\\nAnswer:",
    ...     [" Ben lives in Paris.", " Ben lives in Rome."])[0]
    >>> score.best, score.choices[score.best].text
    (1, ' Ben lives in Rome.')
    """

    choices: tuple[ScoredChoice, ...]
    best: int
    answered_from: AnsweredFrom | None = None
    trust: float | None = None

    def __getitem__(self, number: int) -> ScoredChoice:
        return self.choices[number]


@dataclass(frozen=True)
class Scored:
    """Answer of ``score``: a ``Score`` for each input, in order.

    >>> scored = latentwire.Bridge.load().score(["Mara sings.", "Ben sings."], "Who?", [" Mara", " Ben"], end=False)
    >>> len(scored), scored.usage.soft_tokens
    (2, 4)
    """

    id: str
    bridge: str
    scores: tuple[Score, ...]
    usage: Usage
    timing: Timing
    request_id: str | None = None

    def __getitem__(self, number: int) -> Score:
        return self.scores[number]

    def __len__(self) -> int:
        return len(self.scores)
