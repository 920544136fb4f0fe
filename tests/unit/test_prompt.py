"""The composer: what the receiver reads, and what it is taught to say."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from transformers import PreTrainedTokenizerFast

from latentwire.bridge.config import Layout, Turn
from latentwire.bridge.errors import IncompatibleBridge, InvalidRequest
from latentwire.bridge.models import FrozenLM
from latentwire.bridge.prompt import (
    IGNORE,
    TEXT,
    Row,
    check_layout,
    collate,
    compose,
    continuation,
    embed,
    expand,
    fit,
    layout_for,
    place,
    split_template,
)
from latentwire.bridge.reader import text_ids
from tests.conftest import byte_tokenizer

TEMPLATE = "Review: {latent}\nSentiment:"


@pytest.fixture(scope="module")
def llama(lms: dict[str, FrozenLM]) -> FrozenLM:
    return lms["llama"]


@pytest.fixture(scope="module")
def no_bos(llama: FrozenLM) -> FrozenLM:
    return replace(llama, tokenizer=byte_tokenizer(bos=False))


@pytest.fixture(scope="module")
def pad_is_eos(llama: FrozenLM) -> FrozenLM:
    return replace(llama, tokenizer=byte_tokenizer(pad="</s>"))


@pytest.fixture(scope="module")
def metaspace(llama: FrozenLM) -> FrozenLM:
    """A tokenizer that marks the start of a text, as SentencePiece models do."""
    words = ["<s>", "</s>", "<unk>", "▁Rome", "▁is", "▁big", "Rome", "is", "big", ".", "▁", "\n", "a", "▁a", "0", "▁0"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    split = [pre_tokenizers.Split(mark, "isolated") for mark in (".", "\n")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first"), *split])
    tokenizer.decoder = MetaspaceDecoder()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return replace(llama, tokenizer=fast)


def tokens(lm: FrozenLM, ids: list[int]) -> list[str]:
    return [str(token) for token in lm.tokenizer.convert_ids_to_tokens(ids)]


def heard(lm: FrozenLM, row: Row) -> str:
    """The row as text, each soft token shown as its number in brackets."""
    parts = [
        f"[{slot}]" if slot != TEXT else str(lm.tokenizer.decode([i]))
        for i, slot in zip(row.ids, row.slots, strict=True)
    ]
    return "".join(parts)


@pytest.mark.parametrize(
    "template, seen",
    [
        ("{latent}\nQuestion:", "<s>[0][1]\nQuestion:"),
        ("Review: {latent}\nSentiment:", "<s>Review:[0][1]\nSentiment:"),
        ("Read this: {latent}", "<s>Read this:[0][1]"),
        ("no place", "<s>[0][1]no place"),
        ("{latent}", "<s>[0][1]"),
    ],
)
def test_soft_tokens_stand_where_the_template_says(llama: FrozenLM, template: str, seen: str) -> None:
    assert heard(llama, compose(llama, layout_for(llama, template), template, latent=2)) == seen


@pytest.mark.parametrize("latent", [3, 0, "a text", None])
@pytest.mark.parametrize("template", [TEMPLATE, "{latent}\nA:", "A: {latent}"])
def test_bos_stands_once_and_first(llama: FrozenLM, template: str, latent: int | str | None) -> None:
    row = compose(llama, layout_for(llama, template), template, latent=latent, answer=" yes")
    text = [i for i, slot in zip(row.ids, row.slots, strict=True) if slot == TEXT]
    assert row.slots[0] == TEXT and row.ids[0] == 0 and text.count(0) == 1


def test_a_tokenizer_without_bos_gets_none(no_bos: FrozenLM) -> None:
    layout = layout_for(no_bos, TEMPLATE)
    assert layout.bos_id is None
    row = compose(no_bos, layout, "{latent}\nA:", latent=2, answer=" yes")
    assert row.slots[:2] == [0, 1] and heard(no_bos, row) == "[0][1]\nA: yes</s>"


def test_the_answer_and_eos_are_supervised_and_nothing_else(llama: FrozenLM) -> None:
    row = compose(llama, layout_for(llama, TEMPLATE), TEMPLATE, latent=3, answer=" good")
    said = [label for label in row.labels if label != IGNORE]
    assert llama.tokenizer.decode(said) == " good</s>"
    assert row.labels == [IGNORE] * (len(row) - len(said)) + said and row.ids[-len(said) :] == said


def test_without_an_answer_nothing_is_supervised(llama: FrozenLM) -> None:
    row = compose(llama, layout_for(llama, TEMPLATE), TEMPLATE, latent=3)
    assert set(row.labels) == {IGNORE} and 1 not in row.ids


def test_an_empty_answer_still_teaches_to_stop(llama: FrozenLM) -> None:
    row = compose(llama, layout_for(llama, TEMPLATE), TEMPLATE, latent=3, answer="")
    assert [label for label in row.labels if label != IGNORE] == [1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_eos_is_supervised_and_padding_is_not_when_both_are_one_token(
    pad_is_eos: FrozenLM, side: Literal["left", "right"]
) -> None:
    assert pad_is_eos.tokenizer.pad_token_id == pad_is_eos.tokenizer.eos_token_id == 1
    layout = layout_for(pad_is_eos, TEMPLATE)
    rows = [compose(pad_is_eos, layout, TEMPLATE, latent=2, answer=answer) for answer in (" a", " quite a lot more")]
    batch = collate(rows, side=side)
    assert (batch.labels == 1).sum(dim=1).tolist() == [1, 1]
    assert (batch.labels[~batch.mask] == IGNORE).all()


def test_a_text_in_place_of_the_latent_is_tokenised_with_its_surroundings(metaspace: FrozenLM) -> None:
    layout = layout_for(metaspace, "Rome {latent}.")
    row = compose(metaspace, layout, "Rome {latent}.", latent="is big")
    assert tokens(metaspace, row.ids) == ["<s>", "▁Rome", "▁is", "▁big", "."] and set(row.slots) == {TEXT}


def test_soft_tokens_and_texts_stand_one_after_the_other_and_are_numbered_on(llama: FrozenLM) -> None:
    layout = layout_for(llama, TEMPLATE)
    row = compose(llama, layout, TEMPLATE, latent=(2, " and ", 3, " so"), answer=" good")
    slots = [slot for slot in row.slots if slot != TEXT]
    assert slots == [0, 1, 2, 3, 4]
    assert heard(llama, row) == "<s>Review:[0][1] and[2][3][4] so\nSentiment: good</s>"


@pytest.mark.parametrize(
    "prompt, seen",
    [
        ("Who?", "<s>Review:\n[1][0][1]\n[2][2]\n[3][3][4][5]\nWho?"),
        ("{latents}", "<s>[1][0][1]\n[2][2]\n[3][3][4][5]"),
        ("Read:\n{latents}\nWho?", "<s>Read:\n[1][0][1]\n[2][2]\n[3][3][4][5]\nWho?"),
        ("A {latent} B {latent}{latent} C", "<s>A[0][1] B[2][3][4][5] C"),
    ],
)
def test_several_sources_stand_in_their_order_and_each_is_marked_by_its_number(
    llama: FrozenLM, prompt: str, seen: str
) -> None:
    layout = layout_for(llama, "Review:\n{latent}\nSentiment:")
    placed, contents = expand(place(layout, prompt, several=True), [2, 1, 3])
    row = compose(llama, layout, placed, latent=contents)
    assert heard(llama, row) == seen
    assert [slot for slot in row.slots if slot != TEXT] == list(range(6))


def test_several_texts_stand_where_their_latents_would(metaspace: FrozenLM) -> None:
    placed, contents = expand("Rome {latents}.", ["is big", "a"])
    layout = layout_for(metaspace, "{latent}")
    row = compose(metaspace, layout, placed, latent=contents)
    assert row == compose(metaspace, layout, "Rome {latent}.", latent="[1] is big\n[2] a")
    turns, contents = expand((Turn("system", "S"), Turn("user", "{latents} Q")), [1, 2])
    assert turns == (Turn("system", "S"), Turn("user", "{latent} Q"))
    assert contents == ["[1] ", 1, "\n[2] ", 2]


@pytest.mark.parametrize("contents", [[], [2], ["a text"]])
@pytest.mark.parametrize("prompt", [TEMPLATE, "{latent}", "Who?"])
def test_one_source_leaves_a_prompt_as_it_is(prompt: str, contents: list[int | str]) -> None:
    assert expand(prompt, contents) == (prompt, contents)
    assert expand("{latents} Who?", [2]) == ("{latent} Who?", ["[1] ", 2])


@pytest.mark.parametrize(
    "prompt",
    [
        "{latent}",
        "{latent} {latent}",
        "{latent} {latent} {latent} {latent}",
        "{latents} {latents}",
        "{latents} {latent}",
        (Turn("user", "{latent} {latent}"), Turn("user", "{latent}")),
        (Turn("user", "a"), Turn("user", "b")),
    ],
)
def test_other_places_than_sources_are_refused(prompt: Any) -> None:
    with pytest.raises(
        InvalidRequest, match=r"for 3 sources expected {latent} as often, or {latents} once, in one text"
    ):
        expand(prompt, [1, 2, 3])


def test_more_sources_than_fit_are_refused_with_the_numbers(llama: FrozenLM) -> None:
    placed, contents = expand("{latents}", [30] * 3)
    with pytest.raises(InvalidRequest, match="the input with 3 sources takes 102 receiver tokens; 64 fit beside"):
        compose(llama, layout_for(llama, TEMPLATE), placed, latent=contents, max_tokens=64)


def test_neighbouring_texts_are_tokenised_as_one(metaspace: FrozenLM) -> None:
    layout = layout_for(metaspace, "{latent}\n")
    one = compose(metaspace, layout, "Rome {latent}.", latent="is big")
    assert compose(metaspace, layout, "Rome {latent}.", latent=("is", " big")) == one


def test_a_text_behind_soft_tokens_is_cut_to_its_room_and_they_are_kept(llama: FrozenLM) -> None:
    layout = layout_for(llama, TEMPLATE)
    row = fit(llama, layout, TEMPLATE, "a long text " * 20, 40, soft=4)
    assert len(row) <= 40 and [slot for slot in row.slots if slot != TEXT] == [0, 1, 2, 3]
    assert "[3]a long" in heard(llama, row)


def test_nothing_in_place_of_the_latent_leaves_the_prompt_alone(llama: FrozenLM) -> None:
    row = compose(llama, layout_for(llama, TEMPLATE), TEMPLATE, latent=None)
    assert heard(llama, row) == "<s>Review: \nSentiment:"


def test_what_follows_soft_tokens_has_no_start_of_text_mark(metaspace: FrozenLM) -> None:
    assert tokens(metaspace, text_ids(metaspace, "Rome is")) == ["▁Rome", "▁is"]  # the mark a continuation must lack
    layout = layout_for(metaspace, "{latent}Rome is")
    row = compose(metaspace, layout, "{latent}Rome is", latent=1, answer=" big")
    assert tokens(metaspace, row.ids)[2:] == ["Rome", "▁is", "▁big", "</s>"]


@pytest.mark.parametrize("before", ["", "Rome", "is"])
def test_a_continuation_keeps_the_space_it_was_given_and_no_other(metaspace: FrozenLM, before: str) -> None:
    assert tokens(metaspace, continuation(metaspace, " big", before)) == ["▁big"]
    assert tokens(metaspace, continuation(metaspace, "big", "Rome "))[-1] in ("big", "▁big")


def test_a_tokenizer_that_merges_across_every_anchor_still_gives_the_texts_own_tokens(llama: FrozenLM) -> None:
    whole = {f"{head}{tail}": i for i, (head, tail) in enumerate([(h, t) for h in ".a0" for t in "x"], start=10)}
    alphabet = {".": 0, "a": 1, "0": 2, "x": 3}
    tokenizer = Tokenizer(models.BPE({**alphabet, **whole}, [(h, "x") for h in ".a0"]))
    lm = replace(llama, tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert text_ids(lm, ".x") == [10] and continuation(lm, "x") == [3]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=12), before=st.text(max_size=12))
def test_a_continuation_reads_back_as_the_text(llama: FrozenLM, text: str, before: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    before = before.encode("utf-8", "ignore").decode()
    assert llama.tokenizer.decode(continuation(llama, text, before)) == text


def test_two_places_for_the_latent_are_refused(llama: FrozenLM) -> None:
    with pytest.raises(InvalidRequest, match="stands 2 times") as caught:
        split_template("{latent} and {latent}")
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest):
        compose(llama, layout_for(llama, TEMPLATE), "{latent}{latent}", latent=1)


def test_a_row_over_the_limit_is_refused_with_both_numbers(llama: FrozenLM) -> None:
    layout = layout_for(llama, TEMPLATE)
    fits = compose(llama, layout, TEMPLATE, latent=4, answer=" x")
    assert len(compose(llama, layout, TEMPLATE, latent=4, answer=" x", max_tokens=len(fits))) == len(fits)
    with pytest.raises(InvalidRequest, match=rf"{len(fits)} receiver tokens; {len(fits) - 1} fit"):
        compose(llama, layout, TEMPLATE, latent=4, answer=" x", max_tokens=len(fits) - 1)


def test_an_empty_input_is_refused(no_bos: FrozenLM) -> None:
    with pytest.raises(InvalidRequest, match="input is empty"):
        compose(no_bos, Layout("{latent}{prompt}", None, 1), "", latent=None)


def test_the_layout_keeps_what_stands_around_the_latent(llama: FrozenLM) -> None:
    assert layout_for(llama, TEMPLATE) == Layout("Review: {latent}\n{prompt}", 0, 1, (1,))
    assert layout_for(llama, "Say:").template == "{latent}{prompt}"


def test_a_prompt_without_a_place_gets_the_surroundings_of_training(llama: FrozenLM) -> None:
    layout = layout_for(llama, TEMPLATE)
    assert place(layout, "Sentiment:") == TEMPLATE
    assert place(layout, "{latent} Who?") == "{latent} Who?"


def test_a_field_of_the_template_never_reaches_a_request(llama: FrozenLM) -> None:
    layout = layout_for(llama, "Question: {question}\n{latent}\nAnswer:")
    assert "{question}" not in place(layout, "Who?")


@pytest.mark.parametrize("token, want", [("bos", 7), ("bos", None), ("eos", 9), ("eos", None)])
def test_another_special_token_is_refused_with_both_ids(llama: FrozenLM, token: str, want: int | None) -> None:
    layout = layout_for(llama, TEMPLATE)
    check_layout(layout, llama)
    have = {"bos": 0, "eos": 1}[token]
    with pytest.raises(IncompatibleBridge, match=rf"{token} id {want};.* has {have}"):
        check_layout(replace(layout, **{f"{token}_id": want}), llama)


rows_of = st.lists(st.tuples(st.integers(0, 5), st.text("ab ", max_size=9)), min_size=1, max_size=5)
sides = st.sampled_from(["left", "right"])


@settings(max_examples=60, deadline=None)
@given(wanted=rows_of, side=sides)
def test_padding_changes_nothing_of_a_row(
    llama: FrozenLM, wanted: list[tuple[int, str]], side: Literal["left", "right"]
) -> None:
    layout = layout_for(llama, TEMPLATE)
    rows = [compose(llama, layout, TEMPLATE, latent=k, answer=text) for k, text in wanted]
    batch = collate(rows, side=side)
    for i, row in enumerate(rows):
        real = batch.mask[i]
        assert int(real.sum()) == len(row) and bool(real[-1 if side == "left" else 0])
        assert bool((real.int().diff() != 0).sum() <= 1)  # one run of real tokens
        assert batch.ids[i][real].tolist() == row.ids
        assert batch.slots[i][real].tolist() == row.slots
        assert batch.labels[i][real].tolist() == row.labels
        assert batch.positions[i][real].tolist() == list(range(len(row)))
        assert (batch.labels[i][~real] == IGNORE).all() and (batch.slots[i][~real] == TEXT).all()


@settings(max_examples=40, deadline=None)
@given(wanted=rows_of, side=sides)
def test_each_soft_token_enters_once_at_its_own_place(
    llama: FrozenLM, wanted: list[tuple[int, str]], side: Literal["left", "right"]
) -> None:
    layout = layout_for(llama, TEMPLATE)
    rows = [compose(llama, layout, TEMPLATE, latent=k, answer=text) for k, text in wanted]
    K = max(1, *(k for k, _ in wanted)) if len(wanted) > 1 else max(1, wanted[0][0])
    soft = torch.arange(1.0, len(rows) * K + 1).reshape(len(rows), K, 1).expand(-1, -1, llama.width) * 100
    batch = collate(rows, side=side)
    out = embed(llama, batch, soft)
    own = llama.embed(batch.ids)
    for i, (k, _) in enumerate(wanted):
        at = batch.slots[i] != TEXT
        assert torch.equal(out[i][at], soft[i, :k])
        assert torch.equal(out[i][~at], own[i][~at])


def test_gradients_reach_every_soft_token_and_none_of_the_padding(llama: FrozenLM) -> None:
    layout = layout_for(llama, TEMPLATE)
    rows = [compose(llama, layout, TEMPLATE, latent=k) for k in (3, 1)]
    soft = torch.zeros(2, 3, llama.width, requires_grad=True)
    embed(llama, collate(rows, side="left"), soft).sum().backward()  # type: ignore[no-untyped-call]
    assert soft.grad is not None
    assert soft.grad[:, :, 0].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_soft_tokens_of_another_width_are_refused_with_both_widths(llama: FrozenLM) -> None:
    batch = collate([compose(llama, layout_for(llama, TEMPLATE), TEMPLATE, latent=1)], side="left")
    with pytest.raises(IncompatibleBridge, match=rf"5 wide; .* reads {llama.width}"):
        embed(llama, batch, torch.zeros(1, 1, 5))


def test_a_batch_moves_whole(llama: FrozenLM) -> None:
    batch = collate([compose(llama, layout_for(llama, TEMPLATE), TEMPLATE, latent=1)], side="left")
    moved = batch.to(torch.device("meta"))
    assert {getattr(moved, name).device.type for name in ("ids", "slots", "mask", "positions", "labels")} == {"meta"}
