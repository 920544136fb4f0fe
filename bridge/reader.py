"""The side of a language model that reads: texts become ids here, and nowhere else.

What people write is plain text: no token that means something of its own to a model (``</s>``, ``<|im_end|>``,
``<think>``) can be written in it. Such tokens come from layouts alone (``bridge.prompt``), by their ids.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from latentwire.bridge.config import BridgeConfig, SourceLayout
from latentwire.bridge.errors import InvalidRequest, ModelUnavailable, shorten
from latentwire.bridge.families import context_tokens

_NONCE = secrets.token_hex(16)  # names of pieces that no text may hold: nobody can guess them
_PLAIN: "WeakKeyDictionary[PreTrainedTokenizerBase, Tokenizer]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Reader:
    """All that composing needs of a language model, whether its weights are in memory or not.

    Attributes:
        config: What the model's files say of it.
        end_ids: Tokens that end an answer, in ascending order: the tokenizer's and those of the generation settings.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    end_ids: tuple[int, ...]

    @cached_property
    def max_tokens(self) -> int:
        """Longest input that the model reads as it would alone."""
        return context_tokens(self.config)

    @property
    def rows(self) -> int:
        """Rows of the input embedding: ids from 0 to below this can be read."""
        return int(self.config.get_text_config().vocab_size)

    @cached_property
    def marks(self) -> dict[str, int]:
        """Ids of the tokens that no text can name, by how they are written."""
        return _marks(self.tokenizer)

    @cached_property
    def special(self) -> dict[str, int]:
        """Ids of the tokens that stand for no text when they are generated, by how they are written."""
        tokenizer = self.tokenizer
        if not tokenizer.is_fast:  # which leaves out fewer
            return dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}

    @cached_property
    def source_layout(self) -> SourceLayout:
        """What the tokenizer itself puts around a text, tried on one; a model was trained on texts like that.

        Many tokenizers have a ``bos_token`` and add none (ModelUnavailable where one adds several).
        """
        ids, special = _tried(self.tokenizer)
        first, last = special.index(False), len(special) - special[::-1].index(False)
        return SourceLayout(_one(self, ids[:first], "before"), _one(self, ids[last:], "after"))

    @cached_property
    def begins_again(self) -> bool:
        """Whether what follows one of ``marks`` is read as the start of a text is."""
        if not self.tokenizer.is_fast or not self.marks:
            return True
        mark = next(iter(self.marks))
        tried = self.tokenizer.backend_tokenizer.encode(f"{mark}a b", add_special_tokens=False).ids
        return bool(tried[1:] == text_ids(self, "a b"))

    @property
    def reader(self) -> "Reader":
        """This side alone, which stays when the weights leave."""
        return Reader(self.name, self.tokenizer, self.config, self.end_ids)


def _marks(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Added tokens but for runs of whitespace, which are how some tokenizers write indented text."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}


def end_ids_of(tokenizer: PreTrainedTokenizerBase, named: int | Sequence[int] | None) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's own, and those ``named`` by the model's settings.

    An id in the settings that is an ordinary piece of text is a left-over of another vocabulary, and passed over.
    """
    others = [named] if isinstance(named, int) else named or []
    own = tokenizer.eos_token_id
    ends = {int(i) for i in others if i in tokenizer.added_tokens_decoder} | ({int(own)} if own is not None else set())
    return tuple(sorted(ends))


def text_ids(lm: Reader, text: str) -> list[int]:
    """Ids of a text alone, none of them special: ``</s>`` in a text is four characters, not an end."""
    return ids_of_texts(lm, [text])[0]


def ids_of_texts(lm: Reader, texts: Sequence[str]) -> list[list[int]]:
    """``text_ids`` of several at the cost of one, by any thread (InvalidRequest: no Unicode, or a token has no row)."""
    for text in texts:
        check_unicode(text)
    if (plain := _plain(lm.tokenizer)) is not None:
        # Of one text too: ``encode`` lets no other thread run while it reads, the tenth of a second for a long text.
        rows = [encoded.ids for encoded in plain.encode_batch_fast(list(texts), add_special_tokens=False)]
    else:
        as_text = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        rows = [list(ids) for ids in lm.tokenizer(list(texts), **as_text)["input_ids"]]
    for ids in rows:
        check_ids(lm, ids)
    return rows


def text_offsets(lm: Reader, text: str) -> list[tuple[int, int]]:
    """Where in a text each of its tokens begins and ends, in characters; of a tokenizer that can tell."""
    plain = _plain(lm.tokenizer)
    assert plain is not None, "a tokenizer written in Python tells no offsets"
    return list(plain.encode(text, add_special_tokens=False).offsets)


def check_unicode(text: str) -> None:
    """Refuse half a surrogate pair, which no tokenizer takes (InvalidRequest)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise InvalidRequest(f"the text holds {text[at]!r} at character {at}; expected Unicode text") from None


def check_ids(lm: Reader, ids: Sequence[int]) -> None:
    """Refuse a token that the embedding has no row for (InvalidRequest, naming token, id and rows)."""
    odd = max(ids, default=0) if min(ids, default=0) >= 0 else min(ids)
    if not 0 <= odd < lm.rows:
        token = lm.tokenizer.convert_ids_to_tokens(odd) if lm.tokenizer.is_fast and 0 <= odd < 1 << 31 else None
        shown = "a token" if token is None else f"the token {token!r}"
        raise InvalidRequest(f"{shown} with the id {odd} was met; the embedding of {lm.name!r} has {lm.rows} rows")


def _plain(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer as texts meet it: without ``_marks``; None for one written in Python.

    Nothing changes it any more: the library's own call sets padding and truncation, which two threads must not at once.
    """
    if not tokenizer.is_fast:
        return None
    if (plain := _PLAIN.get(tokenizer)) is None:
        marks = _marks(tokenizer)
        plain = _beside(tokenizer, marks)
        if plain is None or _spelled(plain, marks):
            described = json.loads(tokenizer.backend_tokenizer.to_str())
            plain = Tokenizer.from_str(json.dumps(_without(described, set(marks.values()))))
        _PLAIN[tokenizer] = plain
    return plain


def _beside(tokenizer: PreTrainedTokenizerBase, marks: Mapping[str, int]) -> Tokenizer | None:
    """The same vocabulary, shared, with the added tokens that a text may hold; None where they would get other ids."""
    whole = tokenizer.backend_tokenizer
    plain = Tokenizer(whole.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        if (there := getattr(whole, part)) is not None:
            setattr(plain, part, there)
    own = plain.get_vocab_size()
    for i, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.content not in marks:
            plain.add_tokens([token])
        elif i >= own:
            plain.add_tokens([AddedToken(f"{_NONCE}{i}", normalized=False)])  # keeps the place
    kept = (item for item in tokenizer.added_tokens_decoder.items() if item[1].content not in marks)
    return plain if all(plain.token_to_id(token.content) == i for i, token in kept) else None


def _spelled(plain: Tokenizer, marks: Mapping[str, int]) -> bool:
    """Whether a vocabulary makes any of the marks from their letters; what it does with one alone it does anywhere."""
    unknown = {plain.token_to_id(str(getattr(plain.model, "unk_token", None)))}
    encoded = plain.encode_batch_fast(list(marks), add_special_tokens=False)
    return any(i in one.ids and i not in unknown for one, i in zip(encoded, marks.values(), strict=True))


def _without(described: dict[str, Any], marks: set[int]) -> dict[str, Any]:
    """A tokenizer's description in which the marks keep their ids, under names that no text holds or puts together."""
    model, scored = described["model"], not isinstance(described["model"]["vocab"], Mapping)
    pieces = {p: i for i, (p, _) in enumerate(model["vocab"])} if scored else model["vocab"]
    unknown = {i for piece, i in pieces.items() if piece == model.get("unk_token") or i == model.get("unk_id")}
    hidden = {piece: f"{_NONCE}{i}" for piece, i in pieces.items() if i in marks - unknown}
    renamed: Any = {hidden.get(piece, piece): i for piece, i in pieces.items()}
    if scored:
        renamed = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    left = {**model, "vocab": renamed}
    if hidden and model.get("merges"):
        left["merges"] = [m for m in model["merges"] if hidden.keys().isdisjoint([*(pair := _pair(m)), "".join(pair)])]
    added = [
        {**token, "content": f"{_NONCE}{token['id']}"} if token["id"] in marks else token
        for token in described["added_tokens"]
        if token["id"] not in unknown  # the model names it itself
    ]
    return {**described, "added_tokens": added, "truncation": None, "padding": None, "model": left}


def _pair(merge: Any) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


@dataclass(frozen=True, slots=True)
class SourceTokens:
    """A source as the sender reads it: ids, with those around the text, cut to the bridge's limit; its full length."""

    ids: list[int]
    full_length: int


def _tried(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Ids of a short text with what is added to it, and which of them are."""
    if tokenizer.is_fast:
        tried = tokenizer.backend_tokenizer.encode("a")
        return tried.ids, [bool(flag) for flag in tried.special_tokens_mask]
    encoding = tokenizer("a", return_special_tokens_mask=True)
    return list(encoding["input_ids"]), [bool(flag) for flag in encoding["special_tokens_mask"]]


def _one(lm: Reader, ids: Sequence[int], where: str) -> int | None:
    if len(ids) > 1:
        tokens = ", ".join(map(repr, lm.tokenizer.convert_ids_to_tokens(list(ids))))
        raise ModelUnavailable(
            f"the tokenizer of {lm.name!r} puts {len(ids)} tokens {where} a text ({tokens}); at most one is expected"
        )
    check_ids(lm, ids)
    return int(ids[0]) if ids else None


def kept_layout(kept: SourceLayout | None, lm: Reader) -> SourceLayout:
    """What a bridge puts around a source; one made before that was kept opens with BOS wherever there is one."""
    bos = lm.tokenizer.bos_token_id
    return kept or SourceLayout(None if bos is None else int(bos), None)


def source_tokens(config: BridgeConfig, lm: Reader, text: str, *, truncate: bool = False) -> SourceTokens:
    """Sender tokens of one text for a bridge, with its layout and within its limit (errors as ``tokenize_source``)."""
    return tokenize_source(lm, text, config.source, max_tokens=config.max_source_tokens, truncate=truncate)


def tokenize_source(
    lm: Reader, text: str, kept: SourceLayout | None, *, max_tokens: int, truncate: bool = False
) -> SourceTokens:
    """Sender tokens of a text in its ``kept_layout`` (InvalidRequest: empty, or too long where ``truncate`` is off)."""
    layout, ids, max_tokens = kept_layout(kept, lm), text_ids(lm, text), min(max_tokens, lm.max_tokens)
    if not ids or not text.strip():
        raise InvalidRequest(f"the text {shorten(repr(text), 80)} is empty; expected at least one word", param="inputs")
    opening, closing = ([] if i is None else [i] for i in (layout.bos_id, layout.eos_id))
    full = len(opening) + len(ids) + len(closing)
    if full > max_tokens and not truncate:
        raise InvalidRequest(
            f"the text has {full} sender tokens; this bridge reads at most {max_tokens} (shorten it, or set truncate)",
            param="inputs",
        )
    room = max(max_tokens - len(opening) - len(closing), 1)
    return SourceTokens((opening + ids[:room] + closing)[:max_tokens], full)
