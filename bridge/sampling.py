"""Choosing the next token: temperature, top-p, top-k and a seed per request.

A request's draw depends on its own seed and position alone, so it says the same thing alone or in a batch.

Dimensions used in this file:
    B batch    V vocabulary
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from latentwire.bridge.errors import InvalidRequest, shorten

MASK, MOST = 0xFFFFFFFF, 0x7FFFFFFF
GOLDEN = -0x61C88647
"""2^32 over the golden ratio as a signed number: its multiples are spread evenly."""
CACHED = 1 << 16
"""Scores at once on a CPU: what is made of more leaves its cache, and takes twice as long."""
HELD = 1 << 24
"""Scores at once on an accelerator, whose sort makes some 20 bytes of each."""
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
    """Scores whose argmax is each row's choice at its position (tokens it has generated so far)."""
    scores = logits.float()
    drawn = [row for row, one in enumerate(params) if one.temperature > 0]
    if not drawn:
        return scores
    draws = Draws.of([params[row] for row in drawn], [positions[row] for row in drawn])
    made = draws.draw(scores[drawn], draws.numbers.to(scores.device))
    return scores.index_copy(0, torch.tensor(drawn, device=scores.device), made)


@dataclass(frozen=True, eq=False)
class Draws:
    """How the tokens of some rows are drawn, as numbers that can travel to the device by themselves.

    Attributes:
        numbers: For each row ``FIELDS``, floats by their bits.
        top_k: The most that is asked for; 0 where no row asks.
        top_p: Whether a row asks for it.
    """

    FIELDS: ClassVar = ("temperature", "top_p", "top_k", "seed, low", "seed, high", "position")
    numbers: Int[Tensor, "6 B"]
    top_k: int
    top_p: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], positions: Sequence[int]) -> "Draws":
        """Of rows and their positions."""
        # Not torch's default, which is another while any thread loads a model.
        floats = torch.tensor([[one.temperature for one in params], [one.top_p for one in params]], dtype=torch.float32)
        whole = [
            (min(one.top_k, MOST), one.seed & MASK, one.seed >> 32, at)
            for one, at in zip(params, positions, strict=True)
        ]
        numbers = torch.cat([floats.view(torch.int32), torch.tensor(whole, dtype=torch.int64).T.to(torch.int32)])
        return cls(numbers, min(max(one.top_k for one in params), MOST), any(one.top_p < 1 for one in params))

    def draw(self, scores: Float[Tensor, "B V"], numbers: Int[Tensor, "6 B"]) -> Float[Tensor, "B V"]:
        """Scores whose argmax is drawn from each row's tokens by its ``numbers``, which are on the device by now.

        Sampling is argmax(log p + Gumbel noise), which draws from p exactly; the noise is a hash of seed, position and
        token, so batch-mates and order of arrival cannot change it, and every device draws from the same integers.
        Top-k applies before top-p, both after temperature. Nothing here waits for the device.

        Source: Gumbel-max, Maddison et al. 2014, arXiv:1411.0030 §2; noise from a counter: Salmon et al. 2011,
        "Parallel Random Numbers: As Easy as 1, 2, 3"; the hash: MurmurHash3's last mix, Appleby 2011.
        """
        rows = max(1, (CACHED if scores.device.type == "cpu" else HELD) // scores.shape[1])
        parts = zip(torch.split(scores, rows), torch.split(numbers, rows, dim=1), strict=True)
        return torch.cat([self._drawn(part, its_numbers) for part, its_numbers in parts])

    def _drawn(self, scores: Float[Tensor, "B V"], numbers: Int[Tensor, "6 B"]) -> Float[Tensor, "B V"]:
        V = scores.shape[1]
        temperature, top_p = numbers[:2].contiguous().view(torch.float32)[..., None]
        top_k, low, high, positions = numbers[2:].long()
        kept: Tensor = (scores - scores.amax(dim=1, keepdim=True)) / temperature.clamp(min=COLDEST)
        if most := min(self.top_k, V):
            asked = top_k.clamp(max=V)[:, None]
            least = kept.topk(most).values.gather(1, asked.clamp(min=1) - 1)
            kept = kept.masked_fill((kept < least) & (asked > 0), float("-inf"))
        if self.top_p:
            kept = _nucleus(kept, top_p)
        return kept + _gumbel(torch.stack([low, high], dim=1), positions, V)


def _nucleus(scores: Float[Tensor, "B V"], top_p: Float[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
    """Scores with -inf behind the smallest set of tokens whose probability reaches ``top_p``."""
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    probability = ordered.softmax(dim=1)
    beyond = (probability.cumsum(dim=1) - probability >= top_p) & (top_p < 1)
    beyond[:, 0] = False
    return torch.empty_like(scores).scatter_(1, order, ordered.masked_fill(beyond, float("-inf")))


def _gumbel(seeds: Int[Tensor, "B 2"], positions: Int[Tensor, " B"], tokens: int) -> Float[Tensor, "B V"]:
    """Noise for each token at each row's position: -log of an exponential draw, of 31 bits of a hash.

    They are read as a number just above 0, where float32 is finest: there the exponential is smallest, and the token
    likeliest to be chosen.
    """
    low, high = (seeds + positions[:, None] * GOLDEN).to(torch.int32).T[..., None]
    high = _hash(_hash(low) ^ high)
    numbers = torch.arange(1, tokens + 1, device=seeds.device, dtype=torch.int32) * GOLDEN
    bits = _hash(_hash(numbers + _hash(low)) ^ high) & 0x7FFFFFFF
    uniform = ((bits.float() + 0.5) * 2**-31).clamp(max=1 - 2**-24)
    return -(-torch.log1p(-uniform)).log()


def _hash(numbers: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """32 bits from 32, one to one. Products wrap around, as the hash wants; shifts must not bring in the sign."""
    for shift, factor in ((16, -0x7A143595), (13, -0x3D4D51CB)):
        numbers = (numbers ^ (numbers >> shift & (1 << 32 - shift) - 1)) * factor
    return numbers ^ (numbers >> 16 & 0xFFFF)
