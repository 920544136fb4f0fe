"""A bridge's gate, calibrated on examples that it was not trained on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import BUILTIN_BRIDGE, read_manifest
from latentwire.bridge.errors import InvalidRequest, LatentWireError
from latentwire.bridge.evaluation.evaluate import evaluate
from latentwire.bridge.evaluation.tasks import World, load_task
from latentwire.bridge.gate import GATE, load_gates
from latentwire.service.__main__ import app
from latentwire.training.calibration import calibrate, drawn, unseen
from latentwire.training.export import export
from latentwire.training.loop import train
from latentwire.training.prepare import prepare, sampler_of
from tests.integration.runs import quiet


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in bridge in a folder of one's own, without its gate."""
    folder = tmp_path_factory.mktemp("own") / "bridge"
    shutil.copytree(BUILTIN_BRIDGE, folder)
    (folder / GATE).unlink()
    return folder


def task_of(folder: Path, rows: int) -> Path:
    """A task file of so many training examples, each with another source."""
    for split, count in (("train", rows), ("test", 8)):
        lines = [json.dumps({"text": f"{split} fact number {i}", "answer": f"number {i}"}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    path = folder / "facts.toml"
    path.write_text(
        'name = "facts"\nkind = "generation"\ntrain = "train.jsonl"\ntest = "test.jsonl"\nsource = "{text}"\n'
        'prompt = "{latent}\\nWhich?"\nanswer = "{answer}"\n'
    )
    return path


def test_the_command_saves_a_gate_and_says_what_it_reaches(builtin: Path) -> None:
    arguments = ["calibrate", str(builtin), "--task", "world", "--target-retention", "0.85", "--examples", "60"]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0, said.output
    gate = load_gates(builtin, read_manifest(builtin))["builtin:llama"]
    assert (gate.task, gate.examples, gate.target_retention, gate.dtype) == ("world", 60, 0.85, "float16")
    assert gate.reached.low >= 0.85 and gate.reached.coverage > 0.5
    assert f"{gate.reached.coverage:.1%}" in said.output and "1.000 from texts" in said.output
    shown = CliRunner().invoke(app, ["inspect", str(builtin)]).output
    assert "gate of 'builtin:llama'" in shown and "latents of 60 texts of 'world'" in shown
    slim = builtin.parent / "slim"
    export(builtin, slim)
    assert load_gates(slim, read_manifest(slim)) == {"builtin:llama": gate}


def test_a_target_out_of_reach_is_one_sentence_and_saves_nothing(builtin: Path) -> None:
    before = (builtin / GATE).read_bytes() if (builtin / GATE).exists() else None
    with pytest.raises(InvalidRequest, match=r"no trust keeps 0.99 of the text's score .* 50 examples: the best"):
        calibrate(Bridge.load(builtin), "world", target_retention=0.99, examples=50)
    assert ((builtin / GATE).read_bytes() if (builtin / GATE).exists() else None) == before


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["builtin", "--task", "world"], "'builtin' is no folder; a gate is saved in"),
        (["{}", "--task", "world", "--target-retention", "1"], "target_retention is 1.0; expected more than 0"),
        (["{}", "--task", "world", "--metric", "accuracy"], "metric is 'accuracy'; a generation has em, token_f1"),
        (["{}", "--task", "world", "--receiver", "nobody"], "no head for receiver 'nobody'"),
    ],
)
def test_bad_input_is_named(builtin: Path, arguments: list[str], named: str) -> None:
    done = CliRunner().invoke(app, ["calibrate", *(one.format(builtin) for one in arguments)])
    assert isinstance(done.exception, LatentWireError) and named in str(done.exception)


def test_examples_of_the_world_are_new_ones(builtin: Path) -> None:
    task = load_task("world")
    found = list(unseen(Bridge.load(builtin), task, "builtin:llama", 60))
    assert len(found) == 60 and isinstance(task.train, World)
    assert not {example.source for example in found} & {example.source for example in task.test[:500]}
    assert found[0].source != task.train[0].source and task.train.split == "train"


def test_what_a_run_saw_is_left_out_and_its_validation_is_not(make: Any, tmp_path: Path) -> None:
    path = task_of(tmp_path, 200)
    config = make(task=str(path), max_steps=10, batch_size=8, validate_every=10, validation_examples=20)
    train(config, quiet())
    task, manifest = load_task(str(path)), read_manifest(config.out)
    left = drawn(manifest.bridge.provenance, task)
    run = prepare(config, quiet())
    assert 80 <= len(left) <= 128  # ten steps of eight, up to the end of their group
    seen = {run.train[i].source for step in range(config.max_steps) for i in sampler_of(run).batch(step)}
    assert len(seen) == 80 and seen <= {task.train[i].source for i in left}
    held = {example.source for example in run.validation}
    assert len(held) == 20 and not held & {task.train[i].source for i in left}
    found = unseen(Bridge.load(config.out), task, config.receiver[0], 500)
    assert len(found) == 200 - len(left) and not {example.source for example in found} & seen
    twice = replace(manifest.bridge.provenance, processes=4)
    assert drawn(twice, task) == {i for i in range(200) if task.train[i].source not in held}
    assert drawn(replace(twice, data_sha256="0" * 64), task) == set()


def test_a_bridge_that_saw_nearly_everything_is_refused(make: Any, tmp_path: Path) -> None:
    path = task_of(tmp_path, 60)
    config = make(task=str(path), max_steps=20, batch_size=8, validate_every=20, validation_examples=20)
    train(config, quiet())
    with pytest.raises(InvalidRequest, match="all but 20 of the 60 training examples of 'facts'; 50 are needed"):
        calibrate(Bridge.load(config.out), str(path), receiver=config.receiver[0])


def test_a_text_that_scores_nothing_leaves_nothing_to_retain(checkpoint: Path, tmp_path: Path) -> None:
    path = task_of(tmp_path, 60)
    with pytest.raises(InvalidRequest, match="scores 0 on 60 examples of 'facts': nothing to retain"):
        calibrate(Bridge.load(checkpoint), str(path))


def test_a_label_is_read_where_an_answer_begins() -> None:
    from latentwire.training.calibration import _label_in

    labels = [" good", " goodness", "+"]
    assert _label_in(" Goodness me\nReview:", labels) == "goodness"
    assert (_label_in("+", labels), _label_in(" bad", labels)) == ("+", "")


def test_labels_of_which_one_begins_another_are_refused_where_no_answer_ends(checkpoint: Path, tmp_path: Path) -> None:
    path = task_of(tmp_path, 60)
    asked = 'kind = "classification"\nlabel = "answer"\nlabels = ["number 1", "number 10"]\n'
    text = path.read_text().replace('kind = "generation"\n', asked).replace('answer = "{answer}"\n', "")
    path.write_text(text)
    for split in ("train", "test"):
        rows = [json.dumps({"text": f"{split} fact {i}", "answer": "number 1"}) for i in range(60)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    bridge = Bridge.load(checkpoint)
    config, name = bridge.model.config, bridge.receivers[0]
    head = replace(config.heads[name], layout=replace(config.heads[name].layout, eos_id=None))
    bridge.model = replace(bridge.model, config=replace(config, heads={name: head}))
    with pytest.raises(InvalidRequest, match="label 'number 1' begins 'number 10', and this receiver ends no answer"):
        calibrate(bridge, str(path))


def test_an_evaluation_says_what_the_gate_reaches_on_its_own_examples(tmp_path: Path) -> None:
    report = evaluate(Bridge.load(), limit=12, conditions=["bridge", "direct"])
    (gate,) = load_gates(BUILTIN_BRIDGE, read_manifest("builtin")).values()
    told = report.document["gate"]
    assert told["reached"]["trust"] == gate.reached.trust and told["target_retention"] == 0.98
    assert 0.5 < told["reached"]["coverage"] <= 1 and told["reached"]["retention"] <= 1
    assert told["curve"][-1]["coverage"] == 1.0
    assert told["curve"][-1]["retention"] == pytest.approx(report.conditions["bridge"].value)
    assert "kept of the text's score where the gate trusts" in " ".join(str(report).split())
    report.save(tmp_path / "report.html")
    assert "Latents where they are trusted, else texts" in (tmp_path / "report.html").read_text()
    assert evaluate(Bridge.load(), limit=2, conditions=["bridge"]).document["gate"] is None


def test_of_a_classification_the_gate_trusts_what_it_trusts_where_labels_are_scored(tmp_path: Path) -> None:
    known = load_task("world").test[:8]
    shifted = [replace(one, source=other.source) for one, other in zip(known, [*known[4:], *known[:4]], strict=True)]
    asked, labels = [*known, *shifted], list(dict.fromkeys(example.answer.strip() for example in known))
    rows = [
        {"text": one.source, "asked": one.prompt.removeprefix("{latent}"), "label": one.answer.strip()} for one in asked
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "train.jsonl").write_text(json.dumps({**rows[0], "text": "Another one altogether."}))
    (tmp_path / "labels.toml").write_text(
        'name = "labels"\nkind = "classification"\ntrain = "train.jsonl"\ntest = "test.jsonl"\nsource = "{text}"\n'
        f'prompt = "{{latent}}{{asked}}"\nlabel = "label"\nlabels = {json.dumps(labels)}\n'
    )
    bridge = Bridge.load()
    told = evaluate(bridge, tmp_path / "labels.toml", conditions=["bridge", "direct"]).document
    assert told["conditions"]["bridge"]["metric"] == "accuracy" and told["n"] == len(asked)
    choices = [f" {label}" for label in labels]
    scored = bridge.score([e.source for e in asked], [e.prompt for e in asked], choices, fallback="text").scores
    trusted = [one.answered_from == "latent" for one in scored]
    assert told["gate"]["reached"]["coverage"] == sum(trusted) / len(asked) and 0 < sum(trusted) < len(asked)
