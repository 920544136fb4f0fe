"""A run as a whole: what it leaves, what it measures on the way, and what it refuses before its first step."""

import json
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from latentwire.bridge.checkpoint import load_bridge, read_manifest
from latentwire.bridge.encoder import KINDS
from latentwire.bridge.errors import InvalidRequest, LatentWireError, TrainingFailed
from latentwire.bridge.evaluation.tasks import load_task
from latentwire.bridge.models import FrozenLM, fingerprint_of, load_model
from latentwire.training import alarms, loop
from latentwire.training.loop import train
from latentwire.training.monitor import StepRecord
from tests.conftest import GATED, byte_tokenizer
from tests.integration.conftest import MakeConfig
from tests.integration.runs import (
    ROOT,
    events_of,
    log_of,
    parts,
    prepared,
    quiet,
    said,
    states_of,
    steps_taken,
    task_of,
)

FEW = [(f"Mara has {w}.", " What?", w) for w in ("cats", "a dog", "tea", "no idea")]
LABELLED = """
name = "few"
kind = "classification"
train = "rows.jsonl"
test = "test.jsonl"
source = "{t}"
prompt = "{latent}\\nKind:"
label = "l"
labels = ["bad", "good"]
"""


def labelled(folder: Path, *labels: int) -> str:
    """A task with a row for each label."""
    rows = [json.dumps({"t": f"text {i}", "l": label}) for i, label in enumerate(labels)]
    (folder / "rows.jsonl").write_text("".join(row + "\n" for row in rows))
    (folder / "test.jsonl").write_text('{"t": "not seen", "l": 0}\n')
    (folder / "task.toml").write_text(LABELLED)
    return str(folder / "task.toml")


@pytest.mark.parametrize("encoder", list(KINDS))
def test_every_kind_of_encoder_trains_and_loads(make: MakeConfig, encoder: str) -> None:
    config = make(encoder=encoder, max_steps=2, num_latents=3, alignment_steps=None)
    manifest = train(config, quiet())
    loaded, bridge = load_bridge(config.out)
    assert loaded == manifest == read_manifest(config.out)
    assert bridge.config.encoder.kind == encoder and len(log_of(config.out)) == 2


def test_a_checkpoint_says_where_it_comes_from(make: MakeConfig) -> None:
    config = make(max_steps=1)
    origin = train(config, quiet()).bridge
    assert (origin.sender.fingerprint, origin.sender.name) == (fingerprint_of(config.sender), config.sender)
    assert origin.provenance.recipe == config.model_dump(mode="json", exclude={"out", "cache", "device"})
    assert (origin.provenance.task, origin.provenance.seed, origin.provenance.steps) == ("world", 0, 1)
    assert origin.provenance.data_sha256 == load_task("world").data_sha256
    number, _, commit = origin.provenance.code_version.partition("+")
    assert number == version("latentwire").partition("+")[0] and bool(commit) == (ROOT / ".git").exists()
    assert origin.layers == (2,) and origin.max_source_tokens == 48


def test_the_scale_in_a_checkpoint_is_the_one_measured_on_its_receiver(
    make: MakeConfig, lms: dict[str, FrozenLM]
) -> None:
    config = make(max_steps=1)
    train(config, quiet())
    head = load_bridge(config.out)[1].head(config.receivers[0])
    rows = lms["llama"].model.get_input_embeddings().weight
    assert head.embedding_rms == pytest.approx(float(rows.pow(2).mean(dim=1).sqrt().mean()), rel=1e-4)
    soft = head(torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0)))
    assert soft.pow(2).mean(dim=-1).sqrt().tolist()[0] == pytest.approx([head.embedding_rms] * 3, rel=1e-3)


def test_mode_tokens_are_part_of_the_run_and_not_of_the_checkpoint(make: MakeConfig) -> None:
    config = make(max_steps=1, alignment_steps=0, reconstruction_weight=1.0, continuation_weight=1.0, mode_tokens=2)
    manifest = train(config, quiet())
    _, bridge = load_bridge(config.out)
    (head,) = manifest.heads.values()
    saved = load_file(config.out / manifest.encoder.file) | load_file(config.out / head.file)
    assert saved.keys() == bridge.encoder.state_dict().keys() | bridge.head(config.receivers[0]).state_dict().keys()
    (state,) = config.out.glob("state-*.safetensors")
    weights = [name for name in load_file(state) if name.startswith("weight.")]
    assert len(weights) == len(bridge.parameters()) + 2


def test_the_seed_decides_everything(make: MakeConfig, tmp_path: Path) -> None:
    first, again, other = (
        parts(train(make(out=tmp_path / name, max_steps=2, seed=seed), quiet()))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again and first[0] != other[0]


def test_training_on_a_few_examples_brings_the_loss_down(make: MakeConfig, tmp_path: Path) -> None:
    config = make(task=task_of(tmp_path, *FEW), max_steps=60, save_every=100, alignment_steps=0)
    train(config, quiet())
    losses = [record["losses"]["answer"] for record in log_of(config.out)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_alignment_brings_its_own_loss_down(make: MakeConfig) -> None:
    config = make(max_steps=20, alignment_steps=20, save_every=100)
    train(config, quiet())
    losses = [record["loss"] for record in log_of(config.out)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_record_is_written_as_it_was_measured(make: MakeConfig) -> None:
    config = make(max_steps=3, alignment_steps=1)
    train(config, quiet())
    lines = (config.out / "log.jsonl").read_text().splitlines()
    names = {field.name for field in fields(StepRecord)}
    assert len(lines) == 3 and all(set(json.loads(line)) == names for line in lines)


@pytest.mark.parametrize("kind", list(KINDS))
def test_encoders_with_windows_are_aligned_for_a_third_of_the_steps_unless_told(make: MakeConfig, kind: str) -> None:
    steps = 2 if kind in ("pooling", "hybrid", "linear") else 0

    def aligned(**told: Any) -> list[str]:
        run = prepared(make(encoder=kind, **told))
        return [run.phase(step) for step in range(6)]

    assert aligned(alignment_steps=None) == ["align"] * steps + ["answer"] * (6 - steps)
    assert aligned(alignment_steps=0) == ["answer"] * 6
    if steps:
        assert aligned(alignment_steps=5) == ["align"] * 5 + ["answer"]


@pytest.mark.parametrize("kind", ["perceiver", "pooled-perceiver", "mean", "prompt"])
@pytest.mark.parametrize("asked", [{"alignment_steps": 1}, {"alignment_steps": None, "alignment_weight": 0.5}])
def test_alignment_asked_for_where_slots_cover_no_words_is_refused(
    make: MakeConfig, kind: str, asked: dict[str, Any]
) -> None:
    config = make(encoder=kind, **asked)
    with pytest.raises(InvalidRequest, match=f"alignment was asked for, but {kind} slots cover no words") as caught:
        train(config, quiet())
    assert caught.value.param == "alignment_steps" and not config.out.exists()


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer is written in Python, and tells no character offsets."""
    folder, tokenizer = tmp_path_factory.mktemp("slow"), ByT5Tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **GATED)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert not load_model(str(folder)).tokenizer.is_fast
    return folder


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_a_tokenizer_without_offsets_trains_without_alignment_and_refuses_it_when_asked(
    make: MakeConfig, slow: Path, role: str
) -> None:
    config = make(max_steps=3, alignment_steps=None, **{role: str(slow)})
    train(config, quiet())
    assert [record["phase"] for record in log_of(config.out)] == ["answer"] * 3
    for asked in ({"alignment_steps": 1}, {"alignment_steps": None, "alignment_weight": 0.5}):
        with pytest.raises(InvalidRequest, match=f"tokenizer of '{slow}' gives no character offsets"):
            train(make(**{role: str(slow), "out": config.out / "other", **asked}), quiet())


def test_an_example_that_does_not_fit_the_receiver_is_refused_before_the_first_step(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = steps_taken(monkeypatch)
    rows = [("Mara sings.", " Q?", "yes"), ("Ben", " " * 100 + "Q?", "y" * 200), ("Mara is no cook.", " Q?", "no")]
    config = make(task=task_of(tmp_path, *rows), encoder="mean", num_latents=3, alignment_steps=None)
    # BOS, three slots, 102 bytes of prompt, 201 of answer, EOS
    with pytest.raises(InvalidRequest, match="takes 308 receiver tokens; 256 fit"):
        train(config, quiet())
    assert not taken and not config.out.exists()


def test_a_held_out_example_that_does_not_fit_is_refused_before_the_first_step(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = steps_taken(monkeypatch)
    rows = [("Mara sings.", " Q?", "yes"), ("Ben", " Q" * 150 + "?", "no")]  # the last one is held out
    config = make(task=task_of(tmp_path, *rows), validate_every=2, validation_examples=1, alignment_steps=0)
    with pytest.raises(InvalidRequest, match="receiver tokens"):
        train(config, quiet())
    assert not taken


def test_the_slots_of_the_longest_source_are_counted_before_the_first_step(make: MakeConfig, tmp_path: Path) -> None:
    rows = [("Mara sings.", " Q?", "yes"), ("s" * 95, " Q?", "y" * 244), ("Ben", " Q?", "no")]
    task = task_of(tmp_path, *rows)
    prepared(make(task=task))  # 48 tokens in 6 slots leave exactly enough
    with pytest.raises(InvalidRequest, match="takes 257 receiver tokens; 256 fit"):
        prepared(make(task=task, max_source_tokens=56))


@pytest.mark.parametrize("encoder", ["perceiver", "hybrid", "mean", "prompt"])
def test_more_slots_than_the_receiver_reads_are_refused_before_the_first_step(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    taken = steps_taken(monkeypatch)
    with pytest.raises(InvalidRequest, match=r"takes \d+ receiver tokens; 256 fit"):
        train(make(encoder=encoder, num_latents=257, alignment_steps=None), quiet())
    assert not taken


def test_the_number_of_sources_that_will_be_cut_is_said(make: MakeConfig, tmp_path: Path) -> None:
    # BOS and 47 characters fit in 48 tokens.
    task = task_of(tmp_path, *((("s" * length), " Q?", "a") for length in (47, 48, 10, 60)))
    for limit, cut in [(48, True), (61, False)]:
        console = quiet()
        loop.prepare(make(task=task, max_source_tokens=limit), console)
        assert ("2 of all 4 sources exceed --max-source-tokens: only their start is read" in said(console)) == cut
        assert ("exceed" in said(console)) == cut


def test_a_layer_the_sender_does_not_have_is_refused(make: MakeConfig) -> None:
    with pytest.raises(InvalidRequest, match=r"--layer 9: .* has layers 0 to 3"):
        prepared(make(layer=[2, 9]))


def test_a_bridge_between_a_model_and_itself_is_refused(make: MakeConfig, model_folders: dict[str, Path]) -> None:
    same = str(model_folders["llama"])
    with pytest.raises(InvalidRequest, match=f"sender and receiver are the same model, '{same}'; a bridge needs two"):
        train(make(sender=same), quiet())


def test_a_copy_under_another_name_is_the_same_model(
    make: MakeConfig, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.symlink_to(model_folders["llama"])
    with pytest.raises(InvalidRequest, match="sender and receiver are the same model"):
        prepared(make(sender=str(copy)))


def test_a_receiver_that_could_not_end_an_answer_is_refused(make: MakeConfig, slow: Path, tmp_path: Path) -> None:
    folder = tmp_path / "endless"
    lm = load_model(str(slow))
    lm.model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(InvalidRequest, match=f"receiver '{folder}' has no end-of-text token") as caught:
        prepared(make(receiver=str(folder)))
    assert caught.value.param == "receiver"


def test_a_label_outside_the_set_is_refused_in_one_sentence(make: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"rows\.jsonl.*2.*") as caught:
        train(make(task=labelled(tmp_path, 0, 1, 2)), quiet())
    assert "\n" not in str(caught.value)


def test_an_empty_split_is_refused_in_one_sentence(make: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(LatentWireError, match=r"rows\.jsonl") as caught:
        train(make(task=task_of(tmp_path)), quiet())
    assert "\n" not in str(caught.value)


def test_a_split_too_small_to_hold_anything_out_is_refused_or_not_validated(make: MakeConfig, tmp_path: Path) -> None:
    config = make(task=task_of(tmp_path, FEW[0]), max_steps=1, validate_every=1)
    try:
        train(config, quiet())
    except LatentWireError as error:
        assert "\n" not in str(error)


def test_held_out_examples_come_from_the_training_split_alone_and_are_never_trained_on(
    make: MakeConfig, tmp_path: Path
) -> None:
    rows = [(f"source {i}", " Q?", str(i)) for i in range(7)]
    run = prepared(make(task=task_of(tmp_path, *rows), validate_every=1, validation_examples=64))
    trained, held = ({e.source for e in split} for split in (run.train, run.validation))
    assert (len(trained), len(held)) == (4, 3) and not trained & held
    assert trained | held == {e.source for e in run.task.train}
    world = prepared(make(validate_every=1, validation_examples=3))
    assert not {e.source for e in world.validation} & {e.source for e in world.task.test[:]}


def test_an_alarm_is_said_and_written_and_stops_the_run_when_asked(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentwire.training.alarms.WINDOW", 2)
    monkeypatch.setattr("latentwire.training.alarms.LENGTHS", dict.fromkeys(alarms.LENGTHS, 2))
    monkeypatch.setattr("latentwire.training.alarms.FIRST_TOKEN_TOP1", 1.1)  # nothing is good enough
    console, config = quiet(), make(alignment_steps=0, warmup_steps=0, on_collapse="stop", max_steps=9)
    with pytest.raises(TrainingFailed, match="stopped and saved: ") as caught:
        train(config, console)
    (alarm,) = [event for event in events_of(config.out, "alarm") if event["name"] == "first_token"]
    assert str(caught.value).startswith(f"step {alarm['step']}: ") and alarm["message"] in str(caught.value)
    assert f"alarm at step {alarm['step']}" in said(console)
    assert states_of(config.out)[-1] == f"state-{alarm['step']:08}.json"
