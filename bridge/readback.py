"""Ask a receiver what a latent says: it repeats the source, at the prompt at which training made it do so.

A reading is greedy, and its row is that of the reconstruction objective up to the answer: ``bridge.prompt`` composes
both. Source: the autoencoding of ICAE, arXiv:2307.06945 §2.2.
"""

from collections.abc import Sequence

from latentwire.bridge.config import BridgeConfig
from latentwire.bridge.encoder import encoder_class, slots_of
from latentwire.bridge.generation.output import IMPOSSIBLE, Generation
from latentwire.bridge.prompt import REPEAT
from latentwire.bridge.results import Likelihood, Reading
from latentwire.bridge.sampling import SamplingParams
from latentwire.bridge.scoring import Continuation

SPARE = 8  # tokens beyond twice the source's, for sources of few


def taught(config: BridgeConfig, receiver: str) -> str | None:
    """The prompt at which a receiver was taught to repeat sources; None where it was not.

    Mode tokens of a training belong to the run and are in no checkpoint: what they were trained with cannot be asked.
    A head of before the prompt was kept has that of tasks that name none.
    """
    head = config.heads[receiver]
    recipe = (head.provenance or config.provenance).recipe
    repeated = bool(recipe.get("reconstruction_weight")) and not recipe.get("mode_tokens")
    return (head.repeat or REPEAT) if repeated else None


def reading_params(config: BridgeConfig, slots: int, max_tokens: int | None, room: int) -> SamplingParams:
    """How a latent of so many slots is read.

    Unless ``max_tokens`` is given, a reading has up to twice as many tokens as the source can have had sender tokens,
    as far as the receiver's ``room`` beside the prompt goes: it ends by itself, and only one gone astray is cut.
    """
    encoder = config.encoder
    covering = slots - slots_of(encoder, 0)
    source = covering * encoder.ratio if encoder_class(encoder.kind).windowed else config.max_source_tokens
    most = min(2 * source + SPARE, max(room - slots, 1))
    return SamplingParams(most if max_tokens is None else max_tokens, logprobs=0)


def as_said(text: str) -> str:
    """A source as the receiver says it, behind the prompt."""
    return f" {text}"


def readings_of(
    answers: Sequence[Generation], originals: Sequence[str], found: Sequence[Sequence[Continuation]]
) -> tuple[Reading, ...]:
    """What was said, without the space that leads it; where there are originals, with how likely each of these is."""
    against: list[Likelihood | None] = [
        Likelihood(text, max(one.logprob, IMPOSSIBLE), len(one.ids))
        for text, (one,) in zip(originals, found, strict=True)
    ]
    return tuple(
        Reading(
            answer.text.removeprefix(" "),
            sum(token.logprob for token in answer.logprobs or ()) + (answer.end_logprob or 0.0),
            answer.token_count,
            answer.finish_reason,
            original,
        )
        for answer, original in zip(answers, against or [None] * len(answers), strict=True)
    )
