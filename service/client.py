"""Call a LatentWire service from Python. Needs httpx alone: no torch, no models.

with Client("http://127.0.0.1:8000") as client:
    latent = client.encode(["Mara wants a cup of tea."])["latents"][0]
    said = client.generate([{"latent": latent["data"]}], "Question: What does Mara want?\\nAnswer:")
    print(said["outputs"][0]["text"])
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import httpx

DEFAULT_URL = "http://127.0.0.1:8000"


class ServiceError(Exception):
    """The service refused or failed; ``status``, ``type``, ``param`` and ``request_id`` are those of its error body."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(f"{status} {error.get('type')}: {error.get('message')}")
        self.status = status
        self.type: str | None = error.get("type")
        self.param: str | None = error.get("param")
        self.request_id: str | None = error.get("request_id")


class Client:
    """A connection to one service; close it, or use it in a ``with``."""

    def __init__(self, url: str = DEFAULT_URL, *, timeout_seconds: float = 60.0, trust_env: bool = True) -> None:
        """``trust_env`` off ignores proxy variables."""
        self._http = httpx.Client(base_url=url, timeout=timeout_seconds, trust_env=trust_env)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def encode(self, inputs: str | Sequence[str], **options: Any) -> dict[str, Any]:
        """``POST /encode``: latents of one text or several (ServiceError on refusal).

        Options: bridge, dtype, store, truncate.
        """
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        return self._call("POST", "/encode", {"inputs": texts, **options})

    def generate(self, inputs: Sequence[dict[str, str]], prompt: str | Sequence[str], **options: Any) -> dict[str, Any]:
        """``POST /generate``: answers about ``{"text"}``, ``{"latent"}`` or ``{"latent_id"}`` inputs.

        Options: bridge, receiver, max_tokens, temperature, top_p, top_k, seed, n, stop, truncate (ServiceError on
        refusal).
        """
        asked = prompt if isinstance(prompt, str) else list(prompt)
        return self._call("POST", "/generate", {"inputs": list(inputs), "prompt": asked, **options})

    def bridges(self) -> list[dict[str, Any]]:
        """``GET /bridges``: what is served."""
        found: list[dict[str, Any]] = self._call("GET", "/bridges")["bridges"]
        return found

    def ready(self) -> bool:
        """Whether every bridge has been loaded and has answered once; False where nothing listens."""
        try:
            return self._http.get("/health/ready").is_success
        except httpx.TransportError:
            return False

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        response = self._http.request(method, path, json=body)
        if not response.is_success:
            kind = response.headers.get("content-type", "")
            error = response.json().get("error", {}) if kind.startswith("application/json") else {}
            raise ServiceError(response.status_code, error or {"type": "HTTPError", "message": response.text[:200]})
        answer: dict[str, Any] = response.json()
        return answer
