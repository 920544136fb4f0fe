"""Several sources in one prompt, in training: which, in what order, and whose soft tokens stand where."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation.tasks import Example
from latentwire.bridge.prompt import IGNORE, TEXT
from latentwire.training.config import read_config
from latentwire.training.several import chosen, mix
from latentwire.training.tokens import Tokens, flatten, unflatten
from tests.integration.conftest import MakeConfig
from tests.integration.runs import prepared, step_of
from tests.integration.test_tokens import tokeniser_of

NAMES = ["Mara", "Ben", "Zoe", "Ali", "Kim", "Ida"]
EXAMPLES = [
    Example(f"{name} has {i} cats and the rest.", f"{{latent}}\nQuestion: What does {name} have?\nAnswer:", f" {i}")
    for i, name in enumerate(NAMES)
]


@pytest.fixture(scope="module")
def rows(lms: Any) -> list[Tokens]:
    tokeniser = tokeniser_of(lms["neox"], lms["llama"], sources_per_example=4)
    return [tokeniser(example) for example in EXAMPLES]


def test_an_example_gets_some_others_beside_its_own_source_in_an_order_of_its_own(rows: list[Tokens]) -> None:
    drawn = [chosen(rows, most=4, seed=seed) for seed in range(60)]
    assert drawn == [chosen(rows, most=4, seed=seed) for seed in range(60)]
    for orders in drawn:
        for own, order in enumerate(orders):
            assert own in order and len(set(order)) == len(order) <= 4
    orders = [order for each in drawn for order in each]
    assert {len(order) for order in orders} == {1, 2, 3, 4}
    places = [order.index(own) for each in drawn for own, order in enumerate(each) if len(order) == 4]
    assert set(places) == {0, 1, 2, 3}


def test_a_source_that_the_question_could_also_be_about_is_left_out(rows: list[Tokens]) -> None:
    twin = replace(rows[0], text="Mara has a dog and the rest.")
    for seed in range(30):
        orders = chosen([*rows, twin], most=7, seed=seed)
        assert 6 not in orders[0] and 0 not in orders[6]
    assert any(len(order) == 6 for seed in range(30) for order in chosen([*rows, twin], most=7, seed=seed))


def test_rows_are_those_of_the_composer_with_the_soft_tokens_of_each_source_in_its_place(
    lms: Any, rows: list[Tokens]
) -> None:
    tokeniser = tokeniser_of(lms["neox"], lms["llama"], sources_per_example=4)
    slots = [2, 3, 1, 2, 3, 1]
    soft = torch.arange(6.0)[:, None, None].expand(6, 3, 4).clone().requires_grad_()
    mixed, tokens = mix(tokeniser, rows, soft, slots)
    for own, (row, order, made) in enumerate(zip(mixed, chosen(rows, most=4, seed=0), tokens, strict=True)):
        owners = [j for j in order for _ in range(slots[j])]
        assert [slot for slot in row.slots if slot != TEXT] == list(range(len(owners)))
        assert made[: len(owners), 0].tolist() == owners
        said = [i for i, label in zip(row.ids, row.labels, strict=True) if label != IGNORE]
        assert said == [i for i in rows[own].answer.labels if i != IGNORE]
        if len(order) == 1:
            assert row == rows[own].answer
            continue
        text = lms["llama"].tokenizer.decode([i for i, slot in zip(row.ids, row.slots, strict=True) if slot == TEXT])
        marks = "\n".join(f"[{number}]" for number in range(1, len(order) + 1))
        assert text == f"<s>{marks}\nQuestion: What does {NAMES[own]} have?\nAnswer: {own}</s>"
    tokens.sum().backward()
    assert soft.grad is not None and bool((soft.grad[:, 0] > 0).all())


def test_where_the_receiver_has_no_room_there_are_fewer_sources(lms: Any, rows: list[Tokens]) -> None:
    tokeniser = tokeniser_of(lms["neox"], lms["llama"], sources_per_example=4)
    slots = [100] * 6
    mixed, _ = mix(tokeniser, rows, torch.zeros(6, 100, 4), slots)
    assert {sum(slot != TEXT for slot in row.slots) for row in mixed} <= {100, 200}
    assert any(len(order) > 2 for order in chosen(rows, most=4, seed=0))
    assert all(len(row) <= lms["llama"].max_tokens for row in mixed)


def test_texts_are_kept_where_they_are_needed_and_are_the_same_from_disk(lms: Any, rows: list[Tokens]) -> None:
    assert [unflatten(flatten(row)) for row in rows] == rows and rows[0].said == " 0"
    alone = tokeniser_of(lms["neox"], lms["llama"])(EXAMPLES[0])
    assert replace(rows[0], prompt="", said="", text="") == alone


def test_a_step_answers_from_several_sources_and_compares_single_ones(make: MakeConfig) -> None:
    settings: dict[str, Any] = {"alignment_steps": 0, "margin_weight": 1.0, "kd_weight": 1.0, "probe_every": 1}
    one, several = (step_of(prepared(make(sources_per_example=most, **settings)), 0) for most in (1, 4))
    assert several.losses["margin"] == pytest.approx(one.losses["margin"], abs=1e-4)
    assert several.delta_nats == pytest.approx(one.delta_nats, abs=1e-4)
    assert several.losses["answer"] != pytest.approx(one.losses["answer"], abs=1e-4)
    assert np.isfinite(several.loss)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"sources_per_example": 0}, "greater than or equal to 1"),
        ({"sources_per_example": 5, "batch_size": 4}, "must be at most batch_size, 4"),
        ({"sources_per_example": 2, "source_text": True}, "--source-text none"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(more: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        read_config(None, {"sender": "a", "receiver": ["b"], "task": "world", "out": "run", **more})
