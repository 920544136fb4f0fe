"""What a request costs beside its tokens, with a real Redis: ``python -m benchmarks.cost``.

Bytes that a kept latent and a cached encoding take in Redis, commands and bytes between the service and Redis, bytes
between caller and service, and the processor time of Redis for a command.
"""

import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import redis
import typer

from benchmarks.direct import texts
from benchmarks.record import command_of, record
from benchmarks.rolling import PORT, replicas


def cost(count: int) -> dict[str, Any]:
    """What a request costs in Redis and on the network: over ``count`` of each kind."""
    sources, prompt = texts(count), "Question: What does Mara want?\nAnswer:"
    with tempfile.TemporaryDirectory() as name, replicas([PORT + 1], Path(name)) as (replica,):
        client = redis.Redis(unix_socket_path=f"{name}/redis")
        ids: list[str] = []

        def encode(source: str) -> tuple[int, int]:
            sent, received, answer = exchanged(replica.port, "/encode", {"inputs": [source], "store": True})
            ids.append(answer["latents"][0]["id"])
            return sent, received

        def generate(id: str) -> tuple[int, int]:
            body = {"inputs": [{"latent_id": id}], "prompt": prompt, "max_tokens": 16}
            return exchanged(replica.port, "/generate", body)[:2]

        found = {
            "encode_and_keep": spent(client, encode, sources),
            "generate_by_id": spent(client, generate, ids),
        }
        keys = {kind: list(client.scan_iter(f"latentwire:{kind}:*")) for kind in ("latent", "encode")}
        held = {
            f"{kind}_bytes": statistics.mean(client.memory_usage(key) for key in named) for kind, named in keys.items()
        }
        value = statistics.mean(client.strlen(key) for key in keys["latent"])
        return {"requests": found, "redis": {**held, "latent_value_bytes": value, **commands(client, int(value))}}


OF_REDIS = {
    "redis_commands": "total_commands_processed",
    "redis_bytes_in": "total_net_input_bytes",
    "redis_bytes_out": "total_net_output_bytes",
}


def spent(client: Any, ask: Callable[[str], tuple[int, int]], given: Sequence[str]) -> dict[str, float]:
    """Commands and bytes of Redis, and bytes over HTTP, for each of what is given: medians."""

    def one(item: str | None) -> list[int]:
        before = client.info()
        http = (0, 0) if item is None else ask(item)
        after = client.info()
        return [*(after[field] - before[field] for field in OF_REDIS.values()), *http]

    nothing = np.median([one(None) for _ in range(20)], axis=0)  # what it costs to look
    medians = np.median([one(item) for item in given], axis=0) - nothing
    return dict(zip([*OF_REDIS, "http_bytes_in", "http_bytes_out"], medians.tolist(), strict=True))


def exchanged(port: int, path: str, body: Mapping[str, Any]) -> tuple[int, int, dict[str, Any]]:
    """Bytes of a request and of its answer, all of HTTP's included, and the answer."""
    content = json.dumps(body).encode()
    head = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        "Connection: close",
    ]
    request, answer = "\r\n".join([*head, "", ""]).encode() + content, b""
    while not answer.startswith(b"HTTP/1.1 200"):
        assert not answer or b"StoreUnavailable" in answer, answer
        time.sleep(1 if answer else 0)  # on a busy machine Redis may be late
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(request)
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    return len(request), len(answer), json.loads(answer.partition(b"\r\n\r\n")[2])


def commands(client: Any, value_bytes: int, count: int = 20_000) -> dict[str, float]:
    """Processor time of Redis for a command that sets or gets a value as large as a latent."""
    value, before = os.urandom(value_bytes), client.info("cpu")
    for number in range(count // 2):
        client.set(f"measured:{number % 100}", value)
        client.get(f"measured:{number % 100}")
    after = client.info("cpu")
    seconds = sum(after[name] - before[name] for name in ("used_cpu_user", "used_cpu_sys"))
    return {"processor_seconds_of_a_command": seconds / count}


def main(requests: int = 300) -> None:
    """Measure over REQUESTS of each kind, and record."""
    figures = cost(requests)
    print(json.dumps(figures, indent=2))
    record("cost", command_of("cost", requests=requests), figures)


if __name__ == "__main__":
    typer.run(main)
