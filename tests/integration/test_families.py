"""Every family in every role it may play: each row gets what it would get alone, beyond every window, or is refused."""

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers.generation.continuous_batching import input_outputs
from transformers.generation.continuous_batching import utils as library

from latentwire.bridge import families, scoring
from latentwire.bridge.checkpoint import make_bridge, save_bridge
from latentwire.bridge.engine import answer_logits, generate, token_losses
from latentwire.bridge.errors import InvalidRequest, LatentWireError, ModelUnavailable
from latentwire.bridge.generation import select as probe
from latentwire.bridge.generation.base import Soft
from latentwire.bridge.generation.continuous import PAGE_TOKENS, ContinuousEngine
from latentwire.bridge.generation.output import Generation
from latentwire.bridge.generation.select import open_engine
from latentwire.bridge.models import FrozenLM, check_role, hidden_states, load_model, pad_sources
from latentwire.bridge.prompt import IGNORE, TEXT, Row, collate
from latentwire.bridge.reader import SourceTokens, tokenize_source
from latentwire.bridge.sampling import SamplingParams
from latentwire.service.inference.runtime import Runtime
from latentwire.service.settings import Settings
from latentwire.training.loop import train
from latentwire.training.plan import plan
from tests.conftest import bridge_config
from tests.families import FAMILIES, WINDOW, Family, V, write_family
from tests.integration.conftest import MakeConfig
from tests.integration.runs import ROOT, quiet

LENGTHS = [9, WINDOW + PAGE_TOKENS + 42, 40]  # one beyond every window, by more than a page
SOFT = 5
ANSWER = SamplingParams(6, logprobs=0)
SAID = [[7], [7, 9, 11, 13, 15], [30, 31]]
SENDERS = [name for name, family in FAMILIES.items() if family.sender]
RECEIVERS = [name for name, family in FAMILIES.items() if family.receiver]
RECURRENT = (
    "Qwen3-Next", "Granite 4 (hybrid)", "Mamba", "Mamba 2", "Falcon-Mamba", "Jamba", "LFM2", "RecurrentGemma",
)  # fmt: skip
ALL_WINDOWED = ("Mistral", "Phi-3", "StarCoder 2")  # in every layer
WINDOWED = [name for name, family in FAMILIES.items() if family.wide]
REFUSED = [
    (name, role) for name, family in FAMILIES.items() for role in ("sender", "receiver") if not getattr(family, role)
]
Load = Callable[[str], FrozenLM]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A model of a family, made once."""
    root, made = tmp_path_factory.mktemp("families"), dict[str, FrozenLM]()

    def get(name: str) -> FrozenLM:
        if name not in made:
            made[name] = load_model(str(write_family(root / name, FAMILIES[name])))
        return made[name]

    return get


def sources(lm: FrozenLM) -> list[SourceTokens]:
    """Three texts, none longer than the model reads."""
    lengths = [min(length, lm.max_tokens - ANSWER.max_tokens) for length in LENGTHS]
    drawn = [torch.randint(3, V, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    return [SourceTokens(ids, len(ids)) for ids in drawn]


def rows(lm: FrozenLM, *, soft: int = SOFT, labels: int = 0) -> list[Row]:
    """The same texts, the first tokens of which are soft, the last of which are to be said."""
    return [
        Row(
            source.ids,
            [i if i < soft else TEXT for i in range(len(source.ids))],
            [IGNORE] * (len(source.ids) - labels) + source.ids[len(source.ids) - labels :],
        )
        for source in sources(lm)
    ]


def soft_of(lm: FrozenLM) -> Tensor:
    drawn = torch.randn(len(LENGTHS), SOFT, lm.width, generator=torch.Generator().manual_seed(0))
    return drawn / drawn.pow(2).mean(dim=-1, keepdim=True).sqrt() * lm.embedding_rms()


def same(ours: Generation, theirs: Generation) -> bool:
    """The same tokens, each as likely."""
    assert ours.logprobs is not None and theirs.logprobs is not None
    near = pytest.approx([token.logprob for token in theirs.logprobs], abs=1e-4)
    return ours.text == theirs.text and [token.logprob for token in ours.logprobs] == near


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", SENDERS)
def test_a_sender_reads_a_text_in_a_batch_as_it_reads_it_alone(load: Load, name: str) -> None:
    lm = load(name)
    ids, mask = pad_sources(lm, sources(lm))
    together = hidden_states(lm, ids, mask, (1, 2))
    for i, source in enumerate(sources(lm)):
        alone = hidden_states(lm, *pad_sources(lm, [source]), (1, 2))[0]
        assert off(together[i][mask[i]], alone) < 1e-5
        assert alone.shape == (len(source.ids), lm.state_width(1) + lm.state_width(2))


@pytest.mark.parametrize("name", RECEIVERS)
def test_a_receiver_answers_in_a_batch_as_it_answers_alone(load: Load, name: str) -> None:
    lm = load(name)
    soft = soft_of(lm)
    together = generate(lm, rows(lm), soft, [ANSWER] * 3)[0]
    for i, row in enumerate(rows(lm)):
        assert same(together[i], generate(lm, [row], soft[i : i + 1], [ANSWER])[0][0])
    assert not all(same(*pair) for pair in zip(together, generate(lm, rows(lm), -soft, [ANSWER] * 3)[0], strict=True))


@pytest.mark.parametrize("name", RECEIVERS)
def test_a_receiver_reads_embeddings_as_it_reads_ids(load: Load, name: str) -> None:
    lm = load(name)
    for row in rows(lm, soft=0):
        said = generate(lm, [row], None, [ANSWER])[0][0].text
        ids = cast(Any, lm.model).generate(
            torch.tensor([row.ids]), attention_mask=torch.ones(1, len(row), dtype=torch.long),
            max_new_tokens=ANSWER.max_tokens, do_sample=False, eos_token_id=list(lm.end_ids), pad_token_id=2,
        )[0, len(row) :].tolist()  # fmt: skip
        ended = next((at for at, token in enumerate(ids) if token in lm.end_ids), len(ids))
        assert said == lm.tokenizer.decode(ids[:ended], skip_special_tokens=True)


@pytest.mark.parametrize("name", RECEIVERS)
def test_a_receiver_trains_in_a_batch_as_it_trains_alone(load: Load, name: str) -> None:
    lm = load(name)

    def losses(chosen: list[int], side: Any) -> tuple[Tensor, Tensor]:
        soft = soft_of(lm)[chosen].requires_grad_()
        made = [rows(lm, labels=3)[i] for i in chosen]
        logits, labels = answer_logits(lm, collate(made, side=side), soft)
        lost = token_losses(logits, labels).sum(dim=1)
        return lost.detach(), torch.autograd.grad(lost.sum(), soft)[0]

    for side in ("left", "right"):
        together = losses([0, 1, 2], side)
        for i in range(3):
            loss, gradient = losses([i], "left")
            torch.testing.assert_close(together[0][i], loss[0], rtol=1e-4, atol=1e-4)
            far = not gradient.any()  # out of reach of the windows of all layers
            assert far == (i == 1 and name in ALL_WINDOWED) and far == (not together[1][i].any())
            assert far or off(together[1][i], gradient[0]) < 1e-3


@pytest.mark.parametrize("name", RECEIVERS)
def test_a_receiver_scores_continuations_of_what_it_read_once_as_it_scores_whole_rows(load: Load, name: str) -> None:
    lm = load(name)
    questions = [
        [Row(read.ids + said, read.slots + [TEXT] * len(said), read.labels + said) for said in SAID[: 3 - i]]
        for i, read in enumerate(row[: lm.max_tokens - 5] for row in rows(lm))
    ]
    together = scoring.score(lm, questions, soft_of(lm))
    for i, question in enumerate(questions):
        for row, scored in zip(question, together[i], strict=True):
            logits, labels = answer_logits(lm, collate([row], side="left"), soft_of(lm)[i : i + 1])
            losses = token_losses(logits, labels)[labels[:, 1:] != IGNORE]
            assert scored.logprobs == pytest.approx((-losses).tolist(), abs=1e-4)
    assert scoring.is_copied(lm) == (name not in RECURRENT)


@pytest.mark.parametrize("name", RECEIVERS)
def test_the_engine_gives_the_references_answers(load: Load, name: str) -> None:
    lm = load(name)
    soft = soft_of(lm)
    engine = open_engine(lm, kv_tokens=1024, max_rows=4)
    ended = [threading.Event() for _ in LENGTHS]
    said: dict[int, Generation | LatentWireError] = {}
    try:
        for i, row in enumerate(rows(lm)):

            def end(result: Generation | LatentWireError, i: int = i) -> None:
                said[i] = result
                ended[i].set()

            engine.submit(row, ANSWER, Soft(("row", i), lambda i=i: soft[i]), end)
        assert all(each.wait(60) for each in ended)
    finally:
        engine.close()
    assert engine.kind == FAMILIES[name].engine
    for i, row in enumerate(rows(lm)):
        result = said[i]
        assert isinstance(result, Generation) and same(result, generate(lm, [row], soft[i : i + 1], [ANSWER])[0][0])


@pytest.mark.parametrize("name", WINDOWED)
def test_these_texts_are_long_enough_to_tell_a_window_from_none(load: Load, tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    open_wide = load_model(str(write_family(tmp_path / "wide", family, **family.wide)))
    lm, long = load(name), sources(load(name))[1]
    read = [hidden_states(each, *pad_sources(each, [long]), (1, 2))[0] for each in (lm, open_wide)]
    assert off(*read) > 1e-3
    assert torch.equal(read[0][:WINDOW], read[1][:WINDOW]) or off(read[0][:WINDOW], read[1][:WINDOW]) < 1e-5


@pytest.mark.parametrize("name", ["Mistral", "Gemma 3 (text)"])
def test_an_engine_with_a_wrong_mask_beyond_the_window_is_found_out(
    load: Load, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    build = library.build_attention_mask

    def without_window(*args: Any, sliding_window: int = 1, **rest: Any) -> Any:
        return build(*args, sliding_window=1, **rest)

    monkeypatch.setattr(input_outputs, "build_attention_mask", without_window)
    made = open_engine(load(name), kv_tokens=1024)
    made.close()
    assert made.kind == "padded"


@pytest.mark.parametrize("name", ["GPT-Neo", "MPT", "BLOOM"])
def test_an_engine_that_is_right_on_the_first_token_alone_is_found_out(
    load: Load, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    made = open_engine(load(name), kv_tokens=1024)
    made.close()
    assert made.kind == "padded" and "the log-probability of token " in caplog.text


def test_an_engine_whose_tries_all_end_at_once_is_not_trusted(
    load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lm, tried, submit = load("Llama"), list[Row](), ContinuousEngine.submit

    def counted(made: ContinuousEngine, row: Row, *more: Any) -> Any:
        tried.append(row)
        return submit(made, row, *more)

    monkeypatch.setattr(ContinuousEngine, "submit", counted)
    made = open_engine(replace(lm, end_ids=tuple(range(lm.rows))), kv_tokens=1024)  # every token ends an answer
    made.close()
    assert made.kind == "padded" and len(tried) == 2 * probe.TRIES and "end at once" in caplog.text


@pytest.mark.parametrize("name", ["Phi-3, LongRoPE", "Llama, dynamic RoPE"])
def test_frequencies_that_depend_on_the_longest_row_end_the_context_where_they_begin_to(load: Load, name: str) -> None:
    lm = load(name)
    assert lm.max_tokens == lm.reader.max_tokens == 64
    with pytest.raises(InvalidRequest, match="reads at most 64"):  # whatever an older bridge was made for
        tokenize_source(lm, "a" * 65, None, max_tokens=200)
    long = SourceTokens(list(range(3, 3 + 200)), 200)
    short = sources(lm)[0]
    ids, mask = pad_sources(lm, [short, long])
    with_long = hidden_states(lm, ids, mask, (2,))[0][mask[0]]
    alone = hidden_states(lm, *pad_sources(lm, [short]), (2,))[0]
    assert off(with_long, alone) > 1e-4  # what a longer context would have let in


@pytest.mark.parametrize(("name", "role"), REFUSED)
def test_a_role_that_a_family_cannot_play_is_refused_by_name_wherever_a_model_is_named(
    model_folders: dict[str, Path], make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
    role: Any,
) -> None:  # fmt: skip
    folder = write_family(tmp_path / "model", FAMILIES[name])
    sender, receiver = [str(folder), str(model_folders["llama"])] if role == "sender" else [
        str(model_folders["neox"]), str(folder)
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(families, "REFUSALS", ())
        lms = load_model(sender), load_model(receiver)
    save_bridge(tmp_path / "bridge", make_bridge(bridge_config(*lms)))
    config = make(sender=sender, receiver=receiver)
    for attempt in (
        lambda: check_role(str(folder), role),
        lambda: plan(config, source_tokens=8, prompt_tokens=4, answer_tokens=4),
        lambda: train(config, quiet()),
        lambda: Runtime(Settings(), {"tiny": str(tmp_path / "bridge")}),
    ):
        with pytest.raises(ModelUnavailable, match=rf"{folder}' \(\w+\) cannot be a {role}: ") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def table() -> list[list[str]]:
    """Rows of the first table of the page, cell by cell."""
    lines = (ROOT / "docs" / "families.md").read_text().splitlines()
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in lines if line.startswith("|")]
    return rows[2:]


def cells(name: str, family: Family) -> list[str]:
    can = {True: "yes", False: "refused"}
    return [
        name,
        f"`{family.kind}`",
        can[family.sender],
        can[family.receiver],
        family.engine if family.receiver else "–",
    ]


def test_the_page_of_families_says_what_is_tried_here() -> None:
    assert [row[:5] for row in table()] == [cells(name, family) for name, family in FAMILIES.items()]
