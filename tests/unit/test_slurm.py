"""A job file becomes a script that bash and sbatch read as meant; what cannot run is refused before it is queued."""

import getpass
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentwire.bridge.errors import InvalidRequest
from latentwire.training import slurm
from latentwire.training.slurm import SlurmJob, check, read_job, render, seconds_of

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy/slurm"
WHOLE = (
    'account = "nlp"\npartition = "gpu"\nworking_directory = "/w"\ngpus = 1\ntime = "1:00:00"\nconfig = "run.toml"\n'
)


def job(**changes: Any) -> SlurmJob:
    values = {"account": "nlp", "partition": "gpu", "working_directory": "/w", "gpus": 1, "time": "1:00:00"}
    return SlurmJob.model_validate({**values, "config": "run.toml", **changes})


def directives(script: str) -> list[str]:
    """What sbatch reads, as the words it makes of them."""
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line)]


def test_the_example_is_what_its_job_file_renders_to() -> None:
    assert (DEPLOY / "job.sh").read_text() == render(read_job(DEPLOY / "job.toml"))


SHAPES = [
    job(),
    job(gpus=0, requeue=False, setup="module load cuda"),
    job(gpus=4, cpus=8, memory="64G"),
    job(gpus=4, nodes=2, cpus=8, arguments=["--out", "it's here"]),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_bash_accepts_the_script(shape: SlurmJob) -> None:
    subprocess.run(["bash", "-n"], input=render(shape), text=True, check=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_shellcheck_accepts_the_script(shape: SlurmJob) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-"], input=render(shape), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_sbatch_is_told_everything() -> None:
    shape = job(name="news", gpus=4, nodes=2, cpus=8, memory="64G", time="1-12:00:00", signal_seconds=300)
    assert directives(render(shape)) == [
        "--job-name=news", "--account=nlp", "--partition=gpu", "--chdir=/w", "--nodes=2", "--ntasks-per-node=4",
        "--gpus-per-node=4", "--cpus-per-task=8", "--mem=64G", "--time=1-12:00:00", "--signal=B:USR1@300",
        "--output=news-%j.out", "--open-mode=append", "--requeue",
    ]  # fmt: skip


def test_what_was_not_asked_for_is_left_to_the_cluster() -> None:
    words = directives(render(job(gpus=0, requeue=False)))
    assert not any(word.startswith(("--gpus", "--cpus", "--mem")) for word in words)
    assert "--no-requeue" in words and "scontrol requeue" not in render(job(requeue=False))


@pytest.mark.parametrize("folder", ["/scratch/my bridges", '/scratch/it\'s "here" $HOME'])
def test_a_working_directory_reaches_sbatch_as_one_word(folder: str) -> None:
    assert f"--chdir={folder}" in directives(render(job(working_directory=folder)))


@pytest.mark.parametrize(
    "changes, start, told",
    [
        ({"gpus": 0}, "latentwire train", "kill -USR1"),
        ({"gpus": 1}, "latentwire train", "kill -USR1"),
        ({"gpus": 4}, "torchrun --standalone --nproc-per-node 4 -m latentwire train", "pkill -USR1 -P"),
        ({"gpus": 4, "nodes": 2, "cpus": 8}, "srun --kill-on-bad-exit=1 --cpus-per-task=8 bash -c", "kill -USR1"),
        ({"nodes": 2}, "srun --kill-on-bad-exit=1 bash -c", "kill -USR1"),
    ],
)
def test_the_processes_are_started_by_what_can_be_told_to_stop(changes: dict[str, int], start: str, told: str) -> None:
    lines = render(job(**changes)).splitlines()
    (command,) = [line for line in lines if line.endswith(" &")]
    assert command.startswith(f"{start} ") and command.endswith(" --config run.toml --resume &")
    assert sum(f'{told} "$!"' in line for line in lines) == 2


def test_the_tasks_of_several_nodes_know_their_ranks_and_where_to_meet(tmp_path: Path) -> None:
    """The script itself, with an srun that starts the second of four tasks, and a latentwire that shows what it got."""
    show = '#!/bin/bash\necho "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT"\nprintf "<%s>" "$@"\n'
    srun = '#!/bin/bash\nshift\nSLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 exec "$@"\n'
    tools = tools_in(tmp_path, latentwire=show, srun=srun, scontrol="#!/bin/bash\necho node7\necho node8\n")
    script = render(job(gpus=2, nodes=2, config=None, arguments=["--task", "a b.toml", "--out", "it's $HOME"]))
    env = {**os.environ, "PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "25", "SLURM_JOB_NODELIST": "node[7-8]"}
    done = subprocess.run(["bash"], input=script, env=env, capture_output=True, text=True, check=True)
    told, given = done.stdout.splitlines()[1:]
    assert told == "3 1 4 node7 10025"
    assert given == "<train><--task><a b.toml><--out><it's $HOME><--resume>"


@pytest.mark.parametrize(
    "time, seconds",
    [
        ("90", 5400), ("90:30", 5430), ("08:00:00", 28800), ("1-12", 129600), ("1-12:30", 131400),
        ("1-12:00:01", 129601), ("infinite", None), ("", None), ("1-", None), ("8h", None), ("1:2:3:4", None),
        ("n/a", None), ("٣", None),
    ],
)  # fmt: skip
def test_a_time_is_read_as_slurm_reads_it(time: str, seconds: int | None) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    "line, words",
    [
        ("gpu = 2", "gpu: .*not permitted, got 2$"),
        ("gpus = -1", "gpus: .*, got -1$"),
        ("nodes = 0", "nodes: .*, got 0$"),
        ('time = "soon"', "time: expected HH:MM:SS, D-HH:MM:SS or minutes, above 0, got 'soon'"),
        ('time = "00:00:00"', "time: .*above 0, got '00:00:00'"),
        ("time = 08:00:00", "time: .*string, got '08:00:00'"),
        ('working_directory = "runs"', "working_directory: expected an absolute path in one line, got 'runs'"),
        ('working_directory = "/a\\nb"', "working_directory: expected an absolute path in one line"),
        ('account = "a b"', "account: .*'a b'"),
        ('name = "a\\n#SBATCH --x"', "name: "),
        ('memory = "lots"', "memory: .*'lots'"),
        ('arguments = ["--overwrite"]', "must not hold --overwrite: each restart would begin again"),
        ('arguments = "--resume"', "must not hold --resume: the script gives it"),
        ("signal_seconds = 3600", "signal_seconds 3600 must be less than time '1:00:00'"),
        ("x = ", r"job\.toml: "),
    ],
)
def test_a_wrong_key_is_named_with_its_value(tmp_path: Path, line: str, words: str) -> None:
    key = line.split(" ")[0]
    kept = "".join(f"{other}\n" for other in WHOLE.splitlines() if not other.startswith(f"{key} "))
    (tmp_path / "job.toml").write_text(f"{kept}{line}\n")
    with pytest.raises(InvalidRequest, match=words) as caught:
        read_job(tmp_path / "job.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["account", "partition", "working_directory", "gpus", "time"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    kept = [line for line in WHOLE.splitlines() if not line.startswith(f"{key} ")]
    (tmp_path / "job.toml").write_text("\n".join(kept))
    with pytest.raises(InvalidRequest, match=f"{key}: Field required"):
        read_job(tmp_path / "job.toml")


def test_a_job_without_a_run_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(WHOLE.replace('config = "run.toml"\n', ""))
    with pytest.raises(InvalidRequest, match="one of config and arguments is needed"):
        read_job(tmp_path / "job.toml")
    with pytest.raises(InvalidRequest, match=r"gone\.toml"):
        read_job(tmp_path / "gone.toml")


def test_making_a_script_needs_no_torch() -> None:
    code = "import sys, latentwire.training.slurm; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def tools_in(folder: Path, **tools: str) -> Path:
    """Programs of a cluster, as scripts."""
    for name, text in tools.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


SINFO = """\
#!/bin/bash
[ "$*" = "--all --noheader --format=%R|%l" ] || { echo "sinfo: unexpected $*" >&2; exit 1; }
printf 'gpu|8:00:00\\ndebug|30:00\\nlong|infinite\\n'
"""
SACCTMGR = f"""\
#!/bin/bash
[ "$*" = "--noheader --parsable2 show associations user={getpass.getuser()} format=account" ] ||
    {{ echo "sacctmgr: unexpected $*" >&2; exit 1; }}
printf 'nlp\\nvision\\nnlp\\n'
"""

Cluster = Callable[..., SlurmJob]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A cluster and a job it would take; keyword arguments change the job."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "work/run.toml").touch()
    tools = tools_in(tmp_path / "bin", sinfo=SINFO, sacctmgr=SACCTMGR)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return lambda **changes: job(**{"working_directory": tmp_path / "work", **changes})


@pytest.mark.parametrize(
    "changes", [{}, {"account": "NLP"}, {"time": "8:00:00"}, {"partition": "long", "time": "99-00"}]
)
def test_a_job_the_cluster_would_take_passes(cluster: Cluster, changes: dict[str, str]) -> None:
    check(cluster(**changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"partition": "gpus"}, "no partition 'gpus'; there are: debug, gpu, long"),
        ({"account": "speech"}, "has no account 'speech'; there are: nlp, vision"),
        ({"time": "8:00:01"}, "time '8:00:01' is over the limit of partition 'gpu', '8:00:00'"),
        ({"time": "31", "partition": "debug"}, "time '31' is over the limit of partition 'debug', '30:00'"),
        ({"working_directory": "/gone"}, "working_directory '/gone' is not a folder"),
        ({"working_directory": "/proc"}, "working_directory '/proc' is not writable"),
        ({"config": "gone.toml"}, "config 'gone.toml' is not a file, seen from"),
    ],
)
def test_what_the_cluster_would_refuse_is_refused_with_what_there_is(
    cluster: Cluster, changes: dict[str, str], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        check(cluster(**changes))
    assert caught.value.param in changes and "\n" not in str(caught.value)


@pytest.mark.parametrize("tool", ["sinfo", "sacctmgr"])
def test_a_machine_without_slurm_is_named(cluster: Cluster, tmp_path: Path, tool: str) -> None:
    (tmp_path / "bin" / tool).unlink()
    with pytest.raises(InvalidRequest, match=f"{tool} is not on the PATH: check a job on a login node"):
        check(cluster())


def test_a_tool_that_fails_or_hangs_is_named(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools_in(tmp_path / "bin", sinfo="#!/bin/bash\necho 'no controller' >&2\necho more >&2\nexit 1\n")
    with pytest.raises(InvalidRequest, match=r"^sinfo failed: no controller$"):
        check(cluster())
    monkeypatch.setattr(slurm, "PATIENCE_SECONDS", 0.2)
    tools_in(tmp_path / "bin", sinfo="#!/bin/bash\nexec sleep 60\n")
    with pytest.raises(InvalidRequest, match=r"sinfo did not answer within 0\.2 seconds"):
        check(cluster())
