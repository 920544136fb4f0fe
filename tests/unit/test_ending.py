"""A command that signals end: whenever they come, how many, and whatever they meet."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from latentwire.service.cli.signals import ENDING, ended_by_signals

PROGRAM = """
import os, signal, subprocess, sys, time
from latentwire.service.cli.signals import ended_by_signals
interrupt = lambda: os.kill(os.getpid(), signal.{signal})
with ended_by_signals():
{inside}
print("after")
{after}
"""


def ended(inside: str, number: signal.Signals = signal.SIGINT, after: str = "") -> list[str]:
    """The words a program printed that a signal ended: with code 0 and without an error."""
    block = textwrap.indent(textwrap.dedent(inside), "    ")
    code = PROGRAM.format(signal=number.name, inside=block, after=after)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_what_is_inside(number: signal.Signals) -> None:
    assert ended("interrupt(); print('not reached')", number) == ["after"]


@pytest.mark.parametrize("number", ENDING)
def test_signals_that_meet_the_tidying_up_or_come_after_it_are_not_heard(number: signal.Signals) -> None:
    inside = """
        try:
            interrupt()
        finally:
            interrupt()
            try:
                raise OSError
            except OSError:
                interrupt()
            print("tidied")
    """
    assert ended(inside, number, after="interrupt(); print('alive')") == ["tidied", "after", "alive"]


def test_a_signal_whose_interrupt_was_swallowed_is_heard_when_it_comes_again() -> None:
    assert ended("try: interrupt()\nexcept BaseException: print('swallowed')\ninterrupt()\nprint('deaf')") == [
        "swallowed",
        "after",
    ]


def test_a_signal_in_code_made_from_a_string_ends_with_code_0_too() -> None:
    """Python itself would die of a KeyboardInterrupt that was there, when it ends."""
    assert ended("exec('interrupt(); time.sleep(60)')") == ["after"]


def test_a_process_that_was_just_started_is_not_left_behind() -> None:
    inside = """
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
        print(child.pid)
        interrupt()
    """
    pid, *_ = ended(inside)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_what_nobody_interrupted_leaves_the_signals_as_they_were() -> None:
    before = [signal.getsignal(number) for number in ENDING]
    with ended_by_signals():
        assert [signal.getsignal(number) for number in ENDING] != before
    assert [signal.getsignal(number) for number in ENDING] == before
