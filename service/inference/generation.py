"""The work of ``/encode``, ``/generate``, ``/score`` and ``/read``, for whichever route asks."""

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from latentwire.bridge import wire
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.diversity import diversity
from latentwire.bridge.errors import InvalidRequest, LatentWireError, TooLarge, at_fault
from latentwire.bridge.gate import as_asked, gate_asked, watched
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.readback import as_said, readings_of, taught
from latentwire.bridge.results import AnsweredFrom, ms_since, timing_since
from latentwire.bridge.sampling import SamplingParams, sample_params
from latentwire.bridge.scoring import Continuation, score_of
from latentwire.bridge.sources import Given, slots_in
from latentwire.service import tracing
from latentwire.service.inference.request import GenerationRequest, Piece, Text
from latentwire.service.inference.runtime import Runtime
from latentwire.service.inference.scoring import ScoreQuestion
from latentwire.service.schemas.inference import (
    Asking,
    DiversityOut,
    GenerateRequest,
    GenerateResponse,
    Input,
    Output,
    SourceIn,
    Timing,
    TokenLogprobOut,
    Usage,
    message_of,
)
from latentwire.service.schemas.reading import ReadingOut, ReadRequest, ReadResponse
from latentwire.service.schemas.scoring import ScoreOut, ScoreRequest, ScoreResponse
from latentwire.service.store.latents import (
    CachedEncoding,
    KeptLatent,
    encode_key,
    get_encodings,
    id_of_message,
    id_of_text,
    put_encodings,
    put_latents,
)

MAX_SCORED = 4096  # continuations of one request, over all inputs


class RequestHandler:
    """Encodes and generates for one request on one bridge; ``usage`` counts what that has cost so far."""

    def __init__(self, runtime: Runtime, tenant: str, bridge: Bridge, arrived: float) -> None:
        """``arrived`` is the ``time.monotonic()`` at which the request came."""
        self.arrived = arrived
        self.runtime, self.tenant, self.bridge = runtime, tenant, bridge
        self.store, self.cache, self.ttl_seconds = runtime.store, runtime.cache, runtime.settings.store_ttl
        self.usage = Usage()

    async def encode(self, texts: Sequence[Text], dtype: wire.DType = "float16") -> list[CachedEncoding]:
        """Encode texts. The sender reads equal texts once, and none whose encoding is in the cache.

        ``usage`` counts the tokens that the sender read, also where an error is raised; at the end, those of all texts.
        """
        started, metrics = time.monotonic(), self.runtime.metrics
        bridge, bridge_id = self.bridge, self.bridge.manifest.bridge_id
        books = bridge.model.codebooks
        format = wire.sendable(dtype, books) + wire.codebooks_id(dtype, books)
        keys = [encode_key(bridge_id, format, row.truncate, row.text, self.tenant) for row in texts]
        cached = await self._cached(keys)
        missing: dict[str, Text] = {}
        for key, text, hit in zip(keys, texts, cached, strict=True):
            if hit is None:
                missing.setdefault(key, text)
        encoded = await self.runtime.encode(bridge, list(missing.values()), self._count_source) if missing else []
        read = time.monotonic()
        made = {
            key: CachedEncoding(bridge.message(row.latent, dtype), row.source_tokens, row.truncated)
            for key, row in zip(missing, encoded, strict=True)
        }
        tracing.told("encode", started, read, texts=len(texts), read=len(missing))
        tracing.told("wire", read, time.monotonic(), dtype=dtype)
        if made and self.runtime.settings.encode_cache:
            await put_encodings(self.cache, made, ttl_seconds=self.ttl_seconds)
        encodings = [hit or made[key] for key, hit in zip(keys, cached, strict=True)]
        self._count_source(sum(encoding.source_tokens for encoding in encodings))
        metrics.observe_latents(bridge.name, time.monotonic() - started, [one.message for one in encodings])
        metrics.window(bridge.name).latents.extend(row.latent.mean(axis=0) for row in encoded)
        return encodings

    def _count_source(self, tokens: int) -> None:
        self.usage.source_tokens = tokens

    async def keep(
        self,
        encodings: Sequence[tuple[str | None, CachedEncoding]],
        ttl_seconds: float | None,
        metadata: Sequence[dict[str, Any] | None] | None = None,
    ) -> list[KeptLatent]:
        """Keep latents, each of its text where there is one, for later requests (StoreUnavailable)."""
        latents = [
            replace(self._to_keep(text, encoding), metadata=said)
            for (text, encoding), said in zip(encodings, metadata or [None] * len(encodings), strict=True)
        ]
        return await put_latents(self.store, latents, tenant=self.tenant, ttl_seconds=ttl_seconds)

    def _to_keep(self, text: str | None, encoding: CachedEncoding) -> KeptLatent:
        message, length = encoding.message, len(encoding.message)
        if text is None:
            return KeptLatent(id_of_message(message, self.tenant), message, length)
        header = wire.header_of(message)
        name = id_of_text(header.bridge_id, header.dtype, text, self.tenant)
        return KeptLatent(name, message, length, encoding.source_tokens, len(text.encode()), encoding.truncated)

    async def generate(
        self, receiver: str, body: GenerateRequest, on_piece: Callable[[Piece], None] | None = None
    ) -> GenerateResponse:
        """Generate the outputs that ``POST /generate`` asks for."""
        started = time.perf_counter()
        seed = secrets.randbits(63) if body.seed is None else body.seed
        params = SamplingParams(
            body.max_tokens, body.temperature, body.top_p, body.top_k, seed,
            tuple(body.stop), tuple(body.stop_ids), body.logprobs,
        )  # fmt: skip
        gate = gate_asked(self.bridge.gates, self.bridge.name, receiver, body.fallback)
        instead = _requests(body, map(_texts, body.inputs), params)
        if gate:  # a text for which the receiver has no room is refused before any work
            await self.runtime.compose(self.bridge, receiver, instead)
        requests = _requests(body, await self._sources(body), watched(params) if gate else params)
        encode_ms = ms_since(started)
        numbers = [number // body.n for number in range(len(requests))]
        answers = await self._answers(receiver, requests, numbers, on_piece)
        verdicts: Iterable[Any] = [()] * len(answers)
        if gate:
            verdicts = judged = gate.judge(answers)
            self.runtime.metrics.observe_gate(self.bridge.name, judged)
            refused = judged.refused
            asked, of = [instead[number] for number in refused], [numbers[number] for number in refused]
            told = await self._answers(receiver, asked, of)
            ours = [as_asked(answer, params) for answer in answers]
            answers = judged.given(ours, told)
        texts, window = [answer.text for answer in answers], self.runtime.metrics.window(self.bridge.name)
        for answer in answers:
            window.add(answer.text, answer.finish_reason == "length", answer.entropy_nats)
        return GenerateResponse(
            id=f"gen_{uuid.uuid4().hex}",
            bridge=self.bridge.name,
            outputs=[
                _output(index, answer, *verdict)
                for index, (answer, verdict) in enumerate(zip(answers, verdicts, strict=True))
            ],
            diversity=DiversityOut(**asdict(diversity(texts))),
            usage=self.usage,
            timing=Timing(**asdict(timing_since(started, encode_ms))),
        )

    async def _answers(
        self,
        receiver: str,
        requests: Sequence[GenerationRequest],
        inputs: Sequence[int],
        on_piece: Callable[[Piece], None] | None = None,
    ) -> list[Generation]:
        """Answers; ``inputs`` says of which input each is, which counts once."""

        def count_usage(prompt_tokens: list[int], generated_tokens: int) -> None:
            """Also of a request that was cancelled."""
            slots = [slots_in(request.source) for request in requests]
            self.usage.soft_tokens += sum(dict(zip(inputs, slots, strict=True)).values())
            self.usage.prompt_tokens += sum(dict(zip(inputs, prompt_tokens, strict=True)).values())
            self.usage.generated_tokens += generated_tokens

        if not requests:
            return []
        asked = time.monotonic()
        result = await self.runtime.generate(self.bridge, receiver, requests, on_piece, count_usage)
        self.runtime.metrics.observe_times(self.bridge.name, self.arrived, result.times, result.generations)
        tracing.told_of_answers(self.arrived, asked, result.times)
        return result.generations

    async def score(self, receiver: str, body: ScoreRequest) -> ScoreResponse:
        """Score the choices that ``POST /score`` gives."""
        started = time.perf_counter()
        gate = gate_asked(self.bridge.gates, self.bridge.name, receiver, body.fallback)
        if gate:  # a text for which the receiver has no room is refused before any work
            how = await asyncio.to_thread(self.bridge.judging, receiver, body.choices, end=body.end)
            asked = zip(map(_texts, body.inputs), body.prompts, strict=True)
            await self.runtime.compose(self.bridge, receiver, [GenerationRequest(*both, how) for both in asked])
        sources = await self._sources(body)
        encode_ms = ms_since(started)
        verdicts: Iterable[Any] = [()] * len(sources)
        if gate:
            asked = zip(sources, body.prompts, strict=True)
            requests = [GenerationRequest(*both, how) for both in asked]
            answers = await self._answers(receiver, requests, range(len(requests)))
            verdicts = judged = gate.judge(answers)
            self.runtime.metrics.observe_gate(self.bridge.name, judged)
            sources = judged.given(sources, [_texts(body.inputs[number]) for number in judged.refused])
        questions = [
            ScoreQuestion(source, prompt, body.choices, body.end)
            for source, prompt in zip(sources, body.prompts, strict=True)
        ]
        found = await self._scored(receiver, questions)
        reader = self.bridge.reader(receiver)
        scores = [
            score_of(reader, body.choices, one, *verdict, logprobs=body.logprobs)
            for one, verdict in zip(found, verdicts, strict=True)
        ]
        return ScoreResponse(
            id=f"score_{uuid.uuid4().hex}",
            bridge=self.bridge.name,
            scores=[ScoreOut.of(index, score) for index, score in enumerate(scores)],
            usage=self.usage,
            timing=Timing(**asdict(timing_since(started, encode_ms))),
        )

    async def _scored(self, receiver: str, questions: Sequence[ScoreQuestion]) -> list[list[Continuation]]:
        def count_usage(tokens: int) -> None:
            """Also of a request that was cancelled."""
            soft_tokens = sum(slots_in(question.source) for question in questions)
            self.usage.soft_tokens += soft_tokens
            self.usage.prompt_tokens += max(tokens - soft_tokens, 0)

        return await self.runtime.score(self.bridge, receiver, questions, count_usage)

    async def read(self, receiver: str, body: ReadRequest) -> ReadResponse:
        """Say what the latents hold that ``POST /read`` gives."""
        started = time.perf_counter()
        latents = await self._latents(body.inputs, body.truncate)
        encode_ms = ms_since(started)
        prompt, params = self.bridge.readings(receiver, latents, body.max_tokens)
        most = self.runtime.settings.max_tokens
        requests = [
            GenerationRequest(latent, prompt, replace(how, max_tokens=min(how.max_tokens, most)))
            for latent, how in zip(latents, params, strict=True)
        ]
        originals = body.against or []
        questions = [
            ScoreQuestion(latent, prompt, [as_said(text)], end=True)
            for latent, text in zip(latents, originals, strict=False)
        ]
        with _told_of("against"):
            found = await self._scored(receiver, questions) if questions else []
        with _told_of("max_tokens"):
            answers = await self._answers(receiver, requests, range(len(requests)))
        return ReadResponse(
            id=f"read_{uuid.uuid4().hex}",
            bridge=self.bridge.name,
            trained=taught(self.bridge.manifest.bridge, receiver) is not None,
            readings=[
                ReadingOut.numbered(index, reading)
                for index, reading in enumerate(readings_of(answers, originals, found))
            ],
            usage=self.usage,
            timing=Timing(**asdict(timing_since(started, encode_ms))),
        )

    async def _sources(self, body: Asking) -> list[Given]:
        """For every input, what stands in the latent's place."""
        if body.condition == "none":
            return [None if item.sources is None else ("",) * len(item.sources) for item in body.inputs]
        if body.condition == "direct":
            return [_texts(item) for item in body.inputs]
        rest = iter(await self._latents(body.inputs, body.truncate))
        return [next(rest) if item.sources is None else tuple(next(rest) for _ in item.sources) for item in body.inputs]

    async def _latents(self, inputs: Sequence[SourceIn], truncate: bool) -> list[wire.Latent]:
        """The latents of all sources, in order."""
        each = [named for at, item in enumerate(inputs) for named in item.each(f"inputs.{at}")]
        texts = [Text(one.text, truncate, f"{at}.text") for at, one in each if one.text is not None]
        encodings = iter(await self.encode(texts) if texts else [])
        ids = {f"{at}.latent_id": one.latent_id for at, one in each if one.latent_id is not None}
        stored = await self.runtime.latents(ids, self.tenant) if ids else {}
        latents: list[wire.Latent] = []
        for at, one in each:
            with at_fault(param := f"{at}.{one.given}"):
                if one.given == "text":
                    encoding = next(encodings)
                    latents.append(self.bridge.decode(encoding.message) if encoding.latent is None else encoding.latent)
                else:
                    message = stored[param].message if one.latent is None else message_of(one.latent)
                    latents.append(self.bridge.decode(message))
        return latents

    async def _cached(self, keys: Sequence[str]) -> list[CachedEncoding | None]:
        if not self.runtime.settings.encode_cache:
            return [None] * len(keys)
        found = [hit and self._decoded(hit) for hit in await get_encodings(self.cache, keys)]
        hits = sum(hit is not None for hit in found)
        self.runtime.metrics.cached.labels("hit").inc(hits)
        self.runtime.metrics.cached.labels("miss").inc(len(found) - hits)
        return found

    def _decoded(self, hit: CachedEncoding) -> CachedEncoding | None:
        """A cache hit with its latent; None where the key that signed its message was replaced since."""
        try:
            return replace(hit, latent=self.bridge.decode(hit.message))
        except LatentWireError:
            return None


def _texts(item: Input) -> Given:
    return item.text if item.sources is None else tuple(one.text or "" for one in item.sources)


def check_limits(runtime: Runtime, body: Asking) -> None:
    """Refuse before any work what is over the operator's limits (TooLarge)."""
    settings = runtime.settings
    _check_inputs(runtime, body.inputs)
    if isinstance(body, GenerateRequest):
        within(("n", body.n, settings.max_samples), ("max_tokens", body.max_tokens, settings.max_tokens))
    if isinstance(body, ScoreRequest):
        if (count := len(body.inputs) * len(body.choices)) > MAX_SCORED:
            raise TooLarge(f"the request scores {count} continuations; at most {MAX_SCORED} are taken", param="choices")
        runtime.check_text("".join(body.choices), "choices")
    for prompt in set(body.prompts):
        if isinstance(prompt, str):
            runtime.check_text(prompt, "prompt")
        else:
            runtime.check_text("".join(turn.text for turn in prompt), "messages")


def check_reading(runtime: Runtime, body: ReadRequest) -> None:
    """``check_limits`` of what is read back (TooLarge)."""
    _check_inputs(runtime, body.inputs)
    within(("max_tokens", body.max_tokens or 1, runtime.settings.max_tokens))
    runtime.check_text("".join(body.against or ()), "against")


def _check_inputs(runtime: Runtime, inputs: Sequence[SourceIn]) -> None:
    most = runtime.settings.max_inputs
    each = [named for at, item in enumerate(inputs) for named in item.each(f"inputs.{at}")]
    within(("inputs", len(inputs), most), ("sources", len(each), most))
    for place, one in each:
        runtime.check_text(one.text or "", f"{place}.text")


@contextmanager
def _told_of(param: str) -> Iterator[None]:
    """A request that cannot be composed names the field at fault; it has no prompt of its own."""
    try:
        yield
    except InvalidRequest as error:
        error.param = param
        raise


def within(*limits: tuple[str, int, int]) -> None:
    """Refuse a value over its limit; each is (name, value, limit) (TooLarge)."""
    for name, value, limit in limits:
        if value > limit:
            raise TooLarge(f"{name} is {value}; at most {limit} is taken", param=name)


def _requests(body: GenerateRequest, sources: Iterable[Given], params: SamplingParams) -> list[GenerationRequest]:
    return [
        GenerationRequest(source, prompt, sample_params(params, sample))
        for source, prompt in zip(sources, body.prompts, strict=True)
        for sample in range(body.n)
    ]


def _output(
    index: int, generation: Generation, answered_from: AnsweredFrom | None = None, trust: float | None = None
) -> Output:
    logprobs = None if generation.logprobs is None else [TokenLogprobOut.of(token) for token in generation.logprobs]
    return Output(
        index=index,
        text=generation.text,
        finish_reason=generation.finish_reason,
        token_count=generation.token_count,
        logprobs=logprobs,
        answered_from=answered_from,
        trust=trust,
    )
