"""``/v1``: OpenAI's endpoints, for tools that speak to nothing else. A translation; the work is ``/generate``'s."""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.errors import LatentWireError
from latentwire.service.api.lifetime import event
from latentwire.service.api.openai.requests import ChatRequest, CompletionRequest, OpenAIRequest
from latentwire.service.api.openai.responses import (
    ChatCompletion,
    ChatReply,
    Completion,
    CompletionReply,
    Model,
    ModelList,
    Reply,
)
from latentwire.service.api.routes.inference import EVENT, run_generate
from latentwire.service.inference.generation import within
from latentwire.service.inference.request import Piece
from latentwire.service.inference.runtime import Runtime
from latentwire.service.schemas.inference import GenerateResponse

router = APIRouter(tags=["openai"], prefix="/v1")
BEGAN = int(time.time())  # a checkpoint does not know when it was made
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answers. With `stream`, server-sent events without names: chunks, then `[DONE]`; an error "
        "on the way is `data` with the error body, and ends the stream. Log-probabilities come with the text of "
        "their tokens; those of a stop string with the finish reason.",
        "content": {"text/event-stream": {"schema": EVENT}},
    }
}


@router.post("/completions", response_model=Completion, responses=STREAMED)
async def completions(body: CompletionRequest, request: Request) -> Any:
    """Let a receiver go on with a prompt about a source it will not see.

    `model` is a bridge. The source is one of `source` (a text), `latent` (base64, from /encode) and `latent_id` (of a
    stored one), which OpenAI's client sends as `extra_body`; every prompt is asked about it. What a field would ask
    for that is not done here (penalties, echo, …) is refused unless its value asks for nothing; what no answer could
    show (`metadata`, `session_id`, …) is left out, and so is any null.
    """
    return await _respond(request, body, CompletionReply)


@router.post("/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def chat_completions(body: ChatRequest, request: Request) -> Any:
    """Let a receiver answer messages about a source it will not see.

    `model` is a bridge. The source is a content part of a user's message, `{"type": "source", "text": …}`,
    `{"type": "latent", "data": …}` or `{"type": "latent_id", "id": …}`, or one of the fields `source`, `latent` and
    `latent_id`; one in all.

    A bridge that was trained with the receiver's chat template (`chat` in /bridges) gets all messages in it, in their
    order; the latent stands where a message says `{latent}`, else in the first of the user's.

    The receiver of any other bridge gets the text of every message, system messages and earlier answers included, in
    their order, joined by newlines, and nothing else: no names of roles. So the last message, which is the user's, ends
    the prompt, and asks best in the form that the bridge was trained with, such as
    `Question: What does Mara want?\\nAnswer:`.
    """
    return await _respond(request, body, ChatReply)


@router.get("/models")
async def models(request: Request) -> ModelList:
    """Every name that `model` may be: the bridges, and BRIDGE/RECEIVER for each receiver of one that has several."""
    runtime: Runtime = request.app.state.runtime
    names: list[str] = []
    for name, bridge in runtime.bridges.items():
        receivers = list(bridge.receivers)
        names += [name, *(f"{name}/{receiver}" for receiver in receivers if len(receivers) > 1)]
    return ModelList(object="list", data=[_model(name) for name in names])


@router.get("/models/{name:path}")
async def model(name: str, request: Request) -> Model:
    """One of them."""
    with _translated(lambda param: "model"):
        _find(request.app.state.runtime, name)
    return _model(name)


async def _respond(request: Request, body: OpenAIRequest, shape: type[Reply[Any, Any]]) -> Any:
    runtime: Runtime = request.app.state.runtime
    for name in body.ignored_fields:
        runtime.metrics.ignored.labels(name).inc()
    with _translated(body.param_of):
        bridge, receiver = _find(runtime, body.model)
        within((body.PROMPT, body.prompt_count, runtime.settings.max_inputs))
        reply = shape(body, bridge.manifest.bridge_id)

        async def events(pieces: AsyncIterator[Piece], result: Callable[[], GenerateResponse]) -> AsyncIterator[str]:
            for choice in reply.first_choices():
                yield event(None, reply.chunk_json(choice))
            async for piece in pieces:
                yield event(None, reply.chunk_json(reply.piece_choice(piece)))
            try:
                chunks = reply.last_chunks(result())
            except Exception as error:
                yield event(None, request.app.state.error_body(request, error))
                return
            for chunk in chunks:
                yield event(None, chunk)

        generate = body.to_generate_request(bridge.name, receiver)
        response = await run_generate(request, generate, events if body.stream else None)
    return response if body.stream else reply.whole(response)


def _find(runtime: Runtime, model: str) -> tuple[Bridge, str | None]:
    """The bridge of a model's name, and the receiver where one is named.

    A bridge's whole name comes first, since it may hold slashes; else the bridge ends at the first slash, since the
    names of receivers often hold one (UnknownBridge).
    """
    if model in runtime.bridges:
        return runtime.find(model), None
    name, slash, receiver = model.partition("/")
    bridge = runtime.find(name)
    return bridge, bridge.receiver(receiver) if slash else None


def _model(name: str) -> Model:
    return Model(id=name, object="model", created=BEGAN, owned_by="latentwire")


@contextmanager
def _translated(param_of: Callable[[str | None], str | None]) -> Iterator[None]:
    """Errors raised inside name the fields of OpenAI's format."""
    try:
        yield
    except LatentWireError as error:
        error.param = param_of(error.param)
        raise
