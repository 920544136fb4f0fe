"""Everything an operator can set, read once at start-up from ``LW_*`` variables or the flags of ``serve``.

The prefix is not the Kubernetes Service name: a Service called ``latentwire`` would inject
``LATENTWIRE_PORT=tcp://...`` into every pod of its namespace.
"""

import os
from typing import Annotated, Self

from pydantic import ByteSize, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "LW_"
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[ByteSize, Field(ge=1)]


class Settings(BaseSettings):
    """Frozen. Build one in ``__main__`` and pass it down; never import an instance."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    memory_budget: Bytes | None = Field(
        None, description="Most bytes of model weights in memory at once, e.g. 24GB; models take turns within it."
    )
    max_batch: int = Field(32, ge=1, description="Rows per forward pass.")
    max_queue: int = Field(256, ge=1, description="Rows being answered before 429.")
    request_timeout: Seconds = Field(60.0, description="Deadline of one request, seconds.")
    stall_timeout: Seconds = Field(
        120.0, description="Work without progress for this long fails /health/live, seconds."
    )
    max_inputs: int = Field(64, ge=1, description="Inputs of one request.")
    max_samples: int = Field(16, ge=1, description="Largest n.")
    max_tokens: int = Field(512, ge=1, description="Largest max_tokens.")
    max_text_characters: int = Field(100_000, ge=1, description="Longest text or prompt.")
    max_body: Bytes = Field(ByteSize(32 << 20), description="Largest request body in bytes.")
    redis_url: str | None = Field(None, description="Keep stored latents in this Redis instead of in the process.")
    store_memory: Bytes = Field(ByteSize(64 << 20), description="Most bytes of latents stored in the process.")
    store_ttl: Seconds = Field(3600.0, description="How long a stored latent is kept, seconds.")

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError(f"expected redis://HOST:PORT/DB, rediss://… or unix://PATH, got {url!r}")
        return url

    @model_validator(mode="after")
    def _refuse_unknown_variables(self) -> Self:
        # extra="forbid" covers arguments and .env files, not the environment itself.
        known = {PREFIX + name.upper() for name in type(self).model_fields}
        unknown = {name for name in os.environ if name.startswith(PREFIX)} - known
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        return self
