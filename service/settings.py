"""Everything an operator can set, read once at start-up from ``LW_*`` variables or the flags of ``serve``.

The prefix is not the Kubernetes Service name: a Service called ``latentwire`` would inject
``LATENTWIRE_PORT=tcp://...`` into every pod of its namespace.
"""

import os
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import ByteSize, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from bridge.config import DEVICE, Precision
from bridge.errors import InvalidRequest
from bridge.memory import budget_bytes
from bridge.wire import as_key

PREFIX = "LW_"
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[ByteSize, Field(ge=1)]


class Settings(BaseSettings):
    """Frozen. Build one in ``__main__`` and pass it down; never import an instance."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    admin_port: int | None = Field(
        None, ge=0, le=65535, description="Port for /admin and /metrics alone; without it they are on the main one."
    )
    insecure: bool = Field(False, description="Listen on other addresses than this machine's own without any keys.")
    device: str | None = Field(
        None, pattern=DEVICE, description="Where models compute: cpu, cuda, cuda:1, mps or xpu. [the best there is]"
    )
    dtype: Precision | None = Field(
        None, description="What models compute in: bf16, fp16 or fp32. [bf16; fp32 on a CPU]"
    )
    memory_budget: str | int | None = Field(
        None,
        description="Most bytes of models and their caches at once, e.g. 24GB, or a share of the device, e.g. 0.8; "
        "models take turns within it.",
    )
    keep_alive: Seconds | dict[str, Seconds] | None = Field(
        None, description="Seconds for which an idle model stays; for all bridges, or by name as a JSON object."
    )
    load_wait: Seconds = Field(
        10.0, description="How long a request waits for models in use to make room for its own, seconds."
    )
    max_batch: int = Field(32, ge=1, description="Rows per forward pass.")
    batch_tokens: int = Field(16_384, ge=1, description="Tokens per forward pass of a sender, padding included.")
    step_tokens: int = Field(512, ge=1, description="Tokens per step of a receiver; longer prompts take several.")
    kv_tokens: int = Field(8192, ge=64, description="Tokens that the key/value cache of a receiver holds.")
    max_queue: int = Field(256, ge=1, description="Rows being answered before 429.")
    request_timeout: Seconds = Field(60.0, description="Deadline of one request, seconds.")
    stall_timeout: Seconds = Field(
        120.0, description="Work without progress for this long fails /health/live, seconds."
    )
    drain_timeout: Seconds = Field(
        30.0, description="After SIGTERM, accepted requests have this long to be answered, seconds."
    )
    max_inputs: int = Field(64, ge=1, description="Inputs of one request.")
    max_samples: int = Field(16, ge=1, description="Largest n.")
    max_tokens: int = Field(512, ge=1, description="Largest max_tokens.")
    max_text_characters: int = Field(100_000, ge=1, description="Longest text or prompt.")
    max_body: Bytes = Field(ByteSize(32 << 20), description="Largest request body in bytes.")
    redis_url: str | None = Field(
        None, description="Keep latents, jobs and rate limits in this Redis, for several replicas."
    )
    store_memory: Bytes = Field(ByteSize(64 << 20), description="Most bytes of latents stored in the process.")
    encode_cache_memory: Bytes = Field(ByteSize(64 << 20), description="Most bytes of cached encodings in the process.")
    encode_cache: bool = Field(True, description="Answer a text that was encoded before without running the sender.")
    store_ttl: Seconds = Field(3600.0, description="How long a stored latent is kept, seconds.")

    tasks: dict[str, str] = Field({}, description="Tasks that may be evaluated, by name: files, as a JSON object.")
    jobs_dir: Path | None = Field(
        None, description="Without Redis: keep evaluations in this folder, so that they outlive the service."
    )
    api_keys_file: Path | None = Field(None, description="File of API keys, a line for each (see `latentwire key`).")
    api_keys: SecretStr | None = Field(None, description="API keys as such lines, in the variable itself.")
    signing_key: SecretStr | None = Field(
        None, description="Sign latents with this key, and refuse those that are not; 16 bytes or more."
    )

    def keep_alive_of(self, bridge: str) -> float | None:
        """Seconds for which an idle model of a bridge stays; None for as long as there is room."""
        return self.keep_alive.get(bridge) if isinstance(self.keep_alive, dict) else self.keep_alive

    @property
    def message_key(self) -> bytes | None:
        """The key that messages are signed with (InvalidRequest when it is too short)."""
        return None if self.signing_key is None else as_key(self.signing_key.get_secret_value())

    @field_validator("memory_budget")
    @classmethod
    def _is_a_budget(cls, budget: str | int | None) -> str | int | None:
        try:
            budget_bytes(budget, torch.device("cpu"))
        except InvalidRequest as error:
            raise ValueError(str(error)) from None
        return budget

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("redis://", "rediss://", "unix://")):
            place = url.rpartition("@")[2]  # a password stands before it
            raise ValueError(f"expected redis://HOST:PORT/DB, rediss://… or unix://PATH, got {place!r}")
        return url

    @model_validator(mode="after")
    def _refuse_unknown_variables(self) -> Self:
        # extra="forbid" covers arguments and .env files, not the environment itself.
        known = {PREFIX + name.upper() for name in type(self).model_fields}
        unknown = {name for name in os.environ if name.startswith(PREFIX)} - known
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        return self
