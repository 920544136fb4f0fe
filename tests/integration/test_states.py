"""The states of a run: several are kept, a damaged one costs the steps since the one before and not the run."""

import json
import logging
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from latentwire.bridge.checkpoint import load_bridge
from latentwire.bridge.errors import CorruptCheckpoint, InvalidRequest
from latentwire.training.loop import train
from latentwire.training.state import NAME
from tests.integration.conftest import MakeConfig
from tests.integration.runs import (
    ROOT,
    events_of,
    files_of,
    interrupted,
    log_of,
    parts,
    quiet,
    said,
    states_of,
    task_of,
    write_toml,
)

LATENTWIRE = Path(sys.executable).with_name("latentwire")
Damage = Callable[[Path], None]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def newest(folder: Path, kind: str) -> Path:
    """The last state's name, or the weights that it names."""
    name = folder / states_of(folder)[-1]
    return name if kind == "json" else folder / str(weights_named(name))


def weights_named(state: Path) -> str:
    return str(json.loads(state.read_text())["file"]["file"])


@pytest.mark.parametrize("keep, kept", [(1, [6]), (2, [5, 6]), (4, [3, 4, 5, 6])])
def test_as_many_states_are_kept_as_asked_for_and_their_weights_with_them(
    make: MakeConfig, keep: int, kept: list[int]
) -> None:
    config = make(save_every=1, keep_last=keep)
    train(config, quiet())
    assert states_of(config.out) == [f"state-{step:08}.json" for step in kept]
    weights = {path.name for path in config.out.glob("state-*.safetensors")}
    assert weights == {weights_named(config.out / name) for name in states_of(config.out)} and len(weights) == keep
    assert len(list(config.out.glob("*.safetensors"))) == keep + 2  # encoder and head
    sizes = [event["state_bytes"] for event in events_of(config.out, "save")]
    assert len(sizes) == 6 and sizes[-1] == newest(config.out, "safetensors").stat().st_size


@pytest.mark.parametrize(
    "kind, damage",
    [
        ("json", truncate), ("json", Path.unlink), ("json", lambda path: path.write_bytes(b"[]")),
        ("json", lambda path: path.write_bytes(b"\xff\xfe")), ("safetensors", truncate),
        ("safetensors", Path.unlink), ("safetensors", flip), ("safetensors", lambda path: path.write_bytes(b"")),
    ],
)  # fmt: skip
def test_the_newest_state_damaged_is_named_and_the_one_before_is_used(
    make: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, damage: Damage
) -> None:
    straight = train(make(out=tmp_path / "straight"), quiet())
    config, console = make(), quiet()
    interrupted(config, 5)
    assert states_of(config.out) == ["state-00000002.json", "state-00000004.json"]
    bad = newest(config.out, kind)
    damage(bad)
    with caplog.at_level(logging.WARNING, logger="training"):
        resumed = train(config, console, resume=True)
    assert "resumed after step 2" in said(console)
    warnings = [record.getMessage() for record in caplog.records if record.name == "latentwire.training.state"]
    if (kind, damage) != ("json", Path.unlink):  # what is not there has no name
        assert any(str(bad) in warning for warning in warnings)
    assert parts(resumed) == parts(straight) and log_of(config.out) == log_of(tmp_path / "straight")


@pytest.mark.parametrize("content", [b"", b"{}", b'{"step": 1}', b"[]"])
def test_where_no_state_can_be_read_the_run_is_refused_and_every_one_is_named(
    make: MakeConfig, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    config = make(max_steps=4)
    train(config, quiet())
    for name in states_of(config.out):
        (config.out / name).write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=f"none of the 2 states in {config.out} can be read; --overwrite"):
        train(config, quiet(), resume=True)
    assert all(name in caplog.text for name in states_of(config.out))


def test_damaged_weights_of_the_only_state_are_refused(make: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    config = make(max_steps=2)
    train(config, quiet())
    path = newest(config.out, "safetensors")
    truncate(path)
    with pytest.raises(CorruptCheckpoint, match=r"none of the 1 states"):
        train(config, quiet(), resume=True)
    assert path.name in caplog.text


def test_a_checkpoint_without_a_state_is_not_resumed_and_not_touched(make: MakeConfig) -> None:
    config = make(max_steps=2)
    train(config, quiet())
    for name in states_of(config.out):
        (config.out / name).unlink()
    before, log = files_of(config.out), log_of(config.out)
    with pytest.raises(InvalidRequest, match=r"holds a checkpoint but no state to go on from; --overwrite"):
        train(config, quiet(), resume=True)
    assert files_of(config.out) == before and log_of(config.out) == log


def test_a_state_of_a_future_that_was_discarded_is_removed(make: MakeConfig) -> None:
    interrupted(make(), 5)
    config = make(save_every=1)
    truncate(newest(config.out, "safetensors"))  # of step 4
    interrupted(config, 3, resume=True)
    assert states_of(config.out) == ["state-00000002.json", "state-00000003.json"]
    assert len(list(config.out.glob("state-*.safetensors"))) == 2
    assert [record["step"] for record in log_of(config.out)] == [1, 2, 3]
    assert [event["step"] for event in events_of(config.out, "save")] == [2, 3]


def test_other_files_that_look_like_states_are_left_alone(make: MakeConfig) -> None:
    config = make(max_steps=2)
    config.out.mkdir()
    (config.out / "state-notes.json").write_text("mine")
    assert NAME.fullmatch("state-00000002.json") and not NAME.fullmatch("state-notes.json")
    train(config, quiet())
    assert (config.out / "state-notes.json").read_text() == "mine"


def full_disk(room: int) -> Callable[[], None]:
    """No file may grow over ``room`` bytes; Python ignores the signal that would say so."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


@pytest.mark.parametrize(
    "room, more",
    [
        pytest.param(16 << 10, {}, id="state"),
        pytest.param(
            16 << 10, {"validate_every": 1, "validation_examples": 2, "metric": "loss"}, id="best",
        ),
        pytest.param(
            2500, {}, id="log",
        ),
    ],
)  # fmt: skip
def test_a_full_disk_is_one_line_that_names_the_folder_and_the_last_state_is_kept(
    make: MakeConfig, tmp_path: Path, room: int, more: dict[str, object]
) -> None:
    task = task_of(tmp_path, *((f"Mara has {w}.", " What?", w) for w in ("cats", "a dog", "tea", "no idea")))
    straight = train(make(out=tmp_path / "straight", task=task, **more), quiet())
    config = make(task=task, **more)
    interrupted(config, 2)
    kept = files_of(config.out)
    assert newest(config.out, "safetensors").stat().st_size > room
    command = [LATENTWIRE, "train", "--config", write_toml(tmp_path / "run.toml", config), "--resume"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=full_disk(room))
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("latentwire: ") and str(config.out) in last and "File too large" in last
    assert "Traceback" not in done.stderr and files_of(config.out) == kept
    assert all(p.isfinite().all() for p in load_bridge(config.out)[1].parameters())
    assert parts(train(config, quiet(), resume=True)) == parts(straight)


def test_a_folder_that_cannot_be_made_is_named(make: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match=r"--out .*file/run"):
        train(make(out=tmp_path / "file" / "run"), quiet())


@pytest.mark.parametrize("out", ["/proc/run", "/dev/null/run", "/dev/null"])
def test_a_folder_that_cannot_be_written_is_named_before_any_model_is_loaded(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.setattr("latentwire.training.prepare.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(InvalidRequest, match=f"--out {out}: ") as caught:
        train(make(out=Path(out)), quiet())
    assert caught.value.param == "out"
