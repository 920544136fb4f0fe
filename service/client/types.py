"""What a caller gives to a LatentWire service and gets from it, as plain values. No torch, no connection."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

from latentwire.bridge.results import Generated, Latent

CONNECTION_FAILED, DEADLINE_EXCEEDED = "ConnectionFailed", "DeadlineExceeded"
INVALID_ANSWER, INVALID_REQUEST, HTTP_ERROR = "InvalidAnswer", "InvalidRequest", "HTTPError"
UNFINISHED = ("queued", "running")  # any other state ends the wait, so one from a newer service cannot make it endless


class ServiceError(Exception):
    """The service refused, failed, could not be reached, or answered what no such service answers.

    >>> with latentwire.Client(url) as client:
    ...     try:
    ...         client.encode("Mara sings.", bridge="nowhere")
    ...     except latentwire.ServiceError as error:
    ...         print(error.status, error.type, error.param)
    404 UnknownBridge bridge

    Attributes:
        status: HTTP status; None where no answer came, or where a stream that had begun ended in an error.
        type: The service's own name for the error, or ``ConnectionFailed``, ``DeadlineExceeded``, ``InvalidAnswer``
            (no JSON, fields missing, half a stream), ``InvalidRequest`` (it cannot be sent) or ``HTTPError`` (a refusal
            without the service's error body, by a proxy for example).
        param: The field at fault, where there is one.
        request_id: What to look for in the service's log.
        retry_after_seconds: When the service wants to be asked again.
    """

    def __init__(
        self,
        message: str,
        *,
        type: str = INVALID_ANSWER,
        status: int | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.type, self.status, self.param, self.request_id = type, status, param, request_id
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        return f"{'' if self.status is None else f'{self.status} '}{self.type}: {self.args[0]}"


@dataclass(frozen=True)
class Token:
    """A piece of the text of output ``index``, as soon as it was said.

    >>> with latentwire.Client(url) as client:
    ...     *tokens, answers = client.stream("Mara sings.", "Who sings?", max_tokens=4)
    >>> "".join(token.text for token in tokens) == answers.texts[0]
    True
    """

    index: int
    text: str


@dataclass(frozen=True)
class KeptLatent:
    """A latent that a service keeps under ``id``: an input of ``generate``.

    ``bridge`` is None where its bridge is not served now, ``source_tokens`` and ``source_bytes`` of a message made
    elsewhere, ``expires`` of what is kept for ever; times are in ISO 8601. ``metadata`` is what its keeper or a corpus
    says of it; ``excerpt``, the start of ``text``, is of a document of a corpus. ``data``, the message, and ``text``
    come with the call ``latent`` alone.

    >>> with latentwire.Client(url) as client:
    ...     (kept,) = client.keep("Ben lives in Rome.")
    ...     client.generate(kept, "Question: Where does Ben live?\\nAnswer:").texts
    [' Ben lives in Rome.']
    """

    __pydantic_config__: ClassVar = {"val_json_bytes": "base64"}  # what pydantic needs to know to read it from JSON

    id: str
    bridge_id: str
    shape: tuple[int, int]
    dtype: str
    bridge: str | None = None
    source_tokens: int | None = None
    source_bytes: int | None = None
    truncated: bool = False
    created: str | None = None
    expires: str | None = None
    metadata: dict[str, Any] | None = None
    excerpt: str | None = None
    text: str | None = None
    data: bytes | None = None


@dataclass(frozen=True)
class KeptLatents:
    """Answer of ``POST /latents``."""

    latents: tuple[KeptLatent, ...]


@dataclass(frozen=True)
class LatentPage:
    """Answer of ``GET /latents``; ``next`` is None at the end."""

    latents: tuple[KeptLatent, ...]
    next: str | None = None


Event = Token | Generated
Input = str | bytes | Latent | KeptLatent | Mapping[str, Any]
Inputs = Input | Sequence[Input | Sequence[Input]]
"""One input, or several; a list among them holds the sources of one."""
Prompt = str | Sequence[str] | Sequence[Mapping[str, str]]
"""One prompt for all inputs, one for each, or a conversation: ``{"role": "user", "content": …}`` for each turn."""


@dataclass(frozen=True)
class BridgeInfo:
    """A bridge that is served.

    ``loaded`` holds its models now in memory and their bytes, ``engines`` how each receiver runs (None: not loaded),
    ``sources_per_example`` for how many sources in one prompt it was trained; ``freed_bytes`` is there after an unload.

    >>> with latentwire.Client(url) as client:
    ...     [bridge.sender for bridge in client.bridges()]
    ['builtin:neox']
    """

    name: str
    bridge_id: str
    sender: str
    receivers: tuple[str, ...]
    layers: tuple[int, ...] = ()
    encoder: str = ""
    ratio: int = 0
    num_latents: int = 0
    latent_dim: int = 0
    max_source_tokens: int = 0
    template: str = ""
    task: str = ""
    steps: int = 0
    loaded: dict[str, int] | None = None
    engines: dict[str, str | None] | None = None
    sources_per_example: dict[str, int] | None = None
    pinned: bool = False
    keep_alive_seconds: float | None = None
    freed_bytes: int | None = None


@dataclass(frozen=True)
class Bridges:
    """Answer of ``GET /bridges``."""

    bridges: tuple[BridgeInfo, ...]


@dataclass(frozen=True)
class Progress:
    """Examples done under the condition that is measured now."""

    condition: str | None = None
    done: int = 0
    total: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """A bridge being measured, or to be, or that was.

    ``state`` is queued, running, done, failed (``error`` says why) or cancelled; ``report`` is partial until it is
    done; ``created`` is a time in ISO 8601.

    >>> with latentwire.Client(url) as client:
    ...     evaluation = client.evaluate("demo", "world", conditions=["bridge"], limit=1)
    >>> evaluation.state, list(evaluation.report["conditions"])
    ('done', ['bridge'])
    """

    id: str
    bridge: str
    task: str
    state: str
    receiver: str | None = None
    progress: Progress = Progress()
    report: dict[str, Any] | None = None
    error: str | None = None
    created: str | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state not in UNFINISHED


class CallOptions(TypedDict, total=False):
    """What every call takes.

    ``request_id`` is what the service logs the call under. ``timeout_seconds`` bounds this call, retries included, in
    place of the client's; ``encode``, ``generate``, ``read``, ``score`` and ``stream`` send it along as the service's
    deadline.
    """

    request_id: str | None
    timeout_seconds: float | None


class EncodeOptions(CallOptions, total=False):
    """What ``encode`` takes; None and absent leave the choice to the service."""

    bridge: str | None
    dtype: str | None
    store: bool | None
    truncate: bool | None


class KeepOptions(CallOptions, total=False):
    """What ``keep`` takes; ``ttl_seconds`` may be ``"forever"``. None and absent leave the choice to the service."""

    bridge: str | None
    dtype: str | None
    ttl_seconds: float | str | None
    truncate: bool | None


class GenerateOptions(CallOptions, total=False):
    """What ``generate`` and ``stream`` take; None and absent leave the choice to the service."""

    bridge: str | None
    receiver: str | None
    condition: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    n: int | None
    stop: str | Sequence[str] | None
    stop_ids: Sequence[int] | None
    logprobs: int | None
    truncate: bool | None
    fallback: str | None


class ReadOptions(CallOptions, total=False):
    """What ``read`` takes; ``against`` has the original of each input. None and absent leave it to the service."""

    bridge: str | None
    receiver: str | None
    against: str | Sequence[str] | None
    max_tokens: int | None
    truncate: bool | None


class ScoreOptions(CallOptions, total=False):
    """What ``score`` takes; None and absent leave the choice to the service."""

    bridge: str | None
    receiver: str | None
    condition: str | None
    end: bool | None
    logprobs: bool | None
    truncate: bool | None
    fallback: str | None
