"""What goes over HTTP about kept latents, in and out."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from latentwire.bridge import wire
from latentwire.service.schemas.inference import FAIL_FAST, Deadline, OneOf, Strict, Timing, Usage
from latentwire.service.store.latents import KeptLatent

Ttl = Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["forever"]


class KeepInput(OneOf):
    """One thing to keep: a text, or a latent that was made before."""

    text: str | None = Field(None, description="A text; the sender reads it, and its latent is kept.")
    latent: str | None = Field(None, description="A message of this bridge, base64.")


class KeepRequest(Strict):
    """Texts or messages whose latents are kept, to be asked later by their ids."""

    bridge: str | None = Field(None, description="Name of the bridge; the first one served when absent.")
    inputs: Annotated[list[KeepInput], FAIL_FAST] = Field(min_length=1)
    dtype: wire.DType = Field("float16", description="What latents of texts are kept in.")
    ttl_seconds: Ttl | None = Field(
        None, description='How long they are kept, or "forever"; what the service keeps to (LW_STORE_TTL) when absent.'
    )
    timeout_seconds: Deadline = None
    truncate: bool = Field(False, description="Cut a text over the bridge's limit instead of refusing it.")

    def ttl_or(self, default: float | None) -> float | None:
        """Seconds; None for ever."""
        return None if self.ttl_seconds == "forever" else default if self.ttl_seconds is None else self.ttl_seconds


class KeptLatentOut(BaseModel):
    """A latent that is kept, without its numbers."""

    id: str
    bridge: str | None = Field(description="The served bridge that it is of; null where that is not served now.")
    bridge_id: str
    shape: list[int] = Field(description="[K, C]: slots and width.")
    dtype: str
    bytes: int = Field(description="Length of the message.")
    source_tokens: int | None = Field(description="Sender tokens read; null of a message that was made elsewhere.")
    source_bytes: int | None
    truncated: bool
    created: datetime | None = Field(None, description="When it was kept; null of a document of a corpus.")
    expires: datetime | None = Field(None, description="Until when it is kept; null for ever, as far as room goes.")
    metadata: dict[str, Any] | None = Field(None, description="What the corpus says of the document.")

    @classmethod
    def facts_of(cls, kept: KeptLatent, bridges: dict[str, str]) -> dict[str, Any]:
        """The fields of a kept latent, given the names of served bridges by their ids."""
        header = wire.header_of(kept.message)
        return {
            "id": kept.id,
            "bridge": bridges.get(header.bridge_id),
            "bridge_id": header.bridge_id,
            "shape": list(header.shape),
            "dtype": header.dtype,
            "bytes": kept.message_bytes,
            "source_tokens": kept.source_tokens,
            "source_bytes": kept.source_bytes,
            "truncated": kept.truncated,
            "created": _time(kept.created),
            "expires": _time(kept.expires),
            "metadata": kept.metadata,
        }


class KeptLatentData(KeptLatentOut):
    """A latent that is kept, with its message."""

    data: str = Field(description="The message, base64.")
    text: str | None = Field(None, description="The document itself, where the corpus keeps texts.")


class KeepResponse(BaseModel):
    """What is kept, in the order of the inputs."""

    bridge: str
    latents: list[KeptLatentOut]
    usage: Usage
    timing: Timing


class LatentPage(BaseModel):
    """Some of the caller's latents, in the order of their ids."""

    latents: list[KeptLatentOut]
    next: str | None = Field(description="What to give as `after` for those that follow; null at the end.")


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
