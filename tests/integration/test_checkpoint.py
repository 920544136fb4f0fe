"""A checkpoint is whole or refused, knows its models, and survives being killed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentwire.bridge.checkpoint import (
    BridgeModel,
    check_models,
    check_receiver,
    check_sender,
    load_bridge,
    make_bridge,
    read_manifest,
    save_bridge,
)
from latentwire.bridge.errors import CorruptCheckpoint, IncompatibleBridge, UnknownBridge
from latentwire.bridge.models import FrozenLM
from tests.conftest import bridge_config, write_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def document(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def weights(folder: Path, stem: str) -> Path:
    return next(folder.glob(f"{stem}-*.safetensors"))


def same(first: BridgeModel, second: BridgeModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def another(bridge: BridgeModel, seed: int = 5) -> BridgeModel:
    torch.manual_seed(seed)
    return make_bridge(bridge.config)


def test_a_bridge_comes_back_as_it_was_saved(lms: dict[str, FrozenLM], tmp_path: Path) -> None:
    bridge = make_bridge(bridge_config(lms["neox"], lms["llama"]))
    saved = save_bridge(tmp_path / "deep" / "er", bridge)
    manifest, back = load_bridge(tmp_path / "deep" / "er")
    assert manifest == saved == read_manifest(tmp_path / "deep" / "er") and back.config == bridge.config
    assert same(back, bridge)
    assert not any(p.requires_grad for p in back.parameters()) and not back.encoder.training


def test_a_checkpoint_holds_json_and_safetensors_only(folder: Path) -> None:
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert len(list(folder.iterdir())) == 3


def test_every_receiver_gets_its_own_head_back(lms: dict[str, FrozenLM], tmp_path: Path) -> None:
    config = bridge_config(lms["neox"], lms["llama"])
    both = replace(config, heads={**config.heads, **bridge_config(lms["neox"], lms["gpt2"]).heads})
    bridge = make_bridge(both)
    save_bridge(tmp_path, bridge)
    _, back = load_bridge(tmp_path)
    for name in both.heads:
        assert torch.equal(back.head(name).skip.weight, bridge.head(name).skip.weight)
    assert back.default_receiver == lms["llama"].name
    with pytest.raises(UnknownBridge, match="no head for receiver 'nobody'; it has"):
        back.head("nobody")


def test_saving_twice_leaves_the_second_and_nothing_else(folder: Path) -> None:
    _, first = load_bridge(folder)
    second = another(first)
    manifest = save_bridge(folder, second)
    named = {manifest.encoder.file, *(part.file for part in manifest.heads.values()), "config.json"}
    assert {path.name for path in folder.iterdir()} == named
    assert same(load_bridge(folder)[1], second) and not same(second, first)


def test_files_of_others_in_the_folder_are_left_alone(folder: Path) -> None:
    for name in ("state-00.safetensors", "log.jsonl", "notes.txt"):
        (folder / name).write_text("mine")
    save_bridge(folder, another(load_bridge(folder)[1]))
    assert {"state-00.safetensors", "log.jsonl", "notes.txt"} <= {path.name for path in folder.iterdir()}


def test_the_bridge_id_names_the_latent_space_and_not_the_head(folder: Path, tmp_path: Path) -> None:
    manifest, bridge = load_bridge(folder)
    other = another(bridge)
    new_head = BridgeModel(bridge.config, bridge.encoder, other.heads)
    new_encoder = BridgeModel(bridge.config, other.encoder, bridge.heads)
    assert save_bridge(tmp_path / "a", bridge).bridge_id == manifest.bridge_id
    changed = save_bridge(tmp_path / "b", new_head)
    assert changed.bridge_id == manifest.bridge_id and changed.heads != manifest.heads
    assert save_bridge(tmp_path / "c", new_encoder).bridge_id != manifest.bridge_id
    layers = BridgeModel(replace(bridge.config, layers=(1,)), bridge.encoder, bridge.heads)
    assert save_bridge(tmp_path / "d", layers).bridge_id != manifest.bridge_id


@pytest.mark.parametrize("stem", ["encoder", "head"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "longer", "empty"])
def test_a_damaged_weight_file_is_refused_with_both_values(folder: Path, stem: str, damage: str) -> None:
    path = weights(folder, stem)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    made = {"truncated": whole[:-1], "flipped": bytes(flipped), "longer": whole + b"\0", "empty": b""}
    path.unlink() if damage == "missing" else path.write_bytes(made[damage])
    with pytest.raises(CorruptCheckpoint) as caught:
        load_bridge(folder)
    message = str(caught.value)
    assert path.name in message and f"{len(whole)} bytes" in message
    if damage != "missing":
        manifest = read_manifest(folder)
        expected = manifest.encoder if stem == "encoder" else next(iter(manifest.heads.values()))
        assert expected.sha256[:16] in message and f"{len(made[damage])} bytes" in message


def test_weights_of_other_shapes_are_refused_with_both(folder: Path) -> None:
    text = document(folder)
    (head,) = text["bridge"]["heads"].values()  # type: ignore[index]
    head["receiver"]["width"] = 40
    (folder / "config.json").write_text(json.dumps(text))
    with pytest.raises(CorruptCheckpoint, match=r"skip\.\w+ is \(32.*expected \(40"):
        load_bridge(folder)


def test_an_encoder_described_otherwise_than_it_was_saved_is_refused_with_both_ids(folder: Path) -> None:
    text = document(folder)
    text["bridge"]["encoder"]["ratio"] = 8  # type: ignore[index]
    (folder / "config.json").write_text(json.dumps(text))
    with pytest.raises(CorruptCheckpoint, match=rf"bridge_id is {text['bridge_id']}, its contents make [0-9a-f]{{32}}"):
        load_bridge(folder)


def test_what_a_killed_save_left_is_removed_by_the_next(folder: Path) -> None:
    (folder / ".config.json.1.tmp").write_bytes(b"half")
    save_bridge(folder, load_bridge(folder)[1])
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("change", ["extra", "absent"])
def test_an_extra_or_absent_tensor_is_named(folder: Path, change: str) -> None:
    import hashlib

    path, text = weights(folder, "head"), document(folder)
    tensors = load_file(path)
    if change == "extra":
        tensors["zz"] = torch.zeros(2)
    else:
        del tensors["skip.bias"]
    save_file(tensors, path)
    (part,) = text["heads"].values()
    part |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}  # type: ignore[operator]
    (folder / "config.json").write_text(json.dumps(text))
    with pytest.raises(
        CorruptCheckpoint, match=r"zz is \(2,\), expected nothing|skip.bias is missing, expected \(32,\)"
    ):
        load_bridge(folder)


def set_at(*path: str, value: object) -> Callable[[dict[str, dict[str, object]]], None]:
    def change(text: dict[str, dict[str, object]]) -> None:
        *parents, last = path
        at: dict[str, object] = text  # type: ignore[assignment]
        for parent in parents:
            at = at[parent]  # type: ignore[assignment]
        at[last] = value

    return change


@pytest.mark.parametrize(
    "field, change",
    [
        ("surprise", set_at("surprise", value=1)),
        ("bridge.encoder.surprise", set_at("bridge", "encoder", "surprise", value=1)),
        ("bridge.layers", set_at("bridge", "layers", value="two")),
        ("bridge.encoder.kind", set_at("bridge", "encoder", "kind", value="vq")),
        ("format", set_at("format", value=2)),
        ("encoder.sha256", set_at("encoder", "sha256", value=None)),
        ("bridge_id", lambda text: text.pop("bridge_id") and None),
    ],
)
def test_an_unknown_missing_or_wrong_field_is_named(
    folder: Path, field: str, change: Callable[[dict[str, dict[str, object]]], None]
) -> None:
    text = document(folder)
    change(text)
    (folder / "config.json").write_text(json.dumps(text))
    with pytest.raises(CorruptCheckpoint, match=field.replace(".", r"\.")):
        load_bridge(folder)


def test_a_head_without_weights_is_refused_and_never_drawn_at_random(folder: Path) -> None:
    text = document(folder)
    text["heads"] = {}
    (folder / "config.json").write_text(json.dumps(text))
    with pytest.raises(CorruptCheckpoint, match="heads"):
        load_bridge(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null"])
def test_a_configuration_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        read_manifest(folder)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UnknownBridge, match=rf"no checkpoint at '{where}'"):
            load_bridge(where)


def test_other_models_are_refused_with_both_digests(checkpoint: Path, lms: dict[str, FrozenLM]) -> None:
    config, name = read_manifest(checkpoint).bridge, lms["llama"].name
    check_sender(config, lms["neox"])
    check_receiver(config, name, lms["llama"])
    with pytest.raises(IncompatibleBridge, match=f"{lms['neox'].fingerprint.config}.*{lms['gpt2'].fingerprint.config}"):
        check_sender(config, lms["gpt2"])
    with pytest.raises(IncompatibleBridge, match=f"{lms['llama'].fingerprint.config}"):
        check_receiver(config, name, lms["qwen"])


@pytest.mark.parametrize("token, want, have", [("bos", 7, 0), ("bos", None, 0), ("eos", 7, 1)])
def test_a_receiver_with_other_special_tokens_is_refused_with_both_ids(
    checkpoint: Path, lms: dict[str, FrozenLM], token: str, want: int | None, have: int
) -> None:
    config, name = read_manifest(checkpoint).bridge, lms["llama"].name
    head = config.heads[name]
    other = replace(head, layout=replace(head.layout, **{f"{token}_id": want}))
    with pytest.raises(IncompatibleBridge, match=f"made with {token} id {want}; .* has {have}"):
        check_receiver(replace(config, heads={name: other}), name, lms["llama"])


def test_a_model_changed_on_disk_is_refused_with_both_digests(tmp_path: Path, lms: dict[str, FrozenLM]) -> None:
    from latentwire.bridge.models import fingerprint_of, load_model

    path = write_model(tmp_path / "sender", "neox")
    save_bridge(tmp_path / "bridge", make_bridge(bridge_config(load_model(str(path)), lms["llama"])))
    config = read_manifest(tmp_path / "bridge").bridge
    check_models(config)
    write_model(path, "neox", seed=1)
    now = fingerprint_of(str(path)).weights
    with pytest.raises(
        IncompatibleBridge, match=f"weights is {config.sender.fingerprint.weights}; this one's is {now}"
    ):
        check_models(config)


DYING = """
import json, os, shutil, signal, sys, torch
from pathlib import Path

torch.set_num_threads(1)
os.fsync = lambda file: None  # time saved, no more: what a killed process had written is there, synced or not
CALLS = {"open", "write", "flush", "close", "rename", "replace", "unlink", "remove"}

def die_at(fatal):  # in the child: SIGKILL before file call number ``fatal``, half-written files included
    done = 0
    def hook(frame, event, called):
        nonlocal done
        if event == "c_call" and called.__name__ in CALLS:
            done += 1
            if done > fatal:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(hook)

def survives(folder, pristine, save, look):  # ``save`` in a child that dies at some call, then ``look`` at the folder
    found, finished = [], False
    while not finished and len(found) < 200:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pristine, folder)
        if (child := os.fork()) == 0:
            try:
                die_at(len(found))
                save()
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        finished = os.WIFEXITED(status)
        assert not finished or os.WEXITSTATUS(status) == 0
        found.append([finished, look()])
    return found
"""
SURVIVAL = (
    DYING
    + """
from latentwire.bridge.checkpoint import load_bridge, make_bridge, save_bridge

folder, pristine = Path(sys.argv[1]), Path(sys.argv[2])
_, old = load_bridge(folder)
torch.manual_seed(9)
new = make_bridge(old.config)
weights = {"old": [p.clone() for p in old.parameters()], "new": list(new.parameters())}

def state():
    try:
        _, left = load_bridge(folder)
    except Exception as error:
        return repr(error)
    same = [name for name, saved in weights.items() if all(map(torch.equal, left.parameters(), saved))]
    return same[0] if same else "neither"

found = survives(folder, pristine, lambda: save_bridge(folder, new), state)
anywhere = []
for round in range(12):
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        while True:
            for bridge in (new, old):
                save_bridge(folder, bridge)
                os.write(writer, b".")
    os.read(reader, 1 + round)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    anywhere.append(state())
print(json.dumps([found, anywhere]))
"""
)
RESUMPTION = (
    DYING
    + """
from functools import cache
from rich.console import Console
from latentwire.bridge.checkpoint import load_bridge
from latentwire.training import loop, prepare
from latentwire.training.config import read_config
from latentwire.training.step import take_step

# Time saved, no more.
prepare.CHECKED, prepare.load_model, prepare.code_version = 1, cache(prepare.load_model), lambda: "test"
config, empty, once = read_config(Path(sys.argv[1]), {}), *map(Path, sys.argv[2:])
folder, quiet = config.out, Console(quiet=True)

class Silent:
    def event(self, step, event, **values):
        pass

def save(step):
    loop._save(run, step, Silent())

def step(number):
    name = run.receiver_of(number)
    take_step(run, number, [run.sample(name, i) for i in prepare.sampler_of(run).batch(number)])

def resumed():
    try:
        manifest = loop.train(config, quiet, resume=True)
        same = (manifest, load_bridge(folder)[0]) == (straight, straight)
        return [same, sorted(path.name.split("-")[0] for path in folder.iterdir())]
    except Exception as error:
        return [repr(error), []]

straight = loop.train(config, quiet)
run = prepare.prepare(config, quiet)
step(0)
first = survives(folder, empty, lambda: save(1), resumed)
shutil.rmtree(folder)
shutil.copytree(empty, folder)
save(1)
shutil.copytree(folder, once)
step(1)
later = survives(folder, once, lambda: save(2), resumed)
print(json.dumps([first, later]))
"""
)


@pytest.fixture(scope="module")
def survival(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[bool, str]], list[str]]:
    """What a folder held after saves that were killed, by operation and at any moment (one interpreter, many forks)."""
    folder = tmp_path_factory.mktemp("killed") / "checkpoint"
    shutil.copytree(checkpoint, folder)
    command = [sys.executable, "-c", SURVIVAL, str(folder), str(checkpoint)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    by_operation, anywhere = json.loads(done.stdout)
    return [(finished, state) for finished, state in by_operation], anywhere


def test_killed_before_any_file_operation_of_a_save_the_old_or_the_new_one_is_there(
    survival: tuple[list[tuple[bool, str]], list[str]],
) -> None:
    states = [state for _, state in survival[0]]
    assert len(states) > 20 and states == sorted(states, key=["old", "new"].index)  # old until the commit, then new
    assert set(states) == {"old", "new"} and survival[0][-1] == (True, "new")


def test_killed_at_any_moment_of_repeated_saves_the_checkpoint_still_loads(
    survival: tuple[list[tuple[bool, str]], list[str]],
) -> None:
    assert set(survival[1]) <= {"old", "new"} and len(survival[1]) == 12


def test_killed_before_any_file_operation_of_saving_state_and_checkpoint_the_run_goes_on_to_the_same_weights(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    values = {
        "sender": str(model_folders["neox"]), "receiver": str(model_folders["llama"]), "task": "world",
        "out": str(tmp_path / "run"), "max_steps": 2, "save_every": 1, "batch_size": 2, "max_source_tokens": 48,
        "latent_dim": 16, "hidden_dim": 32, "depth": 0, "ratio": 8, "reconstruction_weight": 0.0, "alignment_steps": 1,
        "validate_every": 0, "keep_last": 1,
    }  # fmt: skip
    (tmp_path / "run.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    (tmp_path / "empty").mkdir()
    places = [str(tmp_path / name) for name in ("run.toml", "empty", "once")]
    command = [sys.executable, "-c", RESUMPTION, *places]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    for saves in json.loads(done.stdout):  # the first save of a run, and one over another
        assert len(saves) > 30 and saves[-1][0]
        whole = [True, ["config.json", "encoder", "events.jsonl", "head", "log.jsonl", "state", "state"]]
        assert [left for _, left in saves] == [whole] * len(saves)


def test_a_checkpoint_can_be_a_revision_of_a_hub_repository(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, commit = tmp_path / "models--org--bridge", "3" * 40
    shutil.copytree(checkpoint, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("org/bridge", f"org/bridge@{commit}"):
        assert load_bridge(name)[0] == read_manifest(checkpoint)
    with pytest.raises(UnknownBridge, match=r"no checkpoint at .org/other.: expected a folder .* the Hub name of one"):
        load_bridge("org/other")
