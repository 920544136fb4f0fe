"""Everything an operator can set, read once at start-up from ``LW_*`` variables or the flags of ``serve``.

Kubernetes tells every pod of the Services of its namespace, in variables named after them: a Service called ``lw``
makes ``LW_PORT=tcp://10.0.0.1:80`` and more. What has exactly that shape is no setting and is left aside.
"""

import os
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from latentwire.bridge.config import DEVICE, Mode, Precision
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.memory import budget_bytes
from latentwire.bridge.remote import parse_addresses
from latentwire.bridge.wire import as_key
from latentwire.service.metrics import LATENCY_SECONDS

PREFIX = "LW_"
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[ByteSize, Field(ge=1)]

KIND, IP = "(?:TCP|UDP|SCTP)", "[0-9a-f.:]+"
URL = rf"(?i:{KIND})://(?:{IP}|\[{IP}\]):\d+"
SERVICE = re.compile(rf"({PREFIX[:-1]}(?:_[A-Z0-9_]+?)?)_PORT(?:_\d+_{KIND})?={URL}")
LINK = re.compile(
    rf"_(?:SERVICE_HOST={IP}|SERVICE_PORT(?:_[A-Z0-9_]+)?=\d+|PORT(?:_\d+_{KIND})?={URL}"
    rf"|PORT_\d+_{KIND}_(?:PROTO=(?i:{KIND})|PORT=\d+|ADDR={IP}))"
)


def service_links() -> list[str]:
    """The variables under our prefix that Kubernetes made for its Services."""
    lines = {name: f"{name}={value}" for name, value in os.environ.items() if name.startswith(PREFIX)}
    services = {found[1] for line in lines.values() if (found := SERVICE.fullmatch(line))}
    return sorted(
        name
        for name, line in lines.items()
        if any(line.startswith(service) and LINK.fullmatch(line, len(service)) for service in services)
    )


HOST, ORIGIN = re.compile(r"\*|(\*\.)?[^\s/:*@]+"), re.compile(r"\*|[a-z][a-z0-9+.-]*://[^\s/*@]+")


def _listed(value: object) -> object:
    return [item.strip().lower() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def _host(item: str) -> str:
    if not HOST.fullmatch(item):
        raise ValueError("expected a name such as lw.example.com, *.example.com or *")
    return item


def _origin(item: str) -> str:
    if not ORIGIN.fullmatch(item):
        raise ValueError("expected an origin such as https://example.com or http://localhost:3000, or *")
    return item


def _ascending(buckets: tuple[float, ...]) -> tuple[float, ...]:
    if list(buckets) != sorted(set(buckets)) or not buckets:
        raise ValueError("expected seconds in ascending order, such as 0.01,0.1,1,10")
    return buckets


def _none_for_ever(value: object) -> object:
    return None if value == "forever" else value


Hosts = Annotated[tuple[Annotated[str, AfterValidator(_host)], ...], NoDecode, BeforeValidator(_listed)]
Buckets = Annotated[tuple[Seconds, ...], NoDecode, BeforeValidator(_listed), AfterValidator(_ascending)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], NoDecode, BeforeValidator(_listed)]


@dataclass(frozen=True)
class Sizes:
    """How much is done at once on a device.

    Attributes:
        max_batch: Rows per forward pass.
        batch_tokens: Tokens per batch of a sender.
        step_tokens: Tokens per step of a receiver.
        step_mode: How its steps are made.
        memory_budget: Of the device.
        cache_share: Of what models and the largest batch leave of the budget, for caches.
    """

    max_batch: int
    batch_tokens: int
    step_tokens: int
    step_mode: Mode
    memory_budget: str | int | None
    cache_share: float


ON_CPU = Sizes(32, 16_384, 512, "paged", None, 0.0)
ON_ACCELERATOR = Sizes(256, 32_768, 2_048, "async", "0.9", 0.8)


class Settings(BaseSettings):
    """Frozen. Build one in ``__main__`` and pass it down; never import an instance."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    admin_port: int | None = Field(
        None, ge=0, le=65535, description="Port for /admin and /metrics alone; without it they are on the main one."
    )
    root_path: str = Field(
        "", description="Path before every address, e.g. /lw, where a proxy in front of the service leaves it in."
    )
    frontends: int = Field(
        int(sys.platform == "linux"), ge=0, le=16,
        description="Processes that answer HTTP, beside that of the models; each is started again where it dies. "
        "Several share latents by LW_REDIS_URL or LW_STORE_DIR, and the limits of keys by Redis. 0: one process does "
        "all. [1 on Linux, 0 elsewhere]",
    )  # fmt: skip
    insecure: bool = Field(False, description="Listen on other addresses than this machine's own without any keys.")
    allowed_hosts: Hosts = Field(
        (),
        description="Names that callers may use for this service, beside addresses, localhost, --host and the "
        "machine's own, with commas between them; *.example.com takes all below it, * any. Without keys no other is "
        "answered; with keys any is, unless some are listed.",
    )
    cors_origins: Origins = Field(
        (),
        description="Origins of web pages that may call, such as https://example.com, with commas between them; * is "
        "any. Without keys other pages are refused.",
    )
    engine: Literal["local", "ray"] = Field(
        "local",
        description="ray: models run on Ray, encoders and generators as deployments of their own; RAY_ADDRESS names "
        "the cluster, and without it one is started on this machine.",
    )
    ray_encoders: int = Field(1, ge=1, description="With ray: replicas that encode.")
    ray_generators: int = Field(1, ge=1, description="With ray: replicas that generate and score.")
    ray_cpus: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="With ray: CPUs that are set aside for each replica."
    )
    ray_gpus: float = Field(0.0, ge=0, allow_inf_nan=False, description="With ray: GPUs of each replica, e.g. 0.5.")
    device: str | None = Field(
        None, pattern=DEVICE, description="Where models compute: cpu, cuda, cuda:1, mps or xpu. [the best there is]"
    )
    sender_device: str | None = Field(
        None, pattern=DEVICE, description="Where senders compute that do not receive too. [LW_DEVICE]"
    )
    receiver_device: str | None = Field(None, pattern=DEVICE, description="Where receivers compute. [LW_DEVICE]")
    receiver: str | None = Field(
        None,
        description="vllm:http://HOST:PORT: receivers answer on this vLLM server; of several, those named by "
        "NAME=vllm:http://HOST:PORT, with commas between them. [receivers run here]",
    )
    dtype: Precision | None = Field(
        None, description="What models compute in: bf16, fp16 or fp32. [bf16; fp32 on a CPU]"
    )
    memory_budget: str | int | None = Field(
        None,
        description="Most bytes of models and their caches at once, e.g. 24GB, or a share of the device, e.g. 0.8; "
        "models take turns within it; of each device that is used. [0.9 of an accelerator; no limit on a CPU]",
    )
    host_memory: Annotated[ByteSize, Field(ge=0)] | None = Field(
        None,
        description="Most bytes of the host's memory for weights of models that take turns on a GPU: they are kept "
        "pinned, and return by a copy; 0 keeps none. [half of what is free]",
    )
    keep_alive: Seconds | dict[str, Seconds] | None = Field(
        None, description="Seconds for which an idle model stays; for all bridges, or by name as a JSON object."
    )
    load_wait: Seconds = Field(
        10.0, description="How long a request waits for models in use to make room for its own, seconds."
    )
    max_batch: int | None = Field(None, ge=1, description="Rows per forward pass. [256; 32 on a CPU]")
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens per batch of a sender, or of continuations to score; padding included. [32768; 16384 on a "
        "CPU]",
    )
    step_tokens: int | None = Field(
        None, ge=1, description="Tokens per step of a receiver; longer prompts take several. [2048; 512 on a CPU]"
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Threads with which models compute on a CPU. [torch's own number, at most one less than there are "
        "cores, which HTTP has; OMP_NUM_THREADS where that is set]",
    )
    step_mode: Mode | None = Field(
        None,
        description="How steps of a receiver are made: plain; paged, attention over the blocks of the cache; graphs, "
        "and CUDA graphs; async, and each prepared while the one before runs. What is not there is left out. "
        "[async; paged on a CPU]",
    )
    kv_tokens: int | None = Field(
        None,
        ge=64,
        description="Tokens that the key/value cache of a receiver holds; fewer where memory is too small for them. "
        "[8192; on an accelerator as many more as 0.8 of what models and the largest batch leave of the memory "
        "budget holds]",
    )
    require_engine: Literal["continuous"] | None = Field(
        None,
        description="continuous: refuse a receiver that continuous batching cannot run, instead of answering it in "
        "padded batches.",
    )
    max_queue: int = Field(256, ge=1, description="Rows being answered before 429.")
    request_timeout: Seconds = Field(60.0, description="Deadline of one request, seconds.")
    stall_timeout: Seconds = Field(
        120.0, description="Work without progress for this long fails /health/live, seconds."
    )
    drain_delay: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="After SIGTERM, new requests are still taken for this long while /health/ready says 503, for "
        "balancers to send them elsewhere, seconds.",
    )
    drain_timeout: Seconds = Field(
        30.0, description="After that, accepted requests have this long to be answered, seconds."
    )
    max_inputs: int = Field(64, ge=1, description="Inputs of one request, and sources of all of them.")
    max_samples: int = Field(16, ge=1, description="Largest n.")
    max_tokens: int = Field(512, ge=1, description="Largest max_tokens.")
    max_text_characters: int = Field(100_000, ge=1, description="Longest text or prompt.")
    max_body: Bytes = Field(ByteSize(32 << 20), description="Largest request body in bytes.")
    max_bodies: Bytes | None = Field(
        None,
        description="Most bytes of the bodies of all requests under way before 429; 8 times LW_MAX_BODY when absent.",
    )
    redis_url: str | None = Field(
        None, description="Keep latents, jobs and rate limits in this Redis, for several replicas."
    )
    store_memory: Bytes = Field(ByteSize(64 << 20), description="Most bytes of latents stored in the process.")
    encode_cache_memory: Bytes = Field(ByteSize(64 << 20), description="Most bytes of cached encodings in the process.")
    encode_cache: bool = Field(True, description="Answer a text that was encoded before without running the sender.")
    store_dir: Path | None = Field(
        None,
        description="Without Redis: keep latents and evaluations in this folder, so that they outlive the service.",
    )
    store_disk: Bytes = Field(ByteSize(10 << 30), description="Most bytes of latents kept in LW_STORE_DIR.")
    store_ttl: Annotated[Seconds | None, BeforeValidator(_none_for_ever)] = Field(
        3600.0, description="How long a latent is kept whose caller does not say, seconds; or forever."
    )

    corpus_dir: Path | None = Field(
        None, description="Serve the corpora in this folder: the document ID of NAME.lw is the latent_id NAME/ID."
    )
    latency_buckets: Buckets = Field(
        LATENCY_SECONDS, description="Bounds of every histogram of seconds in /metrics, with commas between them."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="How the log is written to stderr: lines for people, or a JSON object a line."
    )
    log_requests: bool = Field(
        False, description="Log every request when it is over: its route, status, seconds and id; never a text."
    )
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

    def sizes(self, device: torch.device) -> Sizes:
        """How much is done at once on a device: what the operator says, and else what suits it."""
        usual = ON_CPU if device.type == "cpu" else ON_ACCELERATOR
        said = {field.name: getattr(self, field.name, None) for field in fields(Sizes)}
        return replace(usual, **{name: value for name, value in said.items() if value is not None})

    @property
    def all_bodies(self) -> int:
        """Most bytes of the bodies of all requests under way."""
        return int(8 * self.max_body if self.max_bodies is None else self.max_bodies)

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

    @field_validator("receiver")
    @classmethod
    def _is_an_address(cls, receiver: str | None) -> str | None:
        try:
            parse_addresses(receiver)
        except InvalidRequest as error:
            raise ValueError(str(error)) from None
        return receiver

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("redis://", "rediss://", "unix://")):
            place = url.rpartition("@")[2]  # a password stands before it
            raise ValueError(f"expected redis://HOST:PORT/DB, rediss://… or unix://PATH, got {place!r}")
        return url

    @field_validator("root_path")
    @classmethod
    def _is_a_path(cls, path: str) -> str:
        if not re.fullmatch(r"/?|(/[\w.~-]+)+/?", path):
            raise ValueError("expected a path such as /lw")
        return path.rstrip("/")

    @model_validator(mode="before")
    @classmethod
    def _without_links(cls, given: dict[str, Any]) -> dict[str, Any]:
        links = {link.removeprefix(PREFIX).lower() for link in service_links()}
        return {name: value for name, value in given.items() if name not in links or not isinstance(value, str)}

    @model_validator(mode="after")
    def _room_for_one_body(self) -> Self:
        if self.all_bodies < self.max_body:
            raise ValueError(f"LW_MAX_BODIES is {self.all_bodies}; expected LW_MAX_BODY, {int(self.max_body)}, or more")
        return self

    @model_validator(mode="after")
    def _has_a_place_for_all(self) -> Self:
        if self.frontends > 1 and self.engine == "ray":
            raise ValueError(f"LW_FRONTENDS is {self.frontends}; beside models on Ray one process answers HTTP")
        if self.frontends > 1 and self.redis_url is None and self.store_dir is None:
            raise ValueError(
                f"LW_FRONTENDS is {self.frontends}; expected LW_REDIS_URL or LW_STORE_DIR with it, where each process "
                "finds the latents that another keeps"
            )
        return self

    @model_validator(mode="after")
    def _refuse_unknown_variables(self) -> Self:
        # extra="forbid" covers arguments and .env files, not the environment itself.
        known = {PREFIX + name.upper() for name in type(self).model_fields}
        unknown = {name for name in os.environ if name.startswith(PREFIX)} - known - set(service_links())
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        return self
