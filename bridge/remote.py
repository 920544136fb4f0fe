"""A receiver that answers on a vLLM server: ``vllm:http://HOST:PORT`` in the place of a model in this process.

How such a receiver is spelled, and how it is opened: it must say of first tokens what the receiver itself says.

Dimensions used in this file:
    K soft tokens    D receiver width
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from latentwire.bridge.engine import LatentPrompt, inputs_of
from latentwire.bridge.errors import (
    InsufficientMemory,
    InvalidRequest,
    LatentWireError,
    ModelInUse,
    ModelUnavailable,
    first_line,
)
from latentwire.bridge.generation.base import Engine, Running, Soft
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.generation.remote import RemoteEngine
from latentwire.bridge.loading import embedding_alone
from latentwire.bridge.memory import free_bytes
from latentwire.bridge.models import FrozenLM, check_role, config_of, fingerprint_of, folder_of, load_reader
from latentwire.bridge.prompt import IGNORE, TEXT, Row, collate
from latentwire.bridge.residency import FREE_SHARE, Residency

log = logging.getLogger(__name__)

ADDRESS = re.compile(
    r"(?:(?P<name>.+)=)?vllm:(?P<url>https?://([\w.-]+|\[[0-9A-Fa-f:]+\])(:\d{1,5})?(/[^\s?#]*[^\s?#/])?)/?"
)
PARITY_NATS, PARITY_TOKENS = 0.5, 5
"""How far log-probabilities of the likeliest first tokens may be apart, in the worst of the probes. They were 3e-6 nats
apart in float32 on both sides, up to 0.32 with bfloat16 on one, 5.1 or more with embeddings 12 times too large, and 12
times too small 11.6 in SmolLM2 135M; the tiny built-in Llama hardly minds that (0.16)."""
PROBES, PROBE_TOKENS = 3, 8


def is_address(name: str | None) -> bool:
    """Whether a receiver is spelled as one on a server."""
    return name is not None and (name.startswith("vllm:") or "=vllm:" in name)


def parse_addresses(spelled: str | None) -> dict[str | None, str]:
    """URLs by receiver name, None where none is named, from ``[NAME=]vllm:http://HOST:PORT``, several with commas.

    Raises:
        InvalidRequest: Anything else, or a receiver that is named twice.
    """
    found: dict[str | None, str] = {}
    for item in (spelled or "").split(",") if spelled else ():
        read = ADDRESS.fullmatch(item.strip())
        if read is None or read["name"] in found:
            raise InvalidRequest(
                f"receiver {item.strip()!r}: expected vllm:http://HOST:PORT, or NAME=vllm:http://HOST:PORT, each once",
                param="receiver",
            )
        found[read["name"]] = read["url"]
    return found


def addresses_of(parsed: Mapping[str | None, str], receivers: Sequence[str]) -> dict[str, str]:
    """URLs by the names of a bridge's receivers (InvalidRequest: one stands without a name, and there are several)."""
    if None in parsed and len(receivers) > 1:
        known = " or ".join(f"{name}=vllm:{parsed[None]}" for name in receivers)
        raise InvalidRequest(f"the bridge has {len(receivers)} receivers; expected {known}", param="receiver")
    return {name: url for name in receivers if (url := parsed.get(name, parsed.get(None))) is not None}


def check_named(parsed: Mapping[str | None, str], receivers: Sequence[str]) -> None:
    """Refuse a server for a receiver that there is not (InvalidRequest)."""
    for name in parsed:
        if name is not None and name not in receivers:
            known = ", ".join(receivers)
            raise InvalidRequest(f"there is no receiver {name!r} for vllm:{parsed[name]}; there are {known}")


def load_embedding(name: str, device: torch.device, dtype: torch.dtype) -> FrozenLM:
    """A receiver of which only the input embedding is in memory (ModelUnavailable as ``load_model``)."""
    check_role(name, "receiver")
    reader = load_reader(name)
    try:
        model = embedding_alone(config_of(name), folder_of(name), dtype, device)
    except Exception as error:  # a damaged file surfaces as whatever the library trips over
        raise ModelUnavailable(f"the embedding of {name!r} cannot be loaded: {first_line(error)}") from None
    return FrozenLM(name, reader.tokenizer, reader.config, reader.end_ids, model, fingerprint_of(name))


def open_remote(name: str, url: str, residency: Residency, check: Callable[[FrozenLM], None]) -> RemoteEngine:
    """An engine for a receiver on a vLLM server, which has answered as the receiver itself does.

    The receiver is loaded for that, where it has room in memory, and leaves again; else a warning says so. ``check``
    may refuse the model.

    Raises:
        NotReady: The server is not reached.
        ModelUnavailable: It is no vLLM of a version that can be used, takes no embeddings or not these, or answers
            otherwise than the receiver.
    """
    lm = load_embedding(name, residency.device, residency.dtype or torch.float32)
    check(lm)
    remote = RemoteEngine(lm, url)
    try:
        remote.greet()
        told = [remote.first_tokens(*probe(lm, number)) for number in range(PROBES)]
        try:
            with _for_a_moment(name, residency) as whole:
                check_parity(url, whole, told)
        except InsufficientMemory as error:
            log.warning("%s was not compared with what %s says: %s", name, url, error)
    except BaseException:
        remote.close()
        raise
    return remote


@contextmanager
def _for_a_moment(name: str, residency: Residency) -> Iterator[FrozenLM]:
    """A model, which leaves again unless it was there before (InsufficientMemory where there is no room for it)."""
    was_there, need = residency.find(name) is not None, residency.predict(name)
    free = int(FREE_SHARE * free_bytes(residency.device))
    if need > free and not was_there:
        raise InsufficientMemory(f"it needs {need} bytes; {free} are free")
    try:
        with residency.use(name) as lm:
            yield lm
    finally:
        if not was_there:
            with suppress(ModelInUse):  # by others, who came meanwhile
                residency.unload(name)


def probe(lm: FrozenLM, number: int) -> tuple[Row, Float[Tensor, "K D"]]:
    """A row to try, with soft tokens that are no token's embedding, and have the scale of one."""
    words = [(lm.rows // 2 + number * PROBE_TOKENS + i) % lm.rows for i in range(PROBE_TOKENS)]
    drawn = torch.randn(PROBE_TOKENS, lm.width, generator=torch.Generator().manual_seed(number))
    soft = F.rms_norm(drawn, (lm.width,)) * lm.embedding_rms()
    middle = list(range(PROBE_TOKENS))
    slots = [*[TEXT] * 4, *middle, *[TEXT] * 4]
    return Row([*words[:4], *[0] * PROBE_TOKENS, *words[4:]], slots, [IGNORE] * len(slots)), soft.to(lm.device)


@torch.inference_mode()
def check_parity(url: str, lm: FrozenLM, told: Sequence[Mapping[int, float]]) -> None:
    """Compare what a server says after the probes with the model itself (ModelUnavailable: over ``PARITY_NATS``)."""
    for number, likely in enumerate(told):
        row, soft = probe(lm, number)
        batch = collate([row], side="left").to(lm.device)
        logits: Tensor = lm.model(**inputs_of(lm, batch, soft[None]), logits_to_keep=1).logits
        ours = logits[0, -1].float().log_softmax(dim=-1)
        best = sorted(likely, key=lambda token: -likely[token])[:PARITY_TOKENS]
        off = max(abs(float(ours[token]) - likely[token]) if token < len(ours) else float("inf") for token in best)
        if not off <= PARITY_NATS:
            raise ModelUnavailable(
                f"the vLLM server at {url} answers otherwise than {lm.name!r}: a first token's log-probability is "
                f"{off:.2g} nats off, and {PARITY_NATS} are taken (it serves another model, or scales embeddings)"
            )
        log.info("%s: first tokens on %s within %.2g nats", lm.name, url, off)


def answers_of(
    engine: Engine, prompts: Sequence[LatentPrompt], soft: Callable[[NDArray[np.float32] | None], Soft | None]
) -> list[Generation]:
    """Generations of prompts, all asked at once; ``soft`` makes soft tokens of a latent (the first error, raised)."""
    ended: list[Future[Generation | LatentWireError]] = [Future() for _ in prompts]
    running: list[Running] = []
    try:
        for prompt, end in zip(prompts, ended, strict=True):
            running.append(engine.submit(prompt.row, prompt.params, soft(prompt.latent), end.set_result))
        results = [end.result() for end in ended]
    finally:
        for one in running:
            engine.cancel(one)
    if failed := next((result for result in results if isinstance(result, LatentWireError)), None):
        raise failed
    return [result for result in results if isinstance(result, Generation)]
