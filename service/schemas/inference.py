"""What goes over HTTP, in and out. Unknown fields are refused."""

import base64
import binascii
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from latentwire.bridge import results
from latentwire.bridge.config import Prompt, Role, Turn
from latentwire.bridge.diversity import Diversity
from latentwire.bridge.errors import InvalidMessage
from latentwire.bridge.wire import DType

Condition = Literal["bridge", "direct", "none"]

MAX_FIELDS = 64
MAX_LOGPROBS = 20
MAX_TURNS = 256
IMPOSSIBLE = -9999.0  # as OpenAI has it: JSON knows no infinity
FAIL_FAST = Field(fail_fast=True)  # a million wrong items make one error, not a million


class Strict(BaseModel):
    """Base of every request body. Types are exact: ``"3"`` and ``true`` are no numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, body: Any) -> Any:
        if isinstance(body, dict) and len(body) > MAX_FIELDS:
            raise ValueError(f"the object has {len(body)} fields; expected {', '.join(cls.model_fields)}")
        return body


Deadline = Annotated[
    float | None, Field(gt=0, allow_inf_nan=False, description="Answer within this time or not at all; capped.")
]


def as_list(value: Any) -> Any:
    """A text as a list of it."""
    return [value] if isinstance(value, str) else value


Stop = Annotated[str, Field(min_length=1)]
StopList = Annotated[list[Stop], Field(max_length=16)]
Stops = Annotated[StopList, BeforeValidator(as_list, Stop | StopList)]


class EncodeRequest(Strict):
    """Texts to turn into latents."""

    bridge: str | None = Field(None, description="Name of the bridge; the first one served when absent.")
    inputs: Annotated[list[str], FAIL_FAST] = Field(min_length=1, description="Texts, each read by the sender alone.")
    dtype: DType = Field("float16", description="What the numbers travel in.")
    store: bool = Field(False, description="Keep the latents and return their ids.")
    timeout_seconds: Deadline = None
    truncate: bool = Field(False, description="Cut a text over the bridge's limit instead of refusing it.")


def one_of(schema: dict[str, Any], model: "type[OneOf]") -> None:
    """Say in the document what the validator checks: one of the properties is given."""
    schema["oneOf"] = [
        {"required": [name], "properties": {name: {"type": "array" if name == "sources" else "string"}}}
        for name in model.choices()
    ]


class OneOf(Strict):
    """Base of what has exactly one of its fields, those ``BESIDE`` them apart."""

    model_config = ConfigDict(json_schema_extra=one_of)
    BESIDE: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def choices(cls) -> list[str]:
        """The fields of which one is given."""
        return [name for name in cls.model_fields if name not in cls.BESIDE]

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        names = self.choices()
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(names[:-1])} and {names[-1]}, not {len(given)}")
        return self

    @property
    def given(self) -> str:
        """The name of that field."""
        return next(name for name in self.choices() if getattr(self, name) is not None)


class SourceIn(OneOf):
    """One source of a prompt: exactly one of the three."""

    text: str | None = Field(None, description="A text; the sender reads it, the receiver does not.")
    latent: str | None = Field(None, description="A message from /encode, base64.")
    latent_id: str | None = Field(None, description="The id of a kept latent.")

    def each(self, at: str) -> list[tuple[str, "SourceIn"]]:
        """Its sources, each with its place in the body: itself."""
        return [(at, self)]


class Input(SourceIn):
    """One thing to ask about: exactly one of the four."""

    sources: Annotated[list[SourceIn], FAIL_FAST] | None = Field(
        None,
        min_length=1,
        description="Several sources of one prompt, in their order: {latent} stands in it as often, or {latents} once, "
        "where each has a line of its own behind its number.",
    )

    def each(self, at: str) -> list[tuple[str, SourceIn]]:
        """Its sources, itself where it is one, each with its place in the body."""
        if self.sources is None:
            return super().each(at)
        return [(f"{at}.sources.{number}", source) for number, source in enumerate(self.sources)]


class TurnIn(Strict):
    """What one side says in a conversation."""

    role: Role
    content: str


def _asked_one_way(schema: dict[str, Any]) -> None:
    """Say in the document what the validator checks: a prompt, or messages."""
    schema["oneOf"] = [
        {"required": ["prompt"], "properties": {"prompt": {"type": ["string", "array"]}}},
        {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
    ]


class Asking(Strict):
    """Base of what is asked about inputs: of whom, about what, and how."""

    model_config = ConfigDict(json_schema_extra=_asked_one_way)

    bridge: str | None = Field(None, description="Name of the bridge; the first one served when absent.")
    receiver: str | None = Field(None, description="Which of the bridge's receivers answers; its first when absent.")
    inputs: Annotated[list[Input], FAIL_FAST] = Field(min_length=1)
    prompt: str | Annotated[list[str], FAIL_FAST] | None = Field(
        None,
        description="What the receiver is asked: one prompt for all inputs, or one for each. {latent} says where the "
        "soft tokens stand, {latents} where those of several sources do; without it they stand where the bridge was "
        "trained to have them.",
    )
    messages: Annotated[list[TurnIn], FAIL_FAST] | None = Field(
        None,
        min_length=1,
        max_length=MAX_TURNS,
        description="Instead of a prompt: a conversation whose last message is the user's. It goes through the "
        "receiver's chat template where the bridge was trained with that, else its texts are joined by newlines.",
    )
    condition: Condition = Field(
        "bridge",
        description="What stands in the latent's place, for comparison: the latent, the source text itself (direct), "
        "or nothing (none).",
    )
    timeout_seconds: Deadline = None
    truncate: bool = Field(False, description="Cut a text over the bridge's limit instead of refusing it.")
    fallback: Literal["text"] | None = Field(
        None,
        description="Let the receiver read the text itself where the bridge's gate does not trust the answer from the "
        "latent. Every input is a text then; nothing can be streamed, as an answer is judged whole.",
    )

    @model_validator(mode="after")
    def _asks_one_thing(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        if self.messages is not None and (role := self.messages[-1].role) != "user":
            raise ValueError(f"the last of the messages is of the role {role}; expected user")
        return self

    @model_validator(mode="after")
    def _one_prompt_each(self) -> Self:
        if isinstance(self.prompt, list) and len(self.prompt) != len(self.inputs):
            raise ValueError(f"{len(self.prompt)} prompts for {len(self.inputs)} inputs; give one, or one for each")
        return self

    @model_validator(mode="after")
    def _receivers_read_texts(self) -> Self:
        if self.fallback is not None and self.condition != "bridge":
            raise ValueError(f"a fallback cannot be given with condition {self.condition}: a latent's answer is judged")
        why = "with fallback text the receiver may" if self.fallback else "condition direct lets the receiver"
        reads = self.fallback is not None or self.condition == "direct"
        if reads and any(one.text is None for item in self.inputs for _, one in item.each("")):
            raise ValueError(f"{why} read the source; give every input as text")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        """What is asked about each input."""
        if isinstance(self.prompt, list):
            return list(self.prompt)
        turns = tuple(Turn(turn.role, turn.content) for turn in self.messages or ())
        return [turns if self.prompt is None else self.prompt] * len(self.inputs)


class GenerateRequest(Asking):
    """Questions to a receiver about texts it will not see."""

    stream: bool = Field(False, description="Send tokens as they come, as server-sent events.")
    max_tokens: int = Field(32, ge=1, description="Most tokens to generate for each output.")
    temperature: float = Field(0.0, ge=0, le=100, description="0 takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the smallest set of tokens of this probability.")
    top_k: int = Field(0, ge=0, description="Keep this many of the likeliest tokens; 0 keeps all.")
    seed: int | None = Field(None, ge=0, lt=1 << 63, description="Same seed, same request, same text.")
    n: int = Field(1, ge=1, description="Outputs for each input.")
    stop: Stops = Field([], description="An output ends before the first of these; a string is taken as a list of it.")
    stop_ids: list[Annotated[int, Field(ge=0)]] = Field(
        default=[], max_length=16, description="An output ends at any of these receiver tokens."
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Report each token's log-probability and those of so many likeliest."
    )

    @model_validator(mode="after")
    def _judged_whole(self) -> Self:
        if self.fallback is not None and self.stream:
            raise ValueError("a fallback cannot be given with stream: the latent's answer is judged when it is whole")
        return self


class LatentOut(BaseModel):
    """A latent as it crosses the wire."""

    id: str | None = Field(None, description="There only when stored.")
    data: str = Field(description="The message, base64.")
    shape: list[int] = Field(description="[K, C]: slots and width.")
    dtype: str
    bytes: int = Field(description="Length of the message.")
    source_tokens: int = Field(description="Sender tokens read.")
    source_bytes: int
    truncated: bool


class Usage(BaseModel):
    """What was counted: sender tokens of texts read, the receiver's own tokens of prompts, soft tokens, tokens said."""

    source_tokens: int = 0
    prompt_tokens: int = 0
    soft_tokens: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True)
class Timing(results.Timing):
    """Milliseconds: on the device for each half, and from request to answer."""


class EncodeResponse(BaseModel):
    """Latents in the order of the inputs."""

    bridge: str
    latents: list[LatentOut]
    usage: Usage
    timing: Timing


def _finite(logprob: float) -> float:
    return max(IMPOSSIBLE, logprob)  # in this order: nothing is greater than NaN, nor is NaN


LogProb = Annotated[
    float, AfterValidator(_finite), Field(description=f"In nats; {IMPOSSIBLE:g} of an impossible token.")
]


class TokenLogprobOut(BaseModel):
    """A token with its log-probability in nats, and the likeliest tokens there with theirs."""

    token: str
    logprob: LogProb
    top: list[tuple[str, LogProb]]

    @classmethod
    def of(cls, token: results.TokenLogprob) -> Self:
        """The same, as it goes over HTTP."""
        return cls(token=token.token, logprob=token.logprob, top=list(token.top))


# What a gate says where a fallback was asked for. Not fields of a base class: they would come first in every answer.
ANSWERED_FROM: Any = Field(None, description="With a fallback: what the answer is from.")
TRUST: Any = Field(None, description="With a fallback: how likely the latent's answer was to be as good as the text's.")


class Output(BaseModel):
    """One answer. Outputs follow the inputs, n for each."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    token_count: int
    logprobs: list[TokenLogprobOut] | None = None
    answered_from: results.AnsweredFrom | None = ANSWERED_FROM
    trust: float | None = TRUST


@dataclass(frozen=True)
class DiversityOut(Diversity):
    """Diversity of this request's outputs; see ``bridge.diversity``."""


class GenerateResponse(BaseModel):
    """Answers of the receiver."""

    id: str
    bridge: str
    outputs: list[Output]
    diversity: DiversityOut
    usage: Usage
    timing: Timing


class BridgeOut(BaseModel):
    """A bridge that is served."""

    name: str
    bridge_id: str
    sender: str
    layers: list[int]
    receivers: list[str]
    encoder: str
    ratio: int
    num_latents: int
    latent_dim: int
    max_source_tokens: int
    template: str
    chat: bool = Field(description="Whether prompts go through the receiver's own chat template.")
    task: str
    steps: int = Field(description="Optimiser steps of all runs that made it, those of added heads included.")
    loaded: dict[str, int] = Field(description="Models of this bridge now in memory, and their bytes.")
    engines: dict[str, Literal["continuous", "padded", "vllm"] | None] = Field(
        description="How each receiver generates: it joins requests at every step, or in left-padded batches where "
        "its family allows no more, or a vLLM server does; null while it is not in memory, or not asked yet."
    )
    sources_per_example: dict[str, int] = Field(
        description="The most sources in one prompt that each receiver was trained for."
    )
    pinned: bool = Field(description="Whether its models stay whoever needs their room.")
    keep_alive_seconds: float | None = Field(description="How long its models stay unused; null without a limit.")


class Unloaded(BridgeOut):
    """A bridge whose models have left."""

    freed_bytes: int = Field(description="Memory that came back, measured.")


class BridgeList(BaseModel):
    """Every bridge that is served."""

    bridges: list[BridgeOut]


class Health(BaseModel):
    """``ok``, or an error with status 503."""

    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    """What went wrong, in one sentence."""

    type: str
    message: str
    param: str | None
    request_id: str


class ErrorBody(BaseModel):
    """The one error body."""

    error: ErrorDetail


def message_of(data: str) -> bytes:
    """The bytes of a base64 message.

    Raises:
        InvalidMessage: Not base64.
    """
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidMessage(f"the latent {data[:40]!r} is not base64") from None
