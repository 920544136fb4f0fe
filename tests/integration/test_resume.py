"""A run that was interrupted, killed or told to stop goes on as if nothing had happened; another one is not resumed."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire.bridge.checkpoint import load_bridge, read_manifest
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.tasks import load_task
from latentwire.bridge.models import fingerprint_of
from latentwire.training import loop, prepare
from latentwire.training.loop import train
from latentwire.training.state import Trained, load_state, save_state
from tests.conftest import write_model
from tests.integration.conftest import MakeConfig
from tests.integration.runs import (
    ROOT,
    Stopped,
    files_of,
    interrupted,
    log_of,
    parts,
    prepared,
    quiet,
    said,
    states_of,
    steps_taken,
    write_toml,
)


@pytest.mark.parametrize("fatal", [0, 1, 2, 3, 5])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(make: MakeConfig, tmp_path: Path, fatal: int) -> None:
    straight = train(make(out=tmp_path / "straight"), quiet())
    config = make()
    interrupted(config, fatal)
    torch.manual_seed(123)  # whatever the new process did before
    resumed = train(config, quiet(), resume=True)
    assert parts(resumed) == parts(straight) and resumed.bridge_id == straight.bridge_id
    assert log_of(config.out) == log_of(tmp_path / "straight")
    assert [record["step"] for record in log_of(config.out)] == [1, 2, 3, 4, 5, 6]


def test_a_run_with_every_objective_goes_on_as_if_nothing_had_happened(make: MakeConfig, tmp_path: Path) -> None:
    names = ("first_k", "kd", "reconstruction", "continuation", "margin", "diversity")
    on = {**{f"{name}_weight": 0.5 for name in names}, "mode_tokens": 2, "probe_every": 2, "max_steps": 4}
    straight = train(make(out=tmp_path / "straight", **on), quiet())
    config = make(**on)
    interrupted(config, 3)
    assert parts(train(config, quiet(), resume=True)) == parts(straight)
    assert log_of(config.out) == log_of(tmp_path / "straight")


def test_chance_goes_on_where_it_stopped(make: MakeConfig) -> None:
    run = prepared(make())
    run.config.out.mkdir(exist_ok=True)
    trained = Trained(run.parameters, run.optimizers, run.scaler)
    save_state(run.config.out, run.identity, 5, trained, best=0.5)
    drawn = torch.rand(4)
    torch.manual_seed(99)
    assert load_state(run.config.out, run.identity, trained) == (5, {"best": 0.5})
    assert torch.equal(torch.rand(4), drawn)


SIGNALLED = """
import os, signal, sys
from pathlib import Path
import torch
from latentwire.service.__main__ import main
from latentwire.training import prepare
from latentwire.training.monitor import Monitor

torch.set_num_threads(1)
prepare.CHECKED = 20
folder, *signals = sys.argv[1:]
for name in signals:
    if (child := os.fork()) == 0:
        def log(self, record, log=Monitor.log):
            log(self, record)
            if record.step == 5:
                os.kill(os.getpid(), signal.Signals[name])

        Monitor.log = log
        sys.argv = ["latentwire", "train", "--config", str(Path(folder, name + ".toml"))]
        for number in (1, 2):
            os.dup2(os.open(Path(folder, name + ".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        main()
    _, status = os.waitpid(child, 0)
    print(name, os.waitstatus_to_exitcode(status))
"""


def test_a_run_that_is_killed_or_told_to_stop_is_resumed_bit_for_bit(make: MakeConfig, tmp_path: Path) -> None:
    """One interpreter and a child for each signal: SIGKILL ends it at once, the others after the step and a save."""
    signals = ("SIGKILL", "SIGTERM", "SIGUSR1")
    configs = {name: make(out=tmp_path / name) for name in signals}
    for name, config in configs.items():
        write_toml(tmp_path / f"{name}.toml", config)
    command = [sys.executable, "-c", SIGNALLED, str(tmp_path), *signals]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    codes = dict(line.split() for line in done.stdout.splitlines())
    assert codes == {"SIGKILL": str(-signal.SIGKILL), "SIGTERM": "0", "SIGUSR1": "0"}
    straight = train(make(out=tmp_path / "straight"), quiet())
    for name, config in configs.items():
        assert [record["step"] for record in log_of(config.out)] == [1, 2, 3, 4, 5]
        told, lines = name != "SIGKILL", (tmp_path / f"{name}.txt").read_text().splitlines()
        assert states_of(config.out)[-1] == ("state-00000005.json" if told else "state-00000004.json")
        line = f"{name}: saved after step 5; --resume goes on from there"
        assert lines.count(line) == told and "Traceback" not in "".join(lines)
        console = quiet()
        assert parts(train(config, console, resume=True)) == parts(straight)
        assert f"resumed after step {5 if told else 4}" in said(console)
        assert log_of(config.out) == log_of(tmp_path / "straight")


def test_signals_mean_again_what_they_meant_when_the_run_is_over(make: MakeConfig) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    train(make(max_steps=1), quiet())
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


class Killed(BaseException):
    """The process is gone: nothing after this ran."""


def dying_at(patch: pytest.MonkeyPatch, fatal: int) -> list[str]:
    """Die before write number ``fatal`` (a sync to disk or a rename), counted from 0; the writes that were made."""
    made: list[str] = []

    def before(name: str, call: Any) -> Any:
        def write(*args: Any) -> Any:
            if len(made) == fatal:
                raise Killed
            made.append(name)
            return call(*args)

        return write

    patch.setattr(os, "fsync", before("fsync", os.fsync))
    patch.setattr(Path, "replace", before("replace", Path.replace))
    return made


def test_a_run_killed_at_any_write_of_a_save_is_resumed_bit_for_bit(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Time saved, no more.
    monkeypatch.setattr(prepare, "CHECKED", 1)
    monkeypatch.setattr(prepare, "load_model", cache(prepare.load_model))
    monkeypatch.setattr(prepare, "code_version", lambda: "test")
    shape = {"max_steps": 2, "save_every": 1, "alignment_steps": 1, "batch_size": 2, "keep_last": 1, "depth": 0}
    straight = train(make(out=tmp_path / "straight", **shape), quiet())
    once, config, points = make(out=tmp_path / "once", **shape), make(**shape), 0
    interrupted(once, 1)
    while True:
        shutil.copytree(once.out, config.out)
        try:
            with pytest.MonkeyPatch.context() as patch:
                made = dying_at(patch, points)
                train(config, quiet(), resume=True)
            break
        except Killed:
            assert len(made) == points
        assert parts(train(config, quiet(), resume=True)) == parts(straight)
        assert len(log_of(config.out)) == 2 and states_of(config.out) == ["state-00000002.json"]
        assert not list(config.out.glob(".*")) and len(list(config.out.glob("*.safetensors"))) == 3
        shutil.rmtree(config.out)
        points += 1
    # Two logs, then state, its name, encoder, head and config; each is synced, renamed, and its folder synced.
    assert points == (2 + 5) * 3


@pytest.mark.parametrize("fatal, left", [(3, [2, 3, 4, 5]), (1, [0, 1, 2, 3, 4, 5])])
def test_resuming_repeats_no_saved_step(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, fatal: int, left: list[int]
) -> None:
    config = make()
    interrupted(config, fatal)
    taken, console = steps_taken(monkeypatch), quiet()
    train(config, console, resume=True)
    assert taken == left and ("resumed after step 2" in said(console)) == (fatal == 3)


def test_a_torn_last_line_of_the_log_stops_no_resuming_and_is_dropped(make: MakeConfig, tmp_path: Path) -> None:
    straight = train(make(out=tmp_path / "straight"), quiet())
    config = make()
    interrupted(config, 2)
    with (config.out / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert parts(train(config, quiet(), resume=True)) == parts(straight)
    assert log_of(config.out) == log_of(tmp_path / "straight")


def test_resuming_a_finished_run_changes_nothing(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(max_steps=2)
    first = train(config, quiet())
    taken = steps_taken(monkeypatch)
    assert parts(train(config, quiet(), resume=True)) == parts(first) and len(log_of(config.out)) == 2
    assert not taken


def test_resuming_where_nothing_was_begun_begins(make: MakeConfig) -> None:
    assert len(log_of(train(make(max_steps=1), quiet(), resume=True) and make().out)) == 1


def test_the_state_is_there_before_the_checkpoint(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(max_steps=1)

    def killed(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_bridge", killed)
        with pytest.raises(Stopped):
            train(config, quiet())
    names = [path.name.split("-")[0] for path in sorted(config.out.iterdir())]
    assert names == ["events.jsonl", "log.jsonl", "state", "state"]
    assert train(config, quiet(), resume=True) == read_manifest(config.out)


@pytest.mark.parametrize(
    "key, was, now", [("learning_rate", 0.003, 0.5), ("max_steps", 2, 3), ("seed", 0, 4), ("ratio", 8, 4)]
)
def test_resuming_another_configuration_is_refused_with_both_values(
    make: MakeConfig, key: str, was: object, now: object
) -> None:
    train(make(**{"max_steps": 2, key: was}), quiet())
    with pytest.raises(InvalidRequest, match=f"--resume: {key} was {was}, now {now}") as caught:
        train(make(**{"max_steps": 2, key: now}), quiet(), resume=True)
    assert caught.value.param == key


def test_resuming_with_other_data_is_refused_with_both_digests(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make(max_steps=2), quiet())
    before = load_task("world")
    monkeypatch.setattr(prepare, "load_task", lambda name: replace(before, data_sha256="f" * 64))
    with pytest.raises(InvalidRequest, match=f"data_sha256 was '{before.data_sha256}', now 'ffff"):
        train(make(max_steps=2), quiet(), resume=True)


@pytest.mark.parametrize("role, family", [("sender", "neox"), ("receiver", "llama")])
def test_resuming_with_another_model_under_the_same_name_is_refused_with_both_fingerprints(
    make: MakeConfig, tmp_path: Path, role: str, family: str
) -> None:
    folder = write_model(tmp_path / "model", family)
    config = make(max_steps=2, **{role: str(folder)})
    train(config, quiet())
    was, files = fingerprint_of(str(folder)), files_of(config.out)
    now = fingerprint_of(str(write_model(folder, family, seed=1)))
    with pytest.raises(InvalidRequest, match=f"{role}_fingerprint was '{was}', now '{now}'"):
        train(config, quiet(), resume=True)
    assert files_of(config.out) == files


@pytest.mark.parametrize("free", [{"save_every": 1}, {"keep_last": 1}, {"probe_every": 1}, {"on_collapse": "stop"}])
def test_saving_more_often_or_watching_closer_is_no_other_run(make: MakeConfig, free: dict[str, Any]) -> None:
    first = train(make(max_steps=2), quiet())
    assert parts(train(make(max_steps=2, **free), quiet(), resume=True)) == parts(first)


def test_a_folder_with_a_checkpoint_is_not_written_over_unasked(make: MakeConfig) -> None:
    config = make(max_steps=1)
    first = train(config, quiet())
    with pytest.raises(InvalidRequest, match="already holds a checkpoint; give --resume, --overwrite"):
        train(config, quiet())
    assert read_manifest(config.out) == first
    second = train(make(max_steps=1, seed=1), quiet(), overwrite=True)
    assert parts(second) != parts(first) and len(log_of(config.out)) == 1


def test_a_folder_that_another_run_is_writing_is_refused_until_that_one_has_ended(make: MakeConfig) -> None:
    config = make(max_steps=1)

    def second_run() -> None:
        with pytest.raises(InvalidRequest, match=f"{config.out}: another run is writing there; give another --out"):
            train(config, quiet(), overwrite=True)
        assert not files_of(config.out)

    first = train(config, quiet(), ready=second_run)
    assert read_manifest(config.out) == first
    assert parts(train(config, quiet(), overwrite=True)) == parts(first)


def test_overwriting_leaves_no_state_of_the_run_before(make: MakeConfig) -> None:
    train(make(save_every=2, max_steps=6, keep_last=3), quiet())
    config = make(max_steps=1, seed=1)
    second = train(config, quiet(), overwrite=True)
    assert states_of(config.out) == ["state-00000001.json"]
    assert len(list(config.out.glob("state-*.safetensors"))) == 1 and load_bridge(config.out)[0] == second


def test_a_run_that_was_overwritten_and_died_before_its_first_save_is_not_resumed_from_the_one_before(
    make: MakeConfig,
) -> None:
    train(make(max_steps=2), quiet())
    config = make(max_steps=2, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", lambda *_, **__: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            train(config, quiet(), overwrite=True)
    assert not states_of(config.out)
    with pytest.raises(InvalidRequest, match="holds a checkpoint but no state to go on from"):
        train(config, quiet(), resume=True)
