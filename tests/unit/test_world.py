"""The world: nothing of the test split can be learnt by heart, and every answer stands in its source."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentwire.bridge.evaluation import world
from latentwire.bridge.evaluation.tasks import World, world_task

SPLITS: tuple[world.Split, world.Split] = ("train", "test")


def told(split: world.Split, count: int = 400) -> list[tuple[world.Fact, ...]]:
    return [world.facts(split, 0, index) for index in range(count)]


def test_no_fact_of_a_test_source_ever_stands_in_a_training_source() -> None:
    seen = {split: {(f.subject, f.relation.name, f.value) for scene in told(split) for f in scene} for split in SPLITS}
    assert seen["train"] and seen["test"] and not seen["train"] & seen["test"]


def test_every_fact_belongs_to_the_split_that_tells_it() -> None:
    for split in SPLITS:
        assert all(
            world.split_of(f.subject, f.relation.name, f.value) == split for scene in told(split, 100) for f in scene
        )


def test_about_one_combination_in_eight_is_held_out() -> None:
    owners = [world.split_of(s, r.name, v) for r in world.RELATIONS for s in r.subjects for v in r.values]
    assert owners.count("test") / len(owners) == pytest.approx(1 / 8, abs=0.01)


def test_the_split_of_a_combination_never_changes() -> None:
    # A changed hash would move training facts into the test split of a checkpoint made before.
    held_out = [city for city in world.CITIES if world.split_of("Mara", "home", city) == "test"]
    assert held_out == ["London", "Berlin", "Dublin", "Lisbon", "Chicago"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(0, 99), st.integers(0, 10**6))
def test_every_answer_can_be_read_off_its_source(split: world.Split, seed: int, index: int) -> None:
    facts, scene = world.facts(split, seed, index), world.scene(split, seed, index)
    assert scene.source == " ".join(fact.sentence for fact in facts)
    for fact, (question, answer) in zip(facts, scene.questions, strict=True):
        said = [s.format(s=fact.subject, v=fact.value) for s in fact.relation.statements]
        assert fact.sentence in said and answer == said[0] and fact.subject in question


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(0, 10**6))
def test_a_scene_has_distinct_subjects_and_few_relations(split: world.Split, index: int) -> None:
    facts = world.facts(split, 0, index)
    assert 4 <= len(facts) <= 8 and len({fact.subject for fact in facts}) == len(facts)
    assert len({fact.relation.name for fact in facts}) <= 3
    questions = [question for question, _ in world.scene(split, 0, index).questions]
    assert len(set(questions)) == len(questions)


def test_a_question_gives_away_nothing_but_the_herd() -> None:
    for scene in told("test", 100):
        for fact in scene:
            given_away = fact.relation.name == "herd"
            assert (fact.value.split()[-1] in fact.question.rstrip("?").split()) is given_away
            assert fact.value not in fact.question


def test_the_base_rate_is_one_in_the_values_that_fit() -> None:
    for relation in world.RELATIONS:
        fitting = {v for v in relation.values if relation.name != "herd" or v.endswith(" cats")}
        assert relation.candidates == len(fitting)
    rates = [1 / relation.candidates for relation in world.RELATIONS]
    assert world.base_rate() == pytest.approx(sum(rates) / len(rates)) == pytest.approx(0.0433, abs=0.002)


def test_the_vocabulary_holds_every_word_anyone_says() -> None:
    words = set(world.vocabulary())
    for split in SPLITS:
        for index in range(100):
            scene = world.scene(split, 0, index)
            text = " ".join([scene.source, *(part for pair in scene.questions for part in pair)])
            assert set(text.replace(".", " ").replace("?", " ").split()) <= words


@pytest.mark.parametrize("low, high", [(0, 4), (5, 4), (1, 13)])
def test_an_impossible_number_of_facts_is_refused_with_its_value(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=f"got {low}..{high}"):
        world.facts("train", 0, 0, min_facts=low, max_facts=high)


def test_an_easier_world_draws_on_what_it_is_given() -> None:
    home = tuple(relation for relation in world.RELATIONS if relation.name == "home")
    facts = [fact for i in range(50) for fact in world.facts("train", 0, i, relations=home, wordings=1)]
    assert {fact.relation.name for fact in facts} == {"home"} and {fact.wording for fact in facts} == {0}


def test_an_example_is_a_function_of_split_seed_and_index_alone() -> None:
    data = World("train", 1000)
    backwards = [data[i] for i in reversed(range(20))]
    assert backwards[::-1] == [World("train", 50)[i] for i in range(20)] == data[:20]
    assert World("test", 50)[0] != data[0] != World("train", 50, seed=1)[0]


def test_a_question_drawn_by_index_is_one_of_its_scene() -> None:
    for i in range(50):
        example, scene = World("test", 50)[i], world.scene("test", 0, i)
        pairs = [(world.QUESTION.replace("{question}", q), f" {a}") for q, a in scene.questions]
        assert example.source == scene.source and (example.prompt, example.answer) in pairs


def test_a_split_ends_where_it_says() -> None:
    data = World("test", 5)
    assert len(data) == len(list(data)) == len(data[:99]) == 5 and data[3:1] == []
    for index in (5, -1):
        with pytest.raises(IndexError):
            data[index]


def test_questions_are_drawn_from_the_scenes_in_order() -> None:
    drawn = world.questions("test", 0, 10)
    assert [source for source, _, _ in drawn] == [world.scene("test", 0, i).source for i in range(10)]
    assert all((q, a) in world.scene("test", 0, i).questions for i, (_, q, a) in enumerate(drawn))


def test_the_world_task_names_its_data_and_asks_about_the_latent() -> None:
    task = world_task()
    assert (task.name, task.kind, len(task.train), len(task.test)) == ("world", "generation", 1_000_000, 500)
    assert len(task.data_sha256) == 64 and "{source}" in task.relay
    assert all(example.prompt.count("{latent}") == 1 for example in [*task.train[:20], *task.test[:20]])
