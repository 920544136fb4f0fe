"""Latency of an answer: every side writes the same number of tokens, and what is warm changes no answer."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from latentwire.bridge.checkpoint import make_bridge, save_bridge
from latentwire.bridge.engine import generate
from latentwire.bridge.errors import InvalidRequest
from latentwire.bridge.evaluation import latency as module
from latentwire.bridge.evaluation.context import EvaluationContext, open_context
from latentwire.bridge.evaluation.latency import SIDES, latency
from latentwire.bridge.evaluation.tasks import Example
from latentwire.bridge.models import FrozenLM, load_model
from latentwire.bridge.sampling import SamplingParams
from tests.conftest import bridge_config
from tests.families import FAMILIES, write_family

TOKENS = 6
PROMPTS = ["{latent}\nWho?", "Text: {latent}\nA longer question, with a comma?", "{latent}", "no place for it"]


@pytest.fixture(scope="module")
def opened() -> EvaluationContext:
    """The built-in bridge, asked about texts of many lengths."""
    texts = ["Mara sings.", "Ben lives in Rome. Mara wants a cup of tea.", "Tea.", "Mara lives in Paris, as Ben does."]
    examples = [Example(text, prompt, " x") for text, prompt in zip(texts, PROMPTS, strict=True)]
    return replace(open_context("builtin", "world", limit=1, dtype="float16", receiver=None), examples=examples)


@pytest.fixture(scope="module", params=["built in", "Mistral", "Gemma 3 (text)", "GPT-2", "Mamba"])
def context(
    opened: EvaluationContext, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> EvaluationContext:
    """The same with an untrained bridge to a receiver of another family."""
    if request.param == "built in":
        return opened
    folder = tmp_path_factory.mktemp("latency")
    lm = load_model(str(write_family(folder / "lm", FAMILIES[request.param])))
    assert isinstance(opened.sender, FrozenLM)
    save_bridge(folder / "bridge", make_bridge(bridge_config(opened.sender, lm)))
    made = open_context(folder / "bridge", "world", limit=1, dtype="float16", receiver=None)
    return replace(made, examples=opened.examples)


def ids_of(context: EvaluationContext, side: str, chosen: Sequence[int]) -> list[list[int]]:
    timed = SIDES[side](context, chosen, TOKENS)()
    assert 0 < timed.first_seconds < timed.total_seconds
    assert [len(ids) for ids in timed.ids] == [TOKENS] * len(chosen)
    return timed.ids


@pytest.mark.parametrize("chosen", [[0], [1, 0, 2, 1], [2, 3]])
def test_a_warm_prefix_changes_no_answer_and_neither_does_a_latent_at_hand(
    context: EvaluationContext, chosen: list[int]
) -> None:
    assert ids_of(context, "stored", chosen) == ids_of(context, "bridge", chosen)
    direct = ids_of(context, "direct", chosen)
    assert direct == [ids_of(context, "direct", [i])[0] for i in chosen]
    if module.is_copied(context.receiver):  # type: ignore[arg-type]
        assert ids_of(context, "prefix_cached", chosen) == direct
        again = SIDES["prefix_cached"](context, chosen, TOKENS)
        assert again().ids == again().ids  # what is warm stays as it is


def test_what_is_written_is_what_the_engine_says(opened: EvaluationContext) -> None:
    assert isinstance(opened.receiver, FrozenLM)
    rows = opened.rows([0, 1], [opened.examples[i].source for i in (0, 1)], [None] * 2)
    said = generate(opened.receiver, rows, None, [SamplingParams(TOKENS)] * 2)[0]
    for one, ids in zip(said, ids_of(opened, "direct", [0, 1]), strict=True):
        text = opened.receiver.tokenizer.decode(ids, skip_special_tokens=True)
        assert text.startswith(one.text) and one.text


def test_only_what_follows_the_source_is_read_when_its_prefix_is_warm(opened: EvaluationContext) -> None:
    read: list[int] = []
    assert isinstance(opened.receiver, FrozenLM)
    hook = opened.receiver.model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    run = SIDES["prefix_cached"](opened, [1], 2)
    before = list(read)
    run()
    hook.remove()
    row = opened.rows([1], [opened.examples[1].source], [None])[0]
    asked = opened.receiver.tokenizer("\nA longer question, with a comma?", add_special_tokens=False)["input_ids"]
    assert before == [len(row) - read[1]] and read[2:] == [1]
    assert len(asked) <= read[1] <= len(asked) + 1  # a token may hold the end of the source and the line break


def test_a_report_has_every_side_at_every_batch_size_and_is_json(opened: EvaluationContext) -> None:
    told: list[tuple[Any, ...]] = []
    report = latency(opened, batch_sizes=(1, 3), tokens=3, repeats=2, progress=lambda *made: told.append(made))
    assert json.loads(json.dumps(report)) == report
    assert (report["tokens"], report["repeats"], report["missing"]) == (3, 2, {})
    assert list(report["batches"]) == ["1", "3"] and report["soft_tokens"] < report["receiver_tokens"]
    for sides in report["batches"].values():
        assert list(sides) == list(SIDES)
        for times in sides.values():
            for key in ("first_ms", "total_ms"):
                assert 0 < times[key]["p50"] <= times[key]["p95"]
            assert times["first_ms"]["p50"] < times["total_ms"]["p50"]
    total = 2 * 3 * len(SIDES)
    assert [(done, of) for _, done, of in told] == [(done, total) for done in range(1, total + 1)]
    assert {side for side, _, _ in told[: len(SIDES)]} == set(SIDES)  # in turns
    firsts = [told[at][0] for at in range(0, total, len(SIDES))]
    assert len(set(firsts)) == 3


def test_a_receiver_whose_state_cannot_be_copied_has_no_warm_prefix_and_says_so(
    opened: EvaluationContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_copied", lambda receiver: False)
    report = latency(opened, batch_sizes=(1,), tokens=2, repeats=1)
    assert "prefix_cached" not in report["batches"]["1"] and "cannot be copied" in report["missing"]["prefix_cached"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokens": 0}, "tokens is 0; expected 1 or more"),
        ({"repeats": 0}, "repeats is 0; expected 1 or more"),
        ({"batch_sizes": (1, 0)}, "batch_sizes is 0; expected 1 or more"),
        ({"batch_sizes": ()}, "batch_sizes is 0; expected 1 or more"),
        ({"tokens": 512}, "max_answer_tokens is 512; 'builtin:llama' reads 512 in all"),
    ],
)
def test_a_wrong_number_is_refused(opened: EvaluationContext, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        latency(opened, **changes)
