"""Requests in OpenAI's format, and their translation to requests to ``/generate``.

A null field is an absent one, as in OpenAI's service, also where the field is unknown. A field that could not change
the response is accepted, ignored and counted. Every other unknown field is refused: it could be a misspelt one.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from latentwire.bridge.config import Role
from latentwire.service.schemas.inference import (
    FAIL_FAST,
    MAX_LOGPROBS,
    MAX_TURNS,
    Condition,
    Deadline,
    GenerateRequest,
    Input,
    Stops,
    TurnIn,
    as_list,
)
from latentwire.service.schemas.lenient import Lenient, Only, Unused, below

PART_FIELDS = {"text": "text", "source": "text", "latent": "data", "latent_id": "id"}  # field of each content part
INPUT_FIELDS = {"source": "text", "latent": "latent", "latent_id": "latent_id"}  # field of an input of /generate
ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
DEFAULT_MAX_TOKENS: int = GenerateRequest.model_fields["max_tokens"].default


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Texts = Annotated[list[str], FAIL_FAST, Field(min_length=1), BeforeValidator(as_list, str | list[str])]


class StreamOptions(Lenient):
    """What a stream holds beside the text."""

    include_usage: bool = Field(default=False, description="End with a chunk that has the usage and no choice.")
    include_obfuscation: Annotated[Any, Only(False)] = None


class SourceRef(NamedTuple):
    """A source in a request body: the field of ``Input`` for it, its value, and its place in the body."""

    field: str
    value: str
    place: str


class OpenAIRequest(Lenient):
    """The fields that both endpoints take."""

    PROMPT: ClassVar[str]  # the field that holds the receiver's prompt

    model: str = Field(description="A bridge, or BRIDGE/RECEIVER (the first slash parts them) for another receiver.")
    source: str | None = Field(None, description="A text; the sender reads it, the receiver does not.")
    latent: str | None = Field(None, description="A message from /encode, base64.")
    latent_id: str | None = Field(None, description="The id of a stored latent.")
    condition: Condition = Field(
        "bridge",
        description="What stands in the latent's place: the latent, the source text itself (direct), or nothing "
        "(none), which needs no source.",
    )
    fallback: Literal["text"] | None = Field(
        None,
        description="Let the receiver read the source itself where the bridge's gate does not trust the answer from "
        "the latent. The source is a text then, and nothing is streamed. Not OpenAI's.",
    )
    stream: bool = Field(False, description="Send the text as it comes, as server-sent events.")
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(
        None, ge=1, description=f"Most tokens for each choice; {DEFAULT_MAX_TOKENS} when absent."
    )
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the smallest set of tokens of this probability.")
    top_k: int = Field(0, ge=0, description="Keep this many of the likeliest tokens; 0 keeps all. Not OpenAI's.")
    seed: int | None = Field(None, ge=0, lt=1 << 63, description="Same seed, same request, same text.")
    n: int = Field(1, ge=1, description="Choices for each prompt.")
    stop: Stops = Field([], description="A choice ends before the first of these.")
    timeout_seconds: Deadline = None
    truncate: bool = Field(False, description="Cut a source over the bridge's limit instead of refusing it.")

    user: Unused = None
    metadata: Unused = None
    store: Unused = None
    service_tier: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_retention: Unused = None
    session_id: Unused = None
    conversation_id: Unused = None
    chat_id: Unused = None
    request_id: Unused = None
    trace_id: Unused = None
    frequency_penalty: Annotated[Any, Only(0)] = None
    presence_penalty: Annotated[Any, Only(0)] = None
    repetition_penalty: Annotated[Any, Only(1)] = None
    min_p: Annotated[Any, Only(0)] = None
    min_tokens: Annotated[Any, Only(0)] = None
    ignore_eos: Annotated[Any, Only(False)] = None
    logit_bias: Annotated[Any, Only({})] = None

    @property
    @abstractmethod
    def prompt_fields(self) -> dict[str, Any]:
        """The fields of ``GenerateRequest`` for the prompt."""

    @property
    def prompt_count(self) -> int:
        """Number of prompts about the one source."""
        return 1

    @property
    @abstractmethod
    def logprob_count(self) -> int | None:
        """Number of likeliest tokens to report for each token; None reports no log-probability."""

    @property
    def ignored_fields(self) -> list[str]:
        """Also those of parts of the body."""
        return super().ignored_fields + below("stream_options", self.stream_options)

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate for each choice, where the body has that."""
        return self.max_tokens

    @property
    def sources(self) -> list[SourceRef]:
        """Every source in the body; a valid body has one, or none under condition ``none``."""
        values = {name: getattr(self, name) for name in INPUT_FIELDS}
        return [SourceRef(INPUT_FIELDS[name], value, name) for name, value in values.items() if value is not None]

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = self.sources
        if len(sources) > 1 or (not sources and self.condition != "none"):
            raise PydanticCustomError(
                "source",
                "give exactly one of source, latent and latent_id, not {count}; only condition none needs no source",
                {"count": len(sources)},
            )
        if self.condition == "direct" and sources[0].field != "text":
            raise PydanticCustomError(
                "source", "condition direct lets the receiver read the source; give it as text, not as a latent"
            )
        return self

    @model_validator(mode="after")
    def _judged_whole(self) -> Self:
        if self.fallback is None:
            return self
        if self.stream or self.condition != "bridge":
            raise PydanticCustomError(
                "fallback",
                "a fallback cannot be given with {other}: the latent's answer is judged when it is whole",
                {"other": "stream" if self.stream else f"condition {self.condition}"},
            )
        if self.sources[0].field != "text":
            raise PydanticCustomError(
                "source", "with fallback text the receiver may read the source; give it as text, not as a latent"
            )
        return self

    def to_generate_request(self, bridge: str, receiver: str | None) -> GenerateRequest:
        """The equal request to ``/generate``."""
        same = ("condition", "temperature", "top_p", "top_k", "seed", "n", "stop", "timeout_seconds", "truncate")
        fields: dict[str, Any] = {name: getattr(self, name) for name in (*same, "fallback")}
        if self.token_limit is not None:
            fields["max_tokens"] = self.token_limit
        source = Input.model_validate({one.field: one.value for one in self.sources} or {"text": ""})
        return GenerateRequest(
            bridge=bridge,
            receiver=receiver,
            inputs=[source] * self.prompt_count,
            **self.prompt_fields,
            logprobs=self.logprob_count,
            **fields,
        )

    def param_of(self, param: str | None) -> str | None:
        """The field of this body for a ``param`` of the request to ``/generate``."""
        if param is not None and param.startswith("inputs."):
            return next((one.place for one in self.sources), None)
        names = {"bridge": "model", "receiver": "model", "prompt": self.PROMPT}
        return None if param is None else names.get(param, param)


class CompletionRequest(OpenAIRequest):
    """A receiver goes on with a prompt about a source it will not see."""

    PROMPT = "prompt"

    prompt: Texts = Field(
        description="What the receiver is asked, once or several times about one source. {latent} says where the soft "
        "tokens stand; without it they stand where the bridge was trained to have them."
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Report each token's log-probability and those of so many likeliest."
    )
    best_of: Annotated[Any, Only(1)] = None
    echo: Annotated[Any, Only(False)] = None
    suffix: Annotated[Any, Only("")] = None

    @property
    def prompt_fields(self) -> dict[str, Any]:
        """One prompt for each question."""
        return {"prompt": self.prompt}

    @property
    def prompt_count(self) -> int:
        """One for each prompt."""
        return len(self.prompt)

    @property
    def logprob_count(self) -> int | None:
        """As asked."""
        return self.logprobs


class Part(Lenient):
    """A part of a message: some of its text, or the thing to ask about, with the one field that it carries."""

    type: Literal["text", "source", "latent", "latent_id"]
    text: str | None = Field(None, description="Of a text, or of a source: what the sender reads.")
    data: str | None = Field(None, description="Of a latent: a message from /encode, base64.")
    id: str | None = Field(None, description="Of a latent_id: the id of a stored latent.")
    annotations: Annotated[Any, Only([])] = None
    cache_control: Unused = None

    @model_validator(mode="after")
    def _carries_its_own(self) -> Self:
        given = [name for name in ("text", "data", "id") if getattr(self, name) is not None]
        if given != [PART_FIELDS[self.type]]:
            raise PydanticCustomError(
                "part",
                "a part of type {type} has the field {expected}, not {given}",
                {"type": self.type, "expected": PART_FIELDS[self.type], "given": " and ".join(given) or "none"},
            )
        return self

    @property
    def value(self) -> str:
        """What it carries."""
        value: str = getattr(self, PART_FIELDS[self.type])
        return value


class Message(Lenient):
    """One message. What an earlier answer held beside its text is taken only where it is empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], FAIL_FAST, BeforeValidator(_as_parts, str | list[Part])] = Field(
        description="A text, or parts of it; a user's message may hold a source, a latent or a latent_id."
    )
    id: Unused = None
    name: Unused = None
    metadata: Unused = None
    created_at: Unused = None
    timestamp: Unused = None
    cache_control: Unused = None
    refusal: Annotated[Any, Only("")] = None
    reasoning_content: Annotated[Any, Only("")] = None
    annotations: Annotated[Any, Only([])] = None
    audio: Annotated[Any, Only(None)] = None
    function_call: Annotated[Any, Only(None)] = None
    tool_calls: Annotated[Any, Only([])] = None

    @model_validator(mode="after")
    def _only_users_have_sources(self) -> Self:
        other = [part.type for part in self.content if part.type != "text"]
        if other and self.role != "user":
            raise PydanticCustomError(
                "role",
                "a message of the role {role} has parts of type text only, not {type}; a user's may have others",
                {"role": self.role, "type": other[0]},
            )
        return self

    @property
    def ignored_fields(self) -> list[str]:
        """Also those of its parts."""
        return super().ignored_fields + below("content", *self.content)

    @property
    def text(self) -> str:
        """Its texts, a line for each that is not empty."""
        return _lines([part.value for part in self.content if part.type == "text"])


class ChatRequest(OpenAIRequest):
    """A receiver answers messages about a source it will not see."""

    PROMPT = "messages"

    messages: Annotated[list[Message], FAIL_FAST] = Field(
        min_length=1,
        max_length=MAX_TURNS,
        description="In the receiver's chat template where the bridge was trained with it; else what the receiver gets "
        "is the text of all messages, in their order, joined by newlines. The last message is the user's.",
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool = Field(False, description="Report each token's log-probability.")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="With logprobs: so many likeliest too.")
    tools: Annotated[Any, Only([])] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, Only(True, False)] = None
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    response_format: Annotated[Any, Only({"type": "text"})] = None
    modalities: Annotated[Any, Only(["text"])] = None
    reasoning_effort: Annotated[Any, Only("none")] = None
    verbosity: Annotated[Any, Only("medium")] = None
    audio: Annotated[Any, Only(None)] = None
    prediction: Annotated[Any, Only(None)] = None
    web_search_options: Annotated[Any, Only(None)] = None

    @model_validator(mode="after")
    def _ends_with_the_user(self) -> Self:
        if (role := self.messages[-1].role) != "user":
            raise PydanticCustomError("role", "the last message is of the role {role}; expected user", {"role": role})
        return self

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise PydanticCustomError("twice", "give max_tokens or max_completion_tokens, not both")
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs to be true; it is false")
        return self

    @property
    def ignored_fields(self) -> list[str]:
        """Also those of messages."""
        return super().ignored_fields + below("messages", *self.messages)

    @property
    def prompt_fields(self) -> dict[str, Any]:
        """The conversation."""
        return {"messages": [TurnIn(role=ROLES[m.role], content=m.text) for m in self.messages]}

    @property
    def logprob_count(self) -> int | None:
        """``top_logprobs`` where log-probabilities are asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        """By either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def sources(self) -> list[SourceRef]:
        """Those of the body's fields, and those of content parts."""
        return super().sources + [
            SourceRef(INPUT_FIELDS[part.type], part.value, f"messages.{at}.content.{number}.{PART_FIELDS[part.type]}")
            for at, message in enumerate(self.messages)
            for number, part in enumerate(message.content)
            if part.type != "text"
        ]


def _lines(texts: Sequence[str]) -> str:
    return "\n".join(text for text in texts if text)
