"""Processes and their parent: which end the service with their own end, and which are started again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

WAIT_SECONDS = 60.0
PROGRAM = """
import json, os, pathlib, signal, sys, time
from latentwire.service.processes import supervisor as module
module.END_SECONDS, module.LATER_SECONDS, module.FORCED_SECONDS = json.loads(sys.argv[4]), 0.1, 1.0
made = module.Supervisor(3, 0.1, lambda: None)
role = made.run()
name, (folder, dies, hangs, _) = f"{role}{made.peers.number}", sys.argv[1:]
started = pathlib.Path(folder, name)
with started.open("a") as file:
    print(os.getpid(), file=file)
if len(started.read_text().split()) in json.loads(dies).get(name, []):
    sys.exit(3)
if role == "http":
    made.wait_turn()
signal.signal(signal.SIGTERM, signal.SIG_IGN if name in hangs else lambda *_: sys.exit(0))
made.note(module.READY)
pathlib.Path(folder, f"{name} {os.getpid()}").touch()
while True:
    time.sleep(1)
"""


@dataclass
class Supervised:
    """The parent of three that answer HTTP, and the models."""

    process: subprocess.Popen[str]
    folder: Path

    def started(self, name: str) -> list[int]:
        """The process ids of a role, oldest first."""
        file = self.folder / name
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def is_ready(self, name: str, start: int) -> bool:
        """Whether that start of a role, counted from 1, is."""
        pids = self.started(name)
        return len(pids) >= start and (self.folder / f"{name} {pids[start - 1]}").exists()

    def is_ready_at_first(self) -> bool:
        """Whether every process is that was started first."""
        return all(self.is_ready(name, 1) for name in ("models0", "http0", "http1", "http2"))

    def kill(self, name: str) -> None:
        """End the latest start of a role by force."""
        os.kill(self.started(name)[-1], signal.SIGKILL)

    def ended(self) -> tuple[int, str]:
        """The exit code, and what was said."""
        _, said = self.process.communicate(timeout=WAIT_SECONDS)
        return self.process.returncode, said


@contextmanager
def supervised(
    folder: Path, dies: dict[str, list[int]], hangs: str = "", seconds: float = WAIT_SECONDS
) -> Iterator[Supervised]:
    """``dies`` names the starts of a role that end before they are ready; what is in ``hangs`` hears no signal.

    All has ``seconds`` to end after a signal, and one second after two.
    """
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(dies), hangs, str(seconds)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Supervised(process, folder)
        finally:
            left = psutil.Process(process.pid).children() if process.poll() is None else []
            for one in (*left, process):
                one.kill()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["models0", "http0", "http2"])
def test_one_that_was_never_ready_ends_the_service_with_its_code(name: str, tmp_path: Path) -> None:
    with supervised(tmp_path, {name: [1]}) as made:
        assert made.ended() == (3, "")
        assert len(made.started(name)) == 1


@pytest.mark.parametrize("name", ["models0", "http0", "http2"])
def test_one_that_dies_on_its_way_back_is_tried_until_it_is_ready(name: str, tmp_path: Path) -> None:
    with supervised(tmp_path, {name: [2, 3]}) as made:
        until(made.is_ready_at_first)
        made.kill(name)
        until(lambda: made.is_ready(name, 4))
        made.process.terminate()
        code, said = made.ended()
    assert code == 0 and said.count("process ended with -9; another is started") == 1
    assert said.count("process ended with 3; another is started") == 2


def test_one_that_never_comes_back_keeps_no_other_from_it(tmp_path: Path) -> None:
    with supervised(tmp_path, {"http0": [*range(2, 10_000)]}) as made:
        until(made.is_ready_at_first)
        made.kill("http0")
        until(lambda: len(made.started("http0")) >= 3)
        for name in ("models0", "http1"):
            made.kill(name)
            until(lambda name=name: made.is_ready(name, 2))  # type: ignore[misc]


@pytest.mark.parametrize(("signals", "seconds"), [(1, 1.0), (2, 10 * WAIT_SECONDS)])
@pytest.mark.parametrize("hangs", ["http2", "models0", "models0 http1"])
def test_what_hangs_is_ended_by_force_when_its_time_is_over(
    hangs: str, signals: int, seconds: float, tmp_path: Path
) -> None:
    with supervised(tmp_path, {}, hangs, seconds) as made:
        until(made.is_ready_at_first)
        for _ in range(signals):
            made.process.terminate()
            time.sleep(0.2)  # two that come at once are one
        code, said = made.ended()
    assert ("the http process was ended by SIGKILL before it had done its work" in said) == ("http" in hangs) == code
    assert ("the models process was ended by SIGKILL before" in said) == ("models" in hangs)


def test_signals_that_come_when_all_has_ended_change_nothing(tmp_path: Path) -> None:
    with supervised(tmp_path, {}) as made:
        until(made.is_ready_at_first)
        while made.process.poll() is None:
            made.process.terminate()
            time.sleep(0.01)
        assert made.ended() == (0, "")
