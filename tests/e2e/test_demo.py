"""``latentwire demo`` as somebody meets it who interrupts it, at any stage."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest

from latentwire.bridge.errors import InferenceFailed
from latentwire.service.cli.demo import running
from tests.ports import free_port

END_SECONDS = 120.0  # only ever reached by what hangs
CACHE = "torchinductor_"  # a library's, shared by all that use it
# The signal comes before the reader of the sentence could send one: nothing is quicker.
AT_ONCE = """
import os, signal
from latentwire.service import __main__ as command
say = command._say
command._say = lambda line: say(line) or ("Ctrl-C ends it" in line and os.kill(os.getpid(), signal.SIGINT))
command.main()
"""

Demo = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    """Start a quick demo in a session of its own, with a folder of its own for what is temporary."""
    started: list[subprocess.Popen[str]] = []
    (tmp_path / "tmp").mkdir()

    def start(*main: str) -> subprocess.Popen[str]:
        options = ["demo", "--max-steps", "2", "--limit", "2", "--port", str(free_port())]
        environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        command = [sys.executable, *(main or ("-m", "latentwire")), *options]
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))  # type: ignore[call-overload]
        return started[0]

    yield start
    for process in of_session(started[0].pid):
        process.kill()


def of_session(leader: int) -> list[psutil.Process]:
    """The processes that one started, whoever is their parent by now, and itself."""
    alive = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return alive


def leaves_nothing(process: subprocess.Popen[str], folder: Path) -> None:
    said, errors = process.communicate(timeout=END_SECONDS)
    assert (process.returncode, errors) == (0, ""), said
    assert of_session(process.pid) == []
    assert [path for path in (folder / "tmp").iterdir() if not path.name.startswith(CACHE)] == []


def test_the_demo_can_be_interrupted_the_moment_it_says_so(demo: Demo, tmp_path: Path) -> None:
    leaves_nothing(demo("-c", AT_ONCE), tmp_path)


@pytest.mark.parametrize(
    ("stage", "number"),
    [("train: two frozen", signal.SIGINT), ("evaluate: what", signal.SIGTERM), ("serve: the same", signal.SIGINT)],
)
def test_the_demo_ends_with_code_0_and_leaves_nothing_wherever_it_is_interrupted_and_how_often(
    demo: Demo, tmp_path: Path, stage: str, number: signal.Signals
) -> None:
    process = demo()
    assert process.stdout is not None
    assert any(stage in line for line in process.stdout)
    for _ in range(3):
        process.send_signal(number)
    leaves_nothing(process, tmp_path)


class Ready(BaseHTTPRequestHandler):
    """Says of everything that it is ready."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_another_service_on_the_port_is_not_taken_for_the_one_that_was_started(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), Ready) as other:
        answering = Thread(target=other.serve_forever)
        answering.start()
        port = other.server_address[1]
        with pytest.raises(InferenceFailed, match=f"127.0.0.1:{port} cannot be listened on"):
            with running("builtin", port, tmp_path / "log"):
                pytest.fail("it was taken for ours")
        other.shutdown()
        answering.join()
