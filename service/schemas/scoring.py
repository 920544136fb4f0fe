"""What ``POST /score`` takes and gives. Unknown fields are refused."""

from typing import Annotated, Self

from pydantic import BaseModel, Field

from latentwire.bridge import results
from latentwire.service.schemas.inference import (
    ANSWERED_FROM,
    FAIL_FAST,
    TRUST,
    Asking,
    LogProb,
    Timing,
    TokenLogprobOut,
    Usage,
)

MAX_CHOICES = 256
Choice = Annotated[str, Field(min_length=1)]


class ScoreRequest(Asking):
    """Continuations of a prompt about texts that the receiver will not see."""

    choices: Annotated[list[Choice], FAIL_FAST] = Field(
        min_length=1,
        max_length=MAX_CHOICES,
        description="What may follow, each with the space that leads it; the same for every input.",
    )
    end: bool = Field(
        True, description="The end of the answer counts as a token of each: exactly this is said. Off, it goes on."
    )
    logprobs: bool = Field(False, description="Report each token's log-probability.")


class ChoiceOut(BaseModel):
    """A continuation and how likely the receiver finds it."""

    text: str
    logprob: LogProb
    token_count: int
    mean: LogProb
    probability: float = Field(description="Its share among the choices.")
    logprobs: list[TokenLogprobOut] | None = None


class ScoreOut(BaseModel):
    """The choices about one input, in their order."""

    index: int
    best: int = Field(description="Number of the likeliest choice.")
    choices: list[ChoiceOut]
    answered_from: results.AnsweredFrom | None = ANSWERED_FROM
    trust: float | None = TRUST

    @classmethod
    def of(cls, index: int, score: results.Score) -> Self:
        """The same, as it goes over HTTP."""
        return cls(
            index=index,
            best=score.best,
            answered_from=score.answered_from,
            trust=score.trust,
            choices=[
                ChoiceOut(
                    text=choice.text,
                    logprob=choice.logprob,
                    token_count=choice.token_count,
                    mean=choice.mean,
                    probability=choice.probability,
                    logprobs=None if choice.logprobs is None else [TokenLogprobOut.of(one) for one in choice.logprobs],
                )
                for choice in score.choices
            ],
        )


class ScoreResponse(BaseModel):
    """What a receiver finds likely, input by input."""

    id: str
    bridge: str
    scores: list[ScoreOut]
    usage: Usage
    timing: Timing
