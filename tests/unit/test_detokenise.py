"""Text made as tokens come is the text of all of them, for every kind of tokenizer and at any pace."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, GPT2Config, PreTrainedTokenizerFast

from latentwire.bridge.detokenise import UNFINISHED, Text, decode
from latentwire.bridge.generation.output import Generation, IdLogprob, OutputText, OutputTokens
from latentwire.bridge.models import load_reader
from latentwire.bridge.reader import Reader
from latentwire.bridge.sampling import SamplingParams

MATERIAL = Path(__file__).resolve().parents[3] / "shared" / "models"
FAMILY = "👨‍👩‍👧‍👦"
TEXTS = ["The quick  brown fox.\n\n jumps", "naïve café", "你好。世界", "ไทย हिन्दी", f"{FAMILY} 🏳️‍🌈", "don't , stop ."]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    return tokenizer


def byte_fallback(*strip: decoders.Decoder) -> Tokenizer:
    """As in Llama; without ``strip`` as in Gemma."""
    pieces = ["<unk>", *BYTES, "▁", "▁the", "quick", "▁▁", "a", "e", ".", "好", "世界", "▁👨"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([*LLAMA, *strip])
    return tokenizer


def unigram(scheme: str, *, bytes_too: bool = False) -> Tokenizer:
    pieces = ["▁", "▁the", "quick", "▁▁", "a", "e", ".", "你", "好", "▁ca", "fé", FAMILY[0], "\u200d"]
    known = [("<unk>", 0.0), *((piece, -1.0 - i) for i, piece in enumerate(pieces))]
    known += [(piece, -30.0) for piece in BYTES] if bytes_too else []
    tokenizer = Tokenizer(models.Unigram(known, unk_id=0, byte_fallback=bytes_too))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    metaspace = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace]) if bytes_too else metaspace
    return tokenizer


def word_piece() -> Tokenizer:
    pieces = ["[UNK]", "the", "quick", "##ly", ".", ",", "don", "'", "##t", "你", "好", "naïve"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def with_suffix() -> Tokenizer:
    pieces = ["the</w>", "quick", "ly</w>", ".</w>", "你", "好</w>", "a</w>"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder()
    return tokenizer


def without_decoder() -> Tokenizer:
    return Tokenizer(models.WordLevel({word: i for i, word in enumerate(["the", "quick", "fox", "你好"])}, "the"))


MADE: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": byte_level,
    "byte-fallback BPE, first space dropped": lambda: byte_fallback(decoders.Strip(" ", 1, 0)),
    "byte-fallback BPE, three spaces dropped": lambda: byte_fallback(decoders.Strip(" ", 3, 0)),
    "byte-fallback BPE": byte_fallback,
    "Unigram": lambda: unigram("always"),
    "Unigram, space before the first": lambda: unigram("first"),
    "Unigram, no space before": lambda: unigram("never"),
    "Unigram with byte fallback": lambda: unigram("always", bytes_too=True),
    "WordPiece": word_piece,
    "BPE with suffixes": with_suffix,
    "words without a decoder": without_decoder,
}
FOUND = {path.parent.name: str(path.parent) for path in sorted(MATERIAL.glob("*/tokenizer.json"))}
PYTHON = "bytes, by a tokenizer written in Python"
KINDS = [*MADE, PYTHON, "builtin:llama", "builtin:neox", *FOUND]
each_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def reader(kind: str) -> Reader:
    """A tokenizer that also has tokens for no text, and one with spaces in it, and asks for texts to be tidied up."""
    if kind in MADE:
        made = PreTrainedTokenizerFast(tokenizer_object=MADE[kind](), clean_up_tokenization_spaces=True)
    elif kind == PYTHON:
        made = ByT5Tokenizer(extra_ids=2)
    elif kind in FOUND:
        made = AutoTokenizer.from_pretrained(FOUND[kind])
    else:
        made = load_reader(kind).tokenizer
    made.add_tokens([AddedToken("<|end|>", special=True), AddedToken("<|gap|>", special=True), AddedToken("<a b>")])
    return Reader(kind, made, GPT2Config(vocab_size=len(made)), ())


def whole(lm: Reader, ids: Sequence[int]) -> str:
    return str(lm.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@cache
def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Tokens without any sense, texts, and runs of bytes that may be no text, with tokens for no text among them."""
    tokenizer = reader(kind).tokenizer
    token = st.integers(0, len(tokenizer) + (1 if tokenizer.is_fast else -1))  # two have no name
    named = st.sampled_from(range(len(tokenizer) - 3, len(tokenizer)))
    ids = st.one_of(st.sampled_from(TEXTS), st.text(max_size=12)).map(
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    )
    half = st.builds(lambda ids, start, count: ids[start : start + count], ids, st.integers(0, 9), st.integers(0, 9))
    some_bytes = [i for piece in BYTES if (i := tokenizer.get_vocab().get(piece)) is not None]
    run = st.lists(st.sampled_from(some_bytes), max_size=6) if some_bytes else half
    part = st.one_of(token.map(lambda i: [i]), named.map(lambda i: [i]), ids, half, run)
    return st.lists(part, max_size=8).map(lambda parts: [i for part in parts for i in part])


def paced(data: st.DataObject, ids: Sequence[int]) -> list[list[int]]:
    """The tokens in pieces, as they are found by somebody who looks now and then."""
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(ids) - 1, 1)))))
    return [list(ids[start:stop]) for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@each_kind
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_is_settled_stays_and_the_rest_completes_the_text(kind: str, data: st.DataObject) -> None:
    lm = reader(kind)
    ids = data.draw(ids_of(kind))
    text, taken = Text(lm), list[int]()
    for piece in paced(data, ids):
        text.add(piece)
        text.settle()
        taken += piece
        assert text.settled + text.unsettled == whole(lm, taken) == decode(lm, taken)
        assert whole(lm, ids).startswith(text.settled)


def answered(lm: Reader, ids: Sequence[int], params: SamplingParams) -> Generation:
    """By decoding everything at every token."""
    for count in range(1, len(ids) + 1):
        text = whole(lm, ids[:count])
        if found := [text.index(stop) for stop in params.stop if stop in text]:
            return Generation(text[: min(found)], "stop", count)
    return Generation(whole(lm, ids), "length", len(ids))


@each_kind
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_an_answer_is_the_same_at_any_pace_and_its_pieces_are_its_text(kind: str, data: st.DataObject) -> None:
    lm = reader(kind)
    ids = data.draw(ids_of(kind).filter(bool))
    said = whole(lm, ids)
    at, length = data.draw(st.integers(0, max(len(said) - 1, 0))), data.draw(st.integers(1, 4))
    stop = [said[at : at + length] or "x", data.draw(st.sampled_from(["never this", "\ufffd", " ", "e", "世"]))]
    stop = [one for one in stop if one not in lm.special]
    params = SamplingParams(max_tokens=len(ids), stop=tuple(data.draw(st.sampled_from([[], stop]))))
    transcript, pieces = OutputText(OutputTokens(lm, params)), list[str]()
    for piece in paced(data, ids):
        for token in piece:
            transcript.tokens.add(token)
        pieces.append(transcript.read())
    assert transcript.generation == answered(lm, ids, params)
    assert "".join(pieces) == transcript.text
    assert transcript.tokens.token_count == answered(lm, ids, params).token_count


@each_kind
@pytest.mark.parametrize("text", TEXTS)
def test_nothing_is_held_back_but_the_first_spaces_halves_of_characters_and_runs_of_bytes(kind: str, text: str) -> None:
    lm = reader(kind)
    made = Text(lm)
    for token in lm.tokenizer(text, add_special_tokens=False)["input_ids"]:
        made.add([token])
        made.settle()
        byte = lm.tokenizer.convert_ids_to_tokens(token) in BYTES
        assert byte or made.unsettled.endswith(UNFINISHED) or not made.unsettled or not made.settled


def named(kind: str, pieces: Sequence[str]) -> list[int]:
    vocabulary = reader(kind).tokenizer.get_vocab()
    return [vocabulary.get(piece, len(vocabulary)) for piece in pieces]


@pytest.mark.parametrize(
    ("pieces", "settled", "text"),
    [
        (["▁the", "▁"], "the ", "the "),
        (["▁", "<|gap|>", "▁the"], " the", " the"),
        (["▁the", "<|gap|>", "▁the"], "the the", "the the"),
        (["a", "<0xE5>", "<|gap|>", "<0xA5>", "<0xBD>"], "a", "a好"),
        (["a", "<0xE5>", "<0xA5>", "<0xBD>", "<0xFF>"], "a", "a" + 4 * UNFINISHED),
        (["a", "<0x0A>", "<|gap|>"], "a", "a\n"),
        (["a", "<0x0A>", "<|gap|>", "<0xFF>", "e"], "a" + 2 * UNFINISHED + "e", "a" + 2 * UNFINISHED + "e"),
        (["a", "<0x0A>", "no token", "<0xFF>"], "a", "a" + 2 * UNFINISHED),
        (["a", "<a b>", "<0x0A>", "e"], "a<a b>\ne", "a<a b>\ne"),
    ],
)
def test_what_a_run_of_bytes_and_the_first_space_do_to_a_text(pieces: list[str], settled: str, text: str) -> None:
    kind = "byte-fallback BPE, first space dropped"
    made = Text(reader(kind))
    for token in named(kind, pieces):
        made.add([token])
        made.settle()
    assert (made.settled, made.settled + made.unsettled) == (settled, text)
    assert whole(reader(kind), named(kind, pieces)) == text


def test_texts_are_not_tidied_up_even_where_the_tokenizer_asks_for_it() -> None:
    lm, ids = reader("Unigram"), named("Unigram", ["▁the", "▁", "."])
    assert (lm.tokenizer.decode(ids), decode(lm, ids)) == ("the.", "the .")


@pytest.mark.parametrize(("stop", "text"), [("<|end|>", "the"), ("<a b>", "the"), ("he", "t")])
def test_a_stop_string_that_is_a_token_ends_the_answer(stop: str, text: str) -> None:
    """One that stands for no text is in none: it ends the answer as EOS does."""
    kind = "byte-level BPE"
    lm = reader(kind)
    answer = OutputTokens(lm, SamplingParams(99, stop=("never this", stop)))
    for token in lm.tokenizer("the", add_special_tokens=False)["input_ids"] + named(
        kind, [stop] if "<" in stop else []
    ):
        answer.add(token)
    said = OutputText(answer).finish()
    assert (said.text, said.finish_reason, said.token_count) == (text, "stop", answer.token_count)


def test_tokens_added_before_a_stop_string_was_read_do_not_count() -> None:
    lm = reader("builtin:llama")
    ids = lm.tokenizer("one two three four", add_special_tokens=False)["input_ids"]
    at = next(n for n in range(1, len(ids)) if "two" in whole(lm, ids[:n]))
    answer = OutputTokens(lm, SamplingParams(len(ids), stop=("two",), logprobs=1))
    for token in ids:
        answer.add(token, IdLogprob(token, -1.0, ((token, -1.0),)))
    assert answer.ended_by == "length"
    said = OutputText(answer).finish()
    assert (said.text, said.finish_reason, said.token_count, answer.token_count) == ("one ", "stop", at, at)
    assert said.logprobs is not None and [t.token for t in said.logprobs] == [decode(lm, [i]) for i in ids[:at]]


@each_kind
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_log_probabilities_are_told_once_and_not_before_the_text_of_their_tokens(
    kind: str, data: st.DataObject
) -> None:
    lm = reader(kind)
    ids = data.draw(ids_of(kind).filter(bool))
    stop = data.draw(st.sampled_from([(), ("e ", "never this"), ("\ufffd", "世界")]))
    transcript, shown = OutputText(OutputTokens(lm, SamplingParams(len(ids), stop=stop, logprobs=0))), ""
    told: list[float] = []
    for piece in paced(data, ids):
        for token in piece:
            transcript.tokens.add(token, IdLogprob(token, -float(len(transcript.tokens.ids)), ()))
        shown += transcript.read()
        told += [one.logprob for one in transcript.new_logprobs()]
        if transcript.generation is None:
            assert shown.startswith(whole(lm, ids[: len(told)]))
    said = transcript.generation
    assert said is not None and said.logprobs is not None
    assert told == [one.logprob for one in said.logprobs][: len(told)]
    assert said.finish_reason == "stop" or len(told) == len(ids)


def test_log_probabilities_of_held_back_text_are_held_back_with_it() -> None:
    lm = reader("builtin:llama")
    ids = lm.tokenizer("one two three four", add_special_tokens=False)["input_ids"]
    before = next(n for n in range(len(ids)) if "th" in whole(lm, ids[: n + 1]))
    transcript = OutputText(OutputTokens(lm, SamplingParams(len(ids), stop=("three five",), logprobs=0)))
    for token in ids[: before + 1]:
        transcript.tokens.add(token, IdLogprob(token, -1.0, ()))
    assert transcript.read().strip() == "one two"
    assert [one.token for one in transcript.new_logprobs()] == [decode(lm, [token]) for token in ids[:before]]
    for token in ids[before + 1 :]:
        transcript.tokens.add(token, IdLogprob(token, -1.0, ()))
    assert transcript.read().strip() == "three four"
    assert [one.token for one in transcript.new_logprobs()] == [decode(lm, [token]) for token in ids[before:]]
