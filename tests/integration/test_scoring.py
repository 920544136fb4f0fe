"""Given continuations are scored from what they share, read once: as likely as in whole rows, in fewer tokens."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from latentwire.bridge import scoring
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import IGNORE, TEXT, Row, collate, compose, embed, fit, layout_for
from latentwire.bridge.scoring import Continuation, WarmRows, passes, score, shared

TEMPLATE = "Text: {latent}\nQuestion: {question}\nAnswer:"
PROMPTS = ["Text: {latent}\nWho?", "{latent} a much longer question, with a comma?", "no place for it"]
ANSWERS = [" yes", " no", " a rather long answer", " yes it is"]


def questions_of(lm: FrozenLM, slots: Sequence[int | str | None] = (3, 5, None)) -> list[list[Row]]:
    layout = layout_for(lm, TEMPLATE)
    return [
        [compose(lm, layout, prompt, latent=K, answer=answer) for answer in ANSWERS[: 4 - i]]
        for i, (prompt, K) in enumerate(zip(PROMPTS, slots, strict=True))
    ]


def soft_of(lm: FrozenLM) -> torch.Tensor:
    drawn = torch.randn(3, 5, lm.width, generator=torch.Generator().manual_seed(0))
    return drawn / drawn.pow(2).mean(dim=-1, keepdim=True).sqrt() * lm.embedding_rms()


def by_hand(lm: FrozenLM, row: Row, soft: torch.Tensor) -> list[tuple[int, float, bool]]:
    """Each labelled token of one row alone, without a cache."""
    with torch.no_grad():
        logits = lm.model(inputs_embeds=embed(lm, collate([row], side="left"), soft[None])).logits[0]
    logprobs = logits.log_softmax(-1)
    at = [t for t, label in enumerate(row.labels) if label != IGNORE]
    return [(row.ids[t], float(logprobs[t - 1, row.ids[t]]), int(logits[t - 1].argmax()) == row.ids[t]) for t in at]


def check(lm: FrozenLM, questions: list[list[Row]], found: list[list[Continuation]]) -> None:
    for i, (rows, scored) in enumerate(zip(questions, found, strict=True)):
        for row, one in zip(rows, scored, strict=True):
            wanted = by_hand(lm, row, soft_of(lm)[i])
            assert one.ids == tuple(label for label, _, _ in wanted) and one.greedy == all(g for _, _, g in wanted)
            assert one.logprobs == pytest.approx([logprob for _, logprob, _ in wanted], abs=1e-4)
            assert one.logprob == pytest.approx(sum(one.logprobs))


def test_continuations_are_as_likely_as_in_whole_rows_alone(lm: FrozenLM) -> None:
    questions = questions_of(lm)
    check(lm, questions, score(lm, questions, soft_of(lm)))


def test_a_receiver_in_which_nothing_is_shared_reads_whole_rows(lms: dict[str, FrozenLM]) -> None:
    lm = lms["llama"]
    ids = [[5, 6, 7], [8, 6, 7]]
    questions = [[Row(row, [TEXT] * 3, [IGNORE, *row[1:]]) for row in ids]] * 3
    assert shared(questions[0]) == 0
    check(lm, questions, score(lm, questions, soft_of(lm)))


def test_rows_that_part_before_what_is_scored_are_parted_there(lms: dict[str, FrozenLM]) -> None:
    lm = lms["mistral"]
    layout, room = layout_for(lm, TEMPLATE), 40
    rows = [fit(lm, layout, PROMPTS[0], "a text that is cut to make room for its answer", room, a) for a in ANSWERS]
    first = min(next(t for t, label in enumerate(row.labels) if label != IGNORE) for row in rows)
    assert 0 < shared(rows) < first
    check(lm, [rows, rows], score(lm, [rows, rows], soft_of(lm)[:2]))


def test_what_is_shared_is_read_once_and_nothing_is_read_that_predicts_nothing(
    lms: dict[str, FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lms["llama"]
    read: list[int] = []

    def counted(_: Any, __: Any, given: dict[str, Any]) -> None:
        read.append(given["inputs_embeds"].shape[1] * given["inputs_embeds"].shape[0])

    hook = lm.model.register_forward_pre_hook(counted, with_kwargs=True)
    questions = questions_of(lm)[:1]
    score(lm, questions, soft_of(lm)[:1])
    hook.remove()
    rows, length = questions[0], shared(questions[0])
    assert read[0] == length == next(t for t, label in enumerate(rows[0].labels) if label != IGNORE)
    needed = sum(len(row) - length - 1 for row in rows)
    assert needed <= sum(read[1:]) <= needed * scoring.PADDED


def test_an_accelerator_reads_all_continuations_in_one_forward() -> None:
    lengths = [2, 9, 2, 3]
    assert scoring._alike(lengths, torch.device("cuda")) == [[0, 2, 3, 1]]
    assert scoring._alike(lengths, torch.device("cpu")) == [[0, 2, 3], [1]]


def test_what_was_read_can_be_gone_on_from_many_times(lm: FrozenLM) -> None:
    layout = layout_for(lm, TEMPLATE)
    row = compose(lm, layout, PROMPTS[1], latent="Mara sings a long song.")
    warm = WarmRows.none(lm, 1)
    warm.read(collate([row[:-4]], side="left"))
    whole = lm.model(inputs_embeds=lm.embed(torch.tensor([row.ids]))).logits[0, -1]
    for _ in range(2):
        two = warm.copied([0, 0])
        logits = two.read(collate([row[-4:]] * 2, side="right"))
        torch.testing.assert_close(logits[:, -1], torch.stack([whole, whole]), rtol=1e-4, atol=1e-3)
    assert warm.mask.shape == (1, len(row) - 4)


@pytest.mark.parametrize("most", [1, 3, 4, 100])
def test_passes_hold_every_row_once_in_order_and_no_more_than_they_may(lms: dict[str, FrozenLM], most: int) -> None:
    questions = questions_of(lms["llama"])
    made = list(passes(questions, most))
    assert all(sum(map(len, part)) <= most for _, part in made)
    rows = [row for _, part in made for rows in part for row in rows]
    assert rows == [row for question in questions for row in question]
    assert [number for numbers, part in made for number, rows in zip(numbers, part, strict=True) for _ in rows] == [
        number for number, question in enumerate(questions) for _ in question
    ]
