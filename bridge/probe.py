"""Which engine a receiver gets: continuous batching where it gives the reference's own answer, tried, not assumed."""

import logging
import threading
from collections.abc import Callable

import torch

from bridge import engine
from bridge.answer import Generation
from bridge.continuous import ContinuousEngine
from bridge.errors import LatentWireError, first_line
from bridge.models import FrozenLM
from bridge.padded import PaddedEngine
from bridge.prompt import IGNORE, TEXT, Row
from bridge.running import Engine, Soft
from bridge.sampling import SamplingParams

log = logging.getLogger(__name__)

PROBE_SECONDS = 120.0  # the first steps of a large model on a busy device
PROBE_TOKENS = 24  # more than a page of the cache
EXACT_NATS, HALF_NATS = 1e-3, 0.25  # how far the first token's log-probability may be off, in float32 and below


def open_engine(
    lm: FrozenLM,
    *,
    max_rows: int = 32,
    kv_tokens: int = 8192,
    step_tokens: int = 512,
    on_death: Callable[[], None] = lambda: None,
) -> Engine:
    """An engine for a receiver, warm: it has answered once.

    A model that the library's continuous batching refuses, or answers otherwise, gets left-padded batches.
    """
    try:
        made = ContinuousEngine(lm, max_rows=max_rows, kv_tokens=kv_tokens, step_tokens=step_tokens)
    except Exception as error:  # whatever the library trips over in a model that it was not made for
        trouble: str | None = first_line(error)
    else:
        try:
            trouble = _trouble(made)
        except Exception as error:  # the same, met on the library's own thread
            trouble = first_line(error)
        if trouble is None:
            made.on_death = on_death
            return made
        made.close()
    log.warning("%s runs on padded batches: %s", lm.name, trouble)
    return PaddedEngine(lm, max_rows=max_rows, on_death=on_death)


def _trouble(made: ContinuousEngine) -> str | None:
    """What is wrong with an engine, on one request whose answer the reference gives too."""
    lm = made.lm
    soft = lm.embed(torch.arange(PROBE_TOKENS, device=lm.device) % lm.rows).detach()
    row = Row([0] * PROBE_TOKENS + [1, 2], [*range(PROBE_TOKENS), TEXT, TEXT], [IGNORE] * (PROBE_TOKENS + 2))
    params = SamplingParams(max_tokens=3, logprobs=0)
    wanted = engine.generate(lm, [row], soft[None], [params])[0][0]
    ended, said = threading.Event(), list[Generation | LatentWireError]()

    def end(result: Generation | LatentWireError) -> None:
        said.append(result)
        ended.set()

    made.submit(row, params, Soft("probe", lambda: soft), end)
    if not ended.wait(PROBE_SECONDS):
        return f"continuous batching gave no answer within {PROBE_SECONDS:g} s"
    if isinstance(said[0], LatentWireError):
        return f"continuous batching fails with {first_line(said[0])}"
    return _difference(wanted, said[0], exact=lm.model.dtype == torch.float32)


def _difference(wanted: Generation, said: Generation, *, exact: bool) -> str | None:
    """How an answer differs from the reference's; in half precision only the first token's odds are compared."""
    if exact and wanted.text != said.text:
        return f"continuous batching says {said.text!r} where generate says {wanted.text!r}"
    if not wanted.logprobs or not said.logprobs:
        return None
    off = abs(wanted.logprobs[0].logprob - said.logprobs[0].logprob)
    if off > (EXACT_NATS if exact else HALF_NATS):
        return f"the first token's log-probability is {off:.2g} nats from that of generate"
    return None
