"""Processes and who looks after them: one or several answer HTTP, another holds the models.

The parent is small: it listens, forks, passes signals on, and starts whichever of them has ended without being told
to. One that was never ready is not started again: what is wrong would be wrong the next time. One that was, and dies on
its way back, is tried again for as long as HTTP is answered: the service must not end with it.

A process learns that its parent has gone from a pipe that nobody writes to: it ends with the last who could. That of
the models hangs on those that answer HTTP as well, which have answers to finish.
"""

import gc
import logging
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType
from typing import Literal, NamedTuple

from latentwire.service.processes.door import Door
from latentwire.service.processes.peers import Peers

log = logging.getLogger(__name__)

Role = Literal["models", "http"]
ROLES: tuple[Role, ...] = ("models", "http")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
OPENED, READY = 1, 2
REPLACED = 75  # exit code of models whose checkpoint was replaced: to be started again, ready or not
POLL_SECONDS = 0.02
AGAIN_SECONDS = 0.2  # before another is started
LATER_SECONDS = 2.0  # the same where one died before it was ready: it must not take the machine's time
END_SECONDS = 30.0  # for which a process is given time to end; models may be on their way into memory
FORCED_SECONDS = 5.0  # for which one that was signalled twice is given time to end


class Child(NamedTuple):
    """A process of a role, of which it is that number."""

    role: Role
    number: int = 0


MODELS = Child("models")


class Supervisor:
    """See the module.

    Attributes:
        door: Where the process of the models listens.
        listener: The socket of that.
        peers: The processes that answer HTTP; in one of them, it and the others.
    """

    def __init__(self, frontends: int, drain_seconds: float, close: Callable[[], None]) -> None:
        """Make what the processes share.

        Args:
            frontends: How many answer HTTP.
            drain_seconds: What these may take, once signalled, for what they have accepted.
            close: Called in the parent when none of them is there any more: nobody should wait for an answer.
        """
        self.door, self.listener = Door.opened()
        self.peers = Peers(frontends)
        self._children = [MODELS, *(Child("http", number) for number in range(frontends))]
        self._own = MODELS
        self._stage = {child: mmap.mmap(-1, 1) for child in self._children}  # shared with the children
        self._pipes = {role: os.pipe() for role in ROLES}
        self._due = dict.fromkeys(self._children, 0.0)  # when which is to be started
        self._running: dict[int, Child] = {}
        self._replaced: set[Child] = set()
        self._drain_seconds, self._signals, self._code, self._close = drain_seconds, 0, 0, close

    @property
    def is_first(self) -> bool:
        """Whether this process is the first that answers HTTP, started for the first time."""
        return self._own == Child("http") and self._own not in self._replaced

    def note(self, stage: int) -> None:
        """How far the start of this process is: ``OPENED`` its bridges, or ``READY`` and worth starting again."""
        self._stage[self._own][0] = stage

    def wait_turn(self) -> None:
        """Wait until those before this process could open every bridge: what is wrong with one is said once.

        Where it was started again, for the models alone: another that answers HTTP may never be ready.
        """
        before = self._children[: self._children.index(self._own)]
        for child in [MODELS] if self._own in self._replaced else before:
            while self._stage[child][0] < OPENED:
                time.sleep(POLL_SECONDS)

    def run(self) -> Role:
        """Fork; returns in each child, with its role. The parent exits here, once all have ended.

        Its exit code is that of the first that ended badly and was not started again.
        """
        gc.collect()
        gc.freeze()  # code and libraries, which all share: to look through them stopped every answer for .5 s
        before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._give_up)
        while True:
            if self._signals:
                self._due.clear()
                if all(child == MODELS for child in self._running.values()):
                    self._end()  # the models too: HTTP, which tells those who wait, has ended
                    sys.exit(self._code)
            for child in [child for child, at in self._due.items() if at <= time.monotonic()]:
                del self._due[child]
                if self._is_child(child, before):
                    return child.role
            pid, status = os.waitpid(-1, os.WNOHANG if self._due else 0) if self._running else (0, 0)
            if pid in self._running:  # the first process of a container inherits the orphans of others
                self._note_end(self._running.pop(pid), os.waitstatus_to_exitcode(status))
            elif not pid:
                time.sleep(POLL_SECONDS)

    def _note_end(self, child: Child, code: int) -> None:
        """What follows from the end of a process; exits where it is the end of the service."""
        was_ready, self._stage[child][0] = self._stage[child][0] >= READY or code == REPLACED, 0
        if child != MODELS:
            self.peers.forget(child.number)
        if self._signals:
            forced = _is_forced(child, code)
            if child != MODELS:
                self._code = self._code or max(code, int(forced))
        elif was_ready or (child in self._replaced and self._is_answering()):
            log.error("the %s process ended with %d; another is started", child.role, code)
            self._due[child] = time.monotonic() + (AGAIN_SECONDS if was_ready else LATER_SECONDS)
            self._replaced.add(child)
        else:
            if code < 0:  # it could say nothing itself
                said = "the %s process was ended by %s before it was ready; is there memory for it?"
                log.error(said, child.role, signal.Signals(-code).name)
            self._end()
            sys.exit(code if code >= 0 else 1)

    def _is_answering(self) -> bool:
        """Whether a process answers HTTP."""
        return any(child != MODELS and self._stage[child][0] >= READY for child in self._running.values())

    def _is_child(self, child: Child, handlers: Mapping[signal.Signals, object]) -> bool:
        """Fork a process; True in it."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # one that came now would be obeyed by the wrong handler
        if child != MODELS and child in self._replaced:
            self.peers.expect(child.number)
        pid = os.fork()
        if pid:
            self._running[pid] = child
            for _ in range(self._signals if child != MODELS else 0):
                _send(pid, signal.SIGTERM)
        else:
            self._own, self.peers.number = child, child.number
            os.setpgrp()  # Ctrl-C reaches the parent alone, which passes it on
            for number, handler in handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if pid:
            return False
        os.close(self._pipes["http"][1])
        if child == MODELS:
            os.close(self._pipes["models"][1])
        threading.Thread(target=_end_with, args=[self._pipes[child.role][0]], daemon=True, name="parent").start()
        return True

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        """To those that answer HTTP: the models are told when these have ended."""
        self._signals += 1
        if self._signals == 1:
            signal.setitimer(signal.ITIMER_REAL, self._drain_seconds + END_SECONDS)
        elif self._signals == 2:
            signal.setitimer(signal.ITIMER_REAL, FORCED_SECONDS)
        self._send_http(number)

    def _give_up(self, _number: int, _frame: FrameType | None) -> None:
        """Those that answer HTTP have had their time, and then the models: what hangs hears no signal."""
        http = [pid for pid, child in self._running.items() if child != MODELS]
        for pid in http or list(self._running):
            _send(pid, signal.SIGKILL)
        signal.setitimer(signal.ITIMER_REAL, FORCED_SECONDS if http else 0)

    def _send_http(self, number: int) -> None:
        for pid, child in list(self._running.items()):
            if child != MODELS:
                _send(pid, number)

    def _end(self) -> None:
        """End the other processes: by force where it takes too long, or another signal comes."""
        self._close()
        for pid in self._running:
            _send(pid, signal.SIGTERM)
        until, signals = time.monotonic() + END_SECONDS, self._signals
        while self._running:
            if time.monotonic() > until or self._signals > signals:
                for pid in self._running:
                    _send(pid, signal.SIGKILL)
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in self._running:
                _is_forced(self._running.pop(pid), os.waitstatus_to_exitcode(status))
            time.sleep(POLL_SECONDS)
        for number in (*SIGNALS, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)  # all have ended, and so does this one


def _is_forced(child: Child, code: int) -> bool:
    """Whether a process that was to end did not do so by itself, which is said: what it had accepted is lost."""
    is_forced = code < 0 and -code not in SIGNALS
    if is_forced:
        log.error("the %s process was ended by %s before it had done its work", child.role, signal.Signals(-code).name)
    return is_forced


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _end_with(pipe: int) -> None:
    """On a thread: end this process when nobody holds the other end of a pipe any more."""
    os.read(pipe, 1)
    _send(os.getpid(), signal.SIGTERM)
