"""What a request costs beside its tokens, with a real Redis: ``python -m benchmarks.cost``.

Bytes that a kept latent and a cached encoding take in Redis, commands and bytes between the service and Redis, bytes
between caller and service, and the processor time of Redis for a command.
"""

import json
import os
import socket
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import redis
import typer

from benchmarks.direct import texts
from benchmarks.record import command_of, record
from benchmarks.rolling import PORT, replicas


def cost(count: int) -> dict[str, Any]:
    """What a request costs in Redis and on the network: on average over ``count`` of each kind."""
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
            f"{kind}_bytes": statistics.mean(client.memory_usage(key) for key in named)  # type: ignore[misc]
            for kind, named in keys.items()
        }
        value = statistics.mean(client.strlen(key) for key in keys["latent"])  # type: ignore[misc]
        return {"requests": found, "redis": {**held, "latent_value_bytes": value, **commands(client, int(value))}}


def spent(client: Any, ask: Callable[[str], tuple[int, int]], given: Sequence[str]) -> dict[str, float]:
    """On average over what is given: commands and bytes of Redis, bytes over HTTP."""
    before = client.info()
    http = [ask(one) for one in given]
    after = client.info()
    of_redis = {
        "redis_commands": "total_commands_processed",
        "redis_bytes_in": "total_net_input_bytes",
        "redis_bytes_out": "total_net_output_bytes",
    }
    return {
        **{name: (after[field] - before[field]) / len(given) for name, field in of_redis.items()},
        "http_bytes_in": statistics.mean(sent for sent, _ in http),
        "http_bytes_out": statistics.mean(received for _, received in http),
    }


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
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request)
        while got := connection.recv(1 << 16):
            answer += got
    assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
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
    """Measure, on average over REQUESTS of each kind, and record."""
    figures = cost(requests)
    print(json.dumps(figures, indent=2))
    record("cost", command_of("cost", requests=requests), figures)


if __name__ == "__main__":
    typer.run(main)
