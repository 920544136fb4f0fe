"""Responses in OpenAI's format, whole or in chunks."""

import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, Field

from latentwire.bridge.results import AnsweredFrom
from latentwire.service.api.openai.requests import OpenAIRequest
from latentwire.service.inference.request import Piece
from latentwire.service.schemas.inference import GenerateResponse, Output, TokenLogprobOut, Usage

FinishReason = Literal["stop", "length"]
UNFINISHED = "\ufffd"  # what stands for half of a character
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class LatentUsage(BaseModel):
    """What only a bridge has: tokens the sender read, and soft tokens the receiver got for them."""

    source_tokens: int
    soft_tokens: int


class CompletionUsage(BaseModel):
    """Tokens. ``prompt_tokens`` are what the receiver was given: its own tokens of the prompt, and soft tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    latentwire: LatentUsage


class Verdict(BaseModel):
    """What only a bridge with a gate has: what an answer is from, and how far the latent's was trusted, 0 to 1."""

    answered_from: AnsweredFrom
    trust: float


VERDICT: Any = Field(None, description="Only with a fallback.", exclude_if=lambda verdict: verdict is None)


class Head(BaseModel):
    """What every answer and every chunk begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class Logprobs(BaseModel):
    """Of a completion's tokens: texts, log-probabilities in nats, likeliest tokens, characters of it before each."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A completion, or a piece of it."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None
    latentwire: Verdict | None = VERDICT


class Completion(Head):
    """Completions, n for each prompt; or a piece of one, in a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None


class TokenLogprob(BaseModel):
    """A token, its log-probability in nats, and its UTF-8 bytes where it is no half of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenLogprob):
    """A token said, and the likeliest there."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Of an answer's tokens."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    """What the receiver said."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """An answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    latentwire: Verdict | None = VERDICT


class ChatCompletion(Head):
    """Answers."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: CompletionUsage


class Delta(BaseModel):
    """What is new in an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """A piece of an answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None


class ChatChunk(Head):
    """A piece of a stream of answers."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: CompletionUsage | None = None


class Model(BaseModel):
    """A bridge, or a bridge with one of its receivers."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """Every name that ``model`` may be."""

    object: Literal["list"]
    data: list[Model]


class OpenAIErrorDetail(BaseModel):
    """What went wrong: ``type`` is OpenAI's word for the status, ``code`` ours for the cause."""

    message: str
    type: str
    param: str | None
    code: str
    request_id: str


class OpenAIErrorBody(BaseModel):
    """The one error body, as OpenAI's clients read it."""

    error: OpenAIErrorDetail


Whole = TypeVar("Whole", Completion, ChatCompletion)
Choice = TypeVar("Choice", CompletionChoice, ChatChunkChoice)


class Reply(ABC, Generic[Whole, Choice]):
    """The response to one request, whole or as the chunks of a stream."""

    PREFIX: ClassVar[str]  # of ids

    def __init__(self, body: OpenAIRequest, bridge_id: str) -> None:
        self.choices = range(body.prompt_count * body.n)
        self._tokens, self._characters = Counter[int](), Counter[int]()  # reported so far of each choice
        self._reports_usage = body.stream_options.include_usage
        self._head: dict[str, Any] = {
            "id": f"{self.PREFIX}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": f"fp_{bridge_id[:12]}",
        }

    @abstractmethod
    def whole(self, response: GenerateResponse) -> Whole:
        """The whole response."""

    @abstractmethod
    def choice(self, index: int, text: str | None, finish_reason: FinishReason | None, **logprobs: Any) -> Choice:
        """A choice of a chunk, with new text or, at its end, none."""

    @abstractmethod
    def logprobs(self, tokens: Sequence[TokenLogprobOut], before: int = 0) -> BaseModel:
        """The log-probabilities of tokens; so many characters came before them."""

    @abstractmethod
    def chunk(self, choices: Sequence[Choice], **usage: Any) -> BaseModel:
        """One chunk of the stream."""

    def first_choices(self) -> list[Choice]:
        """The choices of a stream before any text."""
        return []

    def piece_choice(self, piece: Piece) -> Choice:
        """The choice with the text of a piece."""
        tokens = [TokenLogprobOut.of(token) for token in piece.logprobs]
        return self.choice(piece.index, piece.text, None, **self._reported(piece.index, tokens))

    def last_choice(self, output: Output) -> Choice:
        """The choice with the finish reason, and the log-probabilities that no piece had: those of a stop string."""
        rest = (output.logprobs or [])[self._tokens[output.index] :]
        return self.choice(output.index, None, output.finish_reason, **self._reported(output.index, rest))

    def _reported(self, index: int, tokens: Sequence[TokenLogprobOut]) -> dict[str, Any]:
        before = self._characters[index]
        self._tokens[index] += len(tokens)
        self._characters[index] += sum(len(token.token) for token in tokens)
        return {"logprobs": self.logprobs(tokens, before)} if tokens else {}

    def logprobs_of(self, output: Output) -> Any:
        """The log-probabilities of a whole output, where they were requested."""
        return None if output.logprobs is None else self.logprobs(output.logprobs)

    def chunk_json(self, *choices: Choice, usage: CompletionUsage | None = None) -> str:
        """One chunk of the stream as JSON; ``usage`` is in every one, null or not, when it was asked for."""
        reported = {"usage": usage} if self._reports_usage else {}
        return self.chunk(choices, **reported).model_dump_json(exclude_unset=True)

    def last_chunks(self, response: GenerateResponse) -> Iterator[str]:
        """The chunks of a stream after all text."""
        for output in response.outputs:
            yield self.chunk_json(self.last_choice(output))
        if self._reports_usage:
            yield self.chunk_json(usage=usage_of(response.usage))
        yield "[DONE]"


class CompletionReply(Reply[Completion, CompletionChoice]):
    """``/v1/completions``: chunks and the whole have one shape."""

    PREFIX = "cmpl"

    def whole(self, response: GenerateResponse) -> Completion:
        """The whole response."""
        choices = [
            self.choice(
                output.index,
                output.text,
                output.finish_reason,
                logprobs=self.logprobs_of(output),
                latentwire=verdict_of(output),
            )
            for output in response.outputs
        ]
        return self.chunk(choices, usage=usage_of(response.usage))

    def choice(self, index: int, text: str | None, finish_reason: FinishReason | None, **rest: Any) -> CompletionChoice:
        """A choice of a chunk, or of the whole."""
        return CompletionChoice(index=index, text=text or "", finish_reason=finish_reason, **rest)

    def logprobs(self, tokens: Sequence[TokenLogprobOut], before: int = 0) -> Logprobs:
        """In four lists."""
        return Logprobs(
            tokens=[token.token for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[_likeliest(token) for token in tokens],
            text_offset=list(accumulate((len(token.token) for token in tokens), initial=before))[: len(tokens)],
        )

    def chunk(self, choices: Sequence[CompletionChoice], **usage: Any) -> Completion:
        """One chunk of the stream, or the whole."""
        return Completion(**self._head, object="text_completion", choices=list(choices), **usage)


class ChatReply(Reply[ChatCompletion, ChatChunkChoice]):
    """``/v1/chat/completions``."""

    PREFIX = "chatcmpl"

    def whole(self, response: GenerateResponse) -> ChatCompletion:
        """The whole response."""
        choices = [
            ChatChoice(
                index=output.index,
                message=ChatMessage(role="assistant", content=output.text),
                logprobs=self.logprobs_of(output),
                finish_reason=output.finish_reason,
                latentwire=verdict_of(output),
            )
            for output in response.outputs
        ]
        return ChatCompletion(**self._head, object="chat.completion", choices=choices, usage=usage_of(response.usage))

    def first_choices(self) -> list[ChatChunkChoice]:
        """Who speaks, in each choice."""
        delta = Delta(role="assistant", content="")
        return [ChatChunkChoice(index=index, delta=delta, finish_reason=None) for index in self.choices]

    def choice(
        self, index: int, text: str | None, finish_reason: FinishReason | None, **logprobs: Any
    ) -> ChatChunkChoice:
        """A choice of a chunk."""
        delta = Delta() if text is None else Delta(content=text)
        return ChatChunkChoice(index=index, delta=delta, finish_reason=finish_reason, **logprobs)

    def logprobs(self, tokens: Sequence[TokenLogprobOut], before: int = 0) -> ChatLogprobs:
        """One after the other."""
        return ChatLogprobs(
            content=[
                ChatTokenLogprob(
                    **_token(token.token, token.logprob),
                    top_logprobs=[TokenLogprob(**_token(*one)) for one in token.top],
                )
                for token in tokens
            ]
        )

    def chunk(self, choices: Sequence[ChatChunkChoice], **usage: Any) -> ChatChunk:
        """One chunk of the stream."""
        return ChatChunk(**self._head, object="chat.completion.chunk", choices=list(choices), **usage)


def usage_of(usage: Usage) -> CompletionUsage:
    """The same counts by OpenAI's names."""
    given = usage.prompt_tokens + usage.soft_tokens
    return CompletionUsage(
        prompt_tokens=given,
        completion_tokens=usage.generated_tokens,
        total_tokens=given + usage.generated_tokens,
        latentwire=LatentUsage(source_tokens=usage.source_tokens, soft_tokens=usage.soft_tokens),
    )


def verdict_of(output: Output) -> Verdict | None:
    """What the gate said of an answer, where it was asked."""
    if output.answered_from is None or output.trust is None:
        return None
    return Verdict(answered_from=output.answered_from, trust=output.trust)


def error_type(status: int) -> str:
    """OpenAI's word for what a status means."""
    return ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def _likeliest(token: TokenLogprobOut) -> dict[str, float]:
    """The likeliest tokens and the chosen one. Of tokens with the same text, as halves of characters have, the
    likeliest."""
    found: dict[str, float] = {}
    for text, logprob in (*token.top, (token.token, token.logprob)):
        found.setdefault(text, logprob)
    return found


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": None if UNFINISHED in text else list(text.encode())}
