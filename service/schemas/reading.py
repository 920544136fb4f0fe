"""What ``POST /read`` takes and gives. Unknown fields are refused."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from latentwire.bridge import results
from latentwire.service.schemas.inference import FAIL_FAST, Deadline, LogProb, SourceIn, Strict, Timing, Usage, as_list

Original = Annotated[str, Field(min_length=1)]
OriginalList = Annotated[list[Original], FAIL_FAST]
Originals = Annotated[OriginalList, BeforeValidator(as_list, Original | OriginalList)]


class ReadRequest(Strict):
    """Latents of which a receiver is to say what they hold."""

    bridge: str | None = Field(None, description="Name of the bridge; the first one served when absent.")
    receiver: str | None = Field(None, description="Which of the bridge's receivers reads; its first when absent.")
    inputs: Annotated[list[SourceIn], FAIL_FAST] = Field(min_length=1)
    against: Originals | None = Field(
        None,
        description="The original of each input, to report how likely the receiver finds it; a string is taken as a "
        "list of it.",
    )
    max_tokens: int | None = Field(
        None, ge=1, description="Most tokens of a reading; twice what the latent's source can have had when absent."
    )
    timeout_seconds: Deadline = None
    truncate: bool = Field(False, description="Cut a text over the bridge's limit instead of refusing it.")

    @model_validator(mode="after")
    def _one_original_each(self) -> Self:
        if self.against is not None and len(self.against) != len(self.inputs):
            raise ValueError(f"{len(self.against)} originals for {len(self.inputs)} inputs; give one for each")
        return self


class LikelihoodOut(BaseModel):
    """A text and how likely the receiver finds it, the end behind it included."""

    text: str
    logprob: LogProb
    token_count: int
    mean: LogProb

    @classmethod
    def of(cls, said: results.Likelihood, **more: object) -> Self:
        """The same, as it goes over HTTP."""
        facts = {"text": said.text, "logprob": said.logprob, "token_count": said.token_count, "mean": said.mean}
        return cls.model_validate({**facts, **more})


class ReadingOut(LikelihoodOut):
    """What the receiver takes a latent to say."""

    index: int
    finish_reason: Literal["stop", "length"]
    against: LikelihoodOut | None = Field(None, description="With an original: how likely the receiver finds that.")

    @classmethod
    def numbered(cls, index: int, reading: results.Reading) -> Self:
        """The reading of input ``index``, as it goes over HTTP."""
        against = reading.against and LikelihoodOut.of(reading.against)
        return cls.of(reading, index=index, finish_reason=reading.finish_reason, against=against)


class ReadResponse(BaseModel):
    """What a receiver takes latents to say, input by input."""

    id: str
    bridge: str
    trained: bool = Field(
        description="Whether the receiver was taught to repeat sources; where not, what it says is no evidence."
    )
    readings: list[ReadingOut]
    usage: Usage
    timing: Timing
