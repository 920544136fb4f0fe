"""A bridge under the name callers use, and the rows that requests are made of."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from latentwire.bridge import wire
from latentwire.bridge.checkpoint import Bridge
from latentwire.bridge.config import Manifest, Prompt
from latentwire.bridge.encoder import slots_of
from latentwire.bridge.engine import soften
from latentwire.bridge.errors import InvalidRequest, at_fault
from latentwire.bridge.generation.base import Soft
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import Row, compose, place
from latentwire.bridge.reader import Reader, SourceTokens, check_ids, tokenize_source
from latentwire.bridge.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Text:
    """A row of an encode batch; ``param`` says which field of the request it is."""

    text: str
    truncate: bool
    param: str


@dataclass(frozen=True, eq=False)
class Question:
    """One output that is asked for: what stands in the latent's place (a latent, a text, nothing), and the prompt."""

    given: NDArray[np.float32] | str | None
    prompt: Prompt
    params: SamplingParams

    @property
    def characters(self) -> int:
        """Of all its text."""
        said = [self.prompt] if isinstance(self.prompt, str) else [turn.text for turn in self.prompt]
        return sum(map(len, [*said, self.given if isinstance(self.given, str) else ""]))


@dataclass(frozen=True)
class Served:
    """A bridge under the name callers use. ``readers`` are the tokenizers of its models, which stay in memory.

    Attributes:
        keep_alive_seconds: How long its models stay when nobody uses them; None for as long as there is room.
    """

    name: str
    manifest: Manifest
    bridge: Bridge
    readers: Mapping[str, Reader]
    signing_key: bytes | None = field(default=None, repr=False)
    keep_alive_seconds: float | None = None

    @property
    def sender(self) -> str:
        """Name of the sender's model."""
        return self.manifest.bridge.sender.name

    @property
    def models(self) -> list[str]:
        """Names of all its models, the sender first."""
        return [self.sender, *self.manifest.bridge.heads]

    def receiver(self, name: str | None) -> str:
        """The receiver asked for, or the first (UnknownBridge when the bridge has no head for it)."""
        if name is not None:
            self.bridge.head(name)
        return name or self.bridge.default_receiver

    def message(self, latent: NDArray[np.float32], dtype: wire.DType = "float16") -> bytes:
        """A latent of this bridge as it crosses the wire."""
        return wire.encode(latent, self.manifest.bridge_id, dtype, key=self.signing_key)

    def decode(self, message: bytes) -> NDArray[np.float32]:
        """A latent of this bridge from its message, checked (InvalidMessage, IncompatibleBridge, Forbidden)."""
        config = self.manifest.bridge
        return wire.decode(
            message,
            bridge_id=self.manifest.bridge_id,
            latent_dim=config.encoder.latent_dim,
            max_slots=slots_of(config.encoder, config.max_source_tokens),
            key=self.signing_key,
        ).latent

    def tokenize(self, row: Text) -> SourceTokens:
        """What the sender reads of a text (InvalidRequest when that is nothing, or too much)."""
        limit = self.manifest.bridge.max_source_tokens
        return tokenize_source(
            self.readers[self.sender], row.text, self.manifest.bridge.source, max_tokens=limit, truncate=row.truncate
        )

    def compose(self, receiver: str, question: Question) -> Row:
        """The receiver's input for a question (InvalidRequest when it does not fit)."""
        reader, layout = self.readers[receiver], self.manifest.bridge.heads[receiver].layout
        given = question.given
        with at_fault("stop_ids"):
            check_ids(reader, question.params.stop_ids)
        try:
            return compose(
                reader,
                layout,
                place(layout, question.prompt),
                latent=len(given) if isinstance(given, np.ndarray) else given,
                max_tokens=reader.max_tokens - question.params.max_tokens,
            )
        except InvalidRequest as error:
            error.param = error.param or "prompt"
            raise

    def soft(self, receiver: str, lm: FrozenLM, question: Question) -> Soft | None:
        """Soft tokens of a question's latent, under a key that no other latent, encoder or head has."""
        latent = question.given
        if not isinstance(latent, np.ndarray):
            return None

        def make() -> Float[Tensor, "K D"]:
            tokens = soften(self.bridge, receiver, lm, [latent])
            assert tokens is not None
            return tokens[0]

        digest = hashlib.blake2b(latent.tobytes(), digest_size=32).digest()
        return Soft((self.manifest.bridge_id, self.manifest.heads[receiver].sha256, digest), make)
