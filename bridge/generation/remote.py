"""The engine of a receiver on a vLLM server: what it reads goes there as embeddings, its tokens come back as ids.

Template, soft tokens and prompt are put together here, as for the other engines; of the receiver only the embedding
matrix is in memory. Texts, stop strings and log-probabilities are made of the ids, as everywhere.

Dimensions used in this file:
    K soft tokens    D receiver width
"""

import asyncio
import base64
import hashlib
import io
import json
import logging
import os
import re
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx
import torch
from httpx_sse import SSEError, aconnect_sse
from jaxtyping import Float
from torch import Tensor

from latentwire.bridge.errors import (
    InferenceFailed,
    LatentWireError,
    ModelUnavailable,
    NotReady,
    first_line,
    shorten,
)
from latentwire.bridge.generation.base import Engine, Running
from latentwire.bridge.generation.output import IMPOSSIBLE, IdLogprob
from latentwire.bridge.heads import MAX_GAIN
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import TEXT, Row, collate, embed
from latentwire.bridge.sampling import MAX_LOGPROBS, SamplingParams

log = logging.getLogger(__name__)
T = TypeVar("T")

OLDEST = (0, 13)  # before, a prompt's embeddings could run code on the server (CVE-2025-62164)
CONNECT_SECONDS, SILENT_SECONDS = 5.0, 60.0
PAUSES = (0.1, 1.0, 3.0)  # seconds between tries to reach a server
LATER = {429, 502, 503, 504}  # the request was not taken on
LOUDEST = 1.01 * MAX_GAIN  # of the embedding's RMS: what a head can reach, and rounding


class _Unreached(Exception):
    """The server did not take the request on."""


class _Lost(Exception):
    """The server took the request on, and was lost before its end."""


class RemoteEngine(Engine):
    """Requests to a vLLM server, each a stream of its own; see the module.

    A request that the server did not take on is sent again, for some seconds. One that was lost after that is sent
    once more where that is safe: nothing was said yet, or it is greedy and goes on after the tokens there are. A
    sampled one would go on otherwise than it would have without the loss.
    """

    kind = "vllm"

    def __init__(self, lm: FrozenLM, url: str) -> None:
        super().__init__(lm, max_rows=0)
        self.url = url
        self._model, self._most = "", lm.max_tokens
        self._loudest = LOUDEST * lm.embedding_rms()
        self._tasks: dict[str, Future[None]] = {}
        key = os.environ.get("VLLM_API_KEY")  # as vLLM itself reads it
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None),
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="remote-engine")
        self._thread.start()

    @property
    def capacity_tokens(self) -> int:
        """Most tokens of one request, its output included: the model's, or the server's where that is less."""
        return min(self.lm.max_tokens, self._most)

    def close(self) -> None:
        """End every request and the thread."""
        if self._loop.is_closed():
            return
        self._die(NotReady("the service is stopping"))
        self._end_threads()
        self._run(self._hang_up())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _hang_up(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.aclose()

    def greet(self) -> None:
        """Learn which model the server has and how long its inputs may be (errors as of ``open_remote``)."""
        version = str(self._run(self._asked("GET", "/version")).get("version"))
        number = re.match(r"(\d+)\.(\d+)", version)
        if number and tuple(map(int, number.groups())) < OLDEST:
            raise ModelUnavailable(f"{self.url} runs vLLM {version}; expected {OLDEST[0]}.{OLDEST[1]} or newer")
        try:
            model = self._run(self._asked("GET", "/v1/models"))["data"][0]
            self._model, self._most = str(model["id"]), int(model["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise ModelUnavailable(f"{self.url} names no model with a max_model_len, as vLLM does") from None

    def first_tokens(self, row: Row, soft: Float[Tensor, "K D"]) -> dict[int, float]:
        """The likeliest first tokens after a row with soft tokens, and their log-probabilities in nats."""
        body = self._asking(SamplingParams(max_tokens=1, logprobs=MAX_LOGPROBS), self.input_of(row, soft))
        told = self._run(self._asked("POST", "/v1/completions", json=body))
        try:
            return {_id(name): float(nats) for name, nats in told["choices"][0]["logprobs"]["top_logprobs"][0].items()}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise ModelUnavailable(f"{self.url} gave no log-probabilities of the first token") from None

    @torch.inference_mode()
    def input_of(self, row: Row, soft: Float[Tensor, "K D"] | None) -> dict[str, Any]:
        """A row as the server takes it: ids where it is all text, else embeddings, under a digest of them.

        Raises:
            InferenceFailed: An embedding is not finite or far beyond the scale of the model's: vLLM takes both, and
                answers the requests after it wrongly.
        """
        if all(slot == TEXT for slot in row.slots):
            return {"prompt": row.ids}
        embeds = embed(self.lm, collate([row], side="left").to(self.lm.device), None if soft is None else soft[None])[0]
        loudest = float(embeds.float().pow(2).mean(dim=-1).sqrt().max())  # not a number where one of them is none
        if not loudest <= self._loudest:
            raise InferenceFailed(
                f"an embedding for {self.lm.name!r} has RMS {loudest:.3g}; expected a number up to "
                f"{self._loudest:.3g}, {MAX_GAIN:g} times that of its tokens: nothing was sent to {self.url}"
            )
        file = io.BytesIO()
        torch.save(embeds.cpu().contiguous().clone(), file)  # of a view, the whole storage would be written
        saved = file.getvalue()
        # Of all of the input: where keys of a prefix cache lack embeddings, prompts of one latent are alike too.
        salt = hashlib.blake2b(saved, digest_size=16).hexdigest()
        return {"prompt_embeds": base64.b64encode(saved).decode(), "cache_salt": salt}

    def _asking(self, params: SamplingParams, given: Mapping[str, Any], ends: Sequence[int] = ()) -> dict[str, Any]:
        """The body of a request."""
        return {
            "model": self._model, "max_tokens": params.max_tokens, "temperature": params.temperature,
            "top_p": params.top_p, "top_k": params.top_k, "seed": params.seed if params.temperature else None,
            "stop": list(params.stop),
            "logprobs": params.logprobs, "stop_token_ids": list(ends), "ignore_eos": True,  # ends are ours to say
            "return_token_ids": True, "return_tokens_as_token_ids": True, **given,
        }  # fmt: skip

    def _prepare(self, running: Running) -> None:
        """Nothing on the caller's thread."""

    def _discard(self, running: Running) -> None:
        """Nothing is held."""

    def _begin(self, running: Running) -> None:
        task = self._tasks[running.name] = asyncio.run_coroutine_threadsafe(self._answer(running), self._loop)
        task.add_done_callback(lambda _: self._tasks.pop(running.name, None))

    def _stop(self, running: Running) -> None:
        running.tokens.cancel()
        if (task := self._tasks.get(running.name)) is not None:
            task.cancel()

    async def _answer(self, running: Running) -> None:
        """Bring a request to its end, whatever that is."""
        try:
            await self._tried(running)
        except LatentWireError as error:
            self._end(running, error)
        except Exception as error:
            log.exception("a request to %s failed", self.url)
            self._end(running, InferenceFailed.of(error))

    async def _tried(self, running: Running) -> None:
        tokens, pauses, lost = running.tokens, iter(PAUSES), False
        while not tokens.over:
            try:
                return await self._streamed(running)
            except _Unreached as error:
                if (pause := next(pauses, None)) is None:
                    raise self._unreachable(error) from None
                await asyncio.sleep(pause)
            except _Lost as error:
                if lost or (tokens.ids and tokens.params.temperature > 0):
                    said = f"the vLLM server at {self.url} was lost after {len(tokens.ids)} tokens ({error})"
                    raise NotReady(said, retry_after_seconds=PAUSES[-1]) from None
                lost = True

    async def _streamed(self, running: Running) -> None:
        """Ask for what is left of an output, and add its tokens as they come."""
        tokens = running.tokens
        given = await self._loop.run_in_executor(self.submitting, self._given, running)
        body = self._asking(tokens.params, given, sorted(tokens.end_ids)) | {
            "max_tokens": tokens.left, "stream": True,
        }  # fmt: skip
        taken = False
        try:
            async with aconnect_sse(self._http, "POST", "/v1/completions", json=body) as events:
                if not events.response.is_success:
                    await events.response.aread()
                    self._refused(events.response)
                taken = True
                async for event in events.aiter_sse():
                    if event.data == "[DONE]":
                        break
                    if self._take(running, json.loads(event.data)):
                        return
        except httpx.ReadTimeout:
            raise self._silent() from None
        except (httpx.TransportError, SSEError, ValueError) as error:
            raise (_Lost if taken else _Unreached)(first_line(error)) from None
        if not tokens.over:
            raise _Lost("its answer has no end")

    def _given(self, running: Running) -> dict[str, Any]:
        soft = None if running.soft is None else running.soft.make()
        return self.input_of(running.row.after(running.tokens.ids), soft)

    def _take(self, running: Running, told: dict[str, Any]) -> bool:
        """Add the tokens of one event; whether the rest need not be heard."""
        if "error" in told:
            raise _Lost(_message(told))
        tokens = running.tokens
        self.last_step = time.monotonic()
        for choice in told.get("choices", ()):
            named, why = choice.get("logprobs"), choice.get("finish_reason")
            for at, token in enumerate(choice.get("token_ids") or ()):
                over = tokens.add(token, None if named is None else _logprob(named, at, tokens.params.logprobs or 0))
                self._advance(running)
                if over:
                    return why is None
            if why in ("abort", "error"):
                raise _Lost(f"it ended the request with {why!r}")
            if why is not None and not tokens.over:  # at a stop string, which is found in the text here too
                tokens.ended_by = "length" if why == "length" else "stop"
                self._advance(running)
        return False

    async def _asked(self, method: str, path: str, **given: Any) -> dict[str, Any]:
        """The answer to one question, asked until the server is reached."""
        pauses = iter(PAUSES)
        while True:
            try:
                response = await self._http.request(method, path, **given)
                if not response.is_success:
                    self._refused(response, ModelUnavailable)
                return dict(response.json())
            except httpx.ReadTimeout:
                raise self._silent() from None
            except (httpx.TransportError, _Unreached) as error:
                if (pause := next(pauses, None)) is None:
                    raise self._unreachable(error) from None
                await asyncio.sleep(pause)
            except (TypeError, ValueError):
                raise ModelUnavailable(f"{self.url}{path} gave no JSON object; expected a vLLM server") from None

    def _refused(self, response: httpx.Response, usual: type[LatentWireError] = InferenceFailed) -> None:
        """Raise what a status of 400 and above means."""
        try:
            said = _message(response.json())
        except ValueError:
            said = shorten(response.text, 200)
        if response.status_code in LATER:
            raise _Unreached(f"{response.status_code} {said}")
        raise usual(f"the vLLM server at {self.url} answered {response.status_code} for {self.lm.name!r}: {said}")

    def _unreachable(self, error: Exception) -> NotReady:
        said = f"the vLLM server at {self.url} is not reached ({first_line(error)})"
        return NotReady(said, retry_after_seconds=PAUSES[-1])

    def _silent(self) -> NotReady:
        said = f"the vLLM server at {self.url} has said nothing for {SILENT_SECONDS:g} s"
        return NotReady(said, retry_after_seconds=PAUSES[-1])

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _id(name: str) -> int:
    """The id in ``token_id:5``."""
    return int(name.rpartition(":")[2])


def _logprob(told: Mapping[str, Any], at: int, count: int) -> IdLogprob:
    """What a server said of one token; of the likeliest, as many as were asked for."""

    def nats(value: Any) -> float:
        return IMPOSSIBLE if value is None else max(float(value), IMPOSSIBLE)

    likeliest = ((_id(name), nats(value)) for name, value in (told["top_logprobs"][at] or {}).items())
    top = tuple(sorted(likeliest, key=lambda one: -one[1])[:count])
    return IdLogprob(_id(told["tokens"][at]), nats(told["token_logprobs"][at]), top)


def _message(told: Any) -> str:
    """What an error body says."""
    error = told.get("error", told) if isinstance(told, dict) else told
    said = error.get("message", error) if isinstance(error, dict) else error
    return shorten(" ".join(str(said).split()), 200)
