"""An evaluation in which an answer goes around the bridge is stopped; each leak here is planted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from latentwire.bridge.errors import LeakFound
from latentwire.bridge.evaluation.conditions import CONDITIONS, Condition, predict
from latentwire.bridge.evaluation.context import EvaluationContext, PredictionContext, Reading, open_context
from latentwire.bridge.evaluation.leaks import CHECKED, CHECKED_INPUTS, check_answers, check_inputs, looked_at
from latentwire.bridge.evaluation.measure import measure
from latentwire.bridge.prompt import Row
from tests.integration.runs import task_of


@pytest.fixture(scope="module")
def context(checkpoint: Path) -> EvaluationContext:
    return open_context(checkpoint, "world", limit=6, dtype="float16", receiver=None)


@pytest.fixture(scope="module")
def labelled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationContext:
    folder = tmp_path_factory.mktemp("task")
    task_of(folder, *((f"Text number {i}.", "\nKind:", " good") for i in range(6)))
    text = (folder / "task.toml").read_text().replace('"generation"', '"classification"')
    (folder / "task.toml").write_text(text.replace('answer = "{a}"', 'label = "k"\nlabels = ["good", "bad"]'))
    for name in ("rows", "test"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        rows = [line.replace('"a": " good"', f'"k": {i % 2}') for i, line in enumerate(lines)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return open_context(checkpoint, str(folder / "task.toml"), limit=None, dtype="float16", receiver=None)


@dataclass(frozen=True, kw_only=True)
class Telling(EvaluationContext):
    """Puts a word of the source into the receiver's input, beside the latent."""

    def rows(self, chosen: Sequence[int], readings: Sequence[Reading], answers: Sequence[str | None]) -> list[Row]:
        rows = super().rows(chosen, readings, answers)
        both = zip(rows, readings, strict=True)
        return [row if reading is None else row.after(row.text_ids[-1:]) for row, reading in both]


def test_receiver_inputs_are_the_prompts_and_soft_tokens_and_nothing_else(context: EvaluationContext) -> None:
    latents = context.recall(range(6))
    assert check_inputs(context, range(6), latents) == 6
    telling = Telling(**{name: getattr(context, name) for name in context.__dataclass_fields__})
    with pytest.raises(LeakFound, match=r"example 1: beside its soft tokens the receiver reads .*they must be equal"):
        check_inputs(telling, range(6), latents)
    with pytest.raises(LeakFound, match="they must be equal"):
        check_inputs(context, [0], ["the source as text"])


@dataclass(frozen=True, kw_only=True)
class TellingLast(Telling):
    """Does so for one example alone, behind those whose answers are looked at."""

    def rows(self, chosen: Sequence[int], readings: Sequence[Reading], answers: Sequence[str | None]) -> list[Row]:
        return (super() if CHECKED + 1 in chosen else super(Telling, self)).rows(chosen, readings, answers)


def test_no_example_of_an_evaluation_escapes_the_check_of_its_input(checkpoint: Path) -> None:
    more = open_context(checkpoint, "world", limit=CHECKED + 2, dtype="float16", receiver=None)
    assert measure(more, conditions=["bridge"])["checks"] == {"inputs": CHECKED + 2, "answers": CHECKED}
    telling = TellingLast(**{name: getattr(more, name) for name in more.__dataclass_fields__})
    with pytest.raises(LeakFound, match=rf"example {CHECKED + 2}: .*they must be equal"):
        measure(telling, conditions=["bridge"])


def test_of_more_examples_than_two_seconds_take_some_are_looked_at_throughout() -> None:
    looked = looked_at(2 * CHECKED_INPUTS + 1)
    assert len(looked) <= CHECKED_INPUTS and looked[-1] > 2 * CHECKED_INPUTS - looked.step
    assert looked_at(CHECKED_INPUTS) == range(CHECKED_INPUTS)


def knowing(context: PredictionContext, chosen: Sequence[int], readings: Sequence[Reading]) -> list[str]:
    return [context.examples[i].answer for i in chosen]


def as_long(context: PredictionContext, chosen: Sequence[int], readings: Sequence[Reading]) -> list[str]:
    said = predict(context, chosen, readings)
    return [text[: len(context.examples[i].answer) // 4] for text, i in zip(said, chosen, strict=True)]


def the_first(context: PredictionContext, chosen: Sequence[int], readings: Sequence[Reading]) -> list[str]:
    return [f" {context.task.labels[0]}" for _ in chosen]


@pytest.mark.parametrize("answer", [knowing, as_long])
def test_an_answer_that_depends_on_the_wanted_one_or_its_length_stops_the_evaluation(
    context: EvaluationContext, answer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONDITIONS, "bridge", replace(CONDITIONS["bridge"], answer=answer))
    with pytest.raises(LeakFound, match="where another one is wanted and the labels are in another order"):
        measure(context, conditions=["bridge"])


def test_a_label_chosen_by_its_place_stops_the_evaluation(labelled: EvaluationContext) -> None:
    condition = Condition("bridge", "", EvaluationContext.latents, answer=the_first)
    said = the_first(labelled, range(6), [None] * 6)
    with pytest.raises(LeakFound, match="example 1: the answer is ' good', and ' bad' where"):
        check_answers(labelled, condition, [None] * 6, said)


def test_honest_answers_pass_and_the_report_says_how_many_were_looked_at(
    context: EvaluationContext, labelled: EvaluationContext
) -> None:
    for made in (context, labelled):
        assert measure(made, conditions=["bridge"])["checks"] == {"inputs": 6, "answers": 6}
    assert CHECKED >= 6
