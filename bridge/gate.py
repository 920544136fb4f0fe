"""Whether an answer from a latent is to be trusted: logistic regression on how sure the receiver was of its words.

What a latent itself looks like was tried too and told nothing (docs/negative-results.md). A gate is plain numbers in
``gate.json`` beside the checkpoint, and holds for one head of one encoder.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

from pydantic import Field, FiniteFloat, TypeAdapter
from pydantic.dataclasses import dataclass

from latentwire.bridge.config import STRICT, Manifest, parsed
from latentwire.bridge.errors import CorruptCheckpoint, IncompatibleBridge, InvalidRequest
from latentwire.bridge.files import replace_file
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.reader import Reader, text_ids
from latentwire.bridge.results import AnsweredFrom, TokenLogprob
from latentwire.bridge.sampling import SamplingParams

T = TypeVar("T")
GATE = "gate.json"
TOP = 5
"""Likeliest first tokens whose log-probabilities an answer has to report."""
Signal = Literal["first_entropy", "first_margin", "mean_logprob", "lowest_logprob"]
SIGNALS: tuple[Signal, ...] = get_args(Signal)
LOWEST = -100.0  # nats: an impossible token is no infinite evidence


def signals_of(logprobs: Sequence[TokenLogprob]) -> dict[Signal, float]:
    """``SIGNALS`` of an answer, in nats, from its tokens' log-probabilities with ``TOP`` of the likeliest.

    The entropy of the first token is that of the likeliest tokens with all others lumped into one: a lower bound.
    An answer of other than greedy sampling is judged by the unsampled probabilities too.
    """
    first, said = [p for _, p in logprobs[0].top], [max(one.logprob, LOWEST) for one in logprobs]
    shares = [math.exp(p) for p in first]
    shares.append(max(1.0 - sum(shares), 0.0))
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    margin = first[0] - max(first[1], LOWEST) if len(first) > 1 else 0.0
    values = entropy, margin, sum(said) / len(said), min(said)
    return dict(zip(SIGNALS, values, strict=True))


@dataclass(frozen=True, config=STRICT)
class CurvePoint:
    """What is given when answers of this trust or more come from latents, and the others from texts.

    ``retention`` is their score relative to the text's alone, with its 95 % interval.
    """

    trust: float
    coverage: float
    retention: float
    low: float
    high: float


Weights = Annotated[dict[Signal, FiniteFloat], Field(min_length=len(SIGNALS))]


@dataclass(frozen=True, config=STRICT)
class Gate:
    """Says how far an answer from a latent is to be trusted, and from where on it is given.

    Attributes:
        head_sha256: Digest of the head that it was calibrated with.
        task: On what, with ``data_sha256``.
        dtype: What latents travelled in.
        examples: How many, none of which the bridge was trained on.
        target_retention: What was asked for: the least share of the text's score, and so of ``reached.low``.
        weights: Of ``SIGNALS``; with ``intercept`` they make the log-odds that the answer is as good as the text's.
        reached: At the trust chosen.
        curve: At other trusts, from few latents to all.
    """

    head_sha256: str
    task: str
    data_sha256: str
    dtype: str
    examples: int
    target_retention: float
    weights: Weights
    intercept: FiniteFloat
    reached: CurvePoint
    coverage_low: float
    coverage_high: float
    curve: tuple[CurvePoint, ...]

    def __str__(self) -> str:
        reached = self.reached
        return (
            f"on {self.task}, {reached.coverage:.1%} of the answers from latents (trust {reached.trust:.3f} or more), "
            f"{reached.retention:.3f} of the text's score ({reached.low:.3f} – {reached.high:.3f}; "
            f"asked for: {self.target_retention:g})"
        )

    def trust(self, logprobs: Sequence[TokenLogprob]) -> float:
        """Probability that an answer from a latent is as good as the text's; 0 of one that says nothing."""
        return self.trust_of(signals_of(logprobs)) if logprobs else 0.0

    def trust_of(self, signals: Mapping[Signal, float]) -> float:
        """The same from ``SIGNALS``."""
        odds = self.intercept + sum(weight * signals[name] for name, weight in self.weights.items())
        return (1 + math.tanh(odds / 2)) / 2

    def judge(self, answers: Sequence[Generation]) -> "Judged":
        """Which of some ``watched`` answers from latents are given."""
        return Judged(tuple(self.trust(answer.logprobs or ()) for answer in answers), self.reached.trust)


@dataclass(frozen=True)
class Judged:
    """The trust of each of some answers from latents, and the least that one is given with."""

    trusts: tuple[float, ...]
    least: float

    @property
    def refused(self) -> list[int]:
        """Numbers of the answers that the text has to give."""
        return [number for number, trust in enumerate(self.trusts) if trust < self.least]

    def __iter__(self) -> Iterator[tuple[AnsweredFrom, float]]:
        return iter([("text" if trust < self.least else "latent", trust) for trust in self.trusts])

    def given(self, ours: Sequence[T], instead: Sequence[T]) -> list[T]:
        """What belongs to the latents, with that of the text in the place of the refused ones."""
        texts = dict(zip(self.refused, instead, strict=True))
        return [texts.get(number, one) for number, one in enumerate(ours)]


@dataclass(frozen=True, config=STRICT)
class GateFile:
    """``gate.json``: the gates of a checkpoint by receiver."""

    format: Literal[1]
    bridge_id: str
    gates: dict[str, Gate]


_FILE = TypeAdapter(GateFile)


def watched(params: SamplingParams) -> SamplingParams:
    """Parameters under which an answer reports what ``signals_of`` needs."""
    return replace(params, logprobs=max(params.logprobs or 0, TOP))


def answer_tokens(lm: Reader, choices: Iterable[str], *, end: bool) -> int:
    """As many tokens as the longest of some choices has: what a gate looks at where these are to be scored."""
    return max(max((len(text_ids(lm, choice)) for choice in choices), default=0) + end, 1)


def as_asked(answer: Generation, params: SamplingParams) -> Generation:
    """A ``watched`` answer with the log-probabilities that were asked for."""
    if answer.logprobs is None or params.logprobs is None:
        return replace(answer, logprobs=None, end_logprob=None)
    return replace(answer, logprobs=tuple(replace(one, top=one.top[: params.logprobs]) for one in answer.logprobs))


def gate_asked(gates: Mapping[str, Gate], bridge: str, receiver: str, fallback: str | None) -> Gate | None:
    """The gate that a request with this fallback needs; None where it has none (InvalidRequest, where it cannot be)."""
    if fallback is None:
        return None
    if fallback != "text":
        raise InvalidRequest(f"fallback is {fallback!r}; expected 'text'", param="fallback")
    if receiver not in gates:
        whose = f" for receiver {receiver!r}" if gates else ""
        message = f"bridge {bridge!r} has no gate{whose}; latentwire calibrate makes one"
        raise InvalidRequest(message, param="fallback")
    return gates[receiver]


def load_gates(folder: Path, manifest: Manifest) -> dict[str, Gate]:
    """The gates of the checkpoint in ``folder``, by receiver; none where none was calibrated.

    Raises:
        CorruptCheckpoint: ``gate.json`` is damaged; the field is named.
        IncompatibleBridge: It is of another encoder, receiver or head; both values are named.
    """
    path = folder / GATE
    try:
        found = parsed(_FILE.validate_json, path.read_bytes(), str(path))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    if found.bridge_id != manifest.bridge_id:
        have = manifest.bridge_id
        raise IncompatibleBridge(
            f"{path} is of bridge {found.bridge_id}; this one is {have} (delete it, and calibrate)"
        )
    for receiver, gate in found.gates.items():
        if receiver not in manifest.heads:
            raise IncompatibleBridge(f"{path} is of receiver {receiver!r}; this bridge has {', '.join(manifest.heads)}")
        if gate.head_sha256 != (have := manifest.heads[receiver].sha256):
            raise IncompatibleBridge(f"{path}: the head of {receiver!r} was {gate.head_sha256}; this one is {have}")
    return found.gates


def save_gates(folder: Path, bridge_id: str, gates: Mapping[str, Gate]) -> None:
    """Write ``gate.json``, whole or not at all."""
    replace_file(folder / GATE, _FILE.dump_json(GateFile(1, bridge_id, dict(gates)), indent=2) + b"\n")
