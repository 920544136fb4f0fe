"""What each objective of a step reads and says, and that its weight reaches the loss."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latentwire.bridge.encoder import slots_of
from latentwire.bridge.engine import answer_logits, token_losses
from latentwire.bridge.evaluation.tasks import Example
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import IGNORE, TEXT, Batch, Row, collate, compose
from latentwire.bridge.reader import text_ids
from latentwire.training import run as running
from latentwire.training import step as stepping
from latentwire.training import tokens
from latentwire.training.objectives import (
    alignment_loss,
    answer_loss,
    diversity_loss,
    first_k_loss,
    first_logits,
    margin_loss,
    weights_of,
    word_targets,
)
from latentwire.training.run import Run, taught, with_mode
from latentwire.training.said import say
from latentwire.training.tokens import Tokens
from tests.integration.conftest import MakeConfig
from tests.integration.runs import WEIGHTS, examples_of, measured, prepared, receiver_of, step_of, tokens_of

EVERYTHING = {f"{name}_weight": weight for name, weight in WEIGHTS.items()}
SHORT = [
    Example("Mara sings in Rome today.", "{latent} Who?", " Mara"),
    Example("Ben has two cats.", "{latent} What?", " cats"),
    Example("It is a lamp, and red.", "{latent} Colour?", " red, I think"),
]


def changed(name: str, weight: float) -> dict[str, Any]:
    """Settings with another weight of one objective."""
    return {f"{name}_weight": weight}


def soft_tokens(run: Run, rows: list[Tokens]) -> tuple[Tensor, list[int]]:
    """Soft tokens of the rows and how many each has."""
    latents, real = run.bridge.encoder(*run.states.read([row.source for row in rows]))
    return run.bridge.head(run.config.receivers[0])(latents), real.sum(dim=1).tolist()


def read_by_receiver(patch: pytest.MonkeyPatch) -> list[tuple[Batch, Tensor | None]]:
    """Everything a step will give the receiver: the batch, and the soft tokens."""
    seen: list[tuple[Batch, Tensor | None]] = []

    def spying(lm: FrozenLM, batch: Batch, soft: Tensor | None, **rest: Any) -> Any:
        seen.append((batch, None if soft is None else soft.detach()))
        return say(lm, batch, soft, **rest)

    patch.setattr(running, "say", spying)
    return seen


def wanted_text(run: Run, row: Row | None) -> str:
    """What a row supervises, without the end of the text."""
    assert row is not None
    said = [label for label in row.labels if label != IGNORE]
    return str(receiver_of(run).tokenizer.decode(said[:-1]))


def test_every_weight_of_the_configuration_reaches_the_loss_and_every_part_is_logged_apart(make: MakeConfig) -> None:
    run = prepared(make(alignment_steps=0, **EVERYTHING))
    rows = tokens_of(run, SHORT)
    record, gradient = measured(run, rows)
    assert list(record.losses) == list(WEIGHTS)
    assert record.loss == pytest.approx(sum(WEIGHTS[name] * value for name, value in record.losses.items()), rel=1e-5)
    assert all(value > 0.01 for name, value in record.losses.items() if name != "diversity")
    assert record.losses["diversity"] < -1e-4
    for name in WEIGHTS:
        more, other = measured(run, rows, **changed(name, WEIGHTS[name] + 2))
        assert more.loss == pytest.approx(record.loss + 2 * record.losses[name], rel=1e-4), name
        assert more.losses == pytest.approx(record.losses), name
        assert not all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(gradient, other, strict=True)), name
        if name not in ("answer", "kd", "first_k"):
            less, _ = measured(run, rows, **changed(name, 0.0))
            assert less.losses == pytest.approx({key: v for key, v in record.losses.items() if key != name}), name


def test_the_warm_start_has_one_objective_and_measures_no_answers(make: MakeConfig) -> None:
    config = make(alignment_steps=1, probe_every=1, **EVERYTHING)
    assert weights_of(config, "align") == {"alignment": 1.0} and weights_of(config, "answer") == WEIGHTS
    run = prepared(config)
    record, after = step_of(run, 0), step_of(run, 1)
    assert (record.phase, after.phase) == ("align", "answer") and list(record.losses) == ["alignment"]
    assert record.loss == pytest.approx(record.losses["alignment"])
    assert record.accuracy is record.entropy_nats is record.wanted_top_share is record.delta_nats is None
    assert after.accuracy is not None and after.wanted_top_share is not None and after.delta_nats is not None


def test_the_objectives_of_a_step_are_those_of_its_receivers_reading(make: MakeConfig) -> None:
    run = prepared(make(alignment_steps=0, first_k=2, margin=3.0, **EVERYTHING))
    rows, receiver = tokens_of(run, SHORT), receiver_of(run)
    with torch.no_grad():
        soft, slots = soft_tokens(run, rows)
        logits, labels = answer_logits(receiver, collate([row.answer for row in rows], side="left"), soft)
        turned = [row.answer.with_slots(slots[i - 1]) for i, row in enumerate(rows)]
        others = answer_logits(receiver, collate(turned, side="left"), soft.roll(1, dims=0))
        wanted = {
            "answer": answer_loss(logits, labels, first_token_weight=run.config.first_token_weight),
            "first_k": first_k_loss(logits, labels, k=2),
            "diversity": diversity_loss(first_logits(logits, labels)[0]),
            "margin": margin_loss(answer_loss(logits, labels), answer_loss(*others), margin=3.0),
        }
        delta = float((answer_loss(*others) - answer_loss(logits, labels)).mean())
    record, _ = measured(run, rows, probe_every=1)
    for name, losses in wanted.items():
        assert record.losses[name] == pytest.approx(float(losses.mean()), rel=1e-4), name
    assert record.delta_nats == pytest.approx(delta, rel=1e-3, abs=1e-5)


def test_the_first_tokens_weight_is_that_of_the_configuration(make: MakeConfig) -> None:
    run = prepared(make())
    (row,) = tokens_of(run, examples_of(run, 1))
    with torch.no_grad():
        soft, _ = soft_tokens(run, [row])
        losses = token_losses(*answer_logits(receiver_of(run), collate([row.answer], side="left"), soft))[0]
    first, *rest = losses[losses > 0].tolist()
    for weight in (1.0, 8.0):
        made = measured(run, [row], first_token_weight=weight)[0].losses["answer"]
        assert made == pytest.approx((weight * first + sum(rest)) / (weight + len(rest)), rel=1e-4)


def composed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, Row]]:
    """(template, answer, row) of what the receiver will be given."""
    rows: list[tuple[str, str | None, Row]] = []

    def spying(lm: Any, layout: Any, template: str, **rest: Any) -> Row:
        row = compose(lm, layout, template, **rest)
        rows.append((template, rest["answer"], row))
        return row

    monkeypatch.setattr(tokens, "compose", spying)
    return rows


def test_reconstruction_repeats_the_source(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rows = prepared(make(reconstruction_weight=1.0)), composed(monkeypatch)
    examples = SHORT[:2]
    tokens_of(run, examples)
    repeated = [(run.task.reconstruction, f" {e.source}") for e in examples]
    asked = [(e.prompt, e.answer) for e in examples]
    assert [row[:2] for row in rows] == [asked[0], repeated[0], asked[1], repeated[1]]
    rows.clear()
    tokens_of(prepared(make(reconstruction_weight=0.0)), examples)
    assert [row[:2] for row in rows[-2:]] == asked and run.task.reconstruction not in {row[0] for row in rows}


def test_a_source_too_long_to_be_repeated_is_cut_to_what_the_receiver_has_room_for(make: MakeConfig) -> None:
    run = prepared(make(reconstruction_weight=1.0, mode_tokens=3))
    source = "".join(chr(97 + i % 26) for i in range(600))
    (row,) = tokens_of(run, [Example(source, "{latent} Q?", " x")])
    assert row.reconstruction is not None and 230 <= len(row.reconstruction) <= receiver_of(run).max_tokens
    assert source.startswith(wanted_text(run, row.reconstruction).strip())
    assert math.isfinite(measured(run, [row])[0].losses["reconstruction"])


def test_alignment_may_stay_on_with_its_weight(make: MakeConfig) -> None:
    run = prepared(make(alignment_steps=0, alignment_weight=0.5))
    rows = tokens_of(run, examples_of(run))
    alone, gradient = measured(run, rows, alignment_weight=0.0)
    both, other = measured(run, rows)
    with torch.no_grad():
        words, covered = word_targets(receiver_of(run), [row.words for row in rows])
        aligned = float(alignment_loss(soft_tokens(run, rows)[0][:, : words.shape[1]], words, covered).mean())
    assert aligned > 0.1 and both.loss == pytest.approx(alone.loss + 0.5 * aligned, rel=1e-5)
    assert both.losses["answer"] == pytest.approx(alone.losses["answer"])
    assert not all(torch.allclose(a, b) for a, b in zip(gradient, other, strict=True))


def test_the_teacher_is_the_receiver_reading_the_source_at_the_answers_columns_alone(make: MakeConfig) -> None:
    run = prepared(make(kd_weight=1.0))
    rows, lm = tokens_of(run, SHORT), receiver_of(run)
    teacher = taught(run, lm, rows)
    said = [[*text_ids(lm, example.answer), 1] for example in SHORT]  # with EOS
    assert teacher.logits.shape[1] == max(map(len, said)) + 1
    for example, answer, logits in zip(SHORT, said, teacher.logits, strict=True):
        text = [0, *text_ids(lm, example.prompt.replace("{latent}", example.source)), *answer]  # BOS
        with torch.no_grad():
            wanted = lm.model(input_ids=torch.tensor([text])).logits[0, -len(answer) - 1 :]
        torch.testing.assert_close(logits[-len(answer) - 1 :], wanted, rtol=1e-4, atol=1e-4)
    assert not teacher.states.requires_grad


def test_distillation_is_from_the_teacher_and_at_no_distance_from_itself(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(make(kd_weight=1.0))
    rows = tokens_of(run, SHORT)
    assert measured(run, rows)[0].losses["kd"] > 0.01
    with torch.no_grad():
        soft, _ = soft_tokens(run, rows)
        student = say(receiver_of(run), collate([row.answer for row in rows], side="left"), soft)
    monkeypatch.setattr(stepping, "taught", lambda *_: student)
    assert measured(run, rows)[0].losses["kd"] == pytest.approx(0, abs=1e-5)


def test_a_teacher_that_reads_one_row_at_a_time_teaches_the_same(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(make(kd_weight=1.0))
    rows, seen = tokens_of(run, SHORT), read_by_receiver(monkeypatch)
    whole, gradient = measured(run, rows)
    assert [len(batch.ids) for batch, soft in seen if soft is None] == [3]
    seen.clear()
    ones, other = measured(run, rows, kd_chunk=1)
    assert [len(batch.ids) for batch, soft in seen if soft is None] == [1, 1, 1]
    assert ones.losses == pytest.approx(whole.losses, rel=1e-5)
    for a, b in zip(gradient, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_mode_tokens_stand_directly_after_each_rows_last_soft_token_at_the_receivers_scale() -> None:
    soft, learned = torch.randn(2, 3, 4), torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 2]])
    made = with_mode(soft, [3, 1], learned, scale=0.5)
    said = torch.tensor([[0.5] * 4, [0, 0, 0, 1.0]])
    assert made.shape == (2, 5, 4)
    torch.testing.assert_close(made[0], torch.cat([soft[0], said]))
    torch.testing.assert_close(made[1, :3], torch.cat([soft[1, :1], said]))


@pytest.mark.parametrize("mode", ["reconstruction", "continuation"])
def test_a_long_objective_is_said_from_soft_tokens_and_its_own_mode_tokens(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    run = prepared(make(mode_tokens=2, alignment_steps=0, **{f"{mode}_weight": 1.0}))
    rows, seen = tokens_of(run, SHORT), read_by_receiver(monkeypatch)
    measured(run, rows)
    _, (batch, soft) = seen  # the answers come first
    assert soft is not None and len(run.modes) == 1
    ((name, learned),) = run.modes.items()
    assert name.endswith(mode)
    scale = run.bridge.config.heads[run.config.receivers[0]].embedding_rms
    said = torch.nn.functional.rms_norm(learned.detach(), (learned.shape[1],)) * scale
    for row, slots, tokens_ in zip(rows, batch.slots.tolist(), soft, strict=True):
        length = len(row.source.ids) if mode == "reconstruction" else row.half
        K = slots_of(run.bridge.config.encoder, length)
        assert [slot for slot in slots if slot != TEXT] == list(range(K + 2))
        torch.testing.assert_close(tokens_[K : K + 2], said)


def test_mode_tokens_are_trained(make: MakeConfig) -> None:
    weights = {"reconstruction_weight": 1.0, "continuation_weight": 1.0}
    run = prepared(make(mode_tokens=2, alignment_steps=0, **weights))
    before = {name: p.detach().clone() for name, p in run.modes.items()}
    assert len(before) == 2 and all(p.shape == (2, 32) for p in before.values())
    step_of(run, 0)
    for name, p in run.modes.items():
        assert all(not torch.equal(a, b) for a, b in zip(before[name], p, strict=True))


def test_continuation_reads_the_first_half_alone_and_says_the_rest(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(make(continuation_weight=1.0, alignment_steps=0, ratio=3))
    sources = ["Mara sings in Rome today.", "Mara sings in Bern a lot."]
    rows = tokens_of(run, [Example(source, "{latent} Q?", " x") for source in sources])
    assert [wanted_text(run, row.continuation) for row in rows] == [" Rome today.", " Bern a lot."]
    assert [row.half for row in rows] == [1 + len("Mara sings in")] * 2  # BOS
    seen = read_by_receiver(monkeypatch)
    measured(run, rows)
    (_, whole), (batch, half) = seen
    assert whole is not None and half is not None
    K = slots_of(run.bridge.config.encoder, rows[0].half)
    assert [slot for slot in batch.slots[0].tolist() if slot != TEXT] == list(range(K))
    torch.testing.assert_close(half[0, :K], half[1, :K], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(whole[0], whole[1], rtol=1e-3)


def test_a_source_of_one_word_has_nothing_to_go_on_with(make: MakeConfig) -> None:
    run = prepared(make(continuation_weight=1.0, alignment_steps=0))
    rows = tokens_of(run, [Example("Mara.", "{latent} Q?", " x"), SHORT[0]])
    alone, _ = measured(run, [rows[0]])
    assert alone.losses["continuation"] == 0 and math.isfinite(alone.gradient_norm)
    assert measured(run, rows)[0].losses["continuation"] > 0


def test_the_margin_is_kept_to_another_source_only(make: MakeConfig) -> None:
    run = prepared(make(margin_weight=1.0, margin=5.0, alignment_steps=0))
    twice = [Example("Mara sings.", "{latent} Who?", " Mara"), Example("Mara sings.", "{latent} What?", " sings")]
    same_source, _ = measured(run, tokens_of(run, twice))
    assert same_source.losses["margin"] == 0
    rows = tokens_of(run, [*twice, Example("Ben cooks.", "{latent} Who?", " Ben")])
    both, _ = measured(run, rows)
    pairs = [measured(run, [rows[i], rows[j]])[0].losses["margin"] for i, j in ((0, 2), (2, 1))]
    # Row 0 is held against row 2, row 2 against row 1, and row 1 against row 0 for nothing.
    assert all(pair > 1 for pair in pairs) and 1 < both.losses["margin"] < 2 * max(pairs)


def test_delta_is_measured_on_another_source_only(make: MakeConfig) -> None:
    run = prepared(make(alignment_steps=0))
    twice = [Example("Mara sings.", "{latent} Who?", " Mara"), Example("Mara sings.", "{latent} Who?", " Mara")]
    rows = tokens_of(run, [*twice, Example("Ben cooks.", "{latent} Who?", " Ben")])
    apart = measured(run, rows[1:], probe_every=1)[0].delta_nats
    mixed = measured(run, rows, probe_every=1)[0].delta_nats
    assert apart is not None and mixed == pytest.approx(apart, rel=1e-3)


def test_delta_is_probed_every_so_many_steps_of_answering(make: MakeConfig) -> None:
    run = prepared(make(alignment_steps=2, probe_every=2))
    deltas = [step_of(run, step).delta_nats for step in range(6)]
    assert [delta is not None for delta in deltas] == [False, False, False, True, False, True]
