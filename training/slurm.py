"""A training run as a SLURM job: the batch script, and what can be refused before it is submitted.

What SLURM does, seen on a real one (22.05): ``--signal=B:USR1`` reaches the batch shell alone, while ``scancel``, a
preemption and the time limit send SIGTERM to the shell and to everything it started, and mark the job COMPLETING. A
requeue asked for in that state is obeyed too: it would bring back what somebody cancelled. So the script asks only
while its job is RUNNING, and leaves to SLURM what SLURM is ending already.

Importing this module needs no torch.
"""

import getpass
import re
import shlex
import subprocess
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from latentwire.bridge.errors import InvalidRequest, first_line
from latentwire.training.config import in_one_sentence

WORD = r"^[\w.+-]+$"  # what SLURM's own names are made of
TIME = re.compile(r"(?:(\d+)-)?(\d+(?::\d\d){0,2})", re.ASCII)
PATIENCE_SECONDS = 60  # a busy controller answers late
REFUSED = {"--resume": "the script gives it", "--overwrite": "each restart would begin again"}


class SlurmJob(BaseModel):
    """Frozen; an unknown key is an error. Sizes are per node or per process, as SLURM counts them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    account: str = Field(pattern=WORD, description="Account that pays.")
    partition: str = Field(pattern=WORD, description="Partition to run in.")
    working_directory: Path = Field(description="Where the run starts and the output goes; an absolute path.")
    gpus: int = Field(ge=0, description="GPUs per node; each has a process of its own. 0 trains on the CPU.")
    time: str = Field(description="Longest time of one start: HH:MM:SS, D-HH:MM:SS, or minutes.")
    name: str = Field("latentwire", pattern=WORD, description="Name of the job.")
    nodes: int = Field(1, ge=1, description="Nodes.")
    cpus: int | None = Field(None, ge=1, description="CPU cores per process.")
    memory: str | None = Field(None, pattern=r"^\d+[KMGT]?$", description="Memory per node, e.g. 64G.")
    config: Path | None = Field(None, description="TOML file of the run, from the working directory.")
    arguments: list[str] = Field([], description="Arguments of 'latentwire train'; they win over config.")
    setup: list[str] = Field([], description="Lines of shell that put 'latentwire' on the PATH.")
    requeue: bool = Field(True, description="Go on in a new start after a preemption or the time limit.")
    signal_seconds: int = Field(120, ge=1, le=65535, description="Seconds before the limit in which the run saves.")

    @field_validator("arguments", "setup", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("time")
    @classmethod
    def _a_time(cls, value: str) -> str:
        if not seconds_of(value):
            raise ValueError("expected HH:MM:SS, D-HH:MM:SS or minutes, above 0")
        return value

    @field_validator("working_directory")
    @classmethod
    def _from_the_root(cls, value: Path) -> Path:
        if not value.is_absolute() or not str(value).isprintable():
            raise ValueError("expected an absolute path in one line")
        return value

    @model_validator(mode="after")
    def _whole(self) -> "SlurmJob":
        if self.config is None and not self.arguments:
            raise ValueError("one of config and arguments is needed: what 'latentwire train' shall do")
        for flag, why in REFUSED.items():
            if flag in self.arguments:
                raise ValueError(f"arguments must not hold {flag}: {why}")
        if self.signal_seconds >= (seconds_of(self.time) or 0):
            raise ValueError(f"signal_seconds {self.signal_seconds} must be less than time {self.time!r}")
        return self

    @property
    def processes(self) -> int:
        """Processes on each node."""
        return max(1, self.gpus)


def seconds_of(time: str) -> int | None:
    """Seconds of a time as SLURM writes it: minutes, M:SS, H:MM:SS, D-H, D-H:MM or D-H:MM:SS; None where it is none."""
    match = TIME.fullmatch(time)
    if match is None:
        return None
    days, clock = match[1], match[2].split(":")
    if days is None and len(clock) < 3:
        clock = ["0", *clock]  # without days the first number is minutes
    hours, minutes, seconds = [int(part) for part in (*clock, 0, 0)][:3]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def read_job(file: Path) -> SlurmJob:
    """A job from a TOML file.

    Raises:
        InvalidRequest: The file is no TOML, or a key is missing, unknown or of the wrong type; it is named.
    """
    try:
        values = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file}: {error}") from None
    try:
        return SlurmJob.model_validate(values)
    except ValidationError as error:
        raise in_one_sentence(error) from None


SCRIPT = """\
#!/bin/bash
{directives}
# Environments are not followed by the linter; a task expands its ranks itself.
# shellcheck disable=SC1091,SC2016

{setup}{rendezvous}echo "job $SLURM_JOB_ID, restart ${{SLURM_RESTART_COUNT:-0}}"

# A signal is handed on, as USR1: the run saves after the step it is in and ends with 0. bash runs a trap only between
# commands or inside `wait`: so the run is in the background, and a `wait` that a trap cut short is repeated.
asked=''
trap 'asked+=" USR1"; {hand_on} "$!" 2>/dev/null' USR1
trap 'asked+=" TERM"; {hand_on} "$!" 2>/dev/null' TERM
{command} &
run=$!
until before=$asked; wait "$run"; status=$?; [ "$asked" = "$before" ]; do :; done

{end}exit "$status"
"""
SETUP = """\
set -e
{lines}
set +e

"""
# Every process is a task: srun hands USR1 on to all of them, and ends with 0 when they all do.
RENDEZVOUS = """\
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
"""
RANKS = "RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS"
REQUEUE = """\
# A job that SLURM is ending (cancelled, or requeued by SLURM itself) is no longer RUNNING: a requeue would revive it.
if [ -n "$asked" ] && [ "$status" -eq 0 ] &&
    scontrol --oneliner show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
    echo "saved after$asked; asking for a requeue of job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID" || status=$?
fi
"""


def render(job: SlurmJob) -> str:
    """The batch script of a job, for ``sbatch``.

    It may be started any number of times: each start goes on from the state in ``--out``. A signal that comes as the
    run ends may cost one more start, which finds nothing left to do.
    """
    return SCRIPT.format(
        directives="\n".join(f"#SBATCH {line}" for line in _directives(job)),
        setup=SETUP.format(lines="\n".join(job.setup)) if job.setup else "",
        rendezvous=RENDEZVOUS if job.nodes > 1 else "",
        hand_on=_hand_on(job),
        command=_command(job),
        end=REQUEUE if job.requeue else "",
    )


def _directives(job: SlurmJob) -> list[str]:
    options = {
        "job-name": job.name,
        "account": job.account,
        "partition": job.partition,
        "chdir": shlex.quote(str(job.working_directory)),
        "nodes": job.nodes,
        "ntasks-per-node": job.processes,
        "gpus-per-node": job.gpus or None,
        "cpus-per-task": job.cpus,
        "mem": job.memory,
        "time": job.time,
        "signal": f"B:USR1@{job.signal_seconds}",
        "output": f"{job.name}-%j.out",
        "open-mode": "append",
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [*given, "--requeue" if job.requeue else "--no-requeue"]


def _hand_on(job: SlurmJob) -> str:
    """What tells the run to save and end, by the id of the process that the script started.

    srun takes TERM as an order to kill at once; torchrun dies of USR1 and makes a failure of TERM, so its children are
    told and not it.
    """
    return "pkill -USR1 -P" if job.nodes == 1 and job.processes > 1 else "kill -USR1"


def _command(job: SlurmJob) -> str:
    """The line that starts the run; one process, those of one node, or those of several."""
    config = [] if job.config is None else ["--config", str(job.config)]
    train = shlex.join(["train", *config, *job.arguments, "--resume"])
    if job.nodes > 1:
        cores = "" if job.cpus is None else f" --cpus-per-task={job.cpus}"  # srun does not take it from the job
        return f"srun --kill-on-bad-exit=1{cores} bash -c '{RANKS} exec \"$@\"' bash latentwire {train}"
    if job.processes > 1:
        return f"torchrun --standalone --nproc-per-node {job.processes} -m latentwire {train}"
    return f"latentwire {train}"


def check(job: SlurmJob) -> None:
    """Refuse what SLURM would refuse, or fail on hours later. Run it on a login node of the cluster.

    Raises:
        InvalidRequest: The working directory or the run's file is missing or not writable, the partition or the
            account is not there for this user, the time is over the partition's limit, or SLURM does not answer.
    """
    _check_folder(job)
    _check_partition(job)
    _check_account(job)


def _check_folder(job: SlurmJob) -> None:
    folder = job.working_directory
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        wrong = "writable" if folder.is_dir() else "a folder"
        raise InvalidRequest(f"working_directory {str(folder)!r} is not {wrong}", param="working_directory") from None
    if job.config is not None and not (folder / job.config).is_file():
        raise InvalidRequest(f"config {str(job.config)!r} is not a file, seen from {str(folder)!r}", param="config")


def _check_partition(job: SlurmJob) -> None:
    rows = (line.split("|") for line in _ask("sinfo", "--all", "--noheader", "--format=%R|%l"))
    limits = {row[0].strip(): row[-1].strip() for row in rows}
    if job.partition not in limits:
        raise InvalidRequest(f"no partition {job.partition!r}; there are: {_names(limits)}", param="partition")
    limit = limits[job.partition]
    most = seconds_of(limit)
    if most is not None and (seconds_of(job.time) or 0) > most:  # "infinite" is no time
        message = f"time {job.time!r} is over the limit of partition {job.partition!r}, {limit!r}"
        raise InvalidRequest(message, param="time")


def _check_account(job: SlurmJob) -> None:
    user = getpass.getuser()
    asked = ("--noheader", "--parsable2", "show", "associations", f"user={user}", "format=account")
    accounts = {line.strip() for line in _ask("sacctmgr", *asked)} - {""}
    if job.account.lower() not in {name.lower() for name in accounts}:  # SLURM keeps them in lower case
        message = f"user {user!r} has no account {job.account!r}; there are: {_names(accounts)}"
        raise InvalidRequest(message, param="account")


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _ask(tool: str, *arguments: str) -> list[str]:
    """The lines that a SLURM tool prints.

    Raises:
        InvalidRequest: It is not there, fails, or does not answer.
    """
    try:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS)
    except FileNotFoundError:
        raise InvalidRequest(f"{tool} is not on the PATH: check a job on a login node of the cluster") from None
    except subprocess.CalledProcessError as error:
        raise InvalidRequest(f"{tool} failed: {first_line(Exception(error.stderr))}") from None
    except subprocess.TimeoutExpired:
        raise InvalidRequest(f"{tool} did not answer within {PATIENCE_SECONDS} seconds") from None
    return done.stdout.splitlines()


app = typer.Typer(no_args_is_help=True, help="Training runs as SLURM jobs.")
JobFile = Annotated[Path, typer.Argument(metavar="JOB.toml", help="Account, partition, GPUs, time, and the run.")]


@app.command("render")
def render_command(
    job: JobFile, out: Annotated[Path | None, typer.Option(help=r"File for the script. \[default: printed]")] = None
) -> None:
    """Write the batch script of a job that saves when it is told to end, and goes on when it is started again."""
    script = render(read_job(job))
    if out is None:
        typer.echo(script, nl=False)
        return
    out.write_text(script)
    typer.echo(f"wrote {out}")


@app.command("check")
def check_command(job: JobFile) -> None:
    """Refuse, before it is submitted, a job whose account, partition, time or folder this cluster does not have."""
    check(read_job(job))
    typer.echo(f"{job}: account, partition, time and working directory are right")
