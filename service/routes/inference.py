"""``POST /encode`` and ``POST /generate``."""

import asyncio
import base64
import secrets
import time
import uuid
from collections.abc import Coroutine
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import APIRouter, Request

from bridge import wire
from bridge.diversity import diversity
from bridge.errors import CallerLeft, DeadlineExceeded, TooLarge, at_fault
from bridge.sampling import SamplingParams
from service.runtime import Question, Runtime, Served, Text, sample_params
from service.schemas import (
    DiversityOut,
    EncodeRequest,
    EncodeResponse,
    GenerateRequest,
    GenerateResponse,
    LatentOut,
    Output,
    Timing,
    Usage,
    message_of,
)

router = APIRouter(tags=["inference"])
Answer = TypeVar("Answer")


@router.post("/encode", response_model_exclude_none=True)
async def encode(body: EncodeRequest, request: Request) -> EncodeResponse:
    """Let the bridge's sender read texts, and return their latents."""
    runtime: Runtime = request.app.state.runtime
    served = runtime.find(body.bridge)
    _within(("inputs", len(body.inputs), runtime.settings.max_inputs))
    for at, text in enumerate(body.inputs):
        runtime.check_text(text, f"inputs.{at}")
    with runtime.load.admit(len(body.inputs)):
        return await _attend(request, _encode(runtime, served, body))


@router.post("/generate")
async def generate(body: GenerateRequest, request: Request) -> GenerateResponse:
    """Let a receiver answer from latents, or from texts it will not see."""
    runtime: Runtime = request.app.state.runtime
    served = runtime.find(body.bridge)
    receiver = served.receiver(body.receiver)
    _check_limits(runtime, body)
    with runtime.load.admit(len(body.inputs) * body.n):
        return await _attend(request, _generate(runtime, served, receiver, body))


async def _attend(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """Do the work of a request while somebody waits for it, and no longer than the operator allows.

    Raises:
        DeadlineExceeded: It took too long.
        CallerLeft: The connection was closed.
    """
    seconds = request.app.state.runtime.settings.request_timeout
    task, left = asyncio.create_task(work), asyncio.create_task(_left(request))
    try:
        done, _ = await asyncio.wait((task, left), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if left in done:
            raise CallerLeft("the caller closed the connection before the answer")
        raise DeadlineExceeded(f"no answer within {seconds:g} s")
    finally:
        task.cancel()
        left.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _encode(runtime: Runtime, served: Served, body: EncodeRequest) -> EncodeResponse:
    started = time.perf_counter()
    rows = [Text(text, body.truncate, f"inputs.{at}") for at, text in enumerate(body.inputs)]
    encoded = await runtime.encode(served, rows)
    encode_ms = _ms_since(started)
    latents = []
    for text, row in zip(body.inputs, encoded, strict=True):
        message = wire.encode(row.latent, served.manifest.bridge_id, body.dtype)
        latents.append(
            LatentOut(
                id=await runtime.store.put(message) if body.store else None,
                data=base64.b64encode(message).decode(),
                shape=list(row.latent.shape),
                dtype=body.dtype,
                bytes=len(message),
                source_tokens=row.source_tokens,
                source_bytes=len(text.encode()),
                truncated=row.truncated,
            )
        )
    usage = Usage(source_tokens=sum(row.source_tokens for row in encoded))
    timing = Timing(encode_ms=encode_ms, total_ms=_ms_since(started))
    return EncodeResponse(bridge=served.name, latents=latents, usage=usage, timing=timing)


async def _generate(runtime: Runtime, served: Served, receiver: str, body: GenerateRequest) -> GenerateResponse:
    started = time.perf_counter()
    usage = Usage()
    latents = await _latents(runtime, served, body, usage)
    encode_ms = _ms_since(started)
    seed = secrets.randbits(63) if body.seed is None else body.seed
    params = SamplingParams(body.max_tokens, body.temperature, body.top_p, body.top_k, seed, tuple(body.stop))
    questions = [
        Question(latent, prompt, sample_params(params, sample))
        for latent, prompt in zip(latents, body.prompts, strict=True)
        for sample in range(body.n)
    ]
    answers = await runtime.generate(served, receiver, questions)
    usage.soft_tokens = sum(len(latent) for latent in latents)
    usage.generated_tokens = sum(answer.token_count for answer in answers)
    total_ms = _ms_since(started)
    return GenerateResponse(
        id=f"gen_{uuid.uuid4().hex}",
        bridge=served.name,
        outputs=[Output(index=i, **asdict(answer)) for i, answer in enumerate(answers)],
        diversity=DiversityOut(**asdict(diversity([answer.text for answer in answers]))),
        usage=usage,
        timing=Timing(encode_ms=encode_ms, generate_ms=total_ms - encode_ms, total_ms=total_ms),
    )


def _check_limits(runtime: Runtime, body: GenerateRequest) -> None:
    settings = runtime.settings
    _within(
        ("inputs", len(body.inputs), settings.max_inputs),
        ("n", body.n, settings.max_samples),
        ("max_tokens", body.max_tokens, settings.max_tokens),
    )
    for at, item in enumerate(body.inputs):
        runtime.check_text(item.text or "", f"inputs.{at}.text")
    for prompt in set(body.prompts):
        runtime.check_text(prompt, "prompt")


def _within(*limits: tuple[str, int, int]) -> None:
    for name, value, limit in limits:
        if value > limit:
            raise TooLarge(f"{name} is {value}; at most {limit} is taken", param=name)


async def _latents(runtime: Runtime, served: Served, body: GenerateRequest, usage: Usage) -> list[wire.Latent]:
    """The latent of every input. A text crosses the same wire as a message would, so both get the same answer."""
    texts = [
        Text(item.text, body.truncate, f"inputs.{at}.text")
        for at, item in enumerate(body.inputs)
        if item.text is not None
    ]
    encoded = iter(await runtime.encode(served, texts) if texts else [])
    latents = []
    for at, item in enumerate(body.inputs):
        if item.text is not None:
            row = next(encoded)
            usage.source_tokens += row.source_tokens
            latents.append(served.decode(wire.encode(row.latent, served.manifest.bridge_id)))
        elif item.latent is not None:
            with at_fault(f"inputs.{at}.latent"):
                latents.append(served.decode(message_of(item.latent)))
        else:
            assert item.latent_id is not None
            with at_fault(f"inputs.{at}.latent_id"):
                latents.append(served.decode(await runtime.store.get(item.latent_id)))
    return latents


def _ms_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 3)
