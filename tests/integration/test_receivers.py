"""Several receivers of one encoder: trained in turns, in any memory, and one more whenever it is wanted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import head_key, load_bridge, read_manifest
from latentwire.bridge.config import Manifest
from latentwire.bridge.errors import IncompatibleBridge, InvalidRequest
from latentwire.bridge.evaluation.conditions import predict
from latentwire.bridge.evaluation.context import open_context
from latentwire.bridge.models import predicted_bytes
from latentwire.training.base import completed
from latentwire.training.config import TrainConfig, read_config
from latentwire.training.loop import train
from latentwire.training.run import Run
from tests.conftest import write_model
from tests.integration.conftest import MakeConfig
from tests.integration.runs import interrupted, log_of, parts, prepared, quiet, same, step_of, weights_of_run


@pytest.fixture
def names(model_folders: dict[str, Path]) -> list[str]:
    """Two receivers of two families."""
    return [str(model_folders["llama"]), str(model_folders["gpt2"])]


def head_of(run: Run, name: str) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.bridge.heads[head_key(name)].parameters()]


def residents(run: Run) -> list[set[str]]:
    """The models in memory after each load or drop."""
    held: set[str] = set()
    found = []
    for event, name, _ in run.residency.history:
        held = held | {name} if event == "load" else held - {name}
        found.append(held)
    return found


def test_receivers_have_their_turns_and_each_its_own_head(make: MakeConfig, names: list[str]) -> None:
    manifest = train(make(receiver=names, receiver_block=2, max_steps=7), quiet())
    llama, gpt2 = names
    assert [record["receiver"] for record in log_of(make().out)] == [llama, llama, gpt2, gpt2, llama, llama, gpt2]
    assert list(manifest.heads) == names and len({part.sha256 for part in manifest.heads.values()}) == 2
    for name in names:
        context = open_context(make().out, "world", limit=2, dtype="float32", receiver=name)
        said = predict(context, range(2), context.latents(range(2)))
        assert len(said) == 2 and all(said)


def test_a_turn_moves_the_encoder_and_its_own_head_alone(make: MakeConfig, names: list[str]) -> None:
    run = prepared(make(receiver=names, alignment_steps=0))
    for step in range(3):
        mine, other = names[step % 2], names[1 - step % 2]
        before = head_of(run, mine), head_of(run, other), [p.detach().clone() for p in run.bridge.encoder.parameters()]
        assert step_of(run, step).receiver == mine
        assert not same(head_of(run, mine), before[0])
        assert same(head_of(run, other), before[1])
        assert not same([p.detach().clone() for p in run.bridge.encoder.parameters()], before[2])


@pytest.mark.parametrize("cached", [False, True], ids=["sender and one receiver", "one receiver"])
def test_in_a_small_budget_one_receiver_is_held_at_a_time_and_the_weights_are_the_same(
    make: MakeConfig, names: list[str], tmp_path: Path, cached: bool
) -> None:
    config = make(receiver=names, max_steps=4, cache_features=cached)
    need = {name: predicted_bytes(name, torch.float32) for name in (config.sender, *names)}
    receivers = max(need[name] for name in names)
    budget = max(receivers, need[config.sender]) if cached else need[config.sender] + receivers
    assert budget < sum(need[name] for name in names) + (0 if cached else need[config.sender])
    runs = [prepared(config), prepared(config.model_copy(update={"memory_budget": budget}))]
    for run in runs:
        for step in range(4):
            step_of(run, step)
    assert same(weights_of_run(runs[0]), weights_of_run(runs[1]))
    assert set(names) <= residents(runs[0])[-1]
    beside = [held for held in residents(runs[1]) if cached or config.sender in held]
    assert all(len(held & set(names)) <= 1 for held in beside)
    assert all(total <= budget for _, _, total in runs[1].residency.history)
    assert {name for held in residents(runs[1]) for name in held} == {config.sender, *names}


def test_an_interrupted_run_of_two_receivers_goes_on_as_if_nothing_had_happened(
    make: MakeConfig, names: list[str], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"receiver": names, "receiver_block": 2, "max_steps": 5, "save_every": 1}
    whole = train(make(**changes, out=tmp_path / "whole"), quiet())
    interrupted(make(**changes), 3)
    assert parts(train(make(**changes), quiet(), resume=True)) == parts(whole)


def test_the_same_receiver_twice_is_refused(make: MakeConfig, names: list[str]) -> None:
    with pytest.raises(ValidationError, match="receivers must differ"):
        make(receiver=[names[0], names[0]])


@pytest.fixture
def extend(make: MakeConfig, names: list[str], tmp_path: Path) -> Any:
    """A finished checkpoint for the first receiver, and the configuration that adds the second to it."""
    base = tmp_path / "base"
    train(make(out=base, max_steps=3, alignment_steps=1), quiet())

    def config(**changes: Any) -> TrainConfig:
        added: dict[str, Any] = {
            "add_receiver": names[1],
            "bridge": str(base),
            "sender": "",
            "receiver": [],
            "alignment_steps": None,
        }
        return make(**{**added, **changes})

    return config


def bytes_of(folder: Path, manifest: Manifest, name: str | None = None) -> bytes:
    part = manifest.encoder if name is None else manifest.heads[name]
    return (folder / part.file).read_bytes()


def test_a_receiver_added_to_a_finished_bridge_changes_nothing_that_was_there(
    extend: Any, names: list[str], tmp_path: Path
) -> None:
    base, (llama, gpt2) = tmp_path / "base", names
    before, kept = read_manifest(base), {path.name: path.read_bytes() for path in base.iterdir()}
    config = extend(seed=5, learning_rate=1e-3)
    after = train(config, quiet())
    assert {path.name: path.read_bytes() for path in base.iterdir()} == kept
    assert after.bridge_id == before.bridge_id
    assert bytes_of(config.out, after) == bytes_of(base, before)
    assert bytes_of(config.out, after, llama) == bytes_of(base, before, llama)
    assert list(after.heads) == [llama, gpt2] and after.bridge.provenance == before.bridge.provenance
    assert after.bridge.heads[llama] == before.bridge.heads[llama]
    provenance = after.bridge.heads[gpt2].provenance
    assert provenance is not None and (provenance.seed, provenance.steps) == (5, config.max_steps)
    assert provenance.recipe["add_receiver"] == gpt2 and provenance.recipe["learning_rate"] == 1e-3

    latents = []
    for checkpoint, name in ((base, llama), (config.out, llama), (config.out, gpt2)):
        context = open_context(checkpoint, "world", limit=2, dtype="float16", receiver=name)
        latents.append(context.latents(range(2)))
        assert all(predict(context, range(2), latents[-1]))
    assert all((a == b).all() and (a == c).all() for a, b, c in zip(*latents, strict=True))


def test_the_senders_own_model_may_be_the_receiver_that_is_added(extend: Any, tmp_path: Path) -> None:
    sender = read_manifest(tmp_path / "base").bridge.sender.name
    config = extend(add_receiver=sender)
    assert list(train(config, quiet()).heads)[1] == sender
    context = open_context(config.out, "world", limit=2, dtype="float16", receiver=sender)
    assert all(predict(context, range(2), context.latents(range(2))))


def test_a_latent_sent_before_a_receiver_was_added_is_read_by_all_receivers(
    extend: Any, names: list[str], tmp_path: Path
) -> None:
    train(config := extend(max_steps=2), quiet())
    sent = Bridge.load(tmp_path / "base").encode("Mara wants tea.")
    asked = [(tmp_path / "base", names[0]), (config.out, names[0]), (config.out, names[1]), (config.out, None)]
    said = [Bridge.load(at).generate(sent, "\nWho?", receiver=name, max_tokens=4).texts[0] for at, name in asked]
    assert said[0] == said[1] == said[3] and all(said)


def test_only_the_head_that_is_added_is_trained(extend: Any, names: list[str]) -> None:
    run = prepared_extension(extend(batch_size=2))
    new = run.bridge.heads[head_key(names[1])]
    assert {id(p) for p in run.parameters} == {id(p) for p in new.parameters()}
    assert run.alignment_steps == 2  # words of its own receiver are what a new head learns first too
    old = [p.detach().clone() for p in (*run.bridge.encoder.parameters(), *run.bridge.head(names[0]).parameters())]
    before = head_of(run, names[1])
    for step in range(2):
        assert step_of(run, step).receiver == names[1]
    assert all(not torch.equal(a, b) for a, b in zip(before, head_of(run, names[1]), strict=True))
    held = [p.detach().clone() for p in (*run.bridge.encoder.parameters(), *run.bridge.head(names[0]).parameters())]
    assert same(held, old)


def prepared_extension(config: TrainConfig) -> Run:
    return prepared(completed(config))


def test_a_bridge_can_be_extended_where_it_lies_only_when_asked(extend: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="already holds a checkpoint"):
        train(extend(out=tmp_path / "base"), quiet())
    assert len(load_bridge(tmp_path / "base")[0].heads) == 1


def test_an_interrupted_extension_goes_on_as_if_nothing_had_happened(extend: Any, tmp_path: Path) -> None:
    whole = train(extend(out=tmp_path / "whole", max_steps=4, save_every=1), quiet())
    interrupted(extend(max_steps=4, save_every=1), 2)
    assert parts(train(extend(max_steps=4, save_every=1), quiet(), resume=True)) == parts(whole)


def test_an_extension_is_not_resumed_on_another_encoder(make: MakeConfig, extend: Any, tmp_path: Path) -> None:
    interrupted(extend(max_steps=4, save_every=1), 2)
    train(make(out=tmp_path / "base", max_steps=3, seed=9), quiet(), overwrite=True)
    with pytest.raises(InvalidRequest, match="bridge"):
        train(extend(max_steps=4, save_every=1), quiet(), resume=True)


def test_a_receiver_that_is_there_already_is_not_added(extend: Any, names: list[str]) -> None:
    config = extend(add_receiver=names[0])
    with pytest.raises(InvalidRequest, match=f"already has a head for '{names[0]}'"):
        train(config, quiet())
    assert not config.out.exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"bridge": None}, "--add-receiver needs --bridge"),
        ({"sender": "builtin:neox"}, "neither --sender nor --receiver"),
        ({"receiver": ["builtin:llama"]}, "neither --sender nor --receiver"),
        ({"add_receiver": None, "sender": "builtin:neox", "receiver": ["builtin:llama"]}, "--bridge needs"),
    ],
)
def test_a_receiver_is_added_to_a_bridge_and_to_nothing_else(flags: dict[str, Any], words: str, tmp_path: Path) -> None:
    asked = {"task": "world", "out": tmp_path, "add_receiver": "builtin:llama", "bridge": "builtin", **flags}
    with pytest.raises(InvalidRequest, match=words):
        read_config(None, asked)


def test_a_receiver_is_not_added_to_the_bridge_of_another_sender(
    make: MakeConfig, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    sender = str(write_model(tmp_path / "sender", "neox", seed=3))
    train(make(sender=sender, out=tmp_path / "base", max_steps=2), quiet())
    write_model(tmp_path / "sender", "neox", seed=4)
    added: dict[str, Any] = {
        "add_receiver": str(model_folders["gpt2"]),
        "bridge": str(tmp_path / "base"),
        "sender": "",
        "receiver": [],
    }
    with pytest.raises(IncompatibleBridge, match=r"trained with sender .* whose weights"):
        train(make(**added, out=tmp_path / "added"), quiet())
    assert not (tmp_path / "added" / "config.json").exists()
