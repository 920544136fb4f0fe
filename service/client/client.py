"""Call a LatentWire service from Python. No torch, no models.

with Client("http://127.0.0.1:8000") as client:
    latent = client.encode("Mara wants a cup of tea.").latents[0]  # latent.array is (K, C) float32
    print(client.generate(latent, "Question: What does Mara want?\\nAnswer:").texts[0])
    for event in client.stream(latent, "Question: What does Mara want?\\nAnswer:"):
        ...  # Token(index, text), …, and Generated at last

``AsyncClient`` has the same methods to await. Each is written once, as a coroutine over a connection. That of
``Client`` blocks where the other suspends, so a coroutine over it has run to its end when it was started.
"""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import aclosing, suppress
from functools import update_wrapper
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

import httpx

from latentwire.bridge.results import Encoded, Generated, ReadBack, Scored
from latentwire.service.client import protocol
from latentwire.service.client.transport import Blocking, Suspending, finish
from latentwire.service.client.types import (
    BridgeInfo,
    Bridges,
    CallOptions,
    EncodeOptions,
    Evaluation,
    Event,
    GenerateOptions,
    Input,
    Inputs,
    KeepOptions,
    KeptLatent,
    KeptLatents,
    LatentPage,
    Prompt,
    ReadOptions,
    ScoreOptions,
    ServiceError,
)

P = ParamSpec("P")
T = TypeVar("T")


class _Service:
    """Every call. All raise ``ServiceError``, and nothing else that comes from the other side."""

    def __init__(self, io: Suspending | Blocking, timeout_seconds: float, retries: int) -> None:
        self._io, self._timeout_seconds, self._retries = io, timeout_seconds, retries

    async def encode(self, inputs: str | Sequence[str], **options: Unpack[EncodeOptions]) -> Encoded:
        """``POST /encode``: latents of one text or several."""
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        return await self._ask(Encoded, protocol.inference("/encode", {"inputs": texts}, options))

    async def generate(self, inputs: Inputs, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generated:
        """``POST /generate``: what a receiver says about one input or several.

        An input is a text, a ``Latent``, a message (bytes), or ``{"text" | "latent" | "latent_id": …}``; a list of
        these among the inputs holds the sources of one. A prompt is a text, one for each input, or the messages of a
        conversation.
        """
        return await self._ask(Generated, protocol.inference("/generate", protocol.question(inputs, prompt), options))

    async def keep(self, inputs: Input | Sequence[Input], **options: Unpack[KeepOptions]) -> list[KeptLatent]:
        """``POST /latents``: keep the latents of texts, or latents made before, to ask them by their ids.

        What is kept is an input of ``generate`` itself.
        """
        call = protocol.inference("/latents", protocol.inputs_of(inputs), options)
        return list((await self._ask(KeptLatents, call)).latents)

    async def latents(self, containing: str = "", **options: Unpack[CallOptions]) -> AsyncGenerator[KeptLatent, None]:
        """``GET /latents``: all that is kept (with these words), without the numbers; each page is one call."""
        after: str | None = ""
        while after is not None:
            page = await self._ask(LatentPage, protocol.page_of_latents(after, containing, options))
            for latent in page.latents:
                yield latent
            after = page.next

    async def latent(self, id: str, **options: Unpack[CallOptions]) -> KeptLatent:
        """``GET /latents/{id}``: a kept latent, with its message in ``data``."""
        return await self._ask(KeptLatent, protocol.latent_of("GET", id, options))

    async def delete_latent(self, id: str, **options: Unpack[CallOptions]) -> KeptLatent:
        """``DELETE /latents/{id}``."""
        return await self._ask(KeptLatent, protocol.latent_of("DELETE", id, options))

    async def read(self, inputs: Input | Sequence[Input], **options: Unpack[ReadOptions]) -> ReadBack:
        """``POST /read``: what a receiver takes latents to say, and how likely it finds their originals."""
        return await self._ask(ReadBack, protocol.inference("/read", protocol.inputs_of(inputs), options))

    async def score(
        self, inputs: Inputs, prompt: Prompt, choices: str | Sequence[str], **options: Unpack[ScoreOptions]
    ) -> Scored:
        """``POST /score``: how likely a receiver finds each of some continuations, about one input or several."""
        given = {"choices": [choices] if isinstance(choices, str) else list(choices)}
        return await self._ask(Scored, protocol.inference("/score", protocol.question(inputs, prompt) | given, options))

    async def stream(
        self, inputs: Inputs, prompt: Prompt, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Event, None]:
        """``generate``, as it is said: ``Token`` by ``Token``, and at last the ``Generated``.

        Closing the iterator closes the connection, which ends the work. Nothing is tried again once the answer has
        begun; from then on the timeout bounds each silence, not the whole.
        """
        call = protocol.inference("/generate", {**protocol.question(inputs, prompt), "stream": True}, options)
        response = await self._patiently(call, self._open_stream)
        async with aclosing(self._chunks(response)) as chunks, aclosing(protocol.read_events(chunks)) as events:
            async for each in events:
                event = protocol.event_of(each, response)
                if isinstance(event, Generated):
                    # To the very end, or the service would see a caller who left, and the connection could not be kept.
                    with suppress(ServiceError):
                        _ = [rest async for rest in chunks]
                    yield event
                    return
                if event is not None:
                    yield event
        raise protocol.unlike(response, "the stream ended before its last event, 'done'")

    async def evaluate(
        self,
        bridge: str,
        task: str,
        *,
        conditions: Sequence[str] | None = None,
        limit: int | None = None,
        receiver: str | None = None,
        wait: bool = True,
        on_progress: Callable[[Evaluation], object] | None = None,
        poll_seconds: float = 0.5,
        idempotency_key: str | None = None,
        **options: Unpack[CallOptions],
    ) -> Evaluation:
        """``POST /evaluations``, and by default wait until it is finished: look at ``state`` then.

        The wait itself has no limit: an evaluation takes as long as it takes, and outlives a restart of the service.
        The same ``idempotency_key`` finds an evaluation again; without one each call is a new evaluation.
        ``on_progress`` is called whenever something has changed.
        """
        details = {"conditions": conditions and list(conditions), "limit": limit, "receiver": receiver}
        call = protocol.submission(bridge, task, details, idempotency_key, options)
        evaluation = await self._ask(Evaluation, call)
        seen = None
        while True:
            if on_progress is not None and evaluation != seen:
                on_progress(evaluation)
            if evaluation.finished or not wait:
                return evaluation
            seen = evaluation
            await self._io.sleep(poll_seconds)
            evaluation = await self.evaluation(evaluation.id, **options)

    async def evaluation(self, id: str, **options: Unpack[CallOptions]) -> Evaluation:
        """``GET /evaluations/{id}``: how far it is."""
        return await self._ask(Evaluation, protocol.evaluation_of("GET", id, options))

    async def cancel_evaluation(self, id: str, **options: Unpack[CallOptions]) -> Evaluation:
        """``DELETE /evaluations/{id}``."""
        return await self._ask(Evaluation, protocol.evaluation_of("DELETE", id, options))

    async def bridges(self, **options: Unpack[CallOptions]) -> list[BridgeInfo]:
        """``GET /bridges``: what is served."""
        return list((await self._ask(Bridges, protocol.Call("GET", "/bridges", **options))).bridges)

    async def load(self, bridge: str, **options: Unpack[CallOptions]) -> BridgeInfo:
        """Load a bridge's models into memory."""
        return await self._ask(BridgeInfo, protocol.admin(bridge, "load", options))

    async def unload(self, bridge: str, **options: Unpack[CallOptions]) -> BridgeInfo:
        """Drop a bridge's models from memory; ``freed_bytes`` says what that brought."""
        return await self._ask(BridgeInfo, protocol.admin(bridge, "unload", options))

    async def pin(self, bridge: str, **options: Unpack[CallOptions]) -> BridgeInfo:
        """Keep a bridge's models in memory whatever else wants to be there."""
        return await self._ask(BridgeInfo, protocol.admin(bridge, "pin", options))

    async def unpin(self, bridge: str, **options: Unpack[CallOptions]) -> BridgeInfo:
        """Let a bridge's models give way again."""
        return await self._ask(BridgeInfo, protocol.admin(bridge, "unpin", options))

    async def ready(self) -> bool:
        """Whether every bridge has been loaded and has answered once; False where nothing listens."""
        return await self._well("/health/ready")

    async def live(self) -> bool:
        """Whether the service makes progress; False where nothing listens."""
        return await self._well("/health/live")

    async def _well(self, path: str) -> bool:
        try:
            await self._whole(self._request(protocol.Call("GET", path), self._timeout_seconds), self._timeout_seconds)
        except ServiceError:
            return False
        return True

    async def _ask(self, kind: type[T], call: protocol.Call) -> T:
        async def once(request: httpx.Request, seconds: float) -> T:
            response, raw = await self._whole(request, seconds)
            with protocol.answered(response):
                return protocol.read_json(kind, raw, response.headers.get("x-request-id"))

        return await self._patiently(call, once)

    async def _patiently(self, call: protocol.Call, once: Callable[[httpx.Request, float], Awaitable[T]]) -> T:
        """Try until it works, it is no use, or the time or the tries are used up; the last error is the one raised."""
        given = call.timeout_seconds
        expires = time.monotonic() + (self._timeout_seconds if given is None else given)
        attempt = 0
        while True:
            left = max(expires - time.monotonic(), 0.001)  # to httpx, 0 would mean not to wait for anything
            try:
                return await once(self._request(call, left), left)
            except ServiceError as error:
                pause = protocol.pause_seconds(error, attempt)
                if attempt >= self._retries or pause is None or time.monotonic() + pause >= expires:
                    raise
            await self._io.sleep(pause)
            attempt += 1

    def _request(self, call: protocol.Call, seconds: float) -> httpx.Request:
        return self._io.http.build_request(
            call.method, call.path, json=call.body, headers=call.headers, timeout=seconds
        )

    async def _whole(self, request: httpx.Request, seconds: float) -> tuple[httpx.Response, bytes]:
        """Send, and read a success to its end; httpx bounds each step of that, and this the sum."""
        expires = time.monotonic() + seconds
        response = await self._open(request)
        parts = []
        async with aclosing(self._chunks(response)) as chunks:
            async for chunk in chunks:
                parts.append(chunk)
                if time.monotonic() > expires:
                    raise protocol.late(request, seconds)
        return response, b"".join(parts)

    async def _open(self, request: httpx.Request) -> httpx.Response:
        """Send; a success comes back unread, a refusal is raised."""
        with protocol.translated(request):
            response = await self._io.open(request)
        if response.is_success:
            return response
        async with aclosing(self._chunks(response)) as chunks:
            raw = b"".join([chunk async for chunk in chunks])
        raise protocol.read_refusal(raw, response.status_code, response.headers)

    async def _open_stream(self, request: httpx.Request, seconds: float) -> httpx.Response:
        response = await self._open(request)
        kind = response.headers.get("content-type", "none")
        if not kind.startswith("text/event-stream"):
            await self._io.shut(response)
            raise protocol.unlike(response, f"the content-type is {kind}; expected text/event-stream")
        return response

    async def _chunks(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        try:
            with protocol.translated(response.request):
                async with aclosing(self._io.chunks(response)) as chunks:
                    async for chunk in chunks:
                        yield chunk
        finally:
            await self._io.shut(response)


class AsyncClient(_Service):
    """``Client`` to be awaited: the same arguments and calls. Close it, or use it in an ``async with``.

    >>> import asyncio
    >>> async def ask():
    ...     async with latentwire.AsyncClient(url) as client:
    ...         return (await client.generate("Mara sings.", "Who sings?", max_tokens=1)).texts
    >>> len(asyncio.run(ask()))
    1
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_seconds: float = 60.0,
        retries: int = 3,
        trust_env: bool = True,
    ) -> None:
        self._http = httpx.AsyncClient(**protocol.connection(url, api_key, timeout_seconds, trust_env))
        super().__init__(Suspending(self._http), timeout_seconds, retries)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection."""
        await self._http.aclose()


def _blocking(
    method: Callable[Concatenate[_Service, P], Coroutine[Any, Any, T]],
) -> "Callable[Concatenate[Client, P], T]":
    def call(self: "Client", /, *args: P.args, **options: P.kwargs) -> T:
        return finish(method(self._service, *args, **options))

    update_wrapper(call, method)
    return call


def _iterated(
    method: Callable[Concatenate[_Service, P], AsyncGenerator[T, None]],
) -> "Callable[Concatenate[Client, P], Generator[T, None, None]]":
    def call(self: "Client", /, *args: P.args, **options: P.kwargs) -> Generator[T, None, None]:
        items = method(self._service, *args, **options)
        try:
            with suppress(StopAsyncIteration):
                while True:
                    yield finish(anext(items))
        finally:
            finish(items.aclose())

    update_wrapper(call, method)
    return call


class Client:
    """A connection to one service, for any number of threads; close it, or use it in a ``with``.

    >>> with latentwire.Client(url) as client:
    ...     latents = client.encode(["Ben lives in Rome."])
    ...     client.generate(latents, "Question: Where does Ben live?\\nAnswer:").texts
    [' Ben lives in Rome.']
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_seconds: float = 60.0,
        retries: int = 3,
        trust_env: bool = True,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: Where the service is; absent, what LATENTWIRE_URL says, or this machine.
            api_key: Sent as a bearer token; absent, what LATENTWIRE_API_KEY says, or none.
            timeout_seconds: Bounds a whole call, retries and the pauses between them included.
            retries: How many more times a call is tried that was refused with 429 or 503 or lost its connection, after
                the time the service asked for or a growing one. 0 tries once.
            trust_env: Off, proxy variables are ignored.

        Raises:
            ValueError: The URL, the key or the timeout cannot be one.
        """
        self._http = httpx.Client(**protocol.connection(url, api_key, timeout_seconds, trust_env))
        self._service = _Service(Blocking(self._http), timeout_seconds, retries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    encode = _blocking(_Service.encode)
    generate = _blocking(_Service.generate)
    keep = _blocking(_Service.keep)
    latents = _iterated(_Service.latents)
    latent = _blocking(_Service.latent)
    delete_latent = _blocking(_Service.delete_latent)
    score = _blocking(_Service.score)
    read = _blocking(_Service.read)
    stream = _iterated(_Service.stream)
    evaluate = _blocking(_Service.evaluate)
    evaluation = _blocking(_Service.evaluation)
    cancel_evaluation = _blocking(_Service.cancel_evaluation)
    bridges = _blocking(_Service.bridges)
    load = _blocking(_Service.load)
    unload = _blocking(_Service.unload)
    pin = _blocking(_Service.pin)
    unpin = _blocking(_Service.unpin)
    ready = _blocking(_Service.ready)
    live = _blocking(_Service.live)
