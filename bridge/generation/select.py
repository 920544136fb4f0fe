"""Which engine a receiver gets: continuous batching where it gives the reference's own answer, tried, not assumed."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from latentwire.bridge import engine
from latentwire.bridge.config import Mode
from latentwire.bridge.devices import is_out_of_memory
from latentwire.bridge.errors import InferenceFailed, InsufficientMemory, LatentWireError, ModelUnavailable, first_line
from latentwire.bridge.families import window_tokens
from latentwire.bridge.generation.base import Engine, Kind, Soft
from latentwire.bridge.generation.continuous import PAGE_TOKENS, PLAIN, ContinuousEngine
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.generation.padded import PaddedEngine
from latentwire.bridge.generation.steps import ways
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import IGNORE, TEXT, Row
from latentwire.bridge.sampling import SamplingParams

log = logging.getLogger(__name__)

PROBE_SECONDS = 120.0  # the first steps of a large model on a busy device
PROBE_TOKENS, ANSWER_TOKENS = 24, 4  # more than a page of the cache; more than one token
TRIES = 3
EXACT_NATS, HALF_NATS = 1e-3, 0.25  # how far a token's log-probability may be off, in float32 and below


def open_engine(
    lm: FrozenLM,
    *,
    max_rows: int = 32,
    kv_tokens: int = 8192,
    step_tokens: int = 512,
    mode: Mode = "plain",
    required: Kind | None = None,
    on_death: Callable[[], None] = lambda: None,
) -> Engine:
    """An engine for a receiver, warm: it has answered once.

    Steps are made as ``mode`` says, as far as the device has it and answers are then the reference's: a warning names
    what is left out. A model that the library's continuous batching refuses, or answers otherwise in any mode, gets
    left-padded batches (ModelUnavailable where ``continuous`` is required: under load they are several times slower;
    InsufficientMemory where it was memory that did not suffice).
    """
    trouble, short = "", False
    for name, way in ways(mode, lm).items():
        options = {"max_rows": max_rows, "kv_tokens": kv_tokens, "step_tokens": step_tokens, "way": way}
        made, trouble, short = _tried_out(lm, options)
        if made is not None:
            made.on_death = on_death
            return made
        if way != PLAIN:
            log.warning("%s does not run in mode %r: %s", lm.name, name, trouble)
    if required == "continuous":
        failure = InsufficientMemory if short else ModelUnavailable
        raise failure(f"{lm.name!r} would run on padded batches, and continuous ones are required: {trouble}")
    log.warning("%s runs on padded batches: %s", lm.name, trouble)
    return PaddedEngine(lm, max_rows=max_rows, on_death=on_death)


def _tried_out(lm: FrozenLM, options: dict[str, Any]) -> tuple[ContinuousEngine | None, str, bool]:
    """An engine that answers as it should; or what is wrong, and whether it is that memory does not suffice."""
    made = None
    try:
        made = ContinuousEngine(lm, **options)
        if (trouble := _trouble(made)) is None:
            return made, "", False
        short = False
    except Exception as error:  # whatever the library trips over in a model that it was not made for
        trouble, short = first_line(error), is_out_of_memory(error)
    if made is not None:
        made.close()
    return None, trouble, short


def _trouble(made: ContinuousEngine) -> str | None:
    """What is wrong with an engine, on a request whose answer the reference gives too.

    The first token of an answer needs no cache: where an answer is no longer, another request is tried.
    """
    for number in range(TRIES):
        wanted, results = _tried(made, number)
        for result in results:
            trouble = _difference(wanted, result, exact=made.lm.model.dtype == torch.float32)
            if trouble is not None:
                return trouble
        if len(wanted.logprobs or ()) > 1:
            return None
    return "the answers that continuous batching was tried on end at once"


def _tried(made: ContinuousEngine, number: int) -> tuple[Generation, list[Generation]]:
    """What the reference answers to a request, and what the engine does, asked twice (InferenceFailed where it does
    not): the second time it reads the end of the prompt behind blocks that are there.

    A request is twice as long as any window of the model's attention, where the cache can hold it: a mask that lets too
    much through shows no sooner. The reference runs while the engine is open, as evaluations do.
    """
    lm = made.lm
    count = min(max(PROBE_TOKENS, 2 * window_tokens(lm.config) + PAGE_TOKENS), made.capacity_tokens - ANSWER_TOKENS - 2)
    ids = (torch.arange(count, device=lm.device) + number * PROBE_TOKENS) % lm.rows
    soft = lm.embed(ids).detach()
    words = [lm.rows // 2 + number, lm.rows // 2]  # special tokens stand at either end of a vocabulary
    row = Row([0] * count + words, [*range(count), TEXT, TEXT], [IGNORE] * (count + 2))
    params = SamplingParams(max_tokens=ANSWER_TOKENS, logprobs=0)
    wanted = engine.generate(lm, [row], soft[None], [params])[0][0]
    results = []
    for _ in range(2):
        ended: Future[Generation | LatentWireError] = Future()
        made.submit(row, params, Soft(("probe", number), lambda: soft), ended.set_result)
        try:
            result = ended.result(PROBE_SECONDS)
        except TimeoutError:
            raise InferenceFailed(f"continuous batching gave no answer within {PROBE_SECONDS:g} s") from None
        if isinstance(result, LatentWireError):
            raise InferenceFailed(f"continuous batching fails with {first_line(result)}")
        results.append(result)
    return wanted, results


def _difference(wanted: Generation, found: Generation, *, exact: bool) -> str | None:
    """How an answer differs from the reference's; in half precision two likely tokens may change places, and what
    follows is not compared."""
    for number, (ours, theirs) in enumerate(zip(found.logprobs or (), wanted.logprobs or (), strict=False), start=1):
        off = abs(ours.logprob - theirs.logprob)
        if off > (EXACT_NATS if exact else HALF_NATS):
            return f"the log-probability of token {number} is {off:.2g} nats from that of generate"
        if ours.token != theirs.token:
            break
    if exact and wanted.text != found.text:
        return f"continuous batching says {found.text!r} where generate says {wanted.text!r}"
    return None
