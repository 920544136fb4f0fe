"""Which test examples are fit to be measured on."""

import pytest

from latentwire.bridge.config import Layout
from latentwire.bridge.errors import InvalidRequest, LeakFound
from latentwire.bridge.evaluation.heldout import check_labels, held_out, is_visible
from latentwire.bridge.evaluation.tasks import Example, Task, load_task

LONG = "The council of the old town decided on Monday that the bridge over the river will be closed for two years."
ASKED = "{latent}\nWhat?"


def task_of(train: list[Example], test: list[Example], labels: tuple[str, ...] = ()) -> Task:
    kind = "classification" if labels else "generation"
    return Task("few", kind, train, test, ASKED, "0" * 64, labels=labels)


def asked(source: str, prompt: str = ASKED, answer: str = " rain") -> Example:
    return Example(source, prompt, answer)


def test_an_example_that_was_trained_on_is_left_out_and_counted() -> None:
    test = [asked("It Rains."), asked("It snows."), asked(LONG)]
    held = held_out(task_of([asked("it rains"), asked("The sun.")], test), None)
    assert held.examples == test[1:] and held.dropped == {"duplicate": 1}


@pytest.mark.parametrize("edited", [LONG.replace("Monday", "Tuesday"), LONG + " Really."])
def test_nearly_the_same_source_is_left_out_too(edited: str) -> None:
    held = held_out(task_of([asked(edited)], [asked(LONG), asked("Else.")]), None)
    assert held.examples == [asked("Else.")] and held.dropped == {"near_duplicate": 1}


def test_another_question_about_a_known_source_and_a_known_question_about_another_are_kept() -> None:
    test = [asked(LONG, "{latent}\nWhen?"), asked("Quite another text about a market in spring.")]
    assert held_out(task_of([asked(LONG)], test), None).dropped == {}


def test_the_limit_counts_what_is_kept() -> None:
    test = [asked("a b c d"), asked("one"), asked("two"), asked("three")]
    held = held_out(task_of([asked("a b c d")], test), 2)
    assert [example.source for example in held.examples] == ["one", "two"]


def test_a_prompt_that_holds_its_answer_is_left_out() -> None:
    test = [asked(f"text {i}") for i in range(20)] + [asked("x", "{latent}\nDoes the Rain fall?")]
    held = held_out(task_of([asked("train")], test), None)
    assert len(held.examples) == 20 and held.dropped == {"answer_in_prompt": 1}


def test_where_the_prompts_hold_the_answers_the_evaluation_fails() -> None:
    test = [asked(f"text {i}", "{latent}\nIs it rain?") for i in range(3)] + [asked("x")]
    with pytest.raises(LeakFound, match="the prompt of 3 of 4 test examples holds the answer itself"):
        held_out(task_of([asked("train")], test), None)


@pytest.mark.parametrize(
    "prompt, labels, seen",
    [
        ("{latent}\nGood or bad?", ("good", "bad"), False),
        ("{latent}\nIt is good:", ("good", "bad"), True),
        ("{latent}\nKind:", ("good", "bad"), False),
        ("{latent}\nGoodness:", ("good", "bad"), False),  # within a word
    ],
)
def test_labels_that_the_prompt_lists_give_nothing_away(prompt: str, labels: tuple[str, ...], seen: bool) -> None:
    example = Example("text", prompt, " good", 0)
    assert is_visible(task_of([], [example], labels), example) is seen


def test_any_right_answer_in_the_prompt_gives_it_away() -> None:
    example = Example("text", "{latent}\nDoes the rain fall?", " a shower", also=(" Rain",))
    assert is_visible(task_of([], [example]), example)
    assert not is_visible(task_of([], [example]), Example("text", example.prompt, " a shower"))


def test_where_nothing_is_left_the_reason_is_said() -> None:
    with pytest.raises(InvalidRequest, match=r"task 'few': no test example is left \(2 duplicate\)"):
        held_out(task_of([asked("a"), asked("b")], [asked("a"), asked("B")]), None)


def test_the_built_in_world_is_taken_as_it_is() -> None:
    held = held_out(load_task("world"), 3)
    assert len(held.examples) == 3 and held.dropped == {}


def test_a_label_that_begins_another_is_refused_where_no_answer_ends() -> None:
    task = task_of([], [], ("no", "no way", "yes"))
    with pytest.raises(InvalidRequest, match="the label 'no' begins 'no way', and this receiver ends no answer"):
        check_labels(task, Layout("{latent}{prompt}", None, None))
    check_labels(task, Layout("{latent}{prompt}", None, 2))
