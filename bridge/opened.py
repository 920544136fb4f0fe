"""A bridge as it was opened: its description, its weights, its models, and what these are given to read.

Dimensions used in this file:
    K slots    C latent width
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from latentwire.bridge import wire
from latentwire.bridge.checkpoint import BridgeModel, check_receiver, check_sender
from latentwire.bridge.config import Manifest, Prompt
from latentwire.bridge.drift import LatentStatistics
from latentwire.bridge.encoder import slots_of
from latentwire.bridge.engine import soften
from latentwire.bridge.errors import InvalidRequest, at_fault
from latentwire.bridge.families import ROLES
from latentwire.bridge.gate import Gate, answer_tokens, watched
from latentwire.bridge.generation.base import Soft
from latentwire.bridge.generation.remote import RemoteEngine
from latentwire.bridge.models import FrozenLM, check_role, load_reader
from latentwire.bridge.prompt import REPEAT, Row, compose
from latentwire.bridge.readback import reading_params, taught
from latentwire.bridge.reader import SourceTokens, check_ids, source_tokens
from latentwire.bridge.remote import open_remote
from latentwire.bridge.residency import Residency
from latentwire.bridge.sampling import SamplingParams
from latentwire.bridge.sources import Given, arrange


class OpenBridge:
    """What ``Bridge`` and the service do their work with.

    Attributes:
        name: The checkpoint it was loaded from, or the name it is served under.
        manifest: What the checkpoint says about itself.
        model: Its weights: the encoder, and a head for each receiver.
        residency: Its models in memory.
        senders: Those that only send; the same, unless they have a device of their own.
        gates: By receiver, which answers from latents are trusted; ``latentwire calibrate`` makes them.
        statistics: Of the latents of training texts; None in a checkpoint of before there were any.
        remote: URLs of the vLLM servers on which receivers answer, by their names; these models do not run here.
        roles: What its models do here; those of the other role run elsewhere.
        signing_key: Signs messages; only messages that bear its signature are then decoded.
    """

    def __init__(
        self, name: str, manifest: Manifest, model: BridgeModel, residency: Residency, *,
        senders: Residency | None = None, signing_key: bytes | None = None,
        gates: Mapping[str, Gate] = MappingProxyType({}), remote: Mapping[str, str] = MappingProxyType({}),
        statistics: LatentStatistics | None = None,
    ) -> None:  # fmt: skip
        self.name, self.manifest, self.model, self.gates, self.statistics = name, manifest, model, gates, statistics
        self.residency, self.senders, self.signing_key = residency, senders or residency, signing_key
        self.remote, self._engines, self._opening = remote, dict[str, RemoteEngine](), threading.Lock()
        self.reader, self.roles = cache(load_reader), ROLES

    def __repr__(self) -> str:
        return f"Bridge({self.name!r}: {self.sender} → {', '.join(self.receivers)})"

    @property
    def sender(self) -> str:
        """Name of the sender."""
        return self.manifest.bridge.sender.name

    @property
    def receivers(self) -> list[str]:
        """Names of the receivers, the default one first."""
        return list(self.manifest.bridge.heads)

    @property
    def model_names(self) -> list[str]:
        """Names of its models that run here, the sender first."""
        receivers = [name for name in self.receivers if name not in self.remote and "receiver" in self.roles]
        return [self.sender, *receivers] if "sender" in self.roles else receivers

    def home(self, name: str) -> Residency:
        """Where a model is held: a sender with the senders, unless it receives too."""
        return self.residency if name in self.receivers and name not in self.remote else self.senders

    def unload(self) -> int:
        """Let the models go; bytes of memory that came back (ModelInUse while one of them works)."""
        with self._opening:
            while self._engines:
                self._engines.popitem()[1].close()
        return sum(self.home(name).unload(name) for name in self.model_names)

    def receiver(self, name: str | None) -> str:
        """The receiver of a name, or the first one (UnknownBridge where the bridge has no head for it)."""
        if name is not None:
            self.model.head(name)
        return name or self.model.default_receiver

    def message(self, latent: NDArray[np.float32], dtype: wire.DType = "float16") -> bytes:
        """A latent (K, C) of this bridge as it crosses the wire."""
        return wire.encode(latent, self.manifest.bridge_id, dtype, key=self.signing_key, codebooks=self.model.codebooks)

    def decode(self, message: bytes) -> NDArray[np.float32]:
        """The latent (K, C) of a message, checked (InvalidMessage, IncompatibleBridge, Forbidden)."""
        config = self.manifest.bridge
        return wire.decode(
            message,
            bridge_id=self.manifest.bridge_id,
            latent_dim=config.encoder.latent_dim,
            max_slots=slots_of(config.encoder, config.max_source_tokens),
            key=self.signing_key,
            codebooks=self.model.codebooks,
        ).latent

    def tokenize(self, text: str, *, truncate: bool = False) -> SourceTokens:
        """What the sender reads of a text (InvalidRequest where that is nothing, or too much)."""
        return source_tokens(self.manifest.bridge, self.reader(self.sender), text, truncate=truncate)

    def compose(
        self, receiver: str, given: Given, prompt: Prompt, params: SamplingParams, answer: str | None = None
    ) -> Row:
        """A prompt with what is given, and any answer to be scored (InvalidRequest: no room, odd ids or places)."""
        reader, layout = self.reader(receiver), self.manifest.bridge.heads[receiver].layout
        with at_fault("stop_ids"):
            check_ids(reader, params.stop_ids)
        try:
            placed, contents = arrange(layout, prompt, given)
            room = reader.max_tokens - params.max_tokens
            return compose(reader, layout, placed, latent=contents, answer=answer, max_tokens=room)
        except InvalidRequest as error:
            error.param = error.param or "prompt"
            raise

    def soft(self, receiver: str, lm: FrozenLM, latent: NDArray[np.float32] | None) -> Soft | None:
        """Soft tokens of a latent, under a key that no other latent, encoder or head has."""
        if latent is None:
            return None

        def make() -> Tensor:  # (K, D)
            tokens = soften(self.model, receiver, lm, [latent])
            assert tokens is not None
            return tokens[0]

        digest = hashlib.blake2b(latent.tobytes(), digest_size=32).digest()
        return Soft((self.manifest.bridge_id, self.manifest.heads[receiver].sha256, digest), make)

    def remote_engine(self, receiver: str) -> RemoteEngine:
        """What asks the vLLM server of a receiver, opened when it is first needed (errors as ``open_remote``)."""
        with self._opening:
            if receiver not in self._engines:
                self._engines[receiver] = open_remote(receiver, self.remote[receiver], self.residency, self.check)
            return self._engines[receiver]

    def check_scores(self, receiver: str) -> None:
        """Refuse a receiver that cannot say how likely given texts are (InvalidRequest)."""
        if receiver in self.remote:
            raise InvalidRequest(
                f"{receiver!r} answers at vllm:{self.remote[receiver]}: vLLM generates from soft tokens, and tells no "
                "log-probabilities of given texts for them; score and evaluate with the model here",
                param="receiver",
            )

    def readings(
        self, receiver: str, latents: Sequence[NDArray[np.float32]], max_tokens: int | None
    ) -> tuple[str, list[SamplingParams]]:
        """The prompt at which a receiver says what latents hold, and how each is answered (InvalidRequest: no room)."""
        prompt = taught(self.manifest.bridge, receiver) or REPEAT
        around = len(self.compose(receiver, np.zeros((1, 1), np.float32), prompt, SamplingParams(max_tokens=0))) - 1
        room = self.reader(receiver).max_tokens - around
        for slots in map(len, latents):
            if max_tokens is not None and max_tokens > room - slots:
                raise InvalidRequest(
                    f"max_tokens is {max_tokens}; beside a latent of {slots} slots {receiver!r} has room for "
                    f"{max(room - slots, 0)}",
                    param="max_tokens",
                )
        return prompt, [reading_params(self.manifest.bridge, len(latent), max_tokens, room) for latent in latents]

    def continue_with(
        self, receiver: str, given: Given, prompt: Prompt, choices: Sequence[str], *, end: bool
    ) -> list[Row]:
        """``compose`` with each of some continuations, which are to be scored (InvalidRequest where one is empty, or
        as of ``check_scores``)."""
        self.check_scores(receiver)
        if not choices or "" in choices:
            raise InvalidRequest("a choice is empty; expected one text or several", param="choices")
        last = None if end or self.manifest.bridge.heads[receiver].layout.eos_id is None else -1
        unsaid = SamplingParams(max_tokens=0)
        return [self.compose(receiver, given, prompt, unsaid, choice)[:last] for choice in choices]

    def judging(self, receiver: str, choices: Sequence[str], *, end: bool) -> SamplingParams:
        """How a prompt is answered where a gate is to say whether to score choices from the latent.

        A gate knows answers that the receiver gives itself; this one may be as long as the longest choice.
        """
        return watched(SamplingParams(max_tokens=answer_tokens(self.reader(receiver), choices, end=end)))

    def check(self, lm: FrozenLM) -> None:
        """Refuse a model that is not the one of its name that the bridge was trained with (IncompatibleBridge)."""
        if lm.name == self.sender:  # one model can be both
            check_sender(self.manifest.bridge, lm)
        if lm.name in self.manifest.bridge.heads:
            check_receiver(self.manifest.bridge, lm.name, lm)

    @contextmanager
    def lend(self, name: str) -> Iterator[FrozenLM]:
        """One of the bridge's models, checked, which stays in memory while the block runs.

        Raises:
            ModelUnavailable: It is not there, or cannot play its role.
            IncompatibleBridge: It is not the one that the bridge was trained with.
            InsufficientMemory: It does not fit the memory budget.
        """
        if name == self.sender:
            check_role(name, "sender")
        if name in self.receivers:
            check_role(name, "receiver")
        with self.home(name).use(name) as lm:
            self.check(lm)
            yield lm
