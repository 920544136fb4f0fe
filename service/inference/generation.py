"""What ``/encode`` and ``/generate`` do, for whichever route asks: latents from texts, answers from latents."""

import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np

from latentwire.bridge import wire
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.diversity import diversity
from latentwire.bridge.errors import LatentWireError, TooLarge, at_fault
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.sampling import SamplingParams, sample_params
from latentwire.service.inference.request import GenerationRequest, Piece, Text
from latentwire.service.inference.runtime import Runtime
from latentwire.service.schemas.inference import (
    DiversityOut,
    GenerateRequest,
    GenerateResponse,
    Output,
    Timing,
    TokenLogprobOut,
    Usage,
    message_of,
)
from latentwire.service.store.latents import (
    CachedEncoding,
    encode_key,
    get_encodings,
    get_latents,
    put_encodings,
    put_latents,
)


class Answering:
    """The work of one caller's request on one bridge."""

    def __init__(self, runtime: Runtime, tenant: str, bridge: Bridge) -> None:
        self.runtime, self.tenant, self.bridge = runtime, tenant, bridge
        self.store, self.ttl_seconds = runtime.store, runtime.settings.store_ttl
        self.usage = Usage()

    async def send(self, texts: Sequence[Text], dtype: wire.DType = "float16") -> list[CachedEncoding]:
        """The messages of texts; one that comes twice is read once, those encoded before come from the cache.

        ``usage`` has what the sender read for it, also when it does not end well; then, what all texts hold.
        """
        bridge, bridge_id = self.bridge, self.bridge.manifest.bridge_id
        keys = [encode_key(bridge_id, dtype, row.truncate, row.text, self.tenant) for row in texts]
        found = await self._cached(keys)
        missing: dict[str, Text] = {}
        for key, text, sent in zip(keys, texts, found, strict=True):
            if sent is None:
                missing.setdefault(key, text)
        encoded = await self.runtime.encode(bridge, list(missing.values()), self._read) if missing else []
        made = {
            key: CachedEncoding(bridge.message(row.latent, dtype), row.source_tokens, row.truncated)
            for key, row in zip(missing, encoded, strict=True)
        }
        if made and self.runtime.settings.encode_cache:
            await put_encodings(self.store, made, ttl_seconds=self.ttl_seconds)
        all_sent = [one or made[key] for key, one in zip(keys, found, strict=True)]
        self.usage.source_tokens = sum(one.source_tokens for one in all_sent)
        return all_sent

    def _read(self, source_tokens: int) -> None:
        self.usage.source_tokens = source_tokens

    async def keep(self, messages: Sequence[bytes]) -> list[str]:
        """Keep messages under ids of their own (StoreUnavailable)."""
        return await put_latents(self.store, messages, tenant=self.tenant, ttl_seconds=self.ttl_seconds)

    async def answer(
        self, receiver: str, body: GenerateRequest, on_piece: Callable[[Piece], None] | None = None
    ) -> GenerateResponse:
        """Everything ``POST /generate`` asks for."""
        started = time.perf_counter()
        given = await self._given(body)
        encode_ms = ms_since(started)
        seed = secrets.randbits(63) if body.seed is None else body.seed
        params = SamplingParams(
            body.max_tokens, body.temperature, body.top_p, body.top_k, seed,
            tuple(body.stop), tuple(body.stop_ids), body.logprobs,
        )  # fmt: skip
        requests = [
            GenerationRequest(one, prompt, sample_params(params, sample))
            for one, prompt in zip(given, body.prompts, strict=True)
            for sample in range(body.n)
        ]

        def cost(prompt_tokens: list[int], generated_tokens: int) -> None:
            """Also of an answer nobody waited for."""
            self.usage.soft_tokens = sum(len(one) for one in given if isinstance(one, np.ndarray))
            self.usage.prompt_tokens = sum(prompt_tokens[:: body.n])
            self.usage.generated_tokens = generated_tokens

        said = await self.runtime.generate(self.bridge, receiver, requests, on_piece, cost)
        texts = [answer.text for answer in said.answers]
        self.runtime.metrics.observe(self.bridge.name, texts, said.first_token_seconds, self.usage)
        total_ms = ms_since(started)
        return GenerateResponse(
            id=f"gen_{uuid.uuid4().hex}",
            bridge=self.bridge.name,
            outputs=[_output(index, answer) for index, answer in enumerate(said.answers)],
            diversity=DiversityOut(**asdict(diversity(texts))),
            usage=self.usage,
            timing=Timing(encode_ms=encode_ms, generate_ms=round(total_ms - encode_ms, 3), total_ms=total_ms),
        )

    async def _given(self, body: GenerateRequest) -> list[wire.Latent | str | None]:
        """What stands in the latent's place for every input."""
        if body.condition == "none":
            return [None] * len(body.inputs)
        if body.condition == "direct":
            return [item.text for item in body.inputs]
        texts = [
            Text(item.text, body.truncate, f"inputs.{at}.text")
            for at, item in enumerate(body.inputs)
            if item.text is not None
        ]
        sent = iter(await self.send(texts) if texts else [])
        ids = {
            f"inputs.{at}.latent_id": item.latent_id
            for at, item in enumerate(body.inputs)
            if item.latent_id is not None
        }
        stored = await get_latents(self.store, ids, tenant=self.tenant) if ids else {}
        given: list[wire.Latent | str | None] = []
        for at, item in enumerate(body.inputs):
            field = next(name for name in ("text", "latent", "latent_id") if getattr(item, name) is not None)
            with at_fault(place := f"inputs.{at}.{field}"):
                if field == "text":
                    message = next(sent).message
                else:
                    message = stored[place] if item.latent is None else message_of(item.latent)
                given.append(self.bridge.decode(message))
        return given

    async def _cached(self, keys: Sequence[str]) -> list[CachedEncoding | None]:
        if not self.runtime.settings.encode_cache:
            return [None] * len(keys)
        found = [sent if sent and self._is_ours(sent) else None for sent in await get_encodings(self.store, keys)]
        hits = sum(sent is not None for sent in found)
        self.runtime.metrics.cached.labels("hit").inc(hits)
        self.runtime.metrics.cached.labels("miss").inc(len(found) - hits)
        return found

    def _is_ours(self, sent: CachedEncoding) -> bool:
        """Whether a cached message may still be sent: it may have been signed with a key that is used no more."""
        try:
            self.bridge.decode(sent.message)
        except LatentWireError:
            return False
        return True


def check_limits(runtime: Runtime, body: GenerateRequest) -> None:
    """Refuse before any work what is over the operator's limits (TooLarge)."""
    settings = runtime.settings
    within(
        ("inputs", len(body.inputs), settings.max_inputs),
        ("n", body.n, settings.max_samples),
        ("max_tokens", body.max_tokens, settings.max_tokens),
    )
    for at, item in enumerate(body.inputs):
        runtime.check_text(item.text or "", f"inputs.{at}.text")
    for prompt in set(body.prompts):
        if isinstance(prompt, str):
            runtime.check_text(prompt, "prompt")
        else:
            runtime.check_text("".join(turn.text for turn in prompt), "messages")


def within(*limits: tuple[str, int, int]) -> None:
    """Refuse a value over its limit; each is (name, value, limit) (TooLarge)."""
    for name, value, limit in limits:
        if value > limit:
            raise TooLarge(f"{name} is {value}; at most {limit} is taken", param=name)


def ms_since(started: float) -> float:
    """Milliseconds since a ``time.perf_counter()``."""
    return round((time.perf_counter() - started) * 1000, 3)


def _output(index: int, answer: Generation) -> Output:
    logprobs = None if answer.logprobs is None else [TokenLogprobOut.of(token) for token in answer.logprobs]
    return Output(
        index=index,
        text=answer.text,
        finish_reason=answer.finish_reason,
        token_count=answer.token_count,
        logprobs=logprobs,
    )
