"""The batch script as a scheduler runs it: bash, real signals, and a ``scontrol`` that notes what it was asked."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentwire.bridge.checkpoint import read_manifest
from latentwire.training.config import TrainConfig
from latentwire.training.loop import train
from latentwire.training.slurm import SlurmJob, render
from tests.integration.conftest import MakeConfig
from tests.integration.runs import log_of, parts, quiet, task_of, write_toml

PATIENCE_SECONDS = 300.0
SCONTROL = """\
#!/bin/bash
case "$*" in
    "--oneliner show job 25") echo "JobId=25 JobState=$(cat state) Reason=None" ;;
    "requeue 25") echo requeue >>asked; exit "$(cat refusal 2>/dev/null || echo 0)" ;;
    *) echo "scontrol: unexpected $*" >&2; exit 1 ;;
esac
"""


class Scheduler:
    """A folder to work in, and what starts a script in it as SLURM would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "my bridges"
        self.tools = self.folder / "tools"
        self.tools.mkdir(parents=True)
        self.program("scontrol", SCONTROL)
        self.becomes("RUNNING")

    def program(self, name: str, text: str) -> None:
        (self.tools / name).write_text(text)
        (self.tools / name).chmod(0o755)

    def becomes(self, state: str) -> None:
        """The state of the job, as SLURM will tell it."""
        (self.folder / "state").write_text(state)

    def job(self, **changes: Any) -> SlurmJob:
        path = f"export PATH={shlex.quote(str(self.tools))}:{Path(sys.executable).parent}:/usr/bin:/bin"
        values = {"account": "a", "partition": "p", "working_directory": self.folder, "gpus": 0, "time": "60"}
        return SlurmJob.model_validate({**values, "config": "run.toml", "setup": path, **changes})

    def start(self, job: SlurmJob, restart: int = 0) -> "subprocess.Popen[bytes]":
        (self.folder / "script").write_text(render(job))
        env = {**os.environ, "SLURM_JOB_ID": "25"} | ({"SLURM_RESTART_COUNT": str(restart)} if restart else {})
        with (self.folder / "out").open("ab") as out:
            return subprocess.Popen(["bash", "script"], cwd=self.folder, env=env, stdout=out, stderr=out)

    @property
    def output(self) -> str:
        """What the job printed, in all its starts."""
        return (self.folder / "out").read_text()

    @property
    def requeues(self) -> int:
        """How often a requeue was asked for."""
        asked = self.folder / "asked"
        return len(asked.read_text().splitlines()) if asked.exists() else 0

    def until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not happened():
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)


@pytest.fixture
def slurm(tmp_path: Path) -> Scheduler:
    return Scheduler(tmp_path)


def long_run(make: MakeConfig, folder: Path, **changes: Any) -> TrainConfig:
    """A run that is far from its end when it has taken a few steps; it saves at its end only."""
    task = task_of(folder, *((f"item {n} is {n * 7}", f" What is item {n}?", f" {n * 7}") for n in range(16)))
    return make(task=task, max_steps=100, save_every=1000, **changes)


def steps_in(folder: Path) -> int:
    log = folder / "log.jsonl"
    return len(log.read_bytes().splitlines()) if log.exists() else 0


def test_a_run_that_is_told_to_stop_twice_ends_as_one_never_stopped(make: MakeConfig, slurm: Scheduler) -> None:
    config = long_run(make, slurm.folder, out=slurm.folder / "runs/one")
    write_toml(slurm.folder / "run.toml", config)
    seen = 0
    for restart, sent in enumerate([signal.SIGUSR1, signal.SIGTERM]):
        shell = slurm.start(slurm.job(), restart)
        slurm.until(lambda: steps_in(config.out) > seen + 2)  # noqa: B023 -- called before seen changes
        shell.send_signal(sent)  # the shell alone gets it
        assert shell.wait(timeout=PATIENCE_SECONDS) == 0, slurm.output
        assert slurm.requeues == restart + 1 and f"saved after {sent.name[3:]}; asking" in slurm.output
        assert slurm.output.count("SIGUSR1: saved after step") == restart + 1
        before, seen = seen, steps_in(config.out)
        assert before < seen < config.max_steps
    assert slurm.start(slurm.job(), restart=2).wait(timeout=PATIENCE_SECONDS) == 0, slurm.output
    assert slurm.requeues == 2 and f"resumed after step {seen}" in slurm.output
    assert "job 25, restart 0\n" in slurm.output and "job 25, restart 2\n" in slurm.output
    straight = train(config.model_copy(update={"out": slurm.folder / "straight"}), quiet())
    assert parts(read_manifest(config.out)) == parts(straight)
    assert [record["step"] for record in log_of(config.out)] == list(range(1, config.max_steps + 1))


def test_processes_behind_torchrun_save_and_end_with_0(make: MakeConfig, slurm: Scheduler) -> None:
    config = long_run(make, slurm.folder, out=slurm.folder / "runs/two")
    write_toml(slurm.folder / "run.toml", config)
    shell = slurm.start(slurm.job(gpus=2))
    slurm.until(lambda: steps_in(config.out) > 2)
    shell.send_signal(signal.SIGUSR1)
    assert shell.wait(timeout=PATIENCE_SECONDS) == 0, slurm.output
    assert slurm.requeues == 1 and "2 processes" in slurm.output
    assert slurm.output.count("SIGUSR1: saved after step") == 1 and steps_in(config.out) < config.max_steps


# What the script does around a run, with a run that only waits for its signal.
WAITS = """\
#!/bin/bash
trap 'echo told; told=yes' USR1
touch ready
until [ -n "$told" ]; do sleep 0.02; done
sleep 0.3
exit "$(cat code 2>/dev/null || echo 0)"
"""


@pytest.fixture
def waiting(slurm: Scheduler) -> Scheduler:
    """A scheduler whose runs end 0.3 seconds after their signal."""
    slurm.program("latentwire", WAITS)
    return slurm


def ended(slurm: Scheduler, *signals: int, **changes: Any) -> int:
    """The exit code of a script that gets signals, a moment apart, once its run listens."""
    shell = slurm.start(slurm.job(**changes))
    slurm.until((slurm.folder / "ready").exists)
    for sent in signals:
        shell.send_signal(sent)
        time.sleep(0.1)
    return shell.wait(timeout=PATIENCE_SECONDS)


def test_a_second_signal_while_the_run_saves_ends_nothing_early(waiting: Scheduler) -> None:
    assert ended(waiting, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1) == 0
    assert waiting.requeues == 1 and "saved after USR1 TERM USR1; asking" in waiting.output


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_slurm_is_ending_already_is_not_revived(waiting: Scheduler, sent: int) -> None:
    waiting.becomes("COMPLETING")  # what scancel makes of it before it sends a signal
    assert ended(waiting, sent) == 0
    assert waiting.requeues == 0 and "told" in waiting.output


def test_a_run_that_fails_is_not_requeued_and_its_code_is_the_jobs(waiting: Scheduler) -> None:
    (waiting.folder / "code").write_text("3")
    assert ended(waiting, signal.SIGUSR1) == 3 and waiting.requeues == 0


def test_a_run_that_ends_by_itself_is_not_requeued(slurm: Scheduler) -> None:
    slurm.program("latentwire", "#!/bin/bash\ntouch ready\n")
    assert ended(slurm) == 0 and slurm.requeues == 0


def test_a_job_that_shall_not_be_requeued_is_not_but_saves(waiting: Scheduler) -> None:
    assert ended(waiting, signal.SIGUSR1, requeue=False) == 0
    assert waiting.requeues == 0 and "told" in waiting.output


def test_a_requeue_that_is_refused_fails_the_job(waiting: Scheduler) -> None:
    (waiting.folder / "refusal").write_text("4")
    assert ended(waiting, signal.SIGUSR1) == 4 and waiting.requeues == 1


def test_an_environment_that_cannot_be_set_up_starts_nothing(slurm: Scheduler) -> None:
    slurm.program("latentwire", "#!/bin/bash\necho began\n")
    shell = slurm.start(slurm.job(setup=["source gone/bin/activate"]))
    assert shell.wait(timeout=PATIENCE_SECONDS) == 1 and "began" not in slurm.output
