"""An evaluation compares, and says exactly what it documents."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from latentwire.bridge import engine, scoring
from latentwire.bridge.bridge import Bridge
from latentwire.bridge.checkpoint import make_bridge, save_bridge
from latentwire.bridge.errors import CorruptCheckpoint, IncompatibleBridge, InvalidRequest, UnknownBridge
from latentwire.bridge.evaluation import conditions
from latentwire.bridge.evaluation import measure as measuring
from latentwire.bridge.evaluation.conditions import CONDITIONS, TRAINED, meaning_of, predict
from latentwire.bridge.evaluation.context import RELAY_TOKENS, EvaluationContext, Lender, Reading, Tuned, open_context
from latentwire.bridge.evaluation.measure import measure
from latentwire.bridge.evaluation.probe import fit_probe
from latentwire.bridge.evaluation.report import notes, table, write_report
from latentwire.bridge.evaluation.statistics import interval
from latentwire.bridge.evaluation.tasks import Example
from latentwire.bridge.models import FrozenLM, load_model
from latentwire.bridge.prompt import IGNORE, LATENT, TEXT, Row, fit
from latentwire.bridge.reader import Reader, text_ids
from latentwire.bridge.sampling import SamplingParams
from latentwire.bridge.scoring import Continuation
from latentwire.training.config import TrainConfig
from latentwire.training.controls import control_config, train_controls
from latentwire.training.lora import rank_for
from latentwire.training.prepare import prepare
from tests.conftest import bridge_config, write_model

EVERY = [
    "bridge", "direct", "sender", "relay", "relay_bytes", "same_budget", "token_pruned", "none", "mismatched", "noise",
]  # fmt: skip
READING_SENDER = ("bridge", "relay", "relay_bytes", "token_pruned")
SENTIMENT = """
name = "tiny"
kind = "classification"
train = "train.jsonl"
test = "rows.jsonl"
source = "{text}"
prompt = "Review: {latent}\\nSentiment:"
label = "label"
labels = ["bad", "very good"]
"""


@pytest.fixture(scope="module")
def context(checkpoint: Path) -> EvaluationContext:
    return open_context(checkpoint, "world", limit=6, dtype="float16", receiver=None)


@pytest.fixture(scope="module")
def report(context: EvaluationContext) -> dict[str, Any]:
    return measure(context)


@pytest.fixture(scope="module")
def sentiment(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationContext:
    folder = tmp_path_factory.mktemp("task")
    rows = [{"text": t, "label": i % 2} for i, t in enumerate(["Good!", "Oh no.", "It was fine, I think.", "Meh"])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train.jsonl").write_text('{"text": "Well done.", "label": 1}\n{"text": "How sad.", "label": 0}\n' * 3)
    (folder / "task.toml").write_text(SENTIMENT)
    return open_context(checkpoint, str(folder / "task.toml"), limit=None, dtype="float32", receiver=None)


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that a test makes up are not looked at for leaks."""
    monkeypatch.setattr(measuring, "check_answers", lambda *_: 0)


def test_the_report_has_exactly_the_documented_keys(report: dict[str, Any], context: EvaluationContext) -> None:
    assert set(report) == {
        "checkpoint", "task", "n", "conditions", "bytes", "source_tokens_per_soft_token",
        "receiver_tokens_per_soft_token", "content_share", "bridge_id", "truncated", "about", "checks", "comparisons",
        "content_share_interval", "dropped", "gate", "headline", "left_out", "sender_share", "sender_share_interval",
    }  # fmt: skip
    assert list(report["conditions"]) == EVERY
    for row in report["conditions"].values():
        assert set(row) == {"metric", "value", "low", "high", "ttft_ms", "token_f1"}
        assert row["metric"] == "em" and 0 <= row["low"] <= row["value"] <= row["high"] <= 1 and row["ttft_ms"] > 0
    assert set(report["bytes"]) == {"latent", "source", "receiver_kv"}
    assert (report["checkpoint"], report["bridge_id"]) == (context.checkpoint, context.bridge_id)
    assert (report["task"], report["n"]) == ("world", 6)


def test_every_condition_is_explained(report: dict[str, Any]) -> None:
    assert set(CONDITIONS) == set(EVERY) and all(meaning_of(name) for name in (*EVERY, *TRAINED))
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table(report))
    text = console.export_text()
    assert all(name in text and meaning_of(name) in text for name in EVERY)
    assert "no 'direct_tuned' in this table" in text and f"{report['truncated']} sources cut" in text
    console.print(table({**report, "truncated": 0}))
    assert "sources cut" not in console.export_text()


def test_truncated_counts_the_sources_of_which_the_bridge_read_only_the_start(
    report: dict[str, Any], context: EvaluationContext
) -> None:
    # A byte is a token, and BOS takes one of the 128 that this bridge reads.
    over = sum(len(example.source.encode()) > 127 for example in context.examples)
    assert report["truncated"] == over and 0 < over < 6


def test_bytes_are_those_of_the_messages(report: dict[str, Any], context: EvaluationContext) -> None:
    from latentwire.bridge import wire

    sent = engine.encode(context.bridge, context.sender, context.sources(range(6)))
    sizes = [len(wire.encode(row.latent, context.bridge_id, "float16")) for row in sent]
    assert report["bytes"]["latent"] == pytest.approx(sum(sizes) / 6)
    slots, tokens = sum(len(row.latent) for row in sent), sum(row.source_tokens for row in sent)
    assert report["source_tokens_per_soft_token"] == pytest.approx(tokens / slots)
    read = sum(len(e.source.encode()) for e in context.examples)
    assert report["bytes"]["source"] == pytest.approx(read / 6)
    # The receiver reads a byte as a token, and keeps key and value of 2 heads of 8 floats in 3 layers for each.
    assert report["bytes"]["receiver_kv"] == pytest.approx(read / 6 * 2 * 2 * 8 * 4 * 3)
    assert report["receiver_tokens_per_soft_token"] == pytest.approx(read / slots)


@pytest.mark.usefixtures("invented")
def test_scores_are_means_over_the_examples_and_their_interval_is_resampled(
    context: EvaluationContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ["Ben has cats.", "Ben has cats.", "The lamp is red.", "Ben sings.", "Mara sings."]
    said = ["Ben has cats", "Ben has dogs", "lamp is red!", "", "Ben"]
    examples = [replace(context.examples[i], answer=f" {text}") for i, text in enumerate(wanted)]
    monkeypatch.setattr(conditions, "predict", lambda made, chosen, readings: [said[i] for i in chosen])
    made = measure(replace(context, examples=examples))
    low, high = interval([1.0, 0.0, 1.0, 0.0, 0.0])
    assert 0 < low + high < 2 and low < 0.4 < high
    for row in made["conditions"].values():
        assert row["value"] == pytest.approx(2 / 5) and (row["low"], row["high"]) == (low, high)
        # 2 of 3 words either way in the second, nothing in common in the last two
        assert row["token_f1"] == pytest.approx((1 + 2 / 3 + 1 + 0 + 0) / 5)


@pytest.mark.usefixtures("invented")
def test_an_answer_counts_that_is_right_in_other_words(
    context: EvaluationContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [replace(example, answer=" the capital", also=(" in Rome",)) for example in context.examples]
    monkeypatch.setattr(conditions, "predict", lambda made, chosen, readings: ["In Rome!"] * len(chosen))
    made = measure(replace(context, examples=examples), conditions=["bridge"], keep_examples=True)
    assert made["conditions"]["bridge"]["value"] == made["conditions"]["bridge"]["token_f1"] == 1.0
    assert made["examples"][0]["wanted"] == " the capital" and made["examples"][0]["also"] == [" in Rome"]


@pytest.mark.usefixtures("invented")
def test_a_set_larger_than_a_batch_is_answered_in_order(
    context: EvaluationContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def knowing(made: EvaluationContext, chosen: Sequence[int], readings: Sequence[Reading]) -> list[str]:
        seen.append(list(chosen))
        assert len(readings) == len(chosen)
        return [made.examples[i].answer for i in chosen]

    monkeypatch.setattr(measuring, "BATCH_ROWS", 4)
    monkeypatch.setattr(conditions, "predict", knowing)
    made = measure(context)
    assert seen == [[0, 1, 2, 3], [4, 5]] * len(EVERY)
    assert all(row["value"] == row["token_f1"] == 1 for row in made["conditions"].values())


@pytest.mark.usefixtures("invented")
def test_time_to_the_first_token_is_that_of_one_token_of_one_request(
    context: EvaluationContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[SamplingParams]] = []
    generate = engine.generate

    def spying(lm: FrozenLM, rows: Sequence[Row], soft: Any, params: Sequence[SamplingParams]) -> Any:
        if lm is context.receiver:  # the sender of a relay writes as much as it needs
            asked.append(list(params))
        return generate(lm, rows, soft, params)

    monkeypatch.setattr(engine, "generate", spying)
    monkeypatch.setattr(conditions, "predict", lambda made, chosen, readings: [""] * len(chosen))
    measure(replace(context, examples=context.examples[:2]))
    assert asked == [[SamplingParams(max_tokens=1)]] * 2 * (len(EVERY) - 1)  # all but the sender's own


def right_in(names: Sequence[str], **right: int) -> Callable[..., list[str]]:
    """Answers of a receiver, asked in one condition after the other, of which so many are right."""
    left = iter(sorted(names, key=lambda name: name != "sender"))  # who is asked while it is there

    def answering(made: EvaluationContext, chosen: Sequence[int], readings: Sequence[Reading]) -> list[str]:
        name = next(left)
        return [made.examples[i].answer if i < right.get(name, 0) else "" for i in chosen]

    return answering


@pytest.mark.usefixtures("invented")
def test_with_one_source_nothing_is_mismatched_and_no_share_is_claimed(
    sentiment: EvaluationContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replace(sentiment, examples=[replace(e, source="Good!") for e in sentiment.examples])
    others = [name for name in EVERY if name != "mismatched"]
    monkeypatch.setattr(conditions, "predict", right_in(others, bridge=4, none=1))
    made = measure(one)
    assert list(made["conditions"]) == others
    assert made["content_share"] is None
    why = {"mismatched": "the examples have one source alone"}
    assert made["left_out"] == why
    assert "no 'mismatched': the examples have one source alone" in notes(made)
    monkeypatch.setattr(conditions, "predict", right_in(EVERY, bridge=4, none=1))
    made = measure(sentiment)
    assert made["content_share"] == 1 and made["left_out"] == {}


def test_a_report_is_written_whole_and_a_bad_path_is_named(report: dict[str, Any], tmp_path: Path) -> None:
    write_report(tmp_path / "deep" / "report.json", report)
    assert json.loads((tmp_path / "deep" / "report.json").read_text()) == report
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match=r"the report .*file/report\.json.* cannot be written: "):
        write_report(tmp_path / "file" / "report.json", report)


def test_progress_reaches_the_end_of_each_condition(context: EvaluationContext) -> None:
    seen: list[tuple[str | None, int, int]] = []
    few = replace(context, examples=context.examples[:2])
    measure(few, trained={"prompt": few}, progress=lambda *now: seen.append(now))
    every = [*EVERY, "prompt"]
    reading, answering = seen[: len(every)], seen[len(every) :]
    assert reading == [(None, done, 2 * len(every)) for done in range(2, 2 * len(every) + 1, 2)]
    assert sorted(answering) == sorted((name, 2, 2) for name in every)


class Counting(Lender):
    """Remembers which model each pass was of, and that no loan was asked for during another."""

    batch_rows = 2

    def __init__(self) -> None:
        self.lent: list[str] = []
        self.out = False

    @contextmanager
    def lend(self, reader: Reader) -> Iterator[FrozenLM]:
        assert not self.out
        self.out = True
        self.lent.append(reader.name)
        with super().lend(reader) as lm:
            yield lm
        self.out = False


@pytest.mark.parametrize("kind", ["context", "sentiment"])
def test_a_lender_may_cut_the_passes_small_and_let_the_models_take_turns(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: EvaluationContext = request.getfixturevalue(kind)
    rows: list[int] = []
    for module, name, given in ((engine, "encode", 2), (engine, "generate", 1), (scoring, "score", 1)):
        real = getattr(module, name)

        def spying(*args: Any, real: Any = real, given: int = given) -> Any:
            rows.append(sum(map(len, args[1])) if real.__name__ == "score" else len(args[given]))
            return real(*args)

        monkeypatch.setattr(module, name, spying)
    lender = Counting()
    small = measure(replace(made, lender=lender))
    assert max(rows) == 2
    turns = [name for at, name in enumerate(lender.lent) if at == 0 or lender.lent[at - 1] != name]
    assert turns == [made.sender.name, made.receiver.name]
    assert numbers(small) == numbers(measure(made))


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    """A report without its timings."""
    rows = report["conditions"].items()
    return {**report, "conditions": {name: {**row, "ttft_ms": None} for name, row in rows}}


def test_timings_leave_out_the_wait_for_a_model(context: EvaluationContext) -> None:
    class Slow(Lender):
        @contextmanager
        def lend(self, reader: Reader) -> Iterator[FrozenLM]:
            self.waited_seconds += 1000  # as if
            with super().lend(reader) as lm:
                yield lm

    few = replace(context, examples=context.examples[:1], lender=Slow())
    waited = {name: row["ttft_ms"] for name, row in measure(few)["conditions"].items()}
    # One loan where nothing is to be read, two where the sender reads.
    assert {name: round(ms / 1e6) for name, ms in waited.items()} == {
        name: -2 if name in READING_SENDER else -1 for name in waited
    }


def test_conditions_are_measured_as_asked_and_seen_as_they_come(
    context: EvaluationContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, seen = replace(context, examples=context.examples[:3]), []
    made = measure(few, conditions=["none", "direct"], partial=seen.append)
    assert [list(report["conditions"]) for report in seen] == [["direct"], ["direct", "none"]]
    assert numbers(seen[-1]) == numbers(made) and set(seen[0]) == set(made) and made["content_share"] is None
    whole = numbers(measure(few))
    apart = ("conditions", "comparisons", "headline", "checks")  # which need the bridge
    assert {name: made[name] for name in made if name not in apart} == {
        name: whole[name] for name in whole if name not in apart
    }
    assert all(numbers(made)["conditions"][name] == whole["conditions"][name] for name in ("none", "direct"))


def test_latents_cross_the_wire_before_they_are_read(context: EvaluationContext) -> None:
    exact = replace(context, dtype="float32").latents([0])[0]
    rounded = replace(context, dtype="int8").latents([0])[0]
    assert not np.array_equal(exact, rounded) and np.abs(exact - rounded).max() < 0.05


def test_mismatched_reads_the_latent_of_another_source(context: EvaluationContext) -> None:
    for i in range(6):
        partner = context.partner(i)
        assert context.examples[partner].source != context.examples[i].source
        wrong = CONDITIONS["mismatched"].read(context, [i])[0]
        assert isinstance(wrong, np.ndarray) and np.array_equal(wrong, context.latents([partner])[0])


def test_an_example_with_the_same_source_is_no_mismatch(context: EvaluationContext) -> None:
    texts = ["one", "two", "one", "one"]
    examples = [Example(text, LATENT, " x") for text in texts]
    assert [texts[replace(context, examples=examples).partner(i)] for i in range(4)] == ["two", "one", "two", "two"]


def test_same_budget_gives_at_most_as_many_receiver_tokens_as_the_latent_has_slots(context: EvaluationContext) -> None:
    hard = [Example(text, LATENT, " x") for text in ("é" * 30, "日本語のテキスト", "naïve café 😀 end", "ab" * 40)]
    for made in (context, replace(context, examples=hard)):
        chosen = range(len(made.examples))
        for i, text, latent in zip(chosen, made.cut(chosen), made.latents(chosen), strict=True):
            assert len(text_ids(made.receiver, text)) <= len(latent)
            assert text and made.examples[i].source.startswith(text.rstrip("\ufffd"))


def test_only_the_bridge_pays_for_the_sender_where_the_latents_are_known(
    context: EvaluationContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = replace(context)  # nothing known yet
    runs: list[int] = []
    encode = engine.encode
    monkeypatch.setattr(engine, "encode", lambda *args: runs.append(len(args[2])) or encode(*args))
    first = CONDITIONS["bridge"].read(made, range(6))
    assert runs == [6]
    for name in ("same_budget", "noise"):
        CONDITIONS[name].read(made, range(6))
    assert runs == [6]
    again = CONDITIONS["bridge"].read(made, range(6))
    assert runs == [6, 6] and all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    CONDITIONS["same_budget"].read(replace(context), [1, 4])
    assert runs == [6, 6, 2]


def test_same_budget_uses_its_budget(context: EvaluationContext) -> None:
    for text, latent in zip(context.cut(range(6)), context.latents(range(6)), strict=True):
        assert len(text_ids(context.receiver, text)) == len(latent)


@pytest.mark.parametrize("name", ["direct", "relay", "same_budget", "none"])
def test_conditions_of_text_never_get_a_soft_token(context: EvaluationContext, name: str) -> None:
    readings = CONDITIONS[name].read(context, range(6))
    assert not any(isinstance(reading, np.ndarray) for reading in readings)
    assert all(set(row.slots) == {TEXT} for row in context.rows(range(6), readings, [None] * 6))


@pytest.mark.parametrize("name", ["bridge", "mismatched", "noise"])
def test_conditions_of_latents_never_get_the_source(context: EvaluationContext, name: str) -> None:
    readings = CONDITIONS[name].read(context, range(6))
    for row, reading, i in zip(context.rows(range(6), readings, [None] * 6), readings, range(6), strict=True):
        assert isinstance(reading, np.ndarray)
        assert [slot for slot in row.slots if slot != TEXT] == list(range(len(reading)))
        text = context.receiver.tokenizer.decode([t for t, s in zip(row.ids, row.slots, strict=True) if s == TEXT])
        assert text == "<s>" + context.examples[i].prompt.replace(LATENT, "")


def test_direct_is_the_whole_source_where_it_fits(context: EvaluationContext) -> None:
    short = replace(context, examples=[Example("Mara sings.", "{latent}\nQ:", " x")])
    row = short.rows([0], CONDITIONS["direct"].read(short, [0]), [None])[0]
    assert context.receiver.tokenizer.decode(row.ids) == "<s>Mara sings.\nQ:"


def test_a_text_over_the_context_is_cut_at_its_end_and_the_prompt_is_kept(lms: dict[str, FrozenLM]) -> None:
    lm = lms["llama"]
    layout = bridge_config(lms["neox"], lm).heads[lm.name].layout
    row = fit(lm, layout, "{latent}\nQ:", "abcdefgh", 8, " x")
    assert lm.tokenizer.decode(row.ids) == "<s>a\nQ: x</s>"
    assert lm.tokenizer.decode([label for label in row.labels if label != IGNORE]) == " x</s>"
    whole = fit(lm, layout, "{latent}\nQ:", "abcdefgh", 12)
    assert lm.tokenizer.decode(whole.ids) == "<s>abcdefgh\nQ:"


@pytest.mark.parametrize("name", EVERY)
def test_a_prompt_too_long_for_the_receiver_is_refused_with_both_numbers(
    lms: dict[str, FrozenLM], context: EvaluationContext, name: str
) -> None:
    # GPT-2 looks its positions up in a table: past the end there is nothing.
    gpt2, config = lms["gpt2"], bridge_config(lms["neox"], lms["gpt2"])
    examples = [Example("Mara sings.", "{latent}" + "Q" * 300, " x"), Example("Ben", "{latent}Q", " y")]
    made = replace(context, receiver=gpt2, receiver_name=gpt2.name, bridge=make_bridge(config), examples=examples)
    with pytest.raises(InvalidRequest, match=r"takes 3\d\d receiver tokens; 232 fit"):
        predict(made, [0, 1], CONDITIONS[name].read(made, [0, 1]))


def test_a_relay_is_what_the_sender_writes(context: EvaluationContext) -> None:
    texts = context.relay(range(6))
    assert len(texts) == 6 and all(len(text_ids(context.sender, text)) <= 3 * RELAY_TOKENS for text in texts)
    assert texts[2] == context.relay([2])[0]


def test_the_sender_of_a_relay_reads_the_source_and_its_words_are_what_is_passed_on(
    context: EvaluationContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[FrozenLM, list[str], Any, list[str]]] = []
    generate = engine.generate

    def spying(lm: FrozenLM, rows: Sequence[Row], soft: Any, params: Sequence[SamplingParams]) -> Any:
        said = generate(lm, rows, soft, params)
        seen.append((lm, [lm.tokenizer.decode(row.ids) for row in rows], soft, [g.text.strip() for g in said[0]]))
        return said

    monkeypatch.setattr(engine, "generate", spying)
    short = replace(context, examples=[replace(e, source=e.source[:60]) for e in context.examples[:2]])
    passed = CONDITIONS["relay"].read(short, [0, 1])
    ((lm, prompts, soft, written),) = seen
    assert lm is context.sender and soft is None and passed == written
    assert prompts == [f"<s>{example.source}\nRepeat:" for example in short.examples]
    assert not {example.source for example in short.examples} & set(passed)


def test_noise_has_the_moments_and_lengths_of_real_latents_and_nothing_of_their_content(
    context: EvaluationContext,
) -> None:
    real, noise = context.latents(range(6)), context.noise(range(6))
    assert [row.shape for row in real] == [row.shape for row in noise]
    np.testing.assert_allclose(np.concatenate(noise).mean(axis=0), context.moments[0], atol=0.35)
    for row in noise:
        np.testing.assert_allclose(np.sqrt(np.square(row).mean(axis=1)), 1, rtol=1e-4)
    assert np.array_equal(noise[3], context.noise([3])[0]) and not np.array_equal(noise[0][:5], noise[1][:5])


def test_an_answer_is_the_same_alone_and_in_a_batch(context: EvaluationContext, sentiment: EvaluationContext) -> None:
    for made in (context, sentiment):
        count = len(made.examples)
        readings = CONDITIONS["bridge"].read(made, range(count))
        together = predict(made, range(count), readings)
        assert together == [predict(made, [i], [readings[i]])[0] for i in range(count)]


@pytest.mark.parametrize("condition", ["direct", "none", "bridge"])
def test_a_label_is_chosen_by_its_likelihood(sentiment: EvaluationContext, condition: str) -> None:
    lm = sentiment.receiver
    readings = CONDITIONS[condition].read(sentiment, range(4))
    chosen = predict(sentiment, range(4), readings)
    for i, reading in enumerate(readings):
        scores = [by_hand(sentiment, reading, f" {label}") for label in sentiment.task.labels]
        assert abs(scores[0] - scores[1]) > 1e-3 and chosen[i] == f" {sentiment.task.labels[int(np.argmax(scores))]}"
    assert lm.tokenizer.bos_token_id == 0


def test_a_classification_scored_in_parts_has_the_scores_of_the_whole(
    sentiment: EvaluationContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(rows: int) -> list[list[float]]:
        made: list[list[float]] = []
        with monkeypatch.context() as patch:
            score = scoring.score

            def spying(*args: Any) -> list[list[Continuation]]:
                found = score(*args)
                made.append([scored.logprob for question in found for scored in question])
                return found

            patch.setattr(scoring, "score", spying)
            patch.setattr(scoring, "SCORED_ROWS", rows)
            predict(sentiment, range(4), CONDITIONS["bridge"].read(sentiment, range(4)))
        return made

    (whole,), threes, ones = scores(64), scores(3), scores(1)
    assert len(whole) == 8 and len({round(score, 3) for score in whole}) == 8
    assert [len(part) for part in threes] == [3, 3, 2] and len(ones) == 8
    for parts in (threes, ones):
        assert [score for part in parts for score in part] == pytest.approx(whole, abs=1e-3)


def test_labels_are_scored_as_they_follow_each_prompt_wherever_it_ends(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = ["Verdict: ", "Verdict:", "So\n", "So"]
    rows = [{"text": f"text {i}", "q": end, "label": i % 2} for i, end in enumerate(ends)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train.jsonl").write_text('{"text": "else", "q": "", "label": 1}\n')
    (tmp_path / "task.toml").write_text(SENTIMENT.replace("Review: {latent}\\nSentiment:", "{latent}\\n{q}"))
    made = open_context(checkpoint, str(tmp_path / "task.toml"), limit=None, dtype="float32", receiver=None)
    assert [example.answer for example in made.examples] == ["bad", " very good", "bad", " very good"]
    scored: list[str] = []

    def knowing(lm: FrozenLM, questions: list[list[Row]], soft: Any) -> list[list[Continuation]]:
        """Gives every example its own label."""
        said = [[str(lm.tokenizer.decode([t for t in row.labels if t != IGNORE])) for row in q] for q in questions]
        scored.extend(text for texts in said for text in texts)
        wanted = [f"{example.answer}</s>" for example in made.examples]
        return [
            [Continuation((), (float(have == want),), False) for have in texts]
            for texts, want in zip(said, wanted, strict=True)
        ]

    monkeypatch.setattr(scoring, "score", knowing)
    assert predict(made, range(4), [None] * 4) == [example.answer for example in made.examples]
    assert scored == ["bad</s>", "very good</s>", " bad</s>", " very good</s>"] * 2
    report = measure(made)
    assert all(row["value"] == 1 for row in report["conditions"].values())


def by_hand(made: EvaluationContext, reading: Reading, label: str) -> float:
    """Log-probability of a label and EOS, without the composer."""
    lm, before, after = made.receiver, "Review:", "\nSentiment:"
    said = torch.tensor([*text_ids(lm, label), 1])
    if isinstance(reading, np.ndarray):
        soft = made.bridge.head(made.receiver_name)(torch.from_numpy(reading)[None])
        head = lm.embed(torch.tensor([[0, *text_ids(lm, before)]]))
        tail = lm.embed(torch.tensor([[*text_ids(lm, after), *said.tolist()]]))
        embeds = torch.cat([head, soft, tail], dim=1)
    else:
        text = f"{before} {reading or ''}{after}"
        embeds = lm.embed(torch.tensor([[0, *text_ids(lm, text), *said.tolist()]]))
    with torch.no_grad():
        logp = lm.model(inputs_embeds=embeds).logits.log_softmax(-1)[0, -len(said) - 1 : -1]
    return float(logp.gather(1, said[:, None]).sum())


def test_a_classification_reports_accuracy_and_no_f1(sentiment: EvaluationContext) -> None:
    made = measure(sentiment)
    row = made["conditions"]["bridge"]
    assert row["metric"] == "accuracy" and "token_f1" not in row and made["n"] == 4
    wanted = [example.answer for example in sentiment.examples]
    said = predict(sentiment, range(4), sentiment.latents(range(4)))
    assert row["value"] == sum(a == b for a, b in zip(said, wanted, strict=True)) / 4


@pytest.mark.parametrize(
    "bridge, none, mismatched, share",
    [(4, 1, 1, 1.0), (4, 0, 2, 0.5), (2, 2, 1, None), (1, 2, 0, None), (3, 1, 0, 1.0), (3, 1, 4, 0.0)],
)
@pytest.mark.usefixtures("invented")
def test_the_content_share_is_the_part_of_the_gain_that_another_latent_does_not_give(
    sentiment: EvaluationContext,
    monkeypatch: pytest.MonkeyPatch,
    bridge: int,
    none: int,
    mismatched: int,
    share: float | None,
) -> None:
    right = {"bridge": bridge, "none": none, "mismatched": mismatched}

    def measured(name: str, *_: object) -> tuple[dict[str, Any], list[str], list[float]]:
        scores = [float(i < right.get(name, 0)) for i in range(4)]
        return {"value": sum(scores) / 4}, [""] * 4, scores

    monkeypatch.setattr(measuring, "_measure", measured)
    assert measure(sentiment)["content_share"] == share


def test_the_receiver_answers_differently_to_different_readings(context: EvaluationContext) -> None:
    read = {name: CONDITIONS[name].read(context, [0]) for name in ("bridge", "none", "direct")}
    assert len({predict(context, [0], readings)[0] for readings in read.values()}) == 3


def test_opening_names_what_is_wrong(checkpoint: Path, tmp_path: Path) -> None:
    def opened(where: Path | str, task: str, receiver: str | None = None) -> EvaluationContext:
        return open_context(where, task, limit=1, dtype="float16", receiver=receiver)

    with pytest.raises(UnknownBridge):
        opened(tmp_path, "world")
    with pytest.raises(UnknownBridge, match="no head for receiver 'nobody'"):
        opened(checkpoint, "world", "nobody")
    with pytest.raises(InvalidRequest):
        opened(checkpoint, "wrld")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint):
        opened(tmp_path, "world")


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    """A bridge between two models that a test may change."""
    families = {"sender": "neox", "receiver": "llama"}
    folders = {role: write_model(tmp_path / role, family) for role, family in families.items()}
    sender, receiver = (load_model(str(folder)) for folder in folders.values())
    save_bridge(tmp_path / "bridge", make_bridge(bridge_config(sender, receiver)))
    return tmp_path / "bridge", folders


@pytest.mark.parametrize("role, family", [("sender", "neox"), ("receiver", "llama")])
def test_a_model_that_is_not_the_one_trained_with_is_neither_measured_nor_used(
    own: tuple[Path, dict[str, Path]], role: str, family: str
) -> None:
    checkpoint, folders = own
    ask: dict[str, Any] = {"limit": 1, "dtype": "float16", "receiver": None}
    before = Bridge.load(checkpoint)
    message = before.message(np.ones((2, 16), dtype=np.float32))
    open_context(checkpoint, "world", **ask)
    assert before.encode("Mara sings.")[0].shape == (3, 16)  # BOS and 11 bytes in windows of 4
    assert before.generate(message, "Q:", max_tokens=2).outputs[0].token_count <= 2
    write_model(folders[role], family, seed=1)
    changed = f"trained with {role} '{folders[role]}' whose weights is"
    with pytest.raises(IncompatibleBridge, match=changed):
        open_context(checkpoint, "world", **ask)
    with pytest.raises(IncompatibleBridge, match=changed):
        if role == "sender":
            Bridge.load(checkpoint).encode("Mara sings.")
        else:
            Bridge.load(checkpoint).generate(message, "Q:", max_tokens=2)


def test_an_answer_that_no_receiver_has_room_for_is_refused_with_both_numbers(
    checkpoint: Path, lms: dict[str, FrozenLM], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "Good!", "label": 0}\n')
    (tmp_path / "train.jsonl").write_text('{"text": "else", "label": 1}\n')
    (tmp_path / "task.toml").write_text(SENTIMENT + "max_answer_tokens = 256\n")
    with pytest.raises(InvalidRequest, match=f"max_answer_tokens is 256; '{lms['llama'].name}' reads 256 in all"):
        open_context(checkpoint, str(tmp_path / "task.toml"), limit=None, dtype="float32", receiver=None)


@pytest.fixture(scope="module")
def trained(
    lms: dict[str, FrozenLM], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, EvaluationContext]:
    """A recipe, and the bridge of that recipe, untrained."""
    folder = tmp_path_factory.mktemp("recipe")
    config = TrainConfig(
        sender=lms["neox"].name, receiver=[lms["llama"].name], task="world", out=folder / "run", ratio=8,
        latent_dim=16, hidden_dim=32, depth=1, max_steps=1, batch_size=2, max_source_tokens=48,
        reconstruction_weight=0, alignment_steps=1, alignment_weight=0.5, validate_every=0,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentwire.training.prepare.CHECKED", 20)
        save_bridge(config.out, prepare(config, Console(quiet=True)).bridge)
    return config, open_context(config.out, "world", limit=4, dtype="float16", receiver=None)


def test_a_control_differs_from_the_recipe_in_what_it_controls_and_nothing_else(
    trained: tuple[TrainConfig, EvaluationContext], tmp_path: Path
) -> None:
    recipe, made = trained
    config = recipe.model_copy(update={"device": str(made.where["device"])})  # where the evaluation computes
    random = control_config("random_sender", made, tmp_path)
    assert random == config.model_copy(update={"sender": f"random:{config.sender}", "out": tmp_path})
    prompt = control_config("prompt", made, tmp_path)
    slots = [len(latent) for latent in made.latents(range(4))]
    count = round(sum(slots) / 4)
    without = {"alignment_steps": None, "alignment_weight": 0.0, "probe_every": 0}  # no words, and all latents alike
    expected = {"encoder": "prompt", "num_latents": count, "out": tmp_path, **without}
    assert prompt == config.model_copy(update=expected) and count == 6


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "probe"])
def test_a_control_is_trained_and_measured_beside_the_bridge(
    trained: tuple[TrainConfig, EvaluationContext], name: str
) -> None:
    _, made = trained
    few = replace(made, examples=made.examples[:2])
    controls = train_controls(few, Console(quiet=True), [name])
    control = controls[name]
    assert list(controls) == [name] and control.examples is few.examples
    report = measure(few, trained=controls)
    assert list(report["conditions"]) == [*EVERY, name]
    if name in ("prompt", "direct_tuned"):
        first, second = control.latents([0, 1])
        assert np.array_equal(first, second)
    assert (control.bridge_id == made.bridge_id) == (name == "receiver_lora")
    assert (control.sender.fingerprint.weights != made.sender.fingerprint.weights) == (name == "random_sender")


@pytest.mark.parametrize("name", ["direct_tuned", "receiver_lora", "prompt"])
def test_a_control_without_a_sender_has_one_source_whatever_the_bridge_was_trained_for(
    trained: tuple[TrainConfig, EvaluationContext], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trained[1].bridge.config.provenance.recipe, "sources_per_example", 2)
    assert control_config(name, trained[1], tmp_path).sources_per_example == 1
    assert control_config("random_sender", trained[1], tmp_path).sources_per_example == 2


def test_a_tuned_text_stands_behind_its_soft_tokens_in_training_and_in_evaluation(
    trained: tuple[TrainConfig, EvaluationContext], tmp_path: Path
) -> None:
    _, made = trained
    config = control_config("direct_tuned", made, tmp_path / "run")
    run = prepare(config, Console(quiet=True))
    learnt = run.sample(config.receiver[0], 0).answer
    example = run.train[0]
    control = replace(made, examples=[example])
    reading = Tuned(np.zeros((config.num_latents, 16), np.float32), example.source)
    (asked,) = control.rows([0], [reading], [example.answer])
    assert asked == learnt and sum(slot != TEXT for slot in learnt.slots) == config.num_latents
    after = learnt.ids[learnt.slots.index(config.num_latents - 1) + 1 :]
    assert made.receiver.tokenizer.decode(after).startswith(example.source)


def test_a_fine_tuned_receiver_is_a_copy_with_as_many_trained_weights_as_the_bridge(
    trained: tuple[TrainConfig, EvaluationContext],
) -> None:
    made = trained[1]
    before = {name: weight.clone() for name, weight in made.receiver.model.state_dict().items()}
    tuned = train_controls(made, Console(quiet=True), ["receiver_lora"])["receiver_lora"].receiver
    assert isinstance(tuned, FrozenLM) and isinstance(made.receiver, FrozenLM)
    after = made.receiver.model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], weight) for name, weight in before.items())
    own = {name: weight for name, weight in tuned.model.named_parameters() if "lora_" in name}
    assert any(weight.any() for name, weight in own.items() if "lora_B" in name), "one step moves what begins at 0"
    count = sum(weight.numel() for weight in own.values())
    wanted = sum(weight.numel() for weight in made.bridge.parameters())
    assert abs(count - wanted) < sum(weight.numel() for weight in own.values()) / rank_for(made.receiver.model, wanted)
    for name, weight in tuned.model.named_parameters():
        assert "lora_" in name or torch.equal(weight, before[name.replace(".base_layer", "")])


def test_a_probe_answers_from_the_senders_states_alone(sentiment: EvaluationContext) -> None:
    texts = {"good": 1, "nice": 1, "fine": 1, "sad": 0, "evil": 0, "grim": 0}
    examples = [Example(f"It is {word}.", "", f" {label}", label) for word, label in texts.items()]
    probe = fit_probe(sentiment, examples)
    known = replace(probe, examples=examples)
    said = TRAINED["probe"].answer(known, range(6), TRAINED["probe"].read(known, range(6)))
    assert said == [f" {sentiment.task.labels[example.label or 0]}" for example in examples]
    row = measure(sentiment, conditions=["none"], trained={"probe": probe})["conditions"]["probe"]
    assert row["metric"] == "accuracy" and row["ttft_ms"] is None
    assert TRAINED["probe"].missing(sentiment) == "the task has no labels"


def test_a_control_that_nobody_knows_or_that_cannot_be_is_said(
    trained: tuple[TrainConfig, EvaluationContext],
) -> None:
    with pytest.raises(InvalidRequest, match="no control is called 'lora'; there are direct_tuned, receiver_lora"):
        train_controls(trained[1], Console(quiet=True), ["lora"])
    console = Console(file=io.StringIO(), width=100)
    made = measure(trained[1], conditions=["none"], trained=train_controls(trained[1], console, ["probe"]))
    assert list(made["conditions"]) == ["none"] and made["left_out"] == {"probe": "the task has no labels"}
    assert "left out: a probe needs labels, and 'world' has none" in console.file.getvalue()


def test_the_sender_is_asked_in_its_own_plain_text(context: EvaluationContext) -> None:
    asked = CONDITIONS["sender"].asked(context)
    assert asked.receiver is context.sender and asked.layout.chat is None
    (row,) = asked.rows([0], CONDITIONS["sender"].read(asked, [0]), [None])
    text = context.sender.tokenizer.decode(row.ids)
    assert text.startswith(f"<s>{context.examples[0].source[:80]}") and text.endswith("Answer:")


def test_a_pruned_source_keeps_its_most_surprising_words_in_order_within_the_budget(context: EvaluationContext) -> None:
    example = replace(context.examples[0], source="Mara Mara Mara Mara Mara Mara Mara zzqx Mara Mara Mara Mara Mara")
    made = replace(context, examples=[example])
    (kept,) = made.pruned([0])
    assert "zzqx" in kept and 0 < len(text_ids(context.receiver, kept)) <= len(made.recall([0])[0])
    for i in range(6):
        (some,) = context.pruned([i])
        words = iter(context.examples[i].source.split())
        assert all(word in words for word in some.split())
        assert len(text_ids(context.receiver, some)) <= len(context.recall([i])[0])


def test_a_relay_of_equal_bytes_is_no_longer_than_the_message(context: EvaluationContext) -> None:
    sizes = [context.message_bytes(len(latent)) for latent in context.recall(range(6))]
    texts = context.relay_bytes(range(6))
    assert all(0 < len(text.encode()) <= size for text, size in zip(texts, sizes, strict=True))
    assert any(len(long) > len(short) for long, short in zip(texts, context.relay(range(6)), strict=True))
