"""Choosing the next token: temperature, top-p, top-k and a seed per request.

A request's draw depends on its own seed and position alone, so it says the same thing alone or in a batch.

Dimensions used in this file:
    B batch    V vocabulary
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from latentwire.bridge.errors import InvalidRequest, shorten

MAX_LOGPROBS, MAX_SAMPLES = 20, 1024
COLDEST = 1e-6
"""Lowest temperature divided by: beyond it float32 overflows, and the likeliest token was certain long before."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is answered.

    Attributes:
        max_tokens: Most tokens to generate.
        temperature: 0 takes the likeliest token; higher is freer.
        top_p: Keep the smallest set of tokens whose probability reaches this.
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        seed: Same seed, same request, same text.
        stop: Generation ends before the first of these strings.
        stop_ids: Generation ends at any of these tokens, as at EOS.
        logprobs: Report each token's log-probability and that of so many of the likeliest; None reports nothing.
    """

    max_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None


class _Ranges(BaseModel):
    """What ``SamplingParams`` may hold where nobody has looked before, and how many samples there may be."""

    model_config = ConfigDict(strict=True)

    max_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0, le=100)
    top_p: float = Field(gt=0, le=1)
    top_k: int = Field(ge=0)
    seed: int = Field(ge=0, lt=1 << 63)
    stop: tuple[Annotated[str, Field(min_length=1)], ...]
    stop_ids: tuple[Annotated[int, Field(ge=0)], ...]
    logprobs: int | None = Field(ge=0, le=MAX_LOGPROBS)
    n: int = Field(ge=1, le=MAX_SAMPLES)


def check_params(params: SamplingParams, samples: int = 1) -> None:
    """Refuse what is of another type or out of its range (InvalidRequest, with the value and what was expected)."""
    try:
        _Ranges(**asdict(params), n=samples)
    except ValidationError as error:
        first = error.errors()[0]
        name, expected = ".".join(map(str, first["loc"])), first["msg"].replace("Input should be", "expected")
        raise InvalidRequest(f"{name} is {shorten(repr(first['input']), 80)}; {expected}", param=name) from None


def sample_params(base: SamplingParams, sample: int) -> SamplingParams:
    """The parameters of the sample-th output of an input: the first has the request's seed, others derive theirs."""
    if sample == 0:
        return base
    digest = hashlib.sha256(f"{base.seed}/sample/{sample}".encode()).digest()
    return replace(base, seed=int.from_bytes(digest[:8], "little") >> 1)


def choose(
    logits: Float[Tensor, "B V"], params: Sequence[SamplingParams], positions: Sequence[int]
) -> Float[Tensor, "B V"]:
    """Scores whose argmax is each row's choice at its position (tokens it has generated so far).

    Sampling is argmax(log p + Gumbel noise), which draws from p exactly; the noise is seeded by (seed, position), so
    batch-mates and order of arrival cannot change it. Top-k applies before top-p, both after temperature.

    Source: Gumbel-max, Maddison et al. 2014, arXiv:1411.0030 §2; counter-based noise: ours.
    """
    scores = logits.float().clone()
    for row, (p, position) in enumerate(zip(params, positions, strict=True)):
        if p.temperature > 0:
            kept = _filter((scores[row] - scores[row].max()) / max(p.temperature, COLDEST), p)
            noise = torch.empty_like(kept).exponential_(generator=_generator(p.seed, position, kept.device))
            scores[row] = kept - noise.log()
    return scores


def _filter(scores: Float[Tensor, " V"], params: SamplingParams) -> Float[Tensor, " V"]:
    if 0 < params.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], float("-inf"))
    if params.top_p < 1:
        ordered, order = scores.sort(descending=True)
        probability = ordered.softmax(dim=-1)
        beyond = probability.cumsum(dim=-1) - probability >= params.top_p
        beyond[0] = False
        scores = scores.index_fill(0, order[beyond], float("-inf"))
    return scores


def _generator(seed: int, position: int, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{position}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
