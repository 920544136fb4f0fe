"""Validation during a run: held-out examples, the task's own measure, and the numbers an evaluation would give."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentwire.bridge import engine
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import save_bridge
from latentwire.bridge.evaluation import measure as measuring
from latentwire.bridge.evaluation.conditions import CONDITIONS, predict
from latentwire.bridge.evaluation.context import EvaluationContext, open_context
from latentwire.bridge.evaluation.debug import shown
from latentwire.bridge.evaluation.metrics import METRICS
from latentwire.bridge.evaluation.tasks import Example
from latentwire.bridge.prompt import collate
from latentwire.training.export import export
from latentwire.training.loop import BEST, train
from latentwire.training.objectives import answer_loss
from latentwire.training.prepare import sampler_of
from latentwire.training.run import Run
from latentwire.training.validation import first_texts, metric_of, validate
from tests.integration.conftest import MakeConfig
from tests.integration.runs import events_of, prepared, quiet, said, step_of, task_of

ROWS = [(f"Number {n}{' and so on' * n}.", f"\nWhich of {chr(96 + n)}?", f" {n}") for n in range(1, 13)]


def labelled(folder: Path) -> str:
    """A task of two labels, one of them rarer."""
    rows = [{"t": f"Review {n}: {'good' if n % 3 else 'bad'} film.", "y": int(n % 3 > 0)} for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text('{"t": "Not seen.", "y": 0}\n')
    (folder / "task.toml").write_text(
        'name = "reviews"\nkind = "classification"\ntrain = "rows.jsonl"\ntest = "test.jsonl"\n'
        'source = "{t}"\nprompt = "{latent}\\nSentiment:"\nlabel = "y"\nlabels = ["negative", "positive"]\n'
    )
    return str(folder / "task.toml")


def trained(config: Any) -> Run:
    run = prepared(config)
    for step in range(3):
        step_of(run, step)
    return run


def context_of(run: Run) -> EvaluationContext:
    """The same bridge, as an evaluation would open it, asked about the run's validation examples."""
    save_bridge(run.config.out / "as-is", run.bridge)
    context = open_context(run.config.out / "as-is", run.config.task, limit=None, dtype="float32", receiver=None)
    return replace(context, examples=list(run.validation))


def losses_of(context: EvaluationContext) -> list[float]:
    """Cross-entropy of each example's answer, one row at a time."""
    found = []
    for i, latent in enumerate(context.latents(range(len(context.examples)))):
        soft = engine.soften(context.bridge, context.receiver_name, context.receiver, [latent])
        batch = collate(context.rows([i], [latent], [context.examples[i].answer]), side="left")
        found.append(float(answer_loss(*engine.answer_logits(context.receiver, batch, soft))))
    return found


def reported(run: Run) -> dict[str, Any]:
    """What an evaluation reports of the bridge; of its rivals only one, for they take long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "CONDITIONS", {name: CONDITIONS[name] for name in ("bridge", "none")})
        patch.setattr(measuring, "TIMED_EXAMPLES", 1)
        return dict(measuring.measure(context_of(run))["conditions"]["bridge"])


def said_by(run: Run) -> list[str]:
    context = context_of(run)
    everyone = range(len(context.examples))
    return predict(context, everyone, context.latents(everyone))


def test_the_measure_is_the_tasks_own_unless_another_is_asked_for(make: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "labelled").mkdir()
    generation = prepared(make(task=task_of(tmp_path, *ROWS), validate_every=1))
    labels = prepared(make(task=labelled(tmp_path / "labelled"), validate_every=1))
    assert (metric_of(generation), metric_of(labels)) == ("em", "accuracy")
    generation.config = generation.config.model_copy(update={"metric": "token_f1"})
    assert metric_of(generation) == "token_f1"


def test_a_loss_is_better_when_it_is_smaller_and_a_score_when_it_is_larger() -> None:
    loss = METRICS["loss"]
    assert loss.is_better(0.5, 0.6) and not loss.is_better(0.6, 0.5) and not loss.is_better(0.5, 0.5)
    for metric in (METRICS["em"], METRICS["accuracy"], METRICS["token_f1"]):
        assert metric.is_better(0.6, 0.5) and not metric.is_better(0.5, 0.6) and not metric.is_better(0.5, 0.5)


def test_exact_match_is_that_of_the_evaluation(make: MakeConfig, tmp_path: Path) -> None:
    run = trained(make(task=task_of(tmp_path, *ROWS), validate_every=1, validation_examples=4))
    # An untrained pair is never right: half of the examples get as their answer what the receiver says to them.
    texts = said_by(run)
    run.validation = [
        replace(example, answer=text if i % 2 else example.answer)
        for i, (example, text) in enumerate(zip(run.validation, texts, strict=True))
    ]
    metric, value = validate(run, lambda _: None)
    wanted = reported(run)
    assert (metric, value) == (wanted["metric"], wanted["value"]) and 0.5 <= value < 1


def test_token_f1_is_that_of_the_evaluation(make: MakeConfig, tmp_path: Path) -> None:
    changes = {"metric": "token_f1", "validate_every": 1, "validation_examples": 4, "batch_size": 3}
    run = trained(make(task=task_of(tmp_path, *ROWS), **changes))
    texts = said_by(run)
    run.validation = [
        replace(example, answer=f"{text} and more" if i % 2 else " nothing like it")
        for i, (example, text) in enumerate(zip(run.validation, texts, strict=True))
    ]
    metric, value = validate(run, lambda _: None)
    assert metric == "token_f1" and 0 < value < 1
    assert value == pytest.approx(reported(run)["token_f1"])


def test_accuracy_is_that_of_the_evaluation(make: MakeConfig, tmp_path: Path) -> None:
    run = trained(make(task=labelled(tmp_path), validate_every=1, validation_examples=6))
    labels = [example.label for example in run.validation]
    assert sorted(labels, key=str) == [0, 0, 1, 1, 1, 1], "stratified"
    metric, value = validate(run, lambda _: None)
    wanted = reported(run)
    assert (metric, value) == (wanted["metric"], wanted["value"])
    # Its complement, so that no constant passes.
    other = {" negative": " positive", " positive": " negative"}
    run.validation = [replace(e, answer=other[e.answer], label=1 - (e.label or 0)) for e in run.validation]
    assert validate(run, lambda _: None)[1] == pytest.approx(1 - value)


def test_the_validation_loss_is_the_unweighted_loss_of_the_answers(make: MakeConfig, tmp_path: Path) -> None:
    changes = {"metric": "loss", "first_token_weight": 9.0, "validate_every": 1, "validation_examples": 5}
    run = trained(make(task=task_of(tmp_path, *ROWS), **changes, batch_size=2))
    metric, value = validate(run, lambda _: None)
    assert metric == "loss"
    assert value == pytest.approx(np.mean(losses_of(context_of(run))), rel=1e-5)


def test_validation_is_the_mean_over_receivers_and_changes_nothing(
    make: MakeConfig, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    receivers = [str(model_folders["llama"]), str(model_folders["gpt2"])]
    changes = {"metric": "loss", "validate_every": 1, "validation_examples": 3, "alignment_steps": 0}
    run = prepared(make(task=task_of(tmp_path, *ROWS), receiver=receivers, **changes))
    before, chance = [p.detach().clone() for p in run.parameters], torch.get_rng_state()
    _, value = validate(run, lambda _: None)
    assert torch.equal(torch.get_rng_state(), chance)
    whole = context_of(run)
    other = open_context(run.config.out / "as-is", run.config.task, limit=None, dtype="float32", receiver=receivers[1])
    apart = [np.mean(losses_of(context)) for context in (whole, replace(other, examples=whole.examples))]
    assert value == pytest.approx(np.mean(apart), rel=1e-5) and apart[0] != pytest.approx(apart[1])
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, run.parameters, strict=True))


def texts_of(examples: Sequence[Example]) -> list[str]:
    return [example.source for example in examples]


def test_no_example_is_both_trained_on_and_validated_on(make: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "labelled").mkdir()
    for task, count in ((task_of(tmp_path, *ROWS), 5), (labelled(tmp_path / "labelled"), 6)):
        run = prepared(make(task=task, validate_every=1, validation_examples=count))
        held, kept = texts_of(run.validation), texts_of(run.train)
        assert len(held) == count and not set(held) & set(kept)
        assert sorted(held + kept) == sorted(texts_of(run.task.train))
    without = prepared(make(task=task_of(tmp_path, *ROWS), validate_every=0))
    assert not without.validation and len(without.train) == len(ROWS)


@pytest.mark.parametrize("metric, sign", [("loss", -1), ("token_f1", 1)])
def test_the_best_checkpoint_is_the_one_of_the_best_validation(
    make: MakeConfig, tmp_path: Path, metric: str, sign: int
) -> None:
    changes = {"metric": metric, "validate_every": 1, "validation_examples": 3, "max_steps": 4, "alignment_steps": 0}
    config = make(task=task_of(tmp_path, *ROWS), **changes, learning_rate=0.05)
    train(config, quiet())
    events = events_of(config.out, "validation")
    assert [event["step"] for event in events] == [1, 2, 3, 4] and {event["metric"] for event in events} == {metric}
    best = -np.inf
    for event in events:
        assert event["best"] is bool(sign * event["value"] > best)
        best = max(best, sign * event["value"])
    context = open_context(config.out / BEST, config.task, limit=None, dtype="float32", receiver=None)
    context = replace(context, examples=list(prepared(config.model_copy(update={"out": tmp_path / "x"})).validation))
    if metric == "loss":
        assert np.mean(losses_of(context)) == pytest.approx(-best, rel=1e-5)


GENERATION = re.compile(r"example (\d+): wanted ('.*?'|\".*?\"), said ")
TOKENS = re.compile(r"example (\d+): first token (.*)")
SHARE = re.compile(r" (\d\.\d{3})(?:, |$)")


def shares(line: str) -> list[float]:
    """The probabilities of a line of likeliest tokens."""
    found = TOKENS.fullmatch(line)
    assert found is not None, line
    return [float(share) for share in SHARE.findall(found[2])]


@pytest.mark.parametrize("first, topk", [(0, 0), (3, 0), (0, 4), (2, 5)])
def test_a_validation_prints_exactly_the_generations_and_tokens_asked_for(
    make: MakeConfig, tmp_path: Path, first: int, topk: int
) -> None:
    debug = {"debug_print_first": first, "debug_topk": topk}
    config = make(task=task_of(tmp_path, *ROWS), validate_every=2, validation_examples=4, max_steps=4, **debug)
    console = quiet()
    train(config, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line for line in text.split("\n") if line.startswith("example ")]
    assert len([line for line in lines if GENERATION.match(line)]) == 2 * first
    told = [line for line in lines if TOKENS.fullmatch(line)]
    assert len(told) == (2 * max(first, 1) if topk else 0)
    assert len(lines) == 2 * first + len(told)
    for line in told:
        found = shares(line)
        assert len(found) == topk and found == sorted(found, reverse=True) and sum(found) <= 1.005
    assert "validation em" in said(console)


def test_what_a_run_prints_is_what_an_evaluation_prints(make: MakeConfig, tmp_path: Path) -> None:
    debug = {"debug_print_first": 3, "debug_topk": 6}
    run = trained(make(task=task_of(tmp_path, *ROWS), validate_every=1, validation_examples=4, **debug))
    lines: list[str] = []
    validate(run, lines.append)
    context = context_of(run)
    latents = context.latents(range(4))
    assert list(shown(context, latents, 3, 6)) == lines and len(lines) == 6
    texts = predict(context, range(3), latents[:3])
    expected = [f"example {i + 1}: wanted {context.examples[i].answer!r}, said {texts[i]!r}" for i in range(3)]
    assert lines[:3] == expected
    assert [line for line in shown(context, latents, 0, 0)] == []


def test_the_likeliest_tokens_are_those_of_a_row_alone(make: MakeConfig, tmp_path: Path) -> None:
    run = trained(make(task=task_of(tmp_path, *ROWS), validate_every=1, validation_examples=3))
    context = context_of(run)
    latents = context.latents(range(3))
    lines = list(shown(context, latents, 3, 4))[3:]
    for i, line in enumerate(lines):
        soft = engine.soften(context.bridge, context.receiver_name, context.receiver, [latents[i]])
        batch = collate(context.rows([i], [latents[i]], [None]), side="left")
        logits, _ = engine.answer_logits(context.receiver, batch, soft)
        best = logits[0, -1].softmax(dim=-1).topk(4)
        assert shares(line) == pytest.approx(best.values.tolist(), abs=6e-4)
        first = context.receiver.tokenizer.decode([int(best.indices[0])])
        assert line.startswith(f"example {i + 1}: first token {first!r} ")


def test_more_tokens_than_there_are_and_more_examples_than_there_are_are_all(make: MakeConfig, tmp_path: Path) -> None:
    run = trained(make(task=task_of(tmp_path, *ROWS), validate_every=1, validation_examples=2))
    context = context_of(run)
    lines = list(shown(context, context.latents(range(2)), 5, 10_000))
    assert len(lines) == 4
    assert sum(shares(lines[-1])) == pytest.approx(1, abs=0.2)  # hundreds of rounded shares


def test_an_evaluation_without_latents_shows_what_the_receiver_says_on_its_own(
    make: MakeConfig, tmp_path: Path
) -> None:
    run = trained(make(task=task_of(tmp_path, *ROWS), validate_every=1, validation_examples=2))
    context = context_of(run)
    readings = [context.examples[0].source, context.examples[1].source]
    lines = list(shown(context, readings, 2, 3))
    assert len(lines) == 4 and all(len(shares(line)) == 3 for line in lines[2:])
    none = list(shown(context, [None, None], 1, 3))
    assert len(none) == 2 and none[0] != lines[0]


@pytest.mark.parametrize("cached", [False, True])
def test_a_checkpoint_keeps_what_the_latents_of_its_training_texts_are_like(
    make: MakeConfig, tmp_path: Path, cached: bool
) -> None:
    config = make(max_steps=10, save_every=20, validate_every=10, validation_examples=2, cache_features=cached)
    train(config, quiet())
    bridge, run = Bridge.load(config.out), prepared(config.model_copy(update={"out": tmp_path / "again"}))
    drawn = [run.train[i].source for step in range(10) for i in sampler_of(run).batch(step)]
    latents = [latent.array for latent in bridge.encode(drawn, dtype="float32", truncate=True)]
    assert bridge.statistics is not None and bridge.statistics.texts == 40
    assert bridge.statistics.mean == pytest.approx(np.mean([one.mean(axis=0) for one in latents], axis=0), abs=1e-4)
    assert bridge.statistics.std == pytest.approx(np.std([one.mean(axis=0) for one in latents], axis=0), abs=1e-4)
    assert Bridge.load(config.out / BEST).statistics == bridge.statistics  # validated once, after the last step
    export(config.out, tmp_path / "slim")
    assert Bridge.load(tmp_path / "slim").statistics == bridge.statistics


@pytest.mark.parametrize("batch_size", [16, 64, 128])
def test_what_is_usual_is_of_texts_of_all_lengths_however_many_a_step_takes(make: MakeConfig, batch_size: int) -> None:
    run = prepared(make(max_steps=8, batch_size=batch_size, group_by_length=True))
    lengths = [len(run.train[i].source) for i in first_texts(run)]
    every = [len(run.train[i].source) for step in range(8) for i in sampler_of(run).batch(step)]
    assert len(lengths) == len(set(first_texts(run))) and 64 <= len(lengths) <= 128
    assert abs(np.mean(lengths) - np.mean(every)) < 0.3 * np.std(every)
    assert np.std(lengths) == pytest.approx(np.std(every), rel=0.3)


def test_a_run_of_too_few_texts_says_nothing_of_them(make: MakeConfig) -> None:
    config = make(max_steps=7)  # of four
    train(config, quiet())
    assert Bridge.load(config.out).statistics is None
