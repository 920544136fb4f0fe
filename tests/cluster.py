"""A cluster of Ray on this machine: a node for each loopback address, which can be killed as a machine can."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

TRIES = 3  # Ray gives up a node whose own processes take 15 s to start, as on a busy machine
START_SECONDS = 120.0
STARTED = "This command will now block"
# Of the packages of tests, jsonschema takes one along that makes every process of Ray start three seconds later.
WITHOUT = "rfc3987_syntax.py"


class Cluster:
    """Nodes of one cluster; ``variables`` are what who joins it needs in the environment."""

    def __init__(self, folder: Path) -> None:
        (folder / WITHOUT).write_text("raise ImportError\n")
        self._folder, self._nodes = folder, list[psutil.Process]()
        self.variables = {
            "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_worker_prestart": "0",
            "RAY_worker_niceness": "0",
        }

    def add(self, cpus: int = 4) -> psutil.Process:
        """Another node, once it is up; the first one is the head."""
        for _ in range(TRIES):
            if (node := self._start(cpus)) is not None:
                self._nodes.append(node)
                return node
        raise RuntimeError(f"no node of Ray could be started: {(self._folder / 'log').read_text()[-2000:]}")

    def run(self, *command: str) -> None:
        """A command of Ray's on this cluster."""
        run = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
        done = subprocess.run(run, env=os.environ | self.variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def _start(self, cpus: int) -> psutil.Process | None:
        host, log = f"127.0.0.{len(self._nodes) + 2}", self._folder / "log"
        if self._nodes:
            place = ["--address", self.variables["RAY_ADDRESS"]]
        else:
            port = free_port(host)
            self.variables["RAY_ADDRESS"] = f"{host}:{port}"
            place = ["--head", "--port", str(port), "--include-dashboard=false", "--temp-dir", str(self._folder)]
        command = [
            *(str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address", host),
            *("--num-cpus", str(cpus), "--object-store-memory", str(100 << 20), "--include-log-monitor=false", *place),
        ]
        environment = {name: value for name, value in (os.environ | self.variables).items() if name != "RAY_ADDRESS"}
        with log.open("w") as out:
            node = psutil.Popen(command, stdout=out, stderr=out, env=environment)
        until = time.monotonic() + START_SECONDS
        while STARTED not in log.read_text():
            if node.poll() is not None or time.monotonic() > until:
                kill(node)
                return None
            time.sleep(0.1)
        return node

    def end(self) -> None:
        """Kill every node, the head last."""
        while self._nodes:
            kill(self._nodes.pop())


def kill(node: psutil.Process) -> list[str]:
    """Kill every process of a node; their names."""
    with suppress(psutil.NoSuchProcess):
        processes = [*node.children(recursive=True), node]
        names = [process.name() for process in processes]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, 10)
        return names
    return []


@contextmanager
def cluster() -> Iterator[Cluster]:
    """One without nodes; ended on the way out. In a short folder: sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    made = Cluster(folder)
    try:
        yield made
    finally:
        made.end()
        shutil.rmtree(folder, ignore_errors=True)


def free_port(host: str) -> int:
    """A port of an address that nobody has."""
    with socket.create_server((host, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
