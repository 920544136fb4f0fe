"""Two processes and who looks after them: one answers HTTP, the other holds the models.

The parent is small: it listens, forks, passes signals on, and starts whichever of the two has ended without being told
to. One that ends before it was ready is not started again: what is wrong would be wrong the next time. But models whose
checkpoint was replaced meanwhile are.

A process learns that its parent has gone from a pipe that nobody writes to: it ends with the last who could. That of
the models hangs on the one that answers HTTP as well, which has answers to finish.
"""

import gc
import logging
import mmap
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType
from typing import Literal

from latentwire.service.processes.frames import REPLACED, SECRET_BYTES, Door

log = logging.getLogger(__name__)

Role = Literal["models", "http"]
ROLES: tuple[Role, ...] = ("models", "http")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
OPENED, READY = 1, 2
POLL_SECONDS = 0.02
AGAIN_SECONDS = 0.2  # before another is started: one that dies at once must not take the machine's time
END_SECONDS = 30.0  # for which a process is given time to end; models may be on their way into memory


class Supervisor:
    """See the module.

    Attributes:
        listener: The Unix socket at which the process of the models answers.
        door: Where that is, and what to say there.
    """

    def __init__(self) -> None:
        self.door = Door(f"\0latentwire-{os.getpid()}-{os.urandom(8).hex()}", os.urandom(SECRET_BYTES))
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.door.address)
        self.listener.listen()
        self._stage = {role: mmap.mmap(-1, 1) for role in ROLES}  # shared with the children
        self._pipes = {role: os.pipe() for role in ROLES}
        self._running: dict[int, Role] = {}
        self._signals = 0

    def note(self, role: Role, stage: int) -> None:
        """How far the start of a process is: ``OPENED`` its bridges, or ``READY`` and worth starting again."""
        self._stage[role][0] = stage

    def wait_opened(self) -> None:
        """Wait until the process of the models could open every bridge: what is wrong with one is said once."""
        while self._stage["models"][0] < OPENED:
            time.sleep(POLL_SECONDS)

    def run(self) -> Role:
        """Fork; returns in each child, with its role. The parent exits here, once both have ended.

        Its exit code is that of the first that ended and was not started again.
        """
        gc.collect()
        gc.freeze()  # code and libraries, which both share: to look through them stopped every answer for .5 s
        before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        for role in ROLES:
            if self._is_child(role, before):
                return role
        while True:
            pid, status = os.wait()
            if pid not in self._running:
                continue  # the first process of a container inherits the orphans of others
            role, code = self._running.pop(pid), os.waitstatus_to_exitcode(status)
            if self._signals and role == "models":
                continue  # HTTP still tells those who wait
            if self._signals or (self._stage[role][0] < READY and code != REPLACED):
                if code < 0 and not self._signals:  # it could say nothing itself
                    name = signal.Signals(-code).name
                    log.error("the %s process was ended by %s before it was ready; is there memory for it?", role, name)
                self._end()
                sys.exit(code if code >= 0 else int(not self._signals))
            log.error("the %s process ended with %d; another is started", role, code)
            self._stage[role][0] = 0
            time.sleep(AGAIN_SECONDS)
            if self._is_child(role, before):
                return role

    def _is_child(self, role: Role, handlers: Mapping[signal.Signals, object]) -> bool:
        """Fork a process of a role; True in it."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # one that came now would be obeyed by the wrong handler
        pid = os.fork()
        if pid:
            self._running[pid] = role
            for _ in range(self._signals if role == "http" else 0):
                _send(pid, signal.SIGTERM)
        else:
            os.setpgrp()  # Ctrl-C reaches the parent alone, which passes it on
            for number, handler in handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if pid:
            return False
        os.close(self._pipes["http"][1])
        if role == "models":
            os.close(self._pipes["models"][1])
        threading.Thread(target=_end_with, args=[self._pipes[role][0]], daemon=True, name="parent").start()
        return True

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        """To the process that answers HTTP: the models are told when that has ended."""
        self._signals += 1
        for pid, role in list(self._running.items()):
            if role == "http":
                _send(pid, number)

    def _end(self) -> None:
        """End the other process: by force where it takes too long, or another signal comes."""
        for pid in self._running:
            _send(pid, signal.SIGTERM)
        until, signals = time.monotonic() + END_SECONDS, self._signals
        while self._running:
            if time.monotonic() > until or self._signals > signals:
                for pid in self._running:
                    _send(pid, signal.SIGKILL)
            self._running.pop(os.waitpid(-1, os.WNOHANG)[0], None)
            time.sleep(POLL_SECONDS)


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _end_with(pipe: int) -> None:
    """On a thread: end this process when nobody holds the other end of a pipe any more."""
    os.read(pipe, 1)
    _send(os.getpid(), signal.SIGTERM)
