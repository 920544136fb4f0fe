"""Texts become ids as plain text, whatever a tokenizer holds; what it adds around them is measured, not assumed."""

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from latentwire.bridge.config import SourceLayout
from latentwire.bridge.errors import InvalidRequest, ModelUnavailable
from latentwire.bridge.reader import Reader, end_ids_of, ids_of_texts, text_ids, text_offsets, tokenize_source

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MARKS = ["<|endoftext|>", "<think>", "<tool_call>"]


def byte_level(template: str | None = None) -> Tokenizer:
    """Like GPT-2 and Qwen: marks beside the vocabulary, of which two are not "special", and a run of spaces."""
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*ALPHABET, "ab"])}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(MARKS[0], special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in [*MARKS[1:], "    "]])
    return around(tokenizer, template)


def unigram(template: str | None = None) -> Tokenizer:
    """Like T5 and mT5: the marks are pieces of the vocabulary, which a text could spell."""
    letters = [(chr(i), -9.0) for i in range(33, 127)]
    pieces = [("<unk>", 0.0), *((mark, 0.0) for mark in MARKS), ("▁", -3.0), ("ab", -5.0), *letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(mark, special=mark == MARKS[0], normalized=False) for mark in MARKS])
    return around(tokenizer, template)


def byte_fallback(template: str | None = None) -> Tokenizer:
    """Like Llama 2 and Gemma: merges that spell a mark, bytes for what the vocabulary lacks."""
    spelled = [
        "<",
        "t",
        "h",
        "i",
        "n",
        "k",
        ">",
        "<t",
        "<th",
        "<thi",
        "<thin",
        "<think",
        "<think>",
        "a",
        "b",
        "ab",
        "▁",
    ]
    others = [chr(i) for i in range(33, 127)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(["<unk>", *MARKS, *(f"<0x{b:02X}>" for b in range(256)),
                                                              *spelled, *others]))}  # fmt: skip
    pairs = [("<", "t"), ("<t", "h"), ("<th", "i"), ("<thi", "n"), ("<thin", "k"), ("<think", ">"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(mark, special=mark == MARKS[0], normalized=False) for mark in MARKS])
    return around(tokenizer, template)


def words(template: str | None = None) -> Tokenizer:
    """Whole words, marks among them."""
    vocab = {word: i for i, word in enumerate(["<unk>", *MARKS, "ab", "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    tokenizer.add_special_tokens([AddedToken(mark, special=mark == MARKS[0], normalized=False) for mark in MARKS])
    return around(tokenizer, template)


def around(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    if template is not None:
        mark = (MARKS[0], tokenizer.token_to_id(MARKS[0]))
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[mark])
    return tokenizer


KINDS: dict[str, Callable[[str | None], Tokenizer]] = {
    "byte-level": byte_level, "unigram": unigram, "byte fallback": byte_fallback, "words": words,
}  # fmt: skip


def reader(tokenizer: Tokenizer, rows: int = 4096) -> Reader:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=MARKS[0], eos_token=MARKS[0])
    return Reader("some model", fast, LlamaConfig(vocab_size=rows), end_ids_of(fast, None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("text", ["{}", "ab {} ab", "{}{}", " {}"])
def test_no_text_can_name_a_mark_whether_it_is_special_or_not(kind: str, mark: str, text: str) -> None:
    lm = reader(KINDS[kind](None))
    written = text.replace("{}", mark)
    assert set(lm.marks) >= set(MARKS)
    assert lm.marks[mark] in lm.tokenizer.backend_tokenizer.encode(written).ids  # as the library itself reads it
    assert not set(lm.marks.values()) - {lm.marks.get("<unk>")} & set(text_ids(lm, written))


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "unigram"])
def test_a_mark_that_is_read_as_text_comes_back_as_it_was_written(kind: str) -> None:
    lm = reader(KINDS[kind](None))
    for text in ("ab<think>ab", "<|endoftext|>", "a <tool_call> b"):
        ids = text_ids(lm, text)
        assert str(lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip() == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_marks_is_read_as_the_library_reads_it(kind: str) -> None:
    lm = reader(KINDS[kind](None))
    for text in ("ab a b", "a", "b ab", "ab    ab"):
        assert text_ids(lm, text) == lm.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_a_run_of_spaces_that_is_a_token_stays_one_in_a_text() -> None:
    lm = reader(byte_level())
    assert lm.tokenizer.convert_tokens_to_ids("    ") in text_ids(lm, "ab    ab") and "    " not in lm.marks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "template, adds",
    [(None, (False, False)), ("<|endoftext|> $A", (True, False)), ("<|endoftext|> $A <|endoftext|>", (True, True))],
    ids=["adds none", "adds BOS", "adds BOS and EOS"],
)
def test_a_source_has_around_it_what_its_tokenizer_itself_adds(
    kind: str, template: str | None, adds: tuple[bool, bool]
) -> None:
    lm = reader(KINDS[kind](template))
    mark = lm.marks["<|endoftext|>"]
    assert lm.tokenizer.bos_token_id == mark  # it has one in every case
    bos, eos = (mark if added else None for added in adds)
    assert lm.source_layout == SourceLayout(bos, eos)
    plain = text_ids(lm, "ab a")
    whole = tokenize_source(lm, "ab a", lm.source_layout, max_tokens=99)
    assert whole.ids == [mark] * adds[0] + plain + [mark] * adds[1] == lm.tokenizer("ab a")["input_ids"]
    assert whole.full_length == len(whole.ids)


def test_a_cut_source_keeps_what_stands_around_it() -> None:
    lm = reader(byte_level("<|endoftext|> $A <|endoftext|>"))
    mark = lm.marks["<|endoftext|>"]
    cut = tokenize_source(lm, "xyzxyz", lm.source_layout, max_tokens=4, truncate=True)
    assert cut.ids == [mark, *text_ids(lm, "xy"), mark] and cut.full_length == 8
    with pytest.raises(InvalidRequest, match="has 8 sender tokens; this bridge reads at most 7"):
        tokenize_source(lm, "xyzxyz", lm.source_layout, max_tokens=7)


def test_a_bridge_made_before_it_was_kept_opens_sources_with_bos_wherever_there_is_one() -> None:
    lm = reader(byte_level())
    assert lm.source_layout == SourceLayout(None, None)
    assert tokenize_source(lm, "ab", None, max_tokens=9).ids == [lm.marks["<|endoftext|>"], *text_ids(lm, "ab")]


def test_a_tokenizer_that_opens_with_two_tokens_is_refused_by_name() -> None:
    lm = reader(byte_level("<|endoftext|> <|endoftext|> $A"))
    with pytest.raises(ModelUnavailable, match=r"'some model' puts 2 tokens before a text \('<\|endoftext\|>', '<\|"):
        _ = lm.source_layout


@pytest.mark.parametrize("rows, refused", [(257, False), (256, True)])
def test_a_piece_without_a_row_in_the_embedding_is_refused_with_token_id_and_rows(rows: int, refused: bool) -> None:
    lm = reader(byte_level(), rows)
    assert text_ids(lm, "a b")
    if not refused:
        assert text_ids(lm, "ab") == [256]
        return
    with pytest.raises(
        InvalidRequest, match="the token 'ab' with the id 256 was met; the embedding of 'some model' has 256"
    ):
        text_ids(lm, "ab")
    with pytest.raises(InvalidRequest, match="id 256"):
        ids_of_texts(lm, ["a", "ab"])
    with pytest.raises(InvalidRequest, match="id 256"):
        tokenize_source(lm, "ab", lm.source_layout, max_tokens=9)


def test_an_added_token_without_a_row_is_text_like_any_other() -> None:
    lm = reader(byte_level(), rows=257)  # every mark is beyond
    assert max(text_ids(lm, "<think>")) < 257


def test_end_tokens_are_the_tokenizers_and_those_of_the_settings_that_are_tokens_of_their_own() -> None:
    fast = reader(byte_level()).tokenizer
    own, think = fast.convert_tokens_to_ids(MARKS[:2])
    assert end_ids_of(fast, None) == (own,) and end_ids_of(fast, own) == (own,)
    assert end_ids_of(fast, [own, think]) == (own, think)
    assert end_ids_of(fast, [think, 5]) == (own, think)  # 5 is a letter: a left-over of another vocabulary
    fast.eos_token = None
    assert end_ids_of(fast, None) == ()


def test_offsets_are_those_of_the_ids() -> None:
    lm = reader(byte_level())
    text = "ab <think>ab"
    assert [text[a:b] for a, b in text_offsets(lm, text)][:2] == ["ab", " "]
    assert len(text_offsets(lm, text)) == len(text_ids(lm, text))


def test_threads_share_a_tokenizer_that_nothing_changes() -> None:
    lm = reader(byte_level())
    trouble: list[BaseException] = []

    def read(seed: int) -> None:
        try:
            for turn in range(200):
                texts = ["ab<think>" * (seed + turn % 7 + 1), "a"]
                assert [len(ids) for ids in ids_of_texts(lm, texts)] == [8 * (seed + turn % 7 + 1), 1]
        except BaseException as error:
            trouble.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not trouble


def test_half_a_character_is_refused_where_it_stands() -> None:
    with pytest.raises(InvalidRequest, match=r"holds '\\ud83d' at character 1"):
        text_ids(reader(byte_level()), "a\ud83d")


def test_a_reader_with_another_tokenizer_reads_with_that() -> None:
    lm = reader(byte_level())
    other = replace(lm, tokenizer=reader(words()).tokenizer)
    assert text_ids(other, "ab") != text_ids(lm, "ab") and text_ids(other, "ab") == [4]
